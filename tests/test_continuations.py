"""continuations.py: its means are the policy's values, an interrupted run ends as one that was not; and how
evaluate.py compares a value model with them."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import continuations
import evaluate
import train_gvm
from common import answer_ids, chat_ids, generate, load_tokenizer
from plumbing import lean
from plumbing.args import parse_args
from plumbing.data import split_of
from plumbing.errors import BadInput
from conftest import ROOT, argv_of, feedback_rows, run_stage, start, write_jsonl

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
    continuations.main(parse_args(continuations.Args, argv_of({**words, **changes})))
    return [json.loads(line) for line in Path({**words, **changes}["out"]).read_text().splitlines()]


def test_a_place_is_read_once_for_all_of_its_continuations(words, chain, models_folder, monkeypatch):
    """The same answers as where each row reads its own, as with a model that cannot go on from a cache."""
    for folder in (chain.sft, models_folder / "gpt2"):
        tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
        prompts = [ids for n in (3, 7, 5) for ids in [list(range(3, 3 + n))] * 4]
        args = model, prompts, range(12), 6, 1.0, tokenizer, torch.device("cpu")
        begin = functools.partial(lean.read_once, each=4)
        assert generate(*args, batch=8, begin=begin) == generate(*args)
    once = run(words)
    monkeypatch.setattr(continuations, "can_share_prefix", lambda *_: False)
    assert run(words, out="again.jsonl") == once
    assert run(words, out="few.jsonl", micro_batch=3) == once


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
    assert rows[0]["places"] == [0, 0.5]
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


def test_places_at_one_token_are_sampled_once(words, monkeypatch):
    """An answer of six tokens, asked at four shares; and all places of a length are continued together."""
    straight, seen = continuations.generate, []
    monkeypatch.setattr(continuations, "generate", lambda model, prompts, seeds, length, *a, **k: (
        seen.append((len(prompts), length)), straight(model, prompts, seeds, length, *a, **k))[1])
    rows = run(words, places=[0, 0.05, 0.5, 0.55])
    said = rows[0]["tokens"][2]
    assert [row["tokens"] for row in rows] == [[0, 0, said, said]] * 2 and said > 0
    assert all(row["scores"][0] == row["scores"][1] != row["scores"][2] == row["scores"][3] for row in rows)
    assert seen == [(16, 8), (16, 8 - said)]


def test_answers_that_cannot_go_on_are_counted(words, capsys):
    """No token is left behind a place; the others are sampled where that is allowed."""
    lines = [json.loads(line) for line in Path(words["data"]).read_text().splitlines()]
    for i, line in enumerate(lines):
        line["completions"][0]["response"] = "no , it is not . " * (3 if i % 2 else 1)
    words["data"] = write_jsonl(Path("longer.jsonl"), lines)
    with pytest.raises(BadInput, match="with a place at or behind --response_length; more than 10%"):
        run(words, examples=9)
    rows = run(words, examples=9, allow_dropped=True)
    assert rows and all(len(row["response"]) < 20 for row in rows)
    assert "with a place at or behind --response_length" in capsys.readouterr().out


def test_a_reward_model_that_cannot_read_a_continuation(words, baseline, monkeypatch, capsys):
    """The answer is left out with all of its places, and counted."""
    del words["reward_fn"]
    words.update(reward_model=baseline.rm, examples=4)
    first, *others = run(words, out="all.jsonl")
    fits = continuations.reward_fits
    monkeypatch.setattr(continuations, "reward_fits", lambda reader, prompt, text: (
        prompt != first["prompt"] and fits(reader, prompt, text)))
    with pytest.raises(BadInput, match="1 with a continuation that the reward model cannot read"):
        run(words)
    assert run(words, allow_dropped=True) == others


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(words, baseline, tmp_path):
    """Scores are read in other batches, whose rounding differs."""
    del words["reward_fn"]
    words.update(reward_model=baseline.rm, examples=3)
    one = run(words, out=tmp_path / "one.jsonl")
    process = start([ROOT / "continuations.py", *argv_of({**words, "data": tmp_path / words["data"],
                                                               "out": tmp_path / "two.jsonl"})], 2)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text[-2000:]
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    for a, b in zip(one, two, strict=True):
        assert np.allclose(a.pop("scores"), b.pop("scores"), atol=1e-5) and a == b
    assert {path.name for path in tmp_path.glob("two*")} == {"two.jsonl", "two.jsonl.settings"}


@pytest.mark.parametrize("changes, said", [
    ({"out": "."}, "--out . is a folder"),
    ({"policies": "other=chain"}, "--policies chain"), ({"places": [1]}, "--places: give shares"),
    ({"temperatures": 0}, "at temperature 0 has one continuation"),
    ({"temperatures": [1, 2]}, "no held-out answer of sft@2")])
def test_what_is_refused(words, changes, said):
    with pytest.raises(BadInput, match=said):
        run(words, **changes)


# ---- against a value model ----

REWARD = {"kind": "score", "center": 5.5, "scale": 4.5}


def rows_and_file(error, n=400, draws=16):
    """Held-out rows, values that are off by `error`, and rows of sampled scores of spread 1 (score units of
    1 to 10, so 1 / 4.5 in units of reward). One in four answers is too short to have a place 0.5."""
    rng, rows, lines, values = np.random.default_rng(0), [], [], []
    for i in range(n):
        prompt, policy = [{"role": "user", "content": f"q{i}"}], f"p{i % 2}"
        truth = rng.normal(5.5 + i % 2, 1, size=2)
        scores = rng.normal(truth[:, None], 1, (2, draws)).tolist()
        rows.append({"prompt": prompt, "policy": policy, "response": "a b", "group": str(i // 4)})
        whole = 1 + (i % 4 > 1)  # of half of the answers place 0 alone was asked
        lines.append({"prompt": prompt, "policy": policy, "response": "a b", "tokenizer": "t",
                      "reward_fn": "a:b", "places": [0, 0.5][:whole], "tokens": [0, 2][:whole],
                      "scores": scores[:whole]})
        known = (truth - 5.5) / 4.5
        values.append(np.array([known[0] + error, 9.0, known[1] + error]))
    return rows, lines, values


def gvm_of(reward=REWARD, gamma=1.0):
    return SimpleNamespace(settings={"reward": reward, "gamma": gamma, "critic": False}, tokenizer=None)


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_the_noise_of_the_samples_is_not_the_value_models_error(error, tmp_path, monkeypatch):
    """Without the subtraction it would be 0.056 for a perfect one. The rows of a file may have other places:
    each is compared with its like."""
    rows, lines, values = rows_and_file(error)
    file = write_jsonl(tmp_path / "values.jsonl", lines)
    monkeypatch.setattr(evaluate, "tokenizer_fingerprint", lambda tokenizer: "t")
    monkeypatch.setattr(evaluate, "values_under_own_tau", lambda gvm, rows, pool, seed: (values, None))
    known = evaluate.sampled_values([file], gvm_of())
    found = evaluate.compare_with_continuations(gvm_of(), rows, None, known, SimpleNamespace(seed=1))
    assert set(found) == {"all", "p0", "p1"}
    assert [(place["place"], place["tokens"], place["answers"]) for place in found["all"]] == [
        (0, 0, 400), (0.5, 2, 200)]
    for place in found["all"]:
        assert place["low"] <= place["rmse"] <= place["high"]
        assert place["rmse"] == pytest.approx(error, abs=0.02)
        assert place["constant"] == pytest.approx(1 / 4.5, abs=0.02)  # the spread of the truths of a policy
        assert place["value"] - place["sampled"] == pytest.approx(error, abs=0.02)
    assert found["p1"][0]["sampled"] - found["p0"][0]["sampled"] == pytest.approx(1 / 4.5, abs=0.05)


def test_the_constant_of_few_answers_is_not_better_for_having_seen_them(tmp_path, monkeypatch):
    """Of three answers a policy, over many draws of the truths: their mean square about the policy's own mean
    is the truths' variance, 1 / 4.5^2. In 400 policies of three it would come out a third less."""
    rows, lines, values = rows_and_file(0.0, n=1200)
    for i, (row, line) in enumerate(zip(rows, lines)):
        row["policy"] = line["policy"] = f"p{i // 6} {i % 2}"
    file = write_jsonl(tmp_path / "values.jsonl", lines)
    monkeypatch.setattr(evaluate, "tokenizer_fingerprint", lambda tokenizer: "t")
    monkeypatch.setattr(evaluate, "values_under_own_tau", lambda gvm, rows, pool, seed: (values, None))
    known = evaluate.sampled_values([file], gvm_of())
    found = evaluate.compare_with_continuations(gvm_of(), rows, None, known, SimpleNamespace(seed=1))
    assert found["all"][0]["constant"] == pytest.approx(1 / 4.5, rel=0.05)


def test_the_interval_is_over_groups(tmp_path, monkeypatch):
    """Answers of a group are dependent: with one group there is nothing to draw from."""
    rows, lines, values = rows_and_file(0.3, n=40)
    file = write_jsonl(tmp_path / "values.jsonl", lines)
    monkeypatch.setattr(evaluate, "tokenizer_fingerprint", lambda tokenizer: "t")
    monkeypatch.setattr(evaluate, "values_under_own_tau", lambda gvm, rows, pool, seed: (values, None))
    known = evaluate.sampled_values([file], gvm_of())
    for groups, wide in ((40, True), (1, False)):
        for i, row in enumerate(rows):
            row["group"] = str(i % groups)
        place = evaluate.compare_with_continuations(gvm_of(), rows, None, known,
                                                    SimpleNamespace(seed=1))["all"][0]
        assert (place["high"] - place["low"] > 1e-3) == wide


def test_files_that_are_no_values(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "tokenizer_fingerprint", lambda tokenizer: "another")
    _, lines, _ = rows_and_file(0.0, n=4)
    line, path = lines[2], tmp_path / "values.jsonl"
    for row, said in (({**line, "scores": [[1.0], [1.0]]}, "not a row of continuations.py"),
                      ({**line, "tokens": [0]}, "not a row"), ({**line, "places": [0]}, "not a row"),
                      ({"instruction": "a"}, "not a row"), (line, "another tokenizer"),
                      ({**line, "scores": [[90, 95], [2, 3]]}, "mean scores up to 92.5, far from"),
                      ({key: line[key] for key in line if key != "reward_fn"}, "goes with --reward score")):
        with pytest.raises(BadInput, match=f"values.jsonl:1: .*{said}"):
            evaluate.sampled_values([write_jsonl(path, [row])], gvm_of())
    file = write_jsonl(path, [{**line, "reward_model": 12, "tokenizer": "another"}])
    for fingerprint, fits in ((12, True), (34, False)):
        gvm = gvm_of({**REWARD, "kind": "model", "fingerprint": fingerprint})
        if fits:
            assert len(evaluate.sampled_values([file], gvm)) == 1
        else:
            with pytest.raises(BadInput, match="another reward model"):
                evaluate.sampled_values([file], gvm)
    assert evaluate.sampled_values([], gvm_of({"kind": "preference"})) == {}
    for gvm in (gvm_of({"kind": "preference"}), gvm_of(gamma=0.9)):
        with pytest.raises(BadInput, match="--reward score"):
            evaluate.sampled_values(["nothing"], gvm)


@pytest.fixture
def compared(words, chain, flags, tmp_path):
    """evaluate.py gvm of a GVM of scores, on the file of continuations that `words` make, changed by `do`."""
    data = [json.loads(line) for line in Path(words["data"]).read_text().splitlines()]
    file = Path("values.jsonl")
    for row in data:  # rewards of the GVM and scores of the rule are in the same units
        for completion in row["completions"]:
            completion["overall_score"] = float(len(completion["response"]))
    words["data"] = write_jsonl(Path("scored.jsonl"), data)
    run_stage(train_gvm, **{**flags.gvm, "data": words["data"], "sft_model": chain.sft, "reward": "score",
                            "score_min": 0, "score_max": 40, "max_steps": 1}, output_dir=tmp_path / "gvm")
    run(words, examples=9)

    def compare(do=lambda rows: rows):
        write_jsonl(file, do([json.loads(line) for line in file.read_text().splitlines()]))
        return evaluate.evaluate_gvm(evaluate.Args(
            data=words["data"], value_model=str(tmp_path / "gvm"), continuations=[str(file)], dtype="float32",
            allow_dropped=True), torch.device("cpu"))
    return compare


def test_what_of_the_file_is_not_in_the_data_is_said(compared):
    whole = compared()
    places = whole["continuations"]["seen"]["all"]
    assert [place["place"] for place in places] == [0, 0.5]
    assert not any("--continuations" in what for what in whole["left_out"])
    fewer = compared(lambda rows: [{**rows[0], "response": "other"}, *rows[1:]])
    assert fewer["left_out"]["answers of --continuations that are not in the data"] == 1
    assert fewer["continuations"]["seen"]["all"][0]["answers"] == places[0]["answers"] - 1
    with pytest.raises(BadInput, match="none of their .* answers is a held-out one"):
        compared(lambda rows: [{**row, "response": "other"} for row in rows])
