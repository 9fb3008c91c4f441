"""A GVM or a reward model whose base was trained again, and models that say NaN: every reader names them."""

import json

import pytest
import torch

import evaluate
import judge
import train_dvpo
import train_gvm
import train_ppo
import train_remax
from common import generate, load_gvm, load_policy, load_reward_model, load_tokenizer
from conftest import copy_of, edit_json, edit_weights, run_stage, write_jsonl
from plumbing.errors import BadInput

PAIR = {"prompt": "is it ?", "chosen": "yes .", "rejected": "no ."}


# ---- a base that was trained again ----

@pytest.fixture
def moved(chain, baseline, tmp_path):
    """Copies of the SFT model, its GVM and its reward model, which know each other; the one in `sft` can be
    trained again."""
    for name in ("sft", "gvm", "rm"):
        copy_of(getattr(baseline if name == "rm" else chain, name), tmp_path / name)
    for name, file in (("gvm", "gvm.json"), ("rm", "rm.json")):
        edit_json(tmp_path / name / file, base_model=str(tmp_path / "sft"))
        edit_json(tmp_path / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "sft"))
    return tmp_path


def readers(moved, chain, flags, data):
    """What reads a GVM or a reward model on an SFT model."""
    on_it = {"sft_model": moved / "sft", "output_dir": moved / "out", "max_steps": 1}
    gvm, rm = str(moved / "gvm"), str(moved / "rm")
    pairs = write_jsonl(moved / "pairs.jsonl", [PAIR])
    at = ["--model", "other", "--data", data, "--dtype", "float32"]
    policy = ["policy", "--policies", f"a={chain.sft}", "--response_length", "4", "--max_prompt_length", "32"]
    return {
        "load_gvm": lambda: load_gvm(gvm, torch.float32),
        "load_reward_model": lambda: load_reward_model(rm, torch.float32),
        "train_dvpo": lambda: run_stage(train_dvpo, **{**flags.dvpo, **on_it}, value_model=gvm),
        "train_ppo": lambda: run_stage(train_ppo, **{**flags.ppo, **on_it}, reward_model=rm),
        "train_ppo critic": lambda: run_stage(train_ppo, **{**flags.ppo, **on_it}, reward_fn="math:sqrt",
                                              critic_model=gvm),
        "train_remax": lambda: run_stage(train_remax, **{**flags.remax, **on_it}, reward_model=rm),
        "train_gvm": lambda: run_stage(train_gvm, **{**flags.gvm, **on_it}, reward="model", reward_model=rm),
        "evaluate gvm": lambda: evaluate.main(["gvm", *at, "--value_model", gvm]),
        "evaluate values": lambda: evaluate.main(["values", *at, "--value_model", gvm]),
        "evaluate policy": lambda: evaluate.main([*policy, *at, "--value_model", gvm]),
        "evaluate policy, reward model": lambda: evaluate.main([*policy, *at, "--reward_model", rm]),
        "judge rank": lambda: judge.main(["rank", "--pairs", pairs, "--value_model", gvm]),
        "judge rank, reward model": lambda: judge.main(["rank", "--pairs", pairs, "--reward_model", rm])}


READERS = ["load_gvm", "load_reward_model", "train_dvpo", "train_ppo", "train_ppo critic", "train_remax",
           "train_gvm", "evaluate gvm", "evaluate values", "evaluate policy", "evaluate policy, reward model",
           "judge rank", "judge rank, reward model"]


@pytest.mark.parametrize("name", READERS)
def test_an_adapter_on_new_weights_is_refused(name, moved, chain, flags, data):
    """One matrix of one layer has moved, as LoRA may leave it."""
    edit_weights(moved / "sft/model.safetensors",
                 lambda weights: weights["model.layers.1.self_attn.q_proj.weight"].add_(0.01))
    with pytest.raises(BadInput, match="its base model .* has other weights than when it was trained"):
        readers(moved, chain, flags, data)[name]()


def test_an_adapter_on_its_weights_is_taken_and_an_older_one_with_a_warning(moved, capsys):
    for name, file, load in (("gvm", "gvm.json", load_gvm), ("rm", "rm.json", load_reward_model)):
        capsys.readouterr()
        assert load(moved / name, torch.float32) and "warning" not in capsys.readouterr().out
        settings = json.loads((moved / name / file).read_text())
        del settings["base_fingerprint"]
        (moved / name / file).write_text(json.dumps(settings))
        assert load(moved / name, torch.float32)
        assert "does not say which weights it was trained on" in capsys.readouterr().out


def test_a_tokenizer_or_settings_file_more_changes_no_base(moved):
    (moved / "sft/notes.json").write_text("{}")
    edit_json(moved / "sft/config.json", use_cache=False)
    assert load_gvm(moved / "gvm", torch.float32)


def test_the_reward_model_of_a_gvm_is_known_by_its_weights(moved, flags, data):
    """evaluate.py compares values with scores of the model that --reward model named."""
    run_stage(train_gvm, **{**flags.gvm, "max_steps": 1}, sft_model=moved / "sft", reward="model",
              reward_model=moved / "rm", output_dir=moved / "gvm_of_rm")
    command = ["gvm", "--model", "other", "--data", data, "--dtype", "float32", "--pairs", "4",
               "--value_model", str(moved / "gvm_of_rm")]
    evaluate.main(command)
    edit_weights(moved / "rm/adapter_model.safetensors",
                 lambda weights: [x.mul_(1.5) for x in weights.values()])
    with pytest.raises(BadInput, match="reward model has other weights"):
        evaluate.main(command)


# ---- numbers that are none ----

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_generate_ends_where_a_model_says_no_numbers(value, chain):
    """As after a step that went wrong."""
    tokenizer = load_tokenizer(chain.sft)
    model = load_policy(chain.sft, tokenizer, torch.float32)
    model.model.norm.weight.data.fill_(value)
    for temperature in (0.0, 1.0):
        with pytest.raises(BadInput, match=f"{chain.sft}: the model does not say finite numbers"):
            generate(model, [[0, 3], [0]], [1, 2], 4, temperature, tokenizer, torch.device("cpu"))


def test_a_token_that_is_forbidden_is_not_taken_for_a_wrong_number(chain):
    tokenizer = load_tokenizer(chain.sft)
    model = load_policy(chain.sft, tokenizer, torch.float32)
    forbid = lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([1, 5]), float("-inf"))
    model.lm_head.register_forward_hook(forbid)
    answer, = generate(model, [[0, 3]], [1], 6, 1.0, tokenizer, torch.device("cpu"))
    assert len(answer) == 6 and not {1, 5} & set(answer)


@pytest.mark.parametrize("what", ["policy", "generate", "gvm", "values", "rank", "reward model"])
def test_a_model_of_nan_is_named(what, chain, baseline, data, tmp_path):
    bad = copy_of({"gvm": chain.gvm, "values": chain.gvm, "rank": chain.gvm,
                   "reward model": baseline.rm}.get(what, chain.sft), tmp_path / "bad")
    edit_weights(next(bad.glob("*model.safetensors")),
                 lambda weights: [tensor.fill_(float("nan")) for tensor in weights.values()])
    pairs = write_jsonl(tmp_path / "p.jsonl", [PAIR])
    at = ["--model", "other", "--data", data, "--dtype", "float32"]
    command, words = {
        "policy": (evaluate, ["policy", *at, "--policies", f"a={bad}", "--response_length", "4",
                              "--max_prompt_length", "32"]),
        "generate": (judge, ["generate", "--policy", str(bad), "--data", data, "--model", "other",
                             "--out", str(tmp_path / "out.json"), "--response_length", "4"]),
        "gvm": (evaluate, ["gvm", *at, "--value_model", str(bad)]),
        "values": (evaluate, ["values", *at, "--value_model", str(bad)]),
        "rank": (judge, ["rank", "--pairs", pairs, "--value_model", str(bad)]),
        "reward model": (judge, ["rank", "--pairs", pairs, "--reward_model", str(bad)])}[what]
    with pytest.raises(BadInput, match=f"{bad}: (the model does not say|its (values|scores) are not) finite"):
        command.main(words)
