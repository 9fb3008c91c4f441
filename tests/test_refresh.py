"""A value model that is trained on."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train_gvm
from conftest import copy_of, edit_json, metrics, run_stage
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
