"""A value model that is trained on, and a policy that goes on from a policy."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_dvpo
import train_gvm
import train_ppo
from conftest import argv_of, copy_of, edit_json, metrics, recorded, run_stage, start
from plumbing.errors import BadInput


def test_a_gvm_is_trained_on_from_where_it_was(chain, flags, tmp_path):
    """The first loss is that of the saved weights, not of a fresh adapter. With a learning rate of nothing
    they come out as they went in, and else they move."""
    run = {**flags.gvm, "sft_model": chain.sft, "tau_warmup": 0, "max_steps": 2}
    run_stage(train_gvm, **run, output_dir=tmp_path / "fresh")
    run_stage(train_gvm, **{**run, "lr": 1e-12}, value_model=chain.gvm, output_dir=tmp_path / "same")
    run_stage(train_gvm, **run, value_model=chain.gvm, output_dir=tmp_path / "on")
    first = {name: metrics(tmp_path / name)[0]["loss"] for name in ("fresh", "same", "on")}
    assert first["same"] == first["on"] != first["fresh"]
    before, same, on = (load_file(folder / "adapter_model.safetensors")
                        for folder in (chain.gvm, tmp_path / "same", tmp_path / "on"))
    assert before.keys() == same.keys() == on.keys()
    assert all(torch.allclose(same[name], w, atol=1e-9) for name, w in before.items())
    assert any((on[name] - w).abs().max() > 1e-3 for name, w in before.items())
    settings = [json.loads((folder / "gvm.json").read_text()) for folder in (chain.gvm, tmp_path / "on")]
    assert settings[0]["base_model"] == settings[1]["base_model"]


def test_what_cannot_be_trained_on(chain, flags, tmp_path):
    run = {**flags.gvm, "sft_model": chain.sft, "output_dir": tmp_path / "out"}
    other = copy_of(chain.gvm, tmp_path / "other")
    edit_json(other / "gvm.json", base_model="elsewhere", base_fingerprint=None)
    for changes, said in (({"value_model": chain.sft}, "not a folder that train_gvm.py wrote"),
                          ({"value_model": other}, "grew from elsewhere; give that as --sft_model"),
                          ({"value_model": chain.gvm, "lora_r": 3}, "--lora_r 3: the adapter of .* has 8")):
        with pytest.raises(BadInput, match=said):
            run_stage(train_gvm, **{**run, **changes})
    assert not (tmp_path / "out/gvm.json").exists()


def logprobs_of(folder, batch):
    """log pi(a_t | s_t) [B, R] by transformers alone."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(
            batch.ids, attention_mask=batch.attention, position_ids=batch.positions).logits[:, batch.P - 1:-1]
    return logits.log_softmax(-1).gather(2, batch.ids[:, batch.P:, None])[..., 0] * batch.mask


@pytest.mark.parametrize("lora_r", [0, 2])
@pytest.mark.parametrize("stage", [train_dvpo, train_ppo])
def test_kl_is_to_the_reference_that_is_named(stage, lora_r, chain, baseline, flags, tmp_path, monkeypatch,
                                              capsys):
    """The policy starts as one model, and its KL is to another one, which the GVM grew from."""
    known = ({**flags.dvpo, "value_model": chain.gvm} if stage is train_dvpo
             else {**flags.ppo, "reward_model": baseline.rm})
    known.update(lora_r=lora_r, max_steps=1, reference_model=chain.sft)
    scores = []
    recorded(monkeypatch, stage, "score", scores)
    run_stage(stage, **known, sft_model=chain.dvpo, output_dir=tmp_path / "on")
    scored = scores[0][1]
    start, reference = logprobs_of(chain.dvpo, scored.batch), logprobs_of(chain.sft, scored.batch)
    assert torch.allclose(scored.logp * scored.batch.mask, start, atol=1e-5)
    assert torch.allclose(scored.ref_logp * scored.batch.mask, reference, atol=1e-5)
    kl = (start - reference).sum(1).mean().item()
    assert abs(kl) > 1e-3
    assert metrics(tmp_path / "on")[0]["objective/kl"] == pytest.approx(kl, abs=1e-4)
    assert "(to another model)" in capsys.readouterr().out

    run_stage(stage, **known, sft_model=chain.sft, output_dir=tmp_path / "same")  # it is the default then
    del known["reference_model"]
    run_stage(stage, **known, sft_model=chain.sft, output_dir=tmp_path / "default")
    same, default = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "default"))
    assert all(torch.equal(same[name], w) for name, w in default.items())


def test_what_cannot_be_a_reference(chain, baseline, flags, tmp_path):
    other = copy_of(chain.sft, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens("further")
    tokenizer.save_pretrained(other)
    edit_json(other / "config.json", vocab_size=len(tokenizer))
    dvpo = {**flags.dvpo, "value_model": chain.gvm}
    ppo = {**flags.ppo, "reward_model": baseline.rm}
    for stage, changes, said in (
            (train_dvpo, {**dvpo, "reference_model": other}, "--reference_model .*other: another vocabulary"),
            (train_dvpo, {**dvpo, "reference_model": tmp_path}, "--reference_model "),
            (train_ppo, {**ppo, "reference_model": chain.dvpo, "share_base": True, "lora_r": 2},
             "leave --reference_model or --share_base out")):
        with pytest.raises(BadInput, match=said):
            run_stage(stage, **changes, sft_model=chain.sft, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lora_r", [0, 2])
def test_two_ranks_with_another_reference_and_a_kept_critic(lora_r, chain, baseline, flags, tmp_path):
    """Under ZeRO-3, where both are in parts: as one rank."""
    config = tmp_path / "zero3.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    run = {**flags.ppo, "ds_config": config, "reward_model": baseline.rm, "sft_model": chain.dvpo,
           "reference_model": chain.sft, "lora_r": lora_r, "max_steps": 2, "critic_every": 2}
    for ranks, changes in ((1, {"accum_steps": 2}), (2, {"rollout_batch": 2})):
        process = start(["train_ppo.py", *argv_of({**run, **changes, "output_dir": tmp_path / str(ranks)})],
                        ranks, tmp_path / f"{ranks}.log")
        assert process.wait() == 0, (tmp_path / f"{ranks}.log").read_text()[-2000:]
    one, two = (metrics(tmp_path / name) for name in "12")
    assert one[0]["objective/kl"] == pytest.approx(two[0]["objective/kl"], abs=1e-5) != 0
    one, two = (load_file(tmp_path / name / "critic_2/model.safetensors") for name in "12")
    assert one.keys() == two.keys() and all(w.numel() for w in two.values())
    assert all(torch.allclose(two[name], w, atol=1e-4) for name, w in one.items())
