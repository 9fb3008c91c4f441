"""What stays, what moves, and what is on disk afterwards: the GVM and the reference are bit-identical and
have no gradient, the policy has moved, and stock transformers and peft load all of it from anywhere."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import AutoPeftModelForTokenClassification
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification, AutoTokenizer)

import sft
import train_dpo
import train_dvpo
import train_grpo
import train_gvm
import train_ppo
import train_remax
import train_rm
from common import load_gvm, load_policy, load_tokenizer, value_head
from plumbing.errors import BadInput
from conftest import clean_env, fingerprint, metrics, recorded, run_stage

IDS = torch.tensor([[0, 3, 6, 9, 15, 27, 7, 4, 6, 12, 9, 27, 14, 8, 1]])

FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from peft import AutoPeftModelForTokenClassification, PeftModel
sft, gvm, dvpo, ids, out = sys.argv[1:]
ids = torch.load(ids)
models = {"sft": AutoModelForCausalLM.from_pretrained(sft),
          "dvpo": AutoModelForCausalLM.from_pretrained(dvpo),
          "gvm": AutoPeftModelForTokenClassification.from_pretrained(gvm),
          "gvm by hand": PeftModel.from_pretrained(AutoModelForTokenClassification.from_pretrained(sft), gvm)}
with torch.no_grad():
    torch.save({name: model.eval()(input_ids=ids).logits for name, model in models.items()}, out)
"""


@torch.no_grad()
def outputs(model):
    getattr(model, "func", model).eval()  # a role of OneBase is a functools.partial
    return model(input_ids=IDS).logits


# ---- during training ----

def test_the_gvm_and_the_reference_are_bit_identical_after_training(chain):
    """One phi for the whole run: every parameter and buffer has the sha256 it had before the first step."""
    (frozen, before), = chain.frozen
    assert value_head(frozen.adapters.get_base_model()) and frozen.lm_head  # the GVM and the reference
    assert fingerprint(frozen) == before


def test_frozen_models_have_no_gradients(chain):
    """Nothing on them asks for a gradient or has one."""
    for model, _ in chain.frozen:
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not model.training


def test_the_policy_moves_away_from_the_reference(chain):
    """Every weight of the policy is trained, and only it is."""
    start, end = load_file(chain.sft / "model.safetensors"), load_file(chain.dvpo / "model.safetensors")
    still = [name for name in start if torch.equal(start[name], end[name])]
    assert not still
    reference = {name.replace(".base_layer", ""): p for name, p in chain.frozen[0][0].lm.named_parameters()}
    policy = dict(chain.policy.module.lm.named_parameters())
    assert policy and not any(torch.equal(p, reference[name]) for name, p in policy.items())


def names_of(chain):
    """Names of the parameters of what can learn, from the SFT model's file."""
    weights = set(load_file(chain.sft / "model.safetensors"))
    linear = {name.removesuffix(".weight") for name in weights if "_proj." in name}  # all but the head

    def adapter(name, front="base_model.model."):
        return {f"{front}{layer}.lora_{matrix}.{name}.weight" for layer in linear for matrix in "AB"}

    on_one_base = partial(adapter, front="adapters.base_model.model.")
    head = "base_model.model.score.modules_to_save.default"
    return {"policy": {f"lm.{name}" for name in weights}, "lora policy": on_one_base("policy"),
            "critic": weights - {"lm_head.weight"} | {"score.weight", "score.bias"},
            "lora values": adapter("default") | {f"{head}.weight", f"{head}.bias"},
            "lora scores": adapter("default") | {f"{head}.weight"},
            "shared": (on_one_base("policy") | on_one_base("critic")
                       | {"heads.critic.weight", "heads.critic.bias"})}


@pytest.mark.parametrize("stage, load, changes, wanted", [
    (train_dvpo, "load_models", {}, {"policy": "policy"}),
    (train_dvpo, "load_models", {"lora_r": 2}, {"policy": "lora policy"}),
    (train_ppo, "load_models", {}, {"policy": "policy", "critic": "critic"}),
    (train_ppo, "load_models", {"lora_r": 2}, {"policy": "lora policy", "critic": "lora values"}),
    (train_ppo, "share_models", {"lora_r": 2, "share_base": True}, {"policy": "shared"}),
    (train_remax, "load_models", {}, {"policy": "policy"}),
    (train_remax, "load_models", {"lora_r": 2}, {"policy": "lora policy"}),
    (train_grpo, "load_models", {}, {"policy": "policy"}),
    (train_dpo, "load_model", {}, {"": "policy"}),
    (train_dpo, "load_model", {"lora_r": 2}, {"": "lora policy"}),
    (train_gvm, "load_model", {}, {"": "lora values"}),
    (train_rm, "load_model", {}, {"": "lora scores"})])
def test_what_is_meant_to_learn_asks_for_gradients_and_nothing_else(stage, load, changes, wanted, chain,
                                                                    baseline, flags, tmp_path, monkeypatch):
    """By name, once the models are loaded and after a step in which each was asked in turn. The optimizer has
    these parameters and no other, and no parameter of a reference of its own is among them."""
    name, loaded, found = stage.__name__.removeprefix("train_"), [], []
    original = getattr(stage, load)

    def noted(*args):
        models = original(*args)
        loaded.append(stage.Models(*models) if load.endswith("models") else models)
        found.append(trained())
        return models

    def trained():
        result = {}
        for role in wanted:
            engine = getattr(loaded[0], role) if role else loaded[0]
            result[role] = {name for name, p in engine.module.named_parameters() if p.requires_grad}
            stepped = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
            assert stepped == {id(p) for p in engine.module.parameters() if p.requires_grad}
        return result
    monkeypatch.setattr(stage, load, noted)
    folders = {"dvpo": {"value_model": chain.gvm}, "ppo": {"reward_model": baseline.rm},
               "remax": {"reward_model": baseline.rm}, "grpo": {"reward_model": baseline.rm}}.get(name, {})
    run_stage(stage, **{**getattr(flags, name), "max_steps": 1, **changes}, **folders, sft_model=chain.sft,
              output_dir=tmp_path)
    meant = {role: names_of(chain)[part] for role, part in wanted.items()}
    assert all(meant.values()) and found[0] == meant and trained() == meant
    if load == "load_models" and not changes:  # with LoRA the reference is a role of the policy's model
        assert not any(p.requires_grad for p in loaded[0].reference.func.parameters())


def test_the_first_step_starts_from_ratio_1_and_kl_0(chain):
    """Before the first update the policy is the one that sampled, and is the reference."""
    _, _, kl, first_ratio, *_ = chain.checked
    assert first_ratio <= 1e-5 and abs(kl) <= 1e-6
    assert chain.scored.values.isfinite().all() and chain.scored.values.std() > 0
    rows = metrics(chain.dvpo)
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6) and rows[-1]["objective/kl"] != 0


def test_the_gvm_learns_its_head_and_adapter_and_nothing_else(chain):
    """The backbone under the adapter is the SFT model's, bit by bit; the adapter and the head have moved."""
    start = load_file(chain.sft / "model.safetensors")
    model = chain.gvm_engine.module
    base = {name.removeprefix("base_model.model.").replace(".base_layer", ""): p
            for name, p in model.named_parameters() if "lora_" not in name and "score" not in name}
    assert base and all(torch.equal(p, start[name]) for name, p in base.items())
    trained = load_file(chain.gvm / "adapter_model.safetensors")
    moved = [tensor for name, tensor in trained.items() if "lora_B" in name]  # these start at 0
    assert moved and all(tensor.abs().max() > 0 for tensor in moved)
    head = model.base_model.model.score
    assert not torch.equal(head.original_module.weight, head.modules_to_save["default"].weight)


def test_the_early_stop_ends_a_steps_updates(chain, flags, tmp_path):
    """Once KL(old, new) per token passes --early_stop_kl the rest of the step is
    left out; at 0 it never is."""
    for limit, stopped in ((1e-6, 1.0), (0.0, 0.0), (1e6, 0.0)):
        run_stage(train_dvpo, **{**flags.dvpo, "max_steps": 1, "ppo_epochs": 3}, sft_model=chain.sft,
                  value_model=chain.gvm, early_stop_kl=limit, output_dir=tmp_path)
        row, = metrics(tmp_path)
        # 3 epochs x 2 optimizer batches; the first update starts at KL 0, and the
        # second batch sees what it did
        assert row["policy/updates"] == (2 if stopped else 6) and row["policy/early_stopped"] == stopped


def test_every_number_that_is_logged_is_finite(chain):
    """No NaN or infinity in any metric of any stage."""
    for folder in (chain.sft, chain.gvm, chain.dvpo):
        assert all(math.isfinite(value) for row in metrics(folder) for value in row.values())


# ---- on disk ----

@pytest.mark.slow
def test_saved_models_load_anywhere_with_stock_libraries(chain, tmp_path):
    """A fresh process in another folder, without this repository: AutoModelForCausalLM for the policies;
    for the GVM peft's auto class, or a token classifier with the adapter on top. The same outputs as the
    models that were trained."""
    torch.save(IDS, tmp_path / "ids.pt")
    arguments = [chain.sft, chain.gvm, chain.dvpo, tmp_path / "ids.pt", tmp_path / "out.pt"]
    env = {k: v for k, v in clean_env().items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)], cwd=tmp_path, env=env,
                          timeout=120, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = torch.load(tmp_path / "out.pt")
    values = outputs(chain.gvm_engine.module)
    assert values.shape == (1, IDS.shape[1], 1) and values.std() > 1e-3
    for name, wanted in (("sft", outputs(chain.sft_engine.module)), ("dvpo", outputs(chain.policy.module)),
                         ("gvm", values), ("gvm by hand", values),
                         ("gvm", outputs(load_gvm(chain.gvm, torch.float32)[0]))):
        assert torch.allclose(loaded[name], wanted, atol=1e-6), name
    assert not torch.allclose(loaded["sft"], loaded["dvpo"], atol=1e-3)


def test_the_sft_model_takes_one_label_heads_unasked(chain):
    """Its config says one label, so stock reward and value heads on it need no argument."""
    assert AutoModelForSequenceClassification.from_pretrained(chain.sft).config.num_labels == 1
    model = AutoModelForTokenClassification.from_pretrained(chain.sft)
    assert model.config.num_labels == 1 and value_head(model).out_features == 1


def test_the_saved_tokenizer_renders_and_stops_as_in_training(chain):
    """Template, EOS and pad travel with every folder, the policy's generation_config stops at that EOS."""
    wanted = load_tokenizer(chain.sft)
    for folder in (chain.gvm, chain.dvpo):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == wanted.chat_template
        assert (tokenizer.eos_token, tokenizer.pad_token) == (wanted.eos_token, wanted.pad_token)
    generation = json.loads((chain.dvpo / "generation_config.json").read_text())
    assert generation["eos_token_id"] == wanted.eos_token_id and "top_k" not in generation


def test_the_gvm_folder_records_what_later_stages_must_not_ask_again(chain, flags):
    """K, tau's budget, gamma, lambda, the reward map and the chat template; load_gvm hands them on."""
    settings = load_gvm(chain.gvm, torch.float32)[1]
    args = json.loads((chain.gvm / "args.json").read_text())
    assert {name: settings[name]
            for name in ("k", "gamma", "lam", "tau_question_tokens", "tau_answer_tokens")} == \
           {name: args[name] for name in ("k", "gamma", "lam", "tau_question_tokens", "tau_answer_tokens")}
    assert settings["k"] == flags.gvm["k"] and settings["reward"] == {"kind": "preference"}
    assert settings["chat_template"] == load_tokenizer(chain.sft).chat_template


def test_a_gvm_finds_its_base_from_any_folder(chain, flags, tmp_path, monkeypatch):
    """Trained with a relative path to the SFT model, it is loaded from another folder."""
    monkeypatch.chdir(chain.sft.parent)
    run_stage(train_gvm, **{**flags.gvm, "max_steps": 1}, sft_model="./sft", output_dir=tmp_path / "gvm")
    monkeypatch.chdir(tmp_path)
    model = load_gvm("gvm", torch.float32)[0]
    assert AutoPeftModelForTokenClassification.from_pretrained("gvm")
    assert torch.equal(model.get_input_embeddings().weight,
                       chain.sft_engine.module.get_input_embeddings().weight)


def test_a_gvm_without_its_head_is_refused(chain, tmp_path):
    """A fresh head would say 0 or noise without a word: load_gvm raises instead."""
    for path in chain.gvm.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert load_gvm(tmp_path, torch.float32)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "score" not in name},
              tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="the head is missing"):
        load_gvm(tmp_path, torch.float32)


@pytest.mark.parametrize("stage, name", [(sft, "sft"), (train_dvpo, "dvpo")])
def test_a_lora_policy_is_saved_merged(stage, name, chain, flags, tmp_path, monkeypatch):
    """--lora_r: what is saved is a plain model without adapters that says what the trained one says."""
    saved = []
    recorded(monkeypatch, stage, "save_model", saved)
    folders = {"sft_model": chain.sft, "value_model": chain.gvm} if stage is train_dvpo else {}
    run_stage(stage, **{**getattr(flags, name), "lr": 1e-2, "max_steps": 2}, **folders, lora_r=4,
              output_dir=tmp_path)
    module = saved[0][0][0].module.double()  # in float32 the order of the sums would be seen
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).double()
    assert torch.allclose(outputs(loaded), outputs(module), atol=1e-5)
    if stage is train_dvpo:
        before = outputs(partial(module, role="reference"))
    else:
        with module.disable_adapter():
            before = outputs(module)
    assert not torch.allclose(outputs(loaded), before, atol=1e-3)
    start = chain.sft if stage is train_dvpo else flags.sft["model"]
    assert torch.allclose(before, outputs(load_policy(start, load_tokenizer(start), torch.float64)),
                          atol=1e-6)
