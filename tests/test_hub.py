"""Models that are named by their ids on the hub, as they lie in its cache; and other people's models that
were refused or read wrongly."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import report
from common import load_tokenizer
from conftest import clean_env, ROOT
from plumbing import checks, lean
from plumbing.errors import BadInput


def cached(home, name, folder, commit):
    """Put a model's folder into a cache of the hub, as its newest snapshot, with links as there."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot, blobs = place / "snapshots" / (commit * 40), place / "blobs"
    for made in (snapshot, blobs, place / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    (place / "refs/main").write_text(commit * 40)
    for file in Path(folder).iterdir():
        if file.is_file() and file.name not in ("rm.json", "args.json", "metrics.jsonl"):
            shutil.copy(file, blobs / f"{commit}{file.name}")
            (snapshot / file.name).symlink_to(blobs / f"{commit}{file.name}")


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_a_gvm_grows_from_models_of_the_hub(sharded, chain, data, tmp_path):
    """Its base and its reward model are hub ids. They are known by their weights: another commit with the
    same ones changes nothing, other weights do, and a copy in a folder is the same model."""
    base, home, out = tmp_path / "base", tmp_path / "home", tmp_path / "gvm"
    shutil.copytree(chain.sft, base)
    if sharded:
        model = AutoModelForCausalLM.from_pretrained(base)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="30KB")
        assert len(list(base.glob("*.safetensors"))) > 1
    reward = AutoModelForSequenceClassification.from_pretrained(chain.sft, num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    for file in base.glob("*token*"):
        shutil.copy(file, tmp_path / "reward")
    cached(home, "some/base", base, "a")
    cached(home, "some/reward", tmp_path / "reward", "a")
    env = {**clean_env(), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    flags = ["--model", "some/base", "--sft_model", "some/base", "--reward", "model", "--reward_model",
             "some/reward", "--data", data, "--ds_config", "ds_configs/fp32.json", "--k", "0",
             "--max_steps", "1", "--batch_size", "4", "--max_length", "64", "--output_dir", str(out)]
    done = subprocess.run([sys.executable, "train_gvm.py", *flags], cwd=ROOT, env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    settings = json.loads((out / "gvm.json").read_text())
    assert settings["base_model"] == "some/base"
    assert settings["base_fingerprint"] == checks.weights_fingerprint(base)
    assert settings["reward"]["fingerprint"] == checks.weights_fingerprint(tmp_path / "reward")

    def checked():
        code = f"from plumbing.checks import check_base; check_base({str(out)!r}, '--value_model')"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    (base / "README.md").write_text("another commit")
    cached(home, "some/base", base, "b")
    done = checked()
    assert done.returncode == 0, done.stderr[-2000:]
    for file in base.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    cached(home, "some/base", base, "c")
    done = checked()
    assert done.returncode and "some/base has other weights" in done.stderr


def test_a_token_that_stands_in_no_text_needs_no_row(chain, tmp_path):
    """Gemma 3's text models have the image's token behind the end of their vocabulary. Padding needs its
    row."""
    tokenizer = AutoTokenizer.from_pretrained(chain.sft)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(chain.sft / file, tmp_path)
    assert checks.check_model(tmp_path, load_tokenizer(tmp_path), "--model") > 0
    tokenizer.pad_token = "<image>"
    with pytest.raises(BadInput, match="do not belong together"):
        checks.check_model(tmp_path, tokenizer, "--model")


@pytest.mark.parametrize("reward", [{}, {"kind": "score"}, {"kind": "model", "center": 0.0, "scale": 0.0},
                                    {"kind": "score", "center": "x", "scale": 1.0}])
def test_a_gvm_that_does_not_say_its_reward_is_refused(reward, chain, tmp_path):
    place = shutil.copytree(chain.gvm, tmp_path / "gvm")
    settings = json.loads((place / "gvm.json").read_text())
    (place / "gvm.json").write_text(json.dumps({**settings, "reward": {"kind": "preference"}}))
    checks.gvm_settings(place)
    (place / "gvm.json").write_text(json.dumps({**settings, "reward": reward}))
    with pytest.raises(BadInput, match="--value_model .*gvm"):
        checks.gvm_settings(place)


@pytest.mark.parametrize("others", [0, 5])
def test_all_ranks_read_a_prefix_or_none(others, monkeypatch):
    """Where the prompts of one rank begin differently, the others read theirs in every row as well."""
    seen = []
    monkeypatch.setattr(lean, "gather_rows", lambda mine: [*mine, others])
    monkeypatch.setattr(lean, "can_share_prefix", lambda *args: True)
    monkeypatch.setattr(lean, "read_prefix", lambda model, ids, device: seen.append(ids))
    prefix = lean.SharedPrefix(None, [[1, 2, 3], [1, 2, 4]], True, torch.device("cpu"))
    assert (seen, prefix.rest) == (([[1, 2]], [[3], [4]]) if others else ([], [[1, 2, 3], [1, 2, 4]]))


def test_the_report_draws_the_file_that_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, kl in (("metrics.jsonl", 1.25), ("seed2.jsonl", 9.75)):
        (tmp_path / name).write_text(json.dumps({"step": 0, "objective/kl": kl}) + "\n")
    report.main(["--runs", "a=seed2.jsonl", "--metrics", "objective/kl", "--out", "r.html"])
    text = (tmp_path / "r.html").read_text()
    assert "9.75" in text and "1.25" not in text
    (tmp_path / "t.json").write_text('{"command": ["x"]}')
    with pytest.raises(BadInput, match="--tables t.json: not what"):
        report.main(["--tables", "t.json", "--out", "r.html"])
