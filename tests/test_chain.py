"""The commands a reader will type, through the launcher: sft -> train_gvm -> train_dvpo -> evaluate and
train_rm -> train_ppo, two ranks on the CPU, with the bf16 ZeRO configs as they are shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Set in this process when an earlier test ran a script in it; a new single-rank process finds its own.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch(script, *flags, ranks=2):
    """Run a script as a user does; returns its output, and fails with it when the command fails."""
    command = [str(BIN / "deepspeed"), "--num_gpus", str(ranks),
               "--master_port", str(29600 + os.getpid() % 300), script, *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    subprocess.run([sys.executable, "-m", "toy.make", "--out", folder / "toy"], cwd=ROOT, check=True,
                   capture_output=True)
    return folder


@pytest.fixture(scope="module")
def sft(world):
    launch("sft.py", "--base_model", world / "toy/model", "--data", world / "toy/sft.jsonl", "--max_steps", 3,
           "--batch_size", 16, "--micro_batch", 8, "--ds_config", "ds_configs/zero3.json",
           "--output_dir", world / "sft")
    return world / "sft"


@pytest.fixture(scope="module")
def gvm(world, sft):
    launch("train_gvm.py", "--sft_model", sft, "--data", world / "toy/preferences.jsonl", "--max_steps", 2,
           "--k", 2, "--batch_size", 16, "--micro_batch", 8, "--eval_pairs", 6,
           "--ds_config", "ds_configs/zero3.json", "--output_dir", world / "gvm")
    return world / "gvm"


@pytest.fixture(scope="module")
def rm(world, sft):
    launch("train_rm.py", "--sft_model", sft, "--data", world / "toy/preferences.jsonl",
           "--ds_config", "ds_configs/zero3.json", "--max_steps", 2, "--batch_size", 16, "--micro_batch", 4,
           "--eval_pairs", 7, "--output_dir", world / "rm")
    return world / "rm"


@pytest.mark.slow
def test_sft_and_gvm_under_zero3(sft, gvm):
    """Weights gathered from both ranks are whole, finite and load without DeepSpeed."""
    from safetensors.torch import load_file
    for path in (sft / "model.safetensors", gvm / "adapter_model.safetensors"):
        weights = load_file(path)
        assert weights and all(w.numel() > 0 and w.isfinite().all() for w in weights.values())
    assert any(key.endswith("score.weight") for key in load_file(gvm / "adapter_model.safetensors"))
    assert len(rows_of(sft)) == 3 and len(rows_of(gvm)) == 2
    assert 0 <= rows_of(gvm)[-1]["eval/accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage, lora_r", [(2, 0), (3, 0), (3, 4)])
def test_dvpo_on_two_ranks(world, sft, gvm, stage, lora_r):
    """Two steps under ZeRO-2 and 3: ratio 1 and KL 0 before the first update, and the policy has moved
    after it. With LoRA all three models are one sharded base."""
    out = world / f"dvpo{stage}-{lora_r}"
    text = launch("train_dvpo.py", "--sft_model", sft, "--value_model", gvm,
                  "--data", world / "toy/preferences.jsonl", "--rollout_batch", 4, "--micro_batch", 2,
                  "--response_length", 8, "--max_steps", 2, "--lr", 1e-2, "--lora_r", lora_r,
                  "--truth_fn", "toy.exact:sampled_reward", "--eval_prompts", 4,
                  "--ds_config", f"ds_configs/zero{stage}.json", "--output_dir", out)
    assert "max |ratio - 1| 0.0e+00" in text and "KL 0.0e+00" in text and "1 BOS" in text
    first, second = rows_of(out)
    assert first["objective/kl"] == 0 and second["objective/kl"] != 0
    assert first["policy/updates"] > 0 and first["grad_norm"] > 0
    import torch
    from transformers import AutoModelForCausalLM
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (sft, out))
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_the_baseline_under_zero3(world, sft, rm):
    """train_rm and train_ppo: gathered weights are whole, ratio 1 and KL 0 before the first update, and
    policy and critic are updated."""
    from safetensors.torch import load_file
    data = ["--sft_model", sft, "--data", world / "toy/preferences.jsonl",
            "--ds_config", "ds_configs/zero3.json"]
    weights = load_file(rm / "adapter_model.safetensors")
    assert all(w.numel() > 0 and w.isfinite().all() for w in weights.values())
    assert any(key.endswith("score.weight") for key in weights)
    assert "eval/accuracy" in rows_of(rm)[-1]
    text = launch("train_ppo.py", *data, "--reward_model", rm, "--rollout_batch", 4,
                  "--micro_batch", 2, "--response_length", 8, "--max_steps", 2, "--lr", 1e-2,
                  "--truth_fn", "toy.exact:sampled_reward", "--eval_prompts", 4,
                  "--output_dir", world / "ppo")
    assert "max |ratio - 1| 0.0e+00" in text and "KL 0.0e+00" in text
    first, second = rows_of(world / "ppo")
    assert first["objective/kl"] == 0 and second["objective/kl"] != 0 and "eval/scores" in second
    assert all(row["grad_norm"] > 0 and row["critic/grad_norm"] > 0 for row in (first, second))
    # all four models on one sharded base
    text = launch("train_ppo.py", *data, "--reward_model", rm, "--rollout_batch", 4,
                  "--micro_batch", 2, "--response_length", 8, "--max_steps", 2, "--lr", 1e-2, "--lora_r", 4,
                  "--share_base", True, "--eval_prompts", 4, "--output_dir", world / "shared")
    assert "max |ratio - 1| 0.0e+00" in text and "KL 0.0e+00" in text
    one, two = rows_of(world / "shared")
    assert one["objective/scores"] == pytest.approx(first["objective/scores"], abs=0.05)  # in bf16
    assert one["critic/mean"] == pytest.approx(first["critic/mean"], abs=0.05)
    assert two["objective/kl"] != 0 and two["grad_norm"] > 0


@pytest.mark.slow
def test_the_other_rows_of_the_comparison_under_zero3(world, sft, rm):
    """train_remax, train_grpo, train_dpo: ratio 1, KL 0 and a loss of log 2 before the first update, and a
    policy that has moved after it. DPO's reference is gathered over both ranks."""
    from safetensors.torch import load_file
    data = ["--sft_model", sft, "--data", world / "toy/preferences.jsonl",
            "--ds_config", "ds_configs/zero3.json", "--lr", 1e-2]
    text = launch("train_remax.py", *data, "--reward_model", rm, "--rollout_batch", 4, "--micro_batch", 2,
                  "--response_length", 8, "--max_steps", 2, "--eval_prompts", 4,
                  "--output_dir", world / "remax")
    assert "max |ratio - 1| 0.0e+00" in text and "KL 0.0e+00" in text
    first, second = rows_of(world / "remax")
    assert first["objective/kl"] == 0 and second["objective/kl"] != 0 and "eval/scores" in second
    assert first["grad_norm"] > 0 and first["policy/updates"] > 0
    text = launch("train_grpo.py", *data, "--reward_model", rm, "--rollout_batch", 4, "--micro_batch", 2,
                  "--response_length", 8, "--max_steps", 2, "--eval_prompts", 4, "--group_size", 2,
                  "--output_dir", world / "grpo")
    assert "max |ratio - 1| 0.0e+00" in text and "KL 0.0e+00" in text
    first, second = rows_of(world / "grpo")
    assert first["objective/kl"] == 0 and second["objective/kl"] != 0 and "eval/scores" in second
    text = launch("train_dpo.py", *data, "--max_steps", 2, "--batch_size", 8, "--micro_batch", 2,
                  "--eval_pairs", 7, "--output_dir", world / "dpo")
    assert "reference: log-probs of 23 pairs in" in text  # an odd number, on two ranks
    first, second = rows_of(world / "dpo")
    assert abs(first["loss"] - 0.6931) < 0.02 and second["loss"] != first["loss"]  # in bf16
    assert 0 <= second["eval/accuracy"] <= 1 and first["grad_norm"] > 0
    methods = ("remax", "grpo", "dpo")
    weights = {name: load_file(world / name / "model.safetensors") for name in ("sft", *methods)}
    for name in methods:
        assert any(not w.equal(weights[name][key]) for key, w in weights["sft"].items())


def test_evaluate_reads_what_the_stages_wrote(world, sft, gvm):
    """The four sub-commands on the chain's outputs, one process, and their files."""
    data = ["--data", str(world / "toy/preferences.jsonl")]
    run = [sys.executable, "evaluate.py"]
    env = {**{k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}, "OMP_NUM_THREADS": "1"}
    for command, made in (
            (["gvm", "--value_model", gvm, *data, "--pairs", "10", "--reference_fn", "", "--unseen_data", "",
              "--json", world / "gvm.json"], "gvm.json"),
            (["plot", "--runs", f"sft={sft / 'metrics.jsonl'}", "--metrics", "loss",
              "--png", world / "c.png"], "c.png")):
        done = subprocess.run([*run, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (world / made).stat().st_size > 0
