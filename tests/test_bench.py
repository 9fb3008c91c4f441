"""The plan counts what is there, and the benchmark runs both trainers as they are."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import ROOT, clean_env

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench
import plan
import scaling

CONFIGS = sorted((ROOT / "benchmarks/configs").glob("*.json"))
DS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "ds_configs").glob("*.json")}


@pytest.mark.parametrize("name, parameters", [("llama-3-8b", 8_030_261_248), ("llama-3.2-3b", 3_212_749_824),
                                              ("llama-3.2-1b", 1_235_814_400), ("mistral-7b", 7_248_023_552)])
def test_parameters_are_those_of_the_published_models(name, parameters):
    assert plan.count(plan.read_config(ROOT / f"benchmarks/configs/{name}.json"))[0] == parameters


def test_what_is_counted_is_what_a_loaded_model_has():
    """Weights, head and LoRA of a small model, against tensors that exist."""
    from peft import get_peft_model
    from common import lora_config
    config = plan.read_config(ROOT / "benchmarks/configs/tiny.json")
    parameters, head, lora = plan.count(config)
    model = AutoModelForCausalLM.from_config(config)
    assert parameters == sum(p.numel() for p in model.parameters()) and head == model.lm_head.weight.numel()
    adapted = get_peft_model(model, lora_config(model, "CAUSAL_LM", SimpleNamespace(lora_r=3, lora_alpha=1)))
    assert 3 * lora == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_activations_of_a_layer_are_what_autograd_keeps():
    """layer_bytes against the bytes that PyTorch saves for backward in one layer, within a quarter."""
    config = plan.read_config(ROOT / "benchmarks/configs/tiny.json")
    model, saved = AutoModelForCausalLM.from_config(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.zeros(2, 64, dtype=torch.long)

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def kept(layers):
        saved.clear()
        model.model.layers = torch.nn.ModuleList(list(model.model.layers)[:layers])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model.model(input_ids=ids, use_cache=False).last_hidden_state  # holds the graph alive
            total = sum(saved.values())
        return total, output
    two, one = kept(2), kept(1)
    measured = (two[0] - one[0]) / ids.numel()
    assert measured == pytest.approx(plan.layer_bytes(config, 4), rel=0.25)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_plan_is_finite_and_more_gpus_never_hold_more(path):
    config = plan.read_config(path)
    for name, ds in DS.items():
        for method in ("gvm", "gvm_0", "rm", "dvpo", "ppo"):
            one, eight = (plan.plan(config, ds, gpus, method) for gpus in (1, 8))
            for item in ("weights, trained", "weights, frozen", "gradients", "optimizer"):
                assert 0 <= eight[item] <= one[item], (name, item)
            assert eight["peak"] > 0
        peak = lambda method: plan.plan(config, ds, 1, method)["peak"]
        assert peak("dvpo") < peak("ppo")
        assert peak("gvm_0") == peak("rm") < peak("gvm")


def test_what_zero_and_lora_divide():
    config = plan.read_config(ROOT / "benchmarks/configs/llama-3-8b.json")
    one, eight = (plan.plan(config, DS["zero3"], gpus, "dvpo") for gpus in (1, 8))
    for item in ("weights, trained", "weights, frozen", "gradients", "optimizer"):
        assert eight[item] == pytest.approx(one[item] / 8)
    assert one["optimizer"] == pytest.approx(8.030261248 * 12)
    shared, alone = (plan.plan(config, DS["zero3"], 1, method) for method in ("gvm", "gvm_alone"))
    tokens = shared["update: activations, mask"] / alone["update: activations, mask"]
    assert tokens == pytest.approx((2 * 2048 + 1024) / (2 * (2048 + 1024)), rel=0.01)  # two rows, one tau
    lora = plan.plan(config, DS["zero1"], 1, "dvpo", lora_r=16)
    copies = (lora["weights, trained"] + lora["weights, frozen"]) / (8.030261248 * 2)
    assert 1 < copies < 1.02 and lora["optimizer"] < 1  # one copy of the weights, and little else


def test_the_table_says_what_fits(capsys):
    rows = plan.main([str(ROOT / "benchmarks/configs/llama-3-8b.json"), "--gpus", "1", "--lora_r", "16",
                      "--prompt", "256", "--gradient_checkpointing", "--gpu_gb", "24",
                      "--ds_config", str(ROOT / "ds_configs/zero1.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [row["method"] for row in rows] == ["gvm", "dvpo", "rm", "ppo", "ppo_shared"]
    assert [line.split(" | ")[-1] for line in lines[-5:]] == ["yes |", "yes |", "yes |", "no |", "yes |"]
    assert rows[4]["peak"] < 1.1 * rows[1]["peak"]  # one copy of the weights as well
    with pytest.raises(SystemExit, match="cannot be read"):
        plan.main([str(ROOT / "README.md")])


@pytest.mark.slow
def test_the_benchmark_measures_both_trainers(tmp_path, capsys, monkeypatch):
    for name in set(os.environ) - set(clean_env()):  # an earlier test of this process has joined a group
        monkeypatch.delenv(name)
    config = {"model_type": "llama", "vocab_size": 210, "hidden_size": 16, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
              "max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["--config", str(tmp_path / "config.json"), "--prompt", "4", "--response", "6", "--rollout_batch",
             "4", "--micro_batch", "2", "--ppo_epochs", "1", "--k", "1", "--steps", "3"]
    rows = bench.main([*flags, "--json", str(tmp_path / "bench.json")])
    assert [row["method"] for row in rows] == ["dvpo", "ppo"]
    assert json.loads((tmp_path / "bench.json").read_text())["results"] == rows
    for row in rows:
        assert 0 < row["rollout_s"] + row["scoring_s"] + row["update_s"]
        assert row["read"] > 0 < row["trained"]
        assert 1 <= row["length"] <= 6 and row["peak_gb"] > 0
    assert "DVPO / PPO: step" in capsys.readouterr().out
    *before, shared = bench.main([*flags, "--methods", "gvm", "gvm_alone", "gvm_0", "rm", "ppo_shared",
                                  "--batch_size", "16", "--gvm_micro_batch", "16", "--tau", "3", "2",
                                  "--lora_r", "2", "--static_cache"])
    assert shared["update_s"] > 0
    # Of 16 rows: 8 policies' tau of 3 + 2 words and an EOS, with each row, or not at all; the rows are 10
    # words and an EOS. Padding comes on top
    tokens = {row["method"]: row["trained"] for row in before}
    assert tokens["gvm_0"] == tokens["rm"] == 16 * 11 and tokens["gvm_alone"] == 16 * 17
    assert tokens["gvm_0"] < tokens["gvm"] < tokens["gvm_alone"]
    assert all(row["read"] == 0 < row["step_s"] for row in before)
    capsys.readouterr()
    stages = bench.main([*flags, "--pipeline", "--gvm_rows", "320", "--rm_pairs", "160", "--rollouts", "40"])
    text = capsys.readouterr().out
    assert [row["method"] for row in stages] == ["gvm", "dvpo", "rm", "ppo"]
    seconds = [10 * row["step_s"] for row in stages]
    assert f"| GVM | 320 | 10 | {10 * stages[0]['read'] / 1e6:.1f} |" in text
    assert f" | {seconds[0] + seconds[1]:.1f} | " in text.split("all of DVPO")[1]
    assert "DVPO / PPO, all stages: " in text
    with pytest.raises(SystemExit, match="needs --lora_r"):
        bench.main([*flags, "--methods", "ppo_shared"])
    with pytest.raises(SystemExit, match="exceed the context"):
        bench.main(["--config", str(tmp_path / "config.json"), "--prompt", "200", "--response", "100"])


def test_an_exponent_is_the_power_with_which_the_cost_grows():
    x = [1, 2, 4, 8]
    assert scaling.exponent(x, [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
    assert scaling.exponent([0, *x], [7.0, *[5.0] * 4]) == pytest.approx(0)  # K = 0 has no logarithm


@pytest.mark.slow
def test_the_cost_of_two_ranks_is_measured(tmp_path, monkeypatch, capsys):
    """A cell of one rank and one of two, of both scripts, with short answers."""
    for name in set(os.environ) - set(clean_env()):  # an earlier test of this process has joined a group
        monkeypatch.delenv(name)
    monkeypatch.setattr(scaling, "BASE", {"response": 8, "k": 1, "batch": 4, "ranks": 1})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--grows", "ranks", "--steps", "3", "--json",
                                      str(tmp_path / "out.json")])
    scaling.main()
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["method"], row["ranks"]) for row in rows] == [
        ("dvpo", 1), ("dvpo", 2), ("ppo", 1), ("ppo", 2)]
    assert all(row["seconds"] > 0 and row["gb"] > 0 and row["length"] > 4 for row in rows)
    assert "| ranks 2 | DVPO |" in capsys.readouterr().out
