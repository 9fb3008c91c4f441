"""continuations.py: its means are the policy's values, an interrupted run ends as one that was not; and how
evaluate.py compares a value model with them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import continuations
import evaluate
from common import answer_ids, chat_ids, load_tokenizer
from plumbing.args import parse_args
from plumbing.data import split_of
from plumbing.errors import BadInput
from conftest import feedback_rows, write_jsonl

RULE = "def letters(rows, policy, tokenizer):\n    return [float(len(row['response'])) for row in rows]\n"


@pytest.fixture
def words(chain, tmp_path, monkeypatch):
    """The flags of a run on held-out answers of one policy."""
    monkeypatch.chdir(tmp_path)
    Path("letters_rule.py").write_text(RULE)
    rows = [{"instruction": row["instruction"], "completions": [
        {"model": "sft@1", "response": "no , it is not .", "overall_score": 1.0},
        {"model": "someone", "response": "yes .", "overall_score": 2.0}]} for row in feedback_rows()]
    data = write_jsonl(Path("answers.jsonl"), rows)
    return {"policies": f"sft={chain.sft}", "temperatures": 1, "data": data, "continuations": 8,
            "reward_fn": "letters_rule:letters", "max_prompt_length": 32, "response_length": 8,
            "micro_batch": 16, "dtype": "float32", "examples": 2, "split_seed": 0, "places": [0, 0.5],
            "out": tmp_path / "values.jsonl"}


def run(words, **changes):
    flags = [str(word) for name, value in {**words, **changes}.items()
             for word in (f"--{name}", *(value if isinstance(value, list) else [value]))]
    continuations.main(parse_args(continuations.Args, flags))
    return [json.loads(line) for line in Path({**words, **changes}["out"]).read_text().splitlines()]


def test_the_mean_is_the_value(words, chain):
    """One token is left to be said, so that the exact value is a sum over the vocabulary: at place 0 of
    answers of one token, and behind half of an answer where one more fits."""
    tokenizer, model = load_tokenizer(chain.sft), AutoModelForCausalLM.from_pretrained(chain.sft).eval()
    said = answer_ids(tokenizer, "no , it is not .")[:-1]
    for length, place, t in ((1, 0, 0), (len(said) // 2 + 1, 0.5, len(said) // 2)):
        rows = run(words, response_length=length, places=[place], continuations=300, micro_batch=300,
                   out=f"{length}.jsonl")
        assert len(rows) == 2 and all(row["policy"] == "sft@1" for row in rows)
        for row in rows:
            assert split_of(row["prompt"][-1]["content"], 0) == "test" and row["tokens"] == [t]
            with torch.no_grad():
                ids = torch.tensor([chat_ids(tokenizer, row["prompt"]) + said[:t]])
                p = model(ids).logits[0, -1].softmax(-1).numpy()
            scores = [len(tokenizer.decode(said[:t] + [i] * (i != 1), skip_special_tokens=True))
                      for i in range(len(p))]
            found, = row["scores"]
            error = np.std(found, ddof=1) / len(found) ** 0.5
            assert len(found) == 300 and abs(np.mean(found) - np.dot(p, scores)) < 4 * error


def test_an_interrupted_run_goes_on(words, monkeypatch):
    rows = run(words, out="straight.jsonl")
    assert [len(row["scores"]) for row in rows] == [2, 2] and rows[0]["tokens"][0] == 0
    assert all(len(scores) == 8 for row in rows for scores in row["scores"])
    straight, seen = continuations.generate, []

    def dying(*args, **kwargs):
        seen.append(1)
        return straight(*args, **kwargs) if len(seen) < 2 else int("power cut")
    with monkeypatch.context() as patch:
        patch.setattr(continuations, "generate", dying)
        with pytest.raises(ValueError, match="power cut"):
            run(words)
    assert not Path("values.jsonl").exists()
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(continuations, "generate", lambda *a, **k: seen.append(1) or straight(*a, **k))
        assert run(words) == rows
        assert len(seen) == 1  # of two batches
        run(words)
        assert len(seen) == 1
    assert {path.name for path in Path().glob("values*")} == {"values.jsonl", "values.jsonl.settings"}


@pytest.mark.parametrize("changes, said", [
    ({"policies": "other=chain"}, "--policies chain"), ({"places": [1]}, "--places: give shares"),
    ({"temperatures": 0}, "at temperature 0 has one continuation"),
    ({"temperatures": [1, 2]}, "no held-out answer of sft@2")])
def test_what_is_refused(words, changes, said):
    with pytest.raises(BadInput, match=said):
        run(words, **changes)


# ---- against a value model ----

def rows_and_file(error, n=400, draws=16):
    """Held-out rows, values that are off by `error`, and a file of sampled scores of spread 1 (score units of
    1 to 10, so 1 / 4.5 in units of reward)."""
    rng, rows, lines, values = np.random.default_rng(0), [], [], []
    for i in range(n):
        prompt, policy = [{"role": "user", "content": f"q{i}"}], f"p{i % 2}"
        truth = rng.normal(5.5 + i % 2, 1, size=2)
        rows.append({"prompt": prompt, "policy": policy, "response": "a b", "group": str(i)})
        lines.append({"prompt": prompt, "policy": policy, "response": "a b", "tokenizer": "t",
                      "scored_by": "a:b", "tokens": [0, 2],
                      "scores": rng.normal(truth[:, None], 1, (2, draws)).tolist()})
        known = (truth - 5.5) / 4.5
        values.append(np.array([known[0] + error, 9.0, known[1] + error]))
    return rows, lines, values


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_the_noise_of_the_samples_is_not_the_value_models_error(error, tmp_path, monkeypatch):
    """Without the subtraction it would be 0.056 for a perfect one."""
    rows, lines, values = rows_and_file(error)
    file = write_jsonl(tmp_path / "values.jsonl", lines)
    gvm = SimpleNamespace(settings={"reward": {"kind": "score", "center": 5.5, "scale": 4.5}}, tokenizer=None)
    monkeypatch.setattr(evaluate, "tokenizer_fingerprint", lambda tokenizer: "t")
    monkeypatch.setattr(evaluate, "values_under_own_tau", lambda gvm, rows, pool, seed: (values, None))
    known = evaluate.sampled_values([file], gvm)
    found = evaluate.compare_with_continuations(gvm, rows, None, known, SimpleNamespace(seed=1))
    assert set(found) == {"all", "p0", "p1"} and [place["tokens"] for place in found["all"]] == [0, 2]
    for place in found["all"]:
        assert place["answers"] == 400 and place["low"] <= place["rmse"] <= place["high"]
        assert place["rmse"] == pytest.approx(error, abs=0.02)
        assert place["constant"] == pytest.approx(1 / 4.5, abs=0.02)  # the spread of the truths of a policy
        assert place["value"] - place["sampled"] == pytest.approx(error, abs=0.02)
    assert found["p1"][0]["sampled"] - found["p0"][0]["sampled"] == pytest.approx(1 / 4.5, abs=0.05)


def test_files_that_are_no_values(tmp_path, monkeypatch):
    gvm = SimpleNamespace(settings={"reward": {"kind": "score", "center": 0, "scale": 1}}, tokenizer=None)
    monkeypatch.setattr(evaluate, "tokenizer_fingerprint", lambda tokenizer: "another")
    _, lines, _ = rows_and_file(0.0, n=2)
    for row, said in (({**lines[0], "scores": [[1.0], [1.0]]}, "not a row of continuations.py"),
                      ({**lines[0], "tokens": [0]}, "not a row"),
                      ({"instruction": "a"}, "not a row"), (lines[0], "another tokenizer"),
                      ({**lines[0], "scored_by": "12ab"}, "in other units than the GVM's reward")):
        with pytest.raises(BadInput, match=f"values.jsonl:1: .*{said}"):
            evaluate.sampled_values([write_jsonl(tmp_path / "values.jsonl", [row])], gvm)
    file = write_jsonl(tmp_path / "values.jsonl", [{**lines[0], "scored_by": 12, "tokenizer": "another"}])
    for fingerprint, fits in ((12, True), (34, False)):
        gvm.settings["reward"] = {"kind": "model", "center": 0, "scale": 1, "fingerprint": fingerprint}
        if fits:
            assert len(evaluate.sampled_values([file], gvm)) == 1
        else:
            with pytest.raises(BadInput, match="in other units"):
                evaluate.sampled_values([file], gvm)
    gvm.settings["reward"] = {"kind": "preference"}
    assert evaluate.sampled_values([], gvm) == {}
    with pytest.raises(BadInput, match="--reward score"):
        evaluate.sampled_values(["nothing"], gvm)
