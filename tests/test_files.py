"""Small files: read with one sentence whatever is in them, written whole or not at all. Columns that nobody
reads break nothing, and an answer without a score is no zero."""

import datetime
import decimal
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import evaluate
import report
import sft
import toy.make
from common import answer_ids
from conftest import ROOT, run_stage, word_tokenizer, write_jsonl
from plumbing import rows
from plumbing.checks import fingerprint, gvm_settings, pretrained, reward_scale
from plumbing.data import read_data, split_of
from plumbing.errors import BadInput
from plumbing.folders import base_of
from plumbing.log import keep_steps
from test_data import SHAPE_CASES, feedback, quiet

sys.path.insert(0, str(ROOT / "results"))
import run

FULL = "could not be written .*make room there"


# ---- columns ----

FAR = 253402300800000000  # microseconds: the first of January of the year 10000, which Python does not have
PAIR = {"prompt": ["What is 2 + 3?"], "chosen": ["5"], "rejected": ["6"]}
STRUCT = [("role", pyarrow.string()), ("content", pyarrow.string()), ("at", pyarrow.timestamp("us"))]


def messages(*turns):
    return [[{**turn, "at": FAR} for turn in turns]]


def unread(name):
    """A table with something in it that nobody reads and that Python cannot hold."""
    at = pyarrow.timestamp("us")
    columns = {"at": pyarrow.array([FAR], at), "took": pyarrow.array([2**62], pyarrow.duration("s")),
               "day": pyarrow.array([2**30], pyarrow.date32()),
               "mars": pyarrow.array([0], pyarrow.timestamp("us", "Mars/Base")),
               "list": pyarrow.array([[FAR]], pyarrow.list_(at)),
               "map": pyarrow.array([[("a", FAR)]], pyarrow.map_(pyarrow.string(), at)),
               "text": pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, *pyarrow.array(
                   [b"\xff"]).buffers()[1:]])}
    if name in columns:
        return pyarrow.table({**PAIR, name: columns[name]})
    if name == "twice":
        return pyarrow.table([*PAIR.values(), ["a"], ["b"]], names=[*PAIR, "x", "x"])
    if name == "dotted":
        return pyarrow.table({**PAIR, "prompt.at": columns["at"]})
    if name == "in chat":
        turns = messages(*SHAPE_CASES["chat"][0]["messages"])
        return pyarrow.table({"messages": pyarrow.array(turns, pyarrow.large_list(pyarrow.struct(STRUCT)))})
    aspect = pyarrow.struct([("Rating", pyarrow.string()), ("at", at)])
    kind = pyarrow.list_(pyarrow.struct([
        ("model", pyarrow.string()), ("response", pyarrow.string()), ("at", at),
        ("overall_score", pyarrow.decimal128(4, 2)),
        ("annotations", pyarrow.struct([("honesty", aspect), ("truth", aspect)]))]))
    rated = {"honesty": {"Rating": "1", "at": FAR}, "truth": {"Rating": "2", "at": FAR}}
    found = [{"model": f"m{i}", "response": f"answer {i}", "at": FAR, "overall_score": decimal.Decimal(score),
              "annotations": rated} for i, score in enumerate(("10", "4.5"))]
    return pyarrow.table({"instruction": ["What is 2 + 3?"], "completions": pyarrow.array([found], kind)})


RECORDS = {"in chat": SHAPE_CASES["chat"][0],
           "in completions": feedback(1.0, 4.5)}  # 10 with ratings of 1 and 2 is a mistaken ten


@pytest.mark.parametrize("name", ["at", "took", "day", "mars", "list", "map", "text", "twice", "dotted",
                                  "in chat", "in completions"])
@pytest.mark.parametrize("hub", [False, True])
def test_what_nobody_reads_breaks_nothing(name, hub, tmp_path, monkeypatch):
    """The record is that of the same row without it, from a file and from the hub."""
    wanted, = read_data(write_jsonl(tmp_path / "x.jsonl", [RECORDS.get(name, SHAPE_CASES["pairs"][0])]),
                        log=quiet)
    if hub:
        if name in ("twice", "text", "map"):
            pytest.skip("datasets has none such")
        monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Dataset(unread(name)))
        found, = read_data("owner/name", log=quiet)
    else:
        pyarrow.parquet.write_table(unread(name), tmp_path / "x.parquet")
        found, = read_data(tmp_path / "x.parquet", log=quiet)
    assert {**found, "where": ""} == {**wanted, "where": ""}


@pytest.mark.parametrize("values, kind, part", [
    ([FAR], pyarrow.timestamp("us"), "year 10000|out of range"),
    ([2**62], pyarrow.duration("s"), "too large"),
    ([2**30], pyarrow.date32(), "must have magnitude"),
    ([datetime.date(2020, 1, 1)], pyarrow.date32(), "group must be a string or an integer, not date"),
    ([decimal.Decimal("1.5")], pyarrow.decimal128(4, 2), "group must be a string .*not Decimal"),
    ([b"\xff"], pyarrow.binary(), "group must be a string .*not bytes")])
@pytest.mark.parametrize("hub", [False, True])
def test_what_is_read_and_cannot_be_is_one_sentence(values, kind, part, hub, tmp_path, monkeypatch):
    table = pyarrow.table({**PAIR, "group": pyarrow.array(values, kind)})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Dataset(table))
    with pytest.raises(BadInput, match=part) as end:
        read_data("owner/name" if hub else tmp_path / "x.parquet", log=quiet)
    assert str(end.value).startswith("owner/name:train[0]" if hub else str(tmp_path / "x.parquet"))
    assert "\n" not in str(end.value)


def test_a_column_of_mixed_types_is_no_text(tmp_path):
    """As `datasets` writes it: the rest is read, and where somebody reads that column it is refused, for its
    text would be the source of JSON."""
    kind = pyarrow.json_()
    storage = pyarrow.array(['"is it ?"', '["a", "b"]'], kind.storage_type)
    table = pyarrow.table({"prompt": pyarrow.ExtensionArray.from_storage(kind, storage),
                           "chosen": ["yes", "yes"], "rejected": ["no", "no"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="a.parquet: unreadable as parquet .*holds JSON; write it as .jsonl"):
        list(read_data(str(tmp_path / "a.parquet")))


def test_two_columns_of_one_name(tmp_path):
    """The last one would silently win."""
    table = pyarrow.table([["a"], *PAIR.values()], names=["prompt", *PAIR])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(BadInput, match="x.parquet: two columns are called prompt; rename one"):
        read_data(tmp_path / "x.parquet", log=quiet)


def test_columns_of_no_shape_are_named_though_nobody_reads_them(tmp_path):
    at = pyarrow.array([FAR], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "at": at}), tmp_path / "x.parquet")
    with pytest.raises(BadInput, match=r"x.parquet\[0\]: no known shape has these columns: 'a', 'at'"):
        read_data(tmp_path / "x.parquet", log=quiet)


# ---- scores ----

def sft_answer(row, folder):
    """The answer that sft.py trains for one prompt of its share."""
    tokenizer = word_tokenizer()
    question = next(f"is thing{i} red ?" for i in range(12) if split_of(f"is thing{i} red ?", 0) == "sft")
    user = [{"role": "user", "content": question}]
    row = {name: [*user, {"role": "assistant", "content": text}] if name in ("chosen", "rejected") else text
           for name, text in row.items()}
    row = {"instruction": question, **row} if "completions" in row else row
    args = SimpleNamespace(data=write_jsonl(folder / "x.jsonl", [row]), allow_dropped=True, split_seed=0,
                           max_length=64)
    (_, answer), = sft.sft_rows(tokenizer, args)[0]
    return next(text for text in ("yes", "no", "it is red") if answer == answer_ids(tokenizer, text))


@pytest.mark.parametrize("scores, right", [
    ((-1.5, None), "yes"),   # an answer without a score is no 0.0
    ((None, 3.0), "yes"),    # of a pair the chosen one
    ((-1.5, -2.0), "yes"), ((None, None), "yes")])
def test_sft_takes_the_chosen_one_of_a_pair(scores, right, tmp_path):
    row = {"chosen": "yes", "rejected": "no", "score_chosen": scores[0], "score_rejected": scores[1]}
    assert sft_answer(row, tmp_path) == right


@pytest.mark.parametrize("scores", [(-3, -1, -2), (None, -5, "N/A"), (2, 7, 7)])
def test_sft_takes_the_best_scored_answer(scores, tmp_path):
    completions = [{"model": "m", "response": text, "overall_score": score}
                   for text, score in zip(("yes", "no", "it is red"), scores)]
    assert sft_answer({"completions": completions}, tmp_path) == "no"


def test_a_policy_that_is_not_in_training_has_no_mean_of_zero(monkeypatch):
    """The baseline `policy mean` where all scores are below 0: of such a policy the mean of all is known."""
    row = lambda policy, split, score: {"policy": policy, "split": split, "score": score, "group": "g",
                                        "response_ids": [1]}
    pool = {"good": [row("good", "value", -1.0)], "bad": [row("bad", "value", -9.0)],
            "new": [row("new", "test", -5.0)]}
    pairs = [(row("good", "test", -1.0), row("new", "test", -5.0)),
             (row("new", "test", -5.0), row("bad", "test", -9.0))]
    monkeypatch.setattr(evaluate, "under_tau", lambda gvm, pool, policy, rows, rng: ([(), ()], []))
    monkeypatch.setattr(evaluate, "token_values", lambda gvm, jobs: [np.zeros(2) for _ in jobs])
    gvm = SimpleNamespace(settings={"k": 0, "critic": False}, tokenizer=None)
    found = evaluate.rank_pairs(gvm, pairs, pool, seed=0)
    assert found["baselines"]["policy mean"]["accuracy"] == 1.0


@pytest.mark.parametrize("world, n", [(1, 7), (2, 7), (3, 7), (2, 1), (4, 3)])
def test_a_reward_model_scores_each_trajectory_on_one_rank(world, n, monkeypatch):
    """In the micro batches of a single rank, so that the numbers are the same; every rank gets all of them,
    in order. (test_invariance.py has two real ranks.)"""
    asked, said, scores = [], [], np.arange(n) ** 2.0

    def reward_scores(model, tokenizer, chats, device, micro_batch):
        asked.append([int(text) for _, text in chats])
        return [scores[int(text)] for _, text in chats]
    model = SimpleNamespace(to=lambda device: None)
    monkeypatch.setattr(rows, "reward_scores", reward_scores)
    monkeypatch.setattr(rows, "load_reward_model", lambda *args: (model, None))
    monkeypatch.setattr(rows, "weights_fingerprint", lambda folder: "")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    args = SimpleNamespace(reward="model", reward_model="rm", micro_batch=2)
    for listening in (False, True):  # each rank says what it has; then each hears what all have said
        for rank in range(world):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(rows, "gather_rows", lambda mine, listening=listening: (
                said if listening else said.extend(mine) or [(0, [0.0])]), raising=False)
            train = [{"prompt": [], "text": str(i), "reward": 0.0} for i in range(n)]
            found = rows.reward_map(train, args, None, None)
            if listening:
                assert (found["center"], found["scale"]) == (scores.mean(), 2 * scores.std() + 1e-8)
                assert [row["reward"] for row in train] == [(x - found["center"]) / found["scale"]
                                                            for x in scores]
        if not listening:
            assert sorted(asked) == [[*range(i, min(i + 2, n))] for i in range(0, n, 2)]


# ---- small JSON files ----

def damaged(path, how):
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a link to nothing":
        path.symlink_to(path.with_name("gone"))
    else:
        path.write_bytes({"a list": b"[]", "deep": b'{"k": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
                          "not UTF-8": b'{"k": "\xff"}', "empty": b"", "text": b'"k"'}[how])


DAMAGES = ["a list", "deep", "not UTF-8", "empty", "text", "a folder", "a link to nothing"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["gvm.json", "rm.json", "adapter_config.json", "args.json", "table"])
def test_a_small_file_that_is_damaged_is_one_sentence(name, how, chain, baseline, tmp_path):
    folder = shutil.copytree(chain.gvm if name == "gvm.json" else baseline.rm, tmp_path / "model")
    if name in ("args.json", "table"):
        (tmp_path / "model/metrics.jsonl").write_text('{"step": 0, "objective/kl": 0}\n')
        (tmp_path / "model/table").write_text("{}")
    if name == "args.json" and how == "a link to nothing":
        pytest.skip("the page then says nothing of its flags")
    damaged(tmp_path / "model" / name, how)
    out = str(tmp_path / "page.html")
    read = {"gvm.json": lambda: gvm_settings(folder), "rm.json": lambda: reward_scale(folder),
            "adapter_config.json": lambda: base_of(folder),
            "args.json": lambda: report.main(["--runs", f"a={folder}", "--out", out]),
            "table": lambda: report.main(["--tables", str(folder / "table"), "--out", out])}[name]
    with pytest.raises(BadInput) as end:
        read()
    text = str(end.value)
    assert str(folder) in text and name in text or "train_gvm.py" in text
    assert "\n" not in text and len(text) < 700 and not Path(out).exists()


def test_a_link_to_nothing_in_a_models_folder(models_folder, chain, tmp_path):
    """As in a pruned cache of the hub. What no model is read from may be one."""
    for name in ("model.safetensors", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        folder = shutil.copytree(models_folder / "llama", tmp_path / name)
        damaged(folder / name, "a link to nothing")
        with pytest.raises(BadInput, match=f"--model .*its {name} is a link to nothing"):
            pretrained(AutoTokenizer, folder)
        with pytest.raises(BadInput, match=f"{name}"):
            fingerprint(folder)
    folder = shutil.copytree(models_folder / "llama", tmp_path / "fine")
    before = fingerprint(folder)
    (folder / "README.md").symlink_to(folder / "gone")
    (folder / "a.json").mkdir()
    assert pretrained(AutoTokenizer, folder) and fingerprint(folder) == before


def test_a_run_on_a_folder_with_a_link_to_nothing_ends_before_the_work(flags, chain, tmp_path):
    folder = shutil.copytree(chain.sft, tmp_path / "sft")
    damaged(folder / "model.safetensors", "a link to nothing")
    with pytest.raises(BadInput, match="--base_model .*model.safetensors is a link to nothing"):
        run_stage(sft, **flags.sft, base_model=folder, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_line_of_the_log_that_is_deeply_nested(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + b"[" * 100_000 + b"\n")
    with pytest.raises(BadInput, match="metrics.jsonl:2"):
        keep_steps(tmp_path / "metrics.jsonl", 3)


# ---- writing ----

def runs(folder):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text('{"step": 0, "gvm/mean": 1}\n{"step": 1, "gvm/mean": 2}\n')
    return f"a={folder}"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("flag", ["--json", "--png", "--out"])
def test_a_full_disk_leaves_the_old_file_or_none(flag, old, room, tmp_path, capsys):
    """And what the work has found was printed."""
    out = tmp_path / "out"
    main, words = report.main, ["--runs", runs(tmp_path / "run"), "--metrics", "gvm/mean", flag, str(out)]
    if flag != "--out":
        main, words = evaluate.main, ["plot", "--png", "/dev/null", *words]
    if old:
        main(words)
    before = files(tmp_path)
    room(100)
    try:
        with pytest.raises(BadInput, match=f"out: {FULL}"):
            main(words)
    finally:
        room()
    assert files(tmp_path) == before and len(before) == old
    assert flag == "--out" or "gvm/mean" in capsys.readouterr().out
    main(words)
    assert len(out.read_bytes()) > 300


@pytest.mark.parametrize("write", [
    lambda out, run: evaluate.main(["plot", "--runs", run, "--metrics", "gvm/mean", "--png", out]),
    lambda out, run: report.main(["--runs", run, "--out", out])])
def test_a_device_is_written_and_a_link_stays_one(write, tmp_path, capsys):
    run = runs(tmp_path / "run")
    with pytest.raises(BadInput, match=f"/dev/full: {FULL}"):
        write("/dev/full", run)
    assert not Path("/dev/full").is_file() and Path("/dev/full").exists()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(str(tmp_path / "link"), run)
    assert (tmp_path / "link").is_symlink() and len((tmp_path / "real").read_bytes()) > 300


@pytest.mark.parametrize("out", ["/proc/none/x", "{}", "{}/none/x"])
def test_an_unwritable_place_shows_before_the_work(out, tmp_path):
    """The runs that are named are not there: they would be missed only later."""
    out = out.format(tmp_path)
    for main, words in ((report.main, ["--out"]), (evaluate.main, ["plot", "--png"])):
        with pytest.raises(BadInput, match=f"{words[-1]} {out}: cannot write there"):
            main([*words, out, "--runs", "a=nothing"])
    assert not files(tmp_path)


def test_the_default_picture_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(BadInput, match="--png curves.png: cannot write there"):
        evaluate.main(["plot", "--runs", "a=nothing"])


@pytest.mark.slow
def test_other_writers_on_a_full_disk(room, tmp_path, monkeypatch, capsys):
    """The toy, the tables of results/, the plan: one sentence, and what was there is kept."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/x.json").write_text("old")
    plan = runpy.run_path(str(ROOT / "benchmarks/plan.py"))["main"]
    monkeypatch.setattr(toy.make, "choose_split_seed", lambda: toy.make.SPLIT_SEED)
    for work in (lambda: run.save_table("x", {f"row {i}": {} for i in range(99)}, ["a"]),
                 lambda: plan([str(ROOT / "benchmarks/configs/llama-3-8b.json"), "--json",
                               str(tmp_path / "plan.json")]),
                 lambda: toy.make.main(tmp_path / "toy", 0)):
        room(300)
        try:
            with pytest.raises(BadInput, match=FULL):
                work()
        finally:
            room()
    assert files(tmp_path) == {} and files(tmp_path / "results") == {"x.json": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_half_a_surrogate_pair_does_not_lose_the_results(tmp_path):
    """No UTF-8 has it; JSON and what a model says may."""
    from plumbing.files import write_whole
    write_whole(tmp_path / "x", "a \ud83d b \u00e9")
    assert (tmp_path / "x").read_bytes() == "a ? b \u00e9".encode()
