"""More than one machine: two launchers on this one, which find each other as two nodes do (machines.md)."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import argv_of, clean_env, free_port, metrics, ROOT, start
from test_resume import numbers, weights

pytestmark = pytest.mark.slow


@pytest.fixture
def run(flags, chain, tmp_path):
    """Flags of DVPO under ZeRO-3, a checkpoint behind each step."""
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    return {**flags.dvpo, "ds_config": config, "sft_model": chain.sft, "value_model": chain.gvm,
            "max_steps": 12, "save_every": 1, "rollout_batch": 2}


def start_nodes(folder, *words):
    """A launcher for each node, with the words of its command; their logs are folder/node0.log, node1.log."""
    hosts = folder / "hostfile"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    port = free_port()
    return [subprocess.Popen(
        [Path(sys.executable).parent / "deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", str(i),
         "--master_addr", "127.0.0.1", "--master_port", str(port), "train_dvpo.py", *mine],
        cwd=ROOT, env=clean_env(), start_new_session=True, stderr=subprocess.STDOUT,
        stdout=open(folder / f"node{i}.log", "w")) for i, mine in enumerate(words)]


def end(nodes):
    """Exit statuses; one that waits for the other for too long is a failure."""
    try:
        return [node.wait(timeout=180) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)


def test_a_node_is_killed_and_both_go_on(run, tmp_path):
    """SIGKILL of all that runs on one node ends the other one; with --resume they end as two ranks of one
    machine that nobody has stopped."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    alone = start(["train_dvpo.py", *argv_of({**run, "output_dir": straight})], 2, tmp_path / "alone.log")
    assert alone.wait() == 0, (tmp_path / "alone.log").read_text()[-2000:]
    words = argv_of({**run, "output_dir": killed, "resume": True})
    nodes = start_nodes(tmp_path, words, words)
    for _ in range(1200):
        if (killed / "metrics.jsonl").exists() and len(metrics(killed)) >= 3:
            break
        time.sleep(0.1)
    os.killpg(nodes[1].pid, signal.SIGKILL)
    assert all(end(nodes)), "a node went on without the other"
    assert 3 <= len(metrics(killed)) < run["max_steps"]

    nodes = start_nodes(tmp_path, words, words)
    assert end(nodes) == [0, 0], (tmp_path / "node0.log").read_text()[-2000:]
    assert "resumed from" in (tmp_path / "node0.log").read_text()
    assert numbers(killed) == numbers(straight)
    assert weights(killed) and weights(killed) == weights(straight)


def test_a_node_without_the_gvm_says_so(run, tmp_path):
    words = [argv_of({**run, "output_dir": tmp_path / "out", "value_model": folder})
             for folder in (run["value_model"], tmp_path / "not_mounted")]
    assert all(end(start_nodes(tmp_path, *words)))
    said = (tmp_path / "node1.log").read_text()
    assert f"No gvm model in {tmp_path / 'not_mounted'}: " in said and "Traceback" not in said
    assert not (tmp_path / "out/model.safetensors").exists()
