"""The README cannot rot: its files exist, its flags parse, its metrics are the ones that are logged."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

import train_dpo
import train_remax
from conftest import run_stage

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("sft", "train_rm", "train_gvm", "train_dvpo", "train_ppo", "train_remax", "train_dpo", "label")


def test_every_file_and_function_named_exists():
    """Paths in backticks and the equation-to-code table point at something."""
    for name in set(re.findall(r"`([\w./]+\.(?:py|json|txt))`", README)) - {"metrics.jsonl"}:
        if name.startswith("runs/"):
            continue  # made by the commands, not part of the tree
        assert (ROOT / name).exists() or (ROOT / "ds_configs" / name).exists(), name
    named = re.findall(r"`(common|data|train_\w+|sft|label)\.(\w+)`", README)
    assert len(named) >= 10
    for module, attribute in named:
        assert attribute == "py" or hasattr(importlib.import_module(module), attribute), (module, attribute)


def test_commands_exist_as_typed():
    """make targets are in the Makefile; scripts of the command lines exist and know
    every flag given to them."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"^    make (\w+)", README, re.M)) <= targets
    commands = re.findall(r"^    (?:deepspeed|python)(?: --num_gpus \d)? (\w+)\.py(.*)$", README, re.M)
    assert {*SCRIPTS, "evaluate"} <= {script for script, _ in commands}
    for script, rest in commands:
        known = re.findall(r"^    (\w+): ", (ROOT / f"{script}.py").read_text(), re.M)
        assert set(re.findall(r"--(\w+)", rest)) <= set(known), (script, rest)


def test_flags_named_in_the_text_exist():
    """Every `--flag` of the README belongs to some script or to the launcher."""
    known = {"num_gpus", "help"}
    for path in ROOT.glob("*.py"):
        known |= set(re.findall(r"^    (\w+): ", path.read_text(), re.M))
    assert set(re.findall(r"`[^`\n]*?--(\w+)", README)) <= known


def test_the_sizes_of_the_diffs_are_what_is_said():
    """`diff a.py b.py` ... (N lines go, M come)"""
    import subprocess
    said = re.findall(r"`diff (\w+\.py) (\w+\.py)`(?:(?!`diff ).)*?\((\d+) lines go, (\d+) come\)", README, re.S)
    assert len(said) == 4
    for one, other, go, come in said:
        lines = subprocess.run(["diff", one, other], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        assert (sum(x[0] == "<" for x in lines), sum(x[0] == ">" for x in lines)) == (int(go), int(come)), (one, other)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_explained(script):
    """No flag that nothing reads, none without help, at most 45."""
    module, source = importlib.import_module(script), (ROOT / f"{script}.py").read_text()
    assert len(fields(module.Args)) <= 45
    # read in the script itself, or in common.py or checkpoint.py, which get the whole of args or vars(args)
    text = source + (ROOT / "common.py").read_text() + (ROOT / "checkpoint.py").read_text()
    for field in fields(module.Args):
        read = re.search(rf"args\.{field.name}\b|\[\"{field.name}\"\]", text)
        assert read or field.name == "local_rank", field.name
        assert re.search(rf"^    {field.name}: .*  # \S", source, re.M), f"{field.name} has no help"


def test_every_logged_metric_is_in_the_table(chain, baseline, flags, tmp_path):
    """Keys of the metrics.jsonl files of every stage, each with a row in the README's table."""
    run_stage(train_remax, **flags.remax, sft_model=chain.sft, reward_model=baseline.rm,
              output_dir=tmp_path / "remax")
    run_stage(train_dpo, **flags.dpo, sft_model=chain.sft, output_dir=tmp_path / "dpo")
    table = set(re.findall(r"`([\w/]+)`", README[README.index("| metric |"):README.index("## Results")]))
    for folder in (chain.sft, chain.gvm, chain.dvpo, baseline.rm, baseline.ppo, tmp_path / "remax",
                   tmp_path / "dpo"):
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
            assert set(json.loads(line)) <= table, set(json.loads(line)) - table


def test_importing_a_stage_touches_nothing(tmp_path):
    """No network, no files, no process group: importing is free of side effects."""
    import subprocess
    import sys
    code = ("import socket;"
            " socket.socket.connect = lambda *a: (_ for _ in ()).throw(RuntimeError('network'));"
            f"import sys; sys.path.insert(0, {str(ROOT)!r});"
            " import sft, train_rm, train_gvm, train_dvpo, train_ppo, train_remax, train_dpo, label, evaluate, judge;"
            " import torch;"
            "assert not torch.distributed.is_initialized()")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
