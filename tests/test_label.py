"""label.py: which policies answer which prompts, whose scores are in the file, that the stages read it, and
that an interrupted run ends as one that was not."""

import json
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import label
import train_dpo
import train_dvpo
import train_gvm
from common import chat_ids, load_reward_model, load_tokenizer, reward_scores
from plumbing import folders, policies
from plumbing.args import parse_args
from plumbing.data import read_data, split_of
from plumbing.errors import BadInput
from conftest import ROOT, argv_of, clean_env, feedback_rows, metrics, run_stage, start, write_jsonl


class PowerCut(Exception):
    """What no code of ours expects."""


@pytest.fixture
def words(chain, baseline, data, tmp_path, monkeypatch):
    """The flags of a run; --out is labels.jsonl in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return {"model": chain.sft, "policies": [f"sft={chain.sft}", f"dvpo={chain.dvpo}"], "data": data,
            "reward_model": baseline.rm, "temperatures": [0, 1], "per_prompt": 3, "max_prompt_length": 32,
            "response_length": 6, "micro_batch": 8, "dtype": "float32", "out": tmp_path / "labels.jsonl"}


def run_label(words, **changes):
    label.main(parse_args(label.Args, argv_of({**words, **changes})))
    out = Path({**words, **changes}["out"])
    return [json.loads(line) for line in out.read_text().splitlines()]


# ---- what is in the file ----

def test_the_file_is_ultrafeedback_with_the_policies_names(words, data):
    """Every prompt of the shares but SFT, three of the four policies each, in a schema of read_data."""
    rows = run_label(words)
    wanted = [row["instruction"] for row in feedback_rows() if split_of(row["instruction"], 0) != "sft"]
    assert [row["instruction"] for row in rows] == wanted and len(wanted) > 20
    for row in rows:
        assert row["models"] == [c["model"] for c in row["completions"]] and len(set(row["models"])) <= 3
        assert all(1 <= c["overall_score"] <= 10 and c["response"].strip() for c in row["completions"])
    found = Counter(name for row in rows for name in row["models"])
    assert set(found) == {"sft@0", "sft@1", "dvpo@0", "dvpo@1"} and min(found.values()) > 5
    scores = [c["overall_score"] for row in rows for c in row["completions"]]
    assert (min(scores), max(scores)) == (1, 10)
    records = read_data("labels.jsonl")
    policies = [response["policy"] for record in records for response in record["responses"]]
    assert policies == [name for row in rows for name in row["models"]]
    from datasets import load_dataset
    assert load_dataset("json", data_files="labels.jsonl", split="train").num_rows == len(rows)
    assert {path.name for path in Path().iterdir()} == {"labels.jsonl", "labels.jsonl.settings",
                                                        ".labels.jsonl.lock"}


def test_greedy_answers_are_the_policys_own(words, chain):
    """A policy's name is the model and temperature that wrote the answer: against stock greedy decoding."""
    rows, tokenizer, checked = run_label(words), load_tokenizer(chain.sft), 0
    models = {name: AutoModelForCausalLM.from_pretrained(folder).eval()
              for name, folder in (("sft@0", chain.sft), ("dvpo@0", chain.dvpo))}
    for row in rows[:12]:
        for c in row["completions"]:
            if c["model"] in models:
                ids = chat_ids(tokenizer, [{"role": "user", "content": row["instruction"]}])
                answer = models[c["model"]].generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6,
                                                     eos_token_id=1, pad_token_id=1)[0, len(ids):]
                assert tokenizer.decode(answer, skip_special_tokens=True).strip() == c["response"]
                checked += 1
    assert checked > 10


def test_scores_are_the_reward_models_of_the_text_in_the_file(words, baseline):
    """Each text with its EOS, scored anew one at a time; the map to 1 .. 10 is linear between the lowest and
    the highest 1 %."""
    rows = run_label(words)
    model, tokenizer, *_ = load_reward_model(baseline.rm, torch.float32)
    pairs = []
    for row in rows[:10]:
        for c in row["completions"]:
            again, = reward_scores(model, tokenizer, [([{"role": "user", "content": row["instruction"]}],
                                                       c["response"])], torch.device("cpu"), 1)
            assert c["reward_model_score"] == pytest.approx(again, abs=1e-4)
            pairs.append((c["reward_model_score"], c["overall_score"]))
    everything = sorted(c["reward_model_score"] for row in rows for c in row["completions"])
    place = 0.01 * (len(everything) - 1)  # of the 1 % quantile, between two scores
    i, part = int(place), place % 1
    low, high = ((1 - part) * a + part * b for a, b in ((everything[i], everything[i + 1]),
                                                        (everything[-1 - i], everything[-2 - i])))
    for x, mapped in pairs:
        assert mapped == pytest.approx(min(10, max(1, 1 + 9 * (x - low) / (high - low))), abs=1e-4)
    assert len({mapped for _, mapped in pairs}) > 10


def test_the_scale_of_another_file(words):
    """With --score_range the map is the one that is named, and what is beyond it stays at its ends."""
    for row in run_label(words, score_range=[-0.5, 0.25], out="scaled.jsonl"):
        for c in row["completions"]:
            mapped = 1 + 9 * (c["reward_model_score"] + 0.5) / 0.75
            assert c["overall_score"] == pytest.approx(min(10, max(1, mapped)), abs=1e-5)
    with pytest.raises(BadInput, match="begun with other settings .range."):
        run_label(words, out="scaled.jsonl")
    with pytest.raises(BadInput, match="--score_range: two scores of a reward model, the lower one first"):
        run_label(words, score_range=[1, 0], out="other.jsonl")


def test_answers_from_a_file_are_scored_with_the_others(words, data, capsys):
    """The data's own answers under their policies' names, pairs under a name of ours, nothing sampled."""
    pairs = [{"prompt": row["instruction"], "chosen": "yes .", "rejected": "no ."}
             for row in feedback_rows()[:20]]
    write_jsonl(Path("pairs.jsonl"), pairs)
    del words["policies"]
    rows = run_label(words, answers=[data, "people=pairs.jsonl"])
    names = {name for row in rows for name in row["models"]}
    assert names == {"policy0", "policy1", "policy2", "policy3", "people"}
    own = {row["instruction"]: {c["response"] for c in row["completions"]} for row in feedback_rows()}
    for row in rows:
        texts = {c["response"] for c in row["completions"] if c["model"] != "people"}
        assert texts == own[row["instruction"]]
    assert "are to prompts that are not labelled here" in capsys.readouterr().out
    with pytest.raises(BadInput, match="pairs.jsonl:1: no policy name .*--answers name=pairs.jsonl"):
        run_label(words, answers=["pairs.jsonl"], out="other.jsonl")


def test_answers_without_scores_and_twice_the_same_command(words, capsys):
    """What nobody has scored, and few of them: the settings that are kept recognize the same command."""
    rows = [{"instruction": row["instruction"], "completions": [
        {"model": c["model"], "response": c["response"]} for c in row["completions"]]}
            for row in feedback_rows()]
    del words["policies"]
    given = write_jsonl(Path("given=1.jsonl"), rows[:3])  # a file's own name may have a =
    data = write_jsonl(Path("unscored.jsonl"), rows)
    shares = {"shares": ["sft", "value", "rl", "test"], "data": data, "answers": [given]}
    found = run_label(words, **shares)
    assert [row["instruction"] for row in found] == [row["instruction"] for row in rows[:3]]
    run_label(words, **shares)
    assert "nothing is left to do" in capsys.readouterr().out


def test_prompts_alone_are_enough(words, capsys):
    """Rows of `instruction` or `prompt`, chats that end with the user: the same answers as with the data."""
    rows = [row["instruction"] for row in feedback_rows()]
    shapes = [lambda text: {"instruction": text}, lambda text: {"prompt": text},
              lambda text: {"prompt": [{"role": "user", "content": text}]},
              lambda text: {"messages": [{"role": "user", "content": text}]}]
    write_jsonl(Path("prompts.jsonl"), [shapes[i % 4](text) for i, text in enumerate(rows)])
    assert run_label(words, data="prompts.jsonl", out="alone.jsonl") == run_label(words)
    assert "prompts.jsonl (45 prompt rows, 15 chat rows), prompts: kept 60 of 60" in capsys.readouterr().out


def test_cut_answers_and_groups_are_marked(words, data, chain):
    """"truncated" says that a sampled answer has no EOS, and nothing of a given one; groups stay."""
    grouped = write_jsonl(Path("grouped.jsonl"), [{**row, "group": f"g{i % 3}"}
                                                  for i, row in enumerate(feedback_rows())])
    rows, tokenizer = run_label(words, data=grouped), load_tokenizer(chain.sft)
    assert {row["group"] for row in rows} == {"g0", "g1", "g2"}
    flags = [(c["truncated"], len(tokenizer(c["response"], add_special_tokens=False).input_ids))
             for row in rows for c in row["completions"]]
    assert {cut for cut, _ in flags} == {True, False}
    assert all(length <= (6 if cut else 5) for cut, length in flags)  # EOS is one of the six
    again = run_label({name: value for name, value in words.items() if name != "policies"}, answers=[data],
                      out="given.jsonl")
    assert not any("truncated" in c for row in again for c in row["completions"])
    assert not any("group" in row for row in again)


def test_a_warning_where_most_answers_are_cut(words, capsys):
    """An end of turn that the model's files do not name shows in this."""
    warned = "% cut at --response_length; warning: that is most of them"
    for length in (1, 24):
        rows, cut = run_label(words, prompts=12, response_length=length, out=f"{length}.jsonl",
                              allow_dropped=True), {}
        for completion in (c for row in rows for c in row["completions"]):
            cut.setdefault(completion["model"], []).append(completion["truncated"])
        said = capsys.readouterr().out.splitlines()
        found = [line.split(":")[0].strip() for line in said if warned in line]
        assert sorted(found) == sorted(p for p, flags in cut.items() if sum(flags) > len(flags) / 2)
        assert (len(found) == 4) == (length == 1)


def test_without_policies_the_sft_model_answers(words, chain, tmp_path):
    """runs/<model name>/sft where there is one, else the model itself."""
    del words["policies"]
    words["allow_dropped"] = True  # one of eight answers is empty
    rows = run_label(words, prompts=4)
    assert {name.partition("@")[0] for row in rows for name in row["models"]} == {"sft"}  # the folder's name
    shutil.copytree(chain.dvpo, tmp_path / "runs/mine/sft")
    rows = run_label(words, model="models/mine", prompts=4, out="other.jsonl")
    assert {name.partition("@")[0] for row in rows for name in row["models"]} == {"sft"}
    with pytest.raises(BadInput, match="--policies models/nothing"):
        run_label(words, model="models/nothing", out="third.jsonl")


def test_only_some_prompts_and_policies(words):
    rows = run_label(words, prompts=7, per_prompt=0, shares=["value"], out="few.jsonl")
    assert len(rows) == 7 and all(split_of(row["instruction"], 0) == "value" for row in rows)
    assert all(len(row["completions"]) <= 4 for row in rows)
    again = run_label(words, prompts=7, per_prompt=0, shares=["value"], out="again.jsonl")
    other = run_label(words, prompts=7, per_prompt=0, shares=["value"], out="other.jsonl", seed=2)
    assert again == rows and [r["instruction"] for r in other] != [r["instruction"] for r in rows]


def test_the_noise_of_an_answer_is_its_prompts_and_policys(words, chain, monkeypatch):
    """Not its batch's: other micro batches give the same texts. Two names of one folder are two samples of
    it, each taken once."""
    batches = cut_after(10**9, monkeypatch)
    words = {**words, "policies": [f"a={chain.sft}", f"b={chain.sft}"], "temperatures": [1], "per_prompt": 2}
    rows = run_label(words)
    assert len(batches) == 2 * -(-len(rows) // 8)
    others = run_label(words, micro_batch=3, out="others.jsonl")
    texts = lambda rows: [[c["response"] for c in row["completions"]] for row in rows]
    assert texts(rows) == texts(others)
    pairs = [found for found in texts(rows) if len(found) == 2]
    assert sum(a != b for a, b in pairs) > len(pairs) / 2 > 10


def test_what_cannot_be_labelled_is_counted(words, capsys):
    """A chat of two turns and a prompt that is too long, in many rows; more than a tenth stops the run."""
    rows = feedback_rows()
    chat = [{"role": "user", "content": "is it red ?"}, {"role": "assistant", "content": "no ."},
            {"role": "user", "content": "is it blue ?"}, {"role": "assistant", "content": "yes ."}]
    long = {"instruction": "is it red ? " * 20, "output": "no ."}
    write_jsonl(Path("mixed.jsonl"), [*rows, {"messages": chat}, *[long] * 20])
    run_label(words, data="mixed.jsonl", shares=["sft", "value", "rl", "test"])
    shown = capsys.readouterr().out
    assert "dropped 2 (" in shown and "1 prompt of several turns" in shown
    assert "1 prompt over --max_prompt_length" in shown
    write_jsonl(Path("chats.jsonl"), [{"messages": [{"role": "user", "content": f"thing{i} ?"}, *chat[1:]]}
                                      for i in range(12)])
    with pytest.raises(BadInput, match="nothing is left"):
        run_label(words, data="chats.jsonl", out="other.jsonl")


# ---- a function in place of the reward model, and policies from a file ----

RULE = """
def letters(rows, policy, tokenizer):
    assert policy is tokenizer is None and set(rows[0]) == {"prompt", "group", "response", "truncated"}
    return [%s * len(row["response"]) - len(row["prompt"][-1]["content"]) for row in rows]
"""


def test_the_numbers_of_a_function_are_kept(words, chain, flags, tmp_path, monkeypatch, capsys):
    """As they are, for all answers, and train_gvm.py reads them by the flags that are printed."""
    (tmp_path / "rule_kept.py").write_text(RULE % "1 / 7")
    del words["reward_model"]
    rows = run_label(words, reward_fn="rule_kept:letters", response_length=10)
    for row in rows:
        for c in row["completions"]:
            assert c["overall_score"] == 1 / 7 * len(c["response"]) - len(row["instruction"])
            assert "reward_model_score" not in c
    shown = re.search(r": train_gvm.py --reward score (--score_min (\S+) --score_max (\S+))\n",
                      capsys.readouterr().out)
    scores = [c["overall_score"] for row in rows for c in row["completions"]]
    assert (float(shown[2]), float(shown[3])) == (min(scores), max(scores))
    run_stage(train_gvm, **{**flags.gvm, "data": "labels.jsonl", "sft_model": chain.sft, "reward": "score",
                            "score_min": shown[2], "score_max": shown[3], "allow_dropped": True},
              output_dir=tmp_path / "gvm")
    assert json.loads((tmp_path / "gvm/gvm.json").read_text())["reward"]["kind"] == "score"


@pytest.mark.parametrize("name", ["rule_changed:letters", "rule_changed.letters"])
def test_a_changed_function_scores_anew(name, words, tmp_path, monkeypatch):
    """Cut while it scored: what the first one said is not taken. A finished file is not replaced."""
    rule = tmp_path / "rule_changed.py"
    rule.write_text(RULE % 1)
    monkeypatch.delitem(sys.modules, "rule_changed", raising=False)
    del words["reward_model"]
    words["reward_fn"] = name
    with monkeypatch.context() as patch:
        straight, seen = policies.load_numbers, []

        def dying(*flags):
            plug = straight(*flags)
            return lambda *rows: seen.append(1) or (plug(*rows) if len(seen) < 3 else int("power cut"))
        patch.setattr(policies, "load_numbers", dying)
        with pytest.raises(ValueError, match="power cut"):
            run_label(words)
    rule.write_text(RULE % 2 + "# another one\n")
    monkeypatch.delitem(sys.modules, "rule_changed")
    rows = run_label(words)
    assert all(c["overall_score"] == 2 * len(c["response"]) - len(row["instruction"])
               for row in rows for c in row["completions"])
    rule.write_text(RULE % 3 + "# and a third\n")
    monkeypatch.delitem(sys.modules, "rule_changed")
    with pytest.raises(BadInput, match=r"begun with other settings \(reward\)"):
        run_label(words)


def test_a_function_that_says_nothing_is_refused(words, tmp_path):
    (tmp_path / "rule_flat.py").write_text("def flat(rows, policy, tokenizer):\n    return [1] * len(rows)\n"
                                           "def few(rows, policy, tokenizer):\n    return [1]\n")
    with pytest.raises(BadInput, match="--reward_fn and --reward_model both"):
        run_label(words, reward_fn="rule_flat:flat")
    del words["reward_model"]
    with pytest.raises(BadInput, match="all .* numbers of --reward_fn rule_flat:flat are 1"):
        run_label(words, reward_fn="rule_flat:flat")
    with pytest.raises(BadInput, match="rule_flat:few: returned 1 rewards for 8 rows"):
        run_label(words, reward_fn="rule_flat:few", out="other.jsonl")
    with pytest.raises(BadInput, match="rule_flat:none: .*expected module:function"):
        run_label(words, reward_fn="rule_flat:none", out="third.jsonl")


def test_policies_from_a_file_have_system_prompts_of_their_own(words, chain):
    """Each answers behind its own, which nothing that reads the data is told."""
    write_jsonl(Path("policies.json"), [])
    Path("policies.json").write_text(json.dumps([
        {"name": "plain", "model": str(chain.sft), "temperature": 0},
        {"name": "odd", "model": str(chain.sft), "system": "is it red ?", "temperature": 0},
        {"name": "warm", "model": str(chain.sft), "system": "no ."}]))
    words.update(policies=["policies.json", f"dvpo={chain.dvpo}"], per_prompt=0, temperatures=[1],
                 allow_dropped=True)
    rows, tokenizer, differ = run_label(words), load_tokenizer(chain.sft), 0
    assert {name for row in rows for name in row["models"]} == {"plain", "odd", "warm@1", "dvpo@1"}
    assert all(set(row) <= {"source", "instruction", "models", "completions", "group"} for row in rows)
    model = AutoModelForCausalLM.from_pretrained(chain.sft).eval()
    for row in rows[:12]:
        texts = {c["model"]: c["response"] for c in row["completions"]}
        for name, system in (("plain", []), ("odd", [{"role": "system", "content": "is it red ?"}])):
            ids = chat_ids(tokenizer, [*system, {"role": "user", "content": row["instruction"]}])
            answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6, eos_token_id=1,
                                    pad_token_id=1)[0, len(ids):]
            assert tokenizer.decode(answer, skip_special_tokens=True).strip() == texts.get(name, "")
        differ += texts.get("plain") != texts.get("odd")
    assert differ > 0


@pytest.mark.parametrize("row, said", [
    ({"name": "a"}, r"policies.json\[0\]: expected"), ({"name": "a", "model": "m", "sytem": "x"}, "expected"),
    ({"name": "a", "model": "m", "temperature": -1}, "expected"),
    ({"name": "a", "model": "m", "system": 1}, "expected"),
    ({"name": "b", "model": "m", "temperature": True}, "expected")])
def test_bad_files_of_policies(words, row, said):
    Path("policies.json").write_text(json.dumps([row]))
    with pytest.raises(BadInput, match=said):
        run_label(words, policies=["policies.json"])


def test_two_policies_of_one_name_or_a_template_without_system_turns(words, chain, tmp_path):
    entry = {"name": "a", "model": str(chain.sft), "temperature": 0}
    Path("policies.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(BadInput, match="two of them have one name"):
        run_label(words, policies=["policies.json"])
    shutil.copytree(chain.sft, tmp_path / "deaf")
    tokenizer = load_tokenizer(chain.sft)
    tokenizer.chat_template = ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }} "
                               "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}")
    tokenizer.save_pretrained(tmp_path / "deaf")
    Path("policies.json").write_text(json.dumps([{**entry, "model": str(tmp_path / "deaf"), "system": "x"}]))
    with pytest.raises(BadInput, match="a has a system prompt, which the chat template .* leaves out"):
        run_label(words, policies=["policies.json"])


# ---- the stages read it ----

def test_gvm_dvpo_and_dpo_run_on_the_file_unchanged(words, chain, flags, tmp_path):
    """With the file's scores as rewards, and tau of its policies' names."""
    run_label(words, response_length=10, temperatures=[0.7, 1.3])
    data = {"data": tmp_path / "labels.jsonl", "sft_model": chain.dvpo}
    run_stage(train_gvm, **{**flags.gvm, **data, "reward": "score", "allow_dropped": True},
              output_dir=tmp_path / "gvm")
    settings = json.loads((tmp_path / "gvm/gvm.json").read_text())
    assert settings["k"] == 2
    run_stage(train_dvpo, **{**flags.dvpo, **data}, value_model=tmp_path / "gvm",
              output_dir=tmp_path / "dvpo")
    run_stage(train_dpo, **{**flags.dpo, **data, "allow_dropped": True}, output_dir=tmp_path / "dpo")
    for stage in ("gvm", "dvpo", "dpo"):
        assert metrics(tmp_path / stage)[-1]["grad_norm"] > 0


# ---- interruptions ----

def cut_after(batches, monkeypatch, what="generate", of=label):
    """The run dies after so many batches."""
    straight, seen = getattr(of, what), []

    def dying(*args, **kwargs):
        seen.append(1)
        if len(seen) > batches:
            raise PowerCut
        return straight(*args, **kwargs)
    monkeypatch.setattr(of, what, dying)
    return seen


def test_an_interrupted_run_goes_on_and_asks_for_nothing_twice(words, tmp_path, monkeypatch):
    """Cut while it samples, then while it scores, with half a line left; the file is the straight one."""
    rows = run_label(words, out="straight.jsonl")

    def half_a_line(kind):
        kept, = tmp_path.glob(f"labels.jsonl.*.{kind}.rank0.jsonl")
        with open(kept, "a") as f:
            f.write('{"key": "cut sh')
    count = []
    with monkeypatch.context() as patch:
        count.append(cut_after(5, patch))
        with pytest.raises(PowerCut):
            run_label(words)
    with monkeypatch.context() as patch:
        count.append(cut_after(4, patch))
        with pytest.raises(PowerCut):
            run_label(words)
    half_a_line("answers")
    with monkeypatch.context() as patch:
        count.append(cut_after(10**9, patch))
        scored = cut_after(3, patch, "reward_scores", policies)
        with pytest.raises(PowerCut):
            run_label(words)
    half_a_line("scores")
    assert not (tmp_path / "labels.jsonl").exists()
    with monkeypatch.context() as patch:
        count.append(cut_after(10**9, patch))
        rest = cut_after(10**9, patch, "reward_scores", policies)
        assert run_label(words) == rows
    assert (tmp_path / "labels.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    # The calls of the four pieces, less the two that were cut, are those of one
    with monkeypatch.context() as patch:
        whole = cut_after(10**9, patch)
        run_label(words, out="once_more.jsonl")
    jobs = Counter(name for row in rows for name in row["models"])
    assert sum(map(len, count)) - 2 <= len(whole) + len(jobs)  # a policy's last batch may be cut anew
    assert len(scored) - 1 + len(rest) <= -(-sum(jobs.values()) // 8) + 1


def test_a_finished_file_is_left_alone_and_other_settings_are_refused(words, monkeypatch, capsys):
    run_label(words)
    before = Path("labels.jsonl").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        seen = cut_after(0, patch)
        run_label(words)
    assert not seen and "nothing is left to do" in capsys.readouterr().out
    for changes in ({"seed": 2}, {"response_length": 5}, {"temperatures": [0]}, {"prompts": 5}):
        with pytest.raises(BadInput, match="begun with other settings"):
            run_label(words, **changes)
    assert Path("labels.jsonl").read_bytes() == before


def test_another_reward_model_scores_what_is_sampled(words, baseline, tmp_path, monkeypatch):
    """A run that was cut while it scored goes on with another reward model: no answer is sampled again, no
    score of the first one is taken, and nothing is left behind."""
    model = AutoModelForSequenceClassification.from_pretrained(words["model"], num_labels=1)
    model.save_pretrained(tmp_path / "other")
    load_tokenizer(words["model"]).save_pretrained(tmp_path / "other")
    straight = run_label(words, reward_model=tmp_path / "other", out="straight.jsonl")
    with monkeypatch.context() as patch:
        cut_after(3, patch, "reward_scores", policies)
        with pytest.raises(PowerCut):
            run_label(words)
    with monkeypatch.context() as patch:
        seen = cut_after(0, patch)
        assert run_label(words, reward_model=tmp_path / "other") == straight
    assert not seen and not list(tmp_path.glob("*.rank*"))


def test_a_reward_model_trained_again_is_noticed(words, baseline, tmp_path):
    shutil.copytree(baseline.rm, tmp_path / "rm")
    run_label(words, reward_model=tmp_path / "rm")
    path = tmp_path / "rm/rm.json"
    path.write_text(path.read_text().replace('"scale"', '"scale" '))
    with pytest.raises(BadInput, match="begun with other settings .reward."):
        run_label(words, reward_model=tmp_path / "rm")


def test_rows_that_are_kept_belong_to_their_settings(words, tmp_path, monkeypatch):
    """Somebody deletes the settings of a run that was cut: its answers are not those of another seed."""
    with monkeypatch.context() as patch:
        cut_after(5, patch)
        with pytest.raises(PowerCut):
            run_label(words)
    (tmp_path / "labels.jsonl.settings").unlink()
    assert run_label(words, seed=2) == run_label(words, seed=2, out="fresh.jsonl")


def test_a_second_writer_is_refused(words, tmp_path):
    """Another process holds the lock beside --out; a folder with brackets in its name is a folder."""
    out = tmp_path / "[a]" / "labels.jsonl"
    out.parent.mkdir()
    place = str(out.with_name(".labels.jsonl.lock"))
    lock = (f"import filelock, time; lock = filelock.FileLock({place!r}); lock.acquire(); "
            f"print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", lock], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match="another run is writing there"):
            run_label(words, out=out)
    finally:
        other.kill()
        other.wait()
    assert run_label(words, out=out)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_what_was_kept_stays(words, tmp_path):
    """The operating system's own limit on the size of a file, in a process of its own."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    done = subprocess.run([sys.executable, ROOT / "label.py", *argv_of(words)], cwd=ROOT, env=clean_env(),
                          preexec_fn=limit, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    said = re.search("answers.rank0.jsonl: cannot be written .*File too large", done.stderr)
    assert said, done.stderr[-2000:]
    assert not (tmp_path / "labels.jsonl").exists()
    kept, = tmp_path.glob("labels.jsonl.*.answers.rank0.jsonl")
    assert 5 < len(kept.read_text().splitlines()) < 40
    assert run_label(words)


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(words, tmp_path):
    """Through the launcher; a run that one rank began is finished by two."""
    run_label(words, out=tmp_path / "one.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        cut_after(4, patch)
        with pytest.raises(PowerCut):
            run_label(words, out=tmp_path / "two.jsonl")
    folders.LOCKS.pop(tmp_path / ".two.jsonl.lock").release()  # this process lives on, a run would not
    process = start([ROOT / "label.py", *argv_of({**words, "out": tmp_path / "two.jsonl"})], 2)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text[-2000:]
    one, two = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):  # scores are read in other batches, whose rounding differs
        assert a["instruction"] == b["instruction"] and a["models"] == b["models"]
        for c, d in zip(a["completions"], b["completions"], strict=True):
            assert c["response"] == d["response"]
            assert c["reward_model_score"] == pytest.approx(d["reward_model_score"], abs=1e-5)
    assert {path.name for path in tmp_path.glob("two*")} == {"two.jsonl", "two.jsonl.settings"}


# ---- bad input ----

def constant_rm(words, tmp_path):
    """A reward model whose head is zero."""
    tokenizer = load_tokenizer(words["model"])
    model = AutoModelForSequenceClassification.from_pretrained(words["model"], num_labels=1)
    model.score.weight.data.zero_()
    model.save_pretrained(tmp_path / "zero")
    tokenizer.save_pretrained(tmp_path / "zero")
    return tmp_path / "zero"


def broken_rm(words, tmp_path):
    folder = constant_rm(words, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("changes, part", [
    ({"policies": ["nothing"]}, "--policies nothing: expected name=path"),
    ({"policies": ["a=nowhere/at/all"]}, "--policies nowhere/at/all"),
    (lambda w, t: {"policies": [f"a={w['model']}", f"a={w['model']}"]}, "two of them have one name"),
    ({"temperatures": [-1]}, "--temperatures -1"),
    ({"temperatures": ["nan"]}, "--temperatures nan"),
    (lambda w, t: {"answers": [write_jsonl(t / "long.jsonl", [
        {"instruction": row["instruction"], "completions": [{"model": "m", "response": "no . " * 100}]}
        for row in feedback_rows()])]}, "longer than the 128 tokens of the reward model's context"),
    ({"temperatures": [1, 1.0]}, "--temperatures: two of them are one"),
    ({"temperatures": ["hot"]}, "--temperatures"),
    ({"shares": ["train"]}, "--shares train"),
    ({"per_prompt": -1}, "--per_prompt -1"),
    ({"response_length": 0}, "--response_length 0"),
    ({"max_prompt_length": 100, "response_length": 29},
     "--max_prompt_length 100 .*--response_length 29.* 128"),
    ({"max_prompt_length": 3}, "--max_prompt_length 3"),
    ({"data": "missing.jsonl"}, "missing.jsonl: no such file"),
    ({"answers": ["missing.jsonl"]}, "missing.jsonl: no such file"),
    ({"reward_model": "./nothing"}, "run `train_rm.py --model .*--reward_model"),
    (lambda w, t: {"reward_model": w["model"]}, "--reward_model .*no trained one-label head"),
    (lambda w, t: {"reward_model": constant_rm(w, t)}, "tells nothing apart"),
    (lambda w, t: {"reward_model": broken_rm(w, t)}, "--reward_model .*is not finite"),
    (lambda w, t: {"out": (t / "there.jsonl").write_text("mine") and t / "there.jsonl"},
     "was not written by this script"),
    (lambda w, t: {"out": (t / "file").write_text("") or t / "file/x.jsonl"}, "file.*cannot write there"),
    ({"out": "."}, "--out . is a folder"),
    ({"out": "/proc/nothing/x.jsonl"}, "/proc/nothing.*cannot write there"),
    (lambda w, t: {"data": write_jsonl(t / "d.jsonl", [r for r in feedback_rows()
                                                        if split_of(r["instruction"], 0) == "sft"])},
     "no prompt of --shares value rl test"),
    ({"dtype": "int8"}, "--dtype"),
])
def test_bad_input_ends_in_one_sentence(changes, part, words, tmp_path, capsys):
    changes = changes(words, tmp_path) if callable(changes) else changes
    with pytest.raises(SystemExit) as end:
        run_label(words, **changes)
    text = end.value.code
    if text == 2:  # argparse: usage lines, then the sentence
        text = capsys.readouterr().err.strip().splitlines()[-1]
    assert isinstance(text, str) and "\n" not in text and len(text) < 1200 and re.search(part, text), text
    assert not (tmp_path / "labels.jsonl").exists()


def test_damaged_settings_say_what_to_delete(words, tmp_path):
    run_label(words)
    for content in (b"{", b"3", b"\xff"):
        (tmp_path / "labels.jsonl.settings").write_bytes(content)
        with pytest.raises(BadInput, match="settings: cannot be read .*delete it"):
            run_label(words)
    assert (tmp_path / "labels.jsonl").exists()
