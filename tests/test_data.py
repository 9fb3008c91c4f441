"""plumbing/data.py: each shape to its record, each kind of noise counted, each error one sentence with its
place."""

import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from plumbing.data import (all_pairs, has_policy_names, mistaken_ten, preference_pair, prompt_text, read_data,
                           report_drops, score_of, split_of)
from plumbing.errors import BadInput

USER = {"role": "user", "content": "What is 2 + 3?"}
FIVE = {"role": "assistant", "content": "5"}
SIX = {"role": "assistant", "content": "6"}
SYSTEM = {"role": "system", "content": "Be brief."}


def quiet(line):
    """A log that is not looked at."""


def write(folder, name, *rows):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return path


def read(folder, *rows, name="x.jsonl", **options):
    return read_data(write(folder, name, *rows), log=options.pop("log", quiet), **options)


def feedback(*scores, instruction="What is 2 + 3?", **fields):
    """An UltraFeedback row whose i-th completion is "answer i" by policy "mi"."""
    completions = [
        {"model": f"m{i}", "response": f"answer {i}", "overall_score": score, **fields}
        for i, score in enumerate(scores)
    ]
    return {"source": "test", "instruction": instruction, "completions": completions}


def unnamed(text, score=None):
    return {"policy": None, "text": text, "score": score}


# ---- shapes ----

SHAPE_CASES = {
    "ultrafeedback": (
        {**feedback(7.5, "3"), "models": ["m0", "m1"]},
        [USER],
        [
            {"policy": "m0", "text": "answer 0", "score": 7.5},
            {"policy": "m1", "text": "answer 1", "score": 3.0},
        ],
    ),
    "binarized": (
        {"prompt": "What is 2 + 3?", "prompt_id": "1", "chosen": [USER, FIVE], "rejected": [USER, SIX],
         "messages": [USER, FIVE], "score_chosen": 8, "score_rejected": 2.5},
        [USER],
        [unnamed("5", 8.0), unnamed("6", 2.5)],
    ),
    "binarized without scores": (
        {"chosen": [SYSTEM, USER, FIVE, USER, FIVE], "rejected": [SYSTEM, USER, FIVE, USER, SIX]},
        [SYSTEM, USER, FIVE, USER],
        [unnamed("5"), unnamed("6")],
    ),
    "binarized with the prompt apart": (
        {"prompt": [SYSTEM, USER], "chosen": [FIVE], "rejected": [SIX]},
        [SYSTEM, USER],
        [unnamed("5"), unnamed("6")],
    ),
    "pairs": (
        {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "6"},
        [USER],
        [unnamed("5"), unnamed("6")],
    ),
    "pairs with prompt messages": (
        {"prompt": [SYSTEM, USER], "chosen": "5", "rejected": "6"},
        [SYSTEM, USER],
        [unnamed("5"), unnamed("6")],
    ),
    "pairs with messages and a rendered prompt": (
        {"prompt": "\n\nHuman: 2 + 3?\n\nAssistant:", "messages": [USER], "chosen": "5", "rejected": "6"},
        [USER],
        [unnamed("5"), unnamed("6")],
    ),
    "chat": ({"messages": [USER, FIVE]}, [USER], [unnamed("5")]),
    "chat of two turns": (
        {"messages": [SYSTEM, USER, SIX, USER, FIVE]}, [SYSTEM, USER, SIX, USER], [unnamed("5")],
    ),
    "instruction": ({"instruction": "What is 2 + 3?", "output": "5"}, [USER], [unnamed("5")]),
    "instruction with empty input": (
        {"instruction": "What is 2 + 3?", "input": " ", "output": "5"}, [USER], [unnamed("5")],
    ),
    "instruction with input": (
        {"instruction": "Add.", "input": "2 3", "output": "5"},
        [{"role": "user", "content": "Add.\n\n2 3"}],
        [unnamed("5")],
    ),
}


@pytest.mark.parametrize("case", SHAPE_CASES)
def test_each_shape_becomes_its_exact_record(tmp_path, case):
    row, prompt, responses = SHAPE_CASES[case]
    expected = {
        "where": f"{tmp_path}/x.jsonl:1", "shape": case.split()[0], "prompt": prompt,
        "group": "\n\n".join(turn["content"] for turn in prompt), "responses": responses,
    }
    assert read(tmp_path, row) == [expected]


def test_a_group_of_its_own_is_kept(tmp_path):
    rows = [{**feedback(1, 2), "group": group} for group in ("sums", 7, "", None)]
    assert [r["group"] for r in read(tmp_path, *rows)] == ["sums", "7", "What is 2 + 3?", "What is 2 + 3?"]


def test_json_jsonl_and_parquet_hold_the_same_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"group": "g", **feedback(7.5, None)}, feedback(2.0, 3.0, instruction="Why?"), feedback(4.0)]
    write(tmp_path, "x.jsonl", *rows)
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "y.json").write_text(json.dumps({"data": rows}))
    # Arrow fills the missing groups with nulls, which must count as absent.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, *others = [
        [{**r, "where": r["where"].removeprefix(str(tmp_path))} for r in
         read_data(tmp_path / name, allow_dropped=True, log=quiet)]
        for name in ("x.jsonl", "x.json", "y.json", "x.parquet")
    ]
    assert [r["where"] for r in first] == ["/x.jsonl:1", "/x.jsonl:2", "/x.jsonl:3"]
    assert [r["where"] for r in others[2]] == ["/x.parquet[0]", "/x.parquet[1]", "/x.parquet[2]"]
    for records in others:
        assert [{**r, "where": ""} for r in records] == [{**r, "where": ""} for r in first]


def test_byte_order_mark_crlf_blank_lines_unicode_and_duplicates(tmp_path):
    row = {"prompt": "Où est\u2028le café? 🙂", "chosen": "là", "rejected": "\u0085"}
    pair = json.dumps({**row, "rejected": "nulle part"}, ensure_ascii=False).encode()
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + pair + b"\r\n\r\n" + pair)
    records = read_data(path, log=quiet)
    assert [r["where"] for r in records] == [f"{path}:1", f"{path}:3"]
    assert records[0] == {**records[1], "where": f"{path}:1"}
    assert records[0]["prompt"] == [{"role": "user", "content": row["prompt"]}]
    assert [r["text"] for r in records[0]["responses"]] == ["là", "nulle part"]
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf[" + pair + b"]\r\n")
    assert len(read_data(path, log=quiet)) == 1


def test_half_a_surrogate_pair_becomes_encodable(tmp_path):
    record, = read(tmp_path, '{"instruction": "a \\ud83d b", "output": "\\ud83d\\ude42"}')
    assert record["prompt"][0]["content"] == "a \ufffd b"
    assert record["responses"][0]["text"] == "🙂"


# ---- the hub, without a network ----

def fake_hub(monkeypatch, load_dataset):
    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def test_hub_id_with_and_without_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    rows = Dataset.from_list([SHAPE_CASES["pairs"][0]])
    fake_hub(monkeypatch, load_dataset)
    assert read_data("owner/name", log=quiet)[0]["where"] == "owner/name:train[0]"
    assert read_data("owner/name:test[:5]", log=quiet)[0]["where"] == "owner/name:test[:5][0]"
    assert asked == [("owner/name", "train"), ("owner/name", "test[:5]")]


def test_a_local_path_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, None)
    (tmp_path / "owner").mkdir()
    write(tmp_path, "owner/name:v1.jsonl", SHAPE_CASES["pairs"][0])
    assert len(read_data("owner/name:v1.jsonl", log=quiet)) == 1


def test_hub_failure_is_one_sentence(tmp_path, monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach\nthe Hub")

    fake_hub(monkeypatch, load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        read_data("owner/name:test", log=quiet)
    message = str(error.value)
    assert "\n" not in message and "owner/name:test" in message and "Couldn't reach the Hub" in message
    assert "without network" in message


def test_import_touches_neither_network_nor_heavy_packages():
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network at import')\n"
        "socket.socket = socket.getaddrinfo = refuse\n"
        "import plumbing.data\n"
        "assert not {'datasets', 'torch', 'pyarrow', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---- scores and drops ----

@pytest.mark.parametrize("value, score", [
    (7, 7.0), (7.5, 7.5), ("7.5", 7.5), (" 8 ", 8.0), (0, 0.0), ("N/A", None), ("", None), (None, None),
    (math.nan, None), ("nan", None), (math.inf, None), (-math.inf, None), (True, None), ([5], None),
    (10**400, None),
])
def test_score_of_one_value(value, score):
    assert score_of({"overall_score": value}) == score


def ratings(*values):
    return {f"aspect {i}": {"Rating": value, "Rationale": "..."} for i, value in enumerate(values)}


@pytest.mark.parametrize("overall, fields, score", [
    (10, {"fine-grained_score": 1.5}, 1.0),
    ("10", {"fine-grained_score": "2.0"}, 1.0),
    (10, {"fine-grained_score": 2.25}, 10.0),
    (9, {"fine-grained_score": 1.0}, 9.0),
    (10, {}, 10.0),
    (10, {"annotations": ratings("1", "2", "N/A")}, 1.0),
    (10, {"fine-grained_score": "N/A", "annotations": ratings("1", "2")}, 1.0),
    (10, {"annotations": ratings("5", "4", "1")}, 10.0),
    (10, {"annotations": ratings("N/A")}, 10.0),
    (10, {"annotations": {"helpfulness": None}}, 10.0),
    (None, {"fine-grained_score": 4.0}, None),  # the two scales are not mixed
])
def test_ten_that_meant_one_is_repaired_and_a_true_ten_stays(overall, fields, score):
    completion = {"overall_score": overall, **fields}
    assert score_of(completion) == score
    assert mistaken_ten(completion) == (score == 1.0)


def test_the_line_says_what_was_read_dropped_and_repaired(tmp_path):
    rows = [feedback(*range(1, 9), instruction=f"prompt {i}") for i in range(5)]
    rows.append(feedback(10, "N/A", instruction="prompt 5", **{"fine-grained_score": 1}))
    rows.append({"instruction": "prompt 6", "models": [], "completions": []})
    rows.append({"instruction": " ", "completions": feedback(4)["completions"]})
    lines = []
    records = read(tmp_path, *rows, log=lines.append)
    assert len(records) == 6
    assert records[5]["responses"] == [{"policy": "m0", "text": "answer 0", "score": 1.0}]
    path = tmp_path / "x.jsonl"
    assert lines == [
        f"{path} (8 ultrafeedback rows, 10 repaired to 1 in 1 of their scores), responses: "
        f"kept 41 of 44, dropped 3 (6.8%): 1 no score (first: {path}:6), "
        f"1 no completions (first: {path}:7), 1 empty prompt (first: {path}:8)"
    ]


@pytest.mark.parametrize("row, reason, count", [
    (feedback("N/A", 5), "no score", 1),
    (feedback(math.nan, 5), "no score", 1),
    ({"instruction": "a", "completions": [{"model": "m", "response": "b"}]}, "no score", 1),
    ({"instruction": "a", "completions": [{"response": None, "overall_score": 5}]}, "empty response", 1),
    ({"instruction": "a", "completions": None}, "no completions", 1),
    ({"instruction": "", "completions": feedback(1, 2)["completions"]}, "empty prompt", 2),
    ({"instruction": "a", "output": "\n"}, "empty response", 1),
    ({"instruction": None, "output": "b"}, "empty prompt", 1),
    ({"messages": []}, "empty prompt", 1),
    ({"messages": [FIVE]}, "empty prompt", 1),
    ({"messages": [SYSTEM, FIVE]}, "empty prompt", 1),
    ({"messages": [USER]}, "empty response", 1),
    ({"messages": [USER, USER, FIVE]}, "turns out of order", 1),
    ({"messages": [USER, SYSTEM, FIVE]}, "turns out of order", 1),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty response", 2),  # half a pair goes as a whole
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty prompt", 2),
    ({"chosen": [USER, {**FIVE, "content": None}], "rejected": [USER, SIX]}, "empty response", 2),
])
def test_noise_is_dropped_and_counted(tmp_path, row, reason, count):
    good = [feedback(*range(10), instruction=f"prompt {i}") for i in range(3)]
    lines = []
    records = read(tmp_path, *good, row, log=lines.append)
    left = sum(len(record["responses"]) for record in records)
    assert f"dropped {count} (" in lines[0]
    assert lines[0].endswith(f": {count} {reason} (first: {tmp_path}/x.jsonl:4)")
    assert left + count == int(lines[0].split(" of ")[1].split(",")[0])
    assert all(record["responses"] for record in records)


def test_more_than_a_tenth_dropped_stops_unless_allowed(tmp_path):
    nine = [feedback(5, instruction=f"prompt {i}") for i in range(9)]
    assert len(read(tmp_path, *nine, feedback("N/A"))) == 9  # exactly a tenth passes
    rows = nine[:7] + [feedback("N/A"), feedback("N/A"), {"instruction": "q", "completions": []}]
    with pytest.raises(BadInput) as error:
        read(tmp_path, *rows)
    place = f"(first: {tmp_path}/x.jsonl:8)"
    for part in (f"2 no score {place}", "1 no completions", "30.0%", "--allow_dropped"):
        assert part in str(error.value)
    lines = []
    assert len(read(tmp_path, *rows, allow_dropped=True, log=lines.append)) == 7
    assert len(lines) == 1 and "30.0%" in lines[0]


def test_nothing_left_stops_even_if_allowed(tmp_path):
    with pytest.raises(BadInput, match="nothing is left"):
        read(tmp_path, feedback("N/A", None), allow_dropped=True)


def test_report_drops_for_reasons_found_later():
    lines = []
    report_drops(Counter({"too long": 1}), 10, "x.jsonl", False, lines.append)
    report_drops(Counter(), 10, "x.jsonl", False, lines.append)
    report_drops(Counter({"too long": 5, "equal scores": 1}), 10, "x.jsonl", True, lines.append)
    assert lines == [
        "x.jsonl: kept 9 of 10, dropped 1 (10.0%): 1 too long",
        "x.jsonl: kept 10 of 10, dropped 0 (0.0%)",
        "x.jsonl: kept 4 of 10, dropped 6 (60.0%): 5 too long, 1 equal scores",
    ]
    with pytest.raises(BadInput, match="5 too long.*--allow_dropped"):
        report_drops(Counter({"too long": 5}), 10, "x.jsonl", False, quiet)
    for dropped, total in ((Counter({"too long": 2}), 2), (Counter(), 0)):
        with pytest.raises(BadInput, match="nothing is left"):
            report_drops(dropped, total, "x.jsonl", True, quiet)


# ---- the split ----

PROMPTS = [f"prompt number {i}\nplease" for i in range(5000)]


def test_shares_are_27_45_18_and_10_percent():
    for seed in (0, 1):
        shares = Counter(split_of(prompt, seed) for prompt in PROMPTS)
        for share, expected in {"sft": 0.27, "value": 0.45, "rl": 0.18, "test": 0.10}.items():
            # four standard deviations of a binomial share
            assert abs(shares[share] / 5000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 5000)


def test_share_depends_on_prompt_and_seed_alone(tmp_path):
    first = {prompt: split_of(prompt, 0) for prompt in PROMPTS}
    shuffled = random.Random(0).sample(PROMPTS, 1000)
    assert {prompt: split_of(prompt, 0) for prompt in shuffled}.items() <= first.items()
    moved = sum(split_of(prompt, 1) != first[prompt] for prompt in PROMPTS)
    # two independent draws fall apart with probability 1 - (0.27^2 + 0.45^2 + 0.18^2 + 0.10^2) = 0.68
    assert 0.64 < moved / 5000 < 0.72
    # Pinned: with a changed hash, models trained before and after the change would see each other's test set.
    assert [split_of(prompt, 0) for prompt in "abcdefgh"] == "value rl value value rl sft sft test".split()


def test_copies_of_a_prompt_share_split_and_group(tmp_path):
    copies = ["café\nprompt", "café\r\nprompt", "cafe\u0301\rprompt", "  café\nprompt \n"]
    for seed in range(20):
        assert len({split_of(copy, seed) for copy in copies}) == 1
    records = read(tmp_path, *[{"instruction": copy, "output": "b"} for copy in copies])
    assert {record["group"] for record in records} == {"café\nprompt"}
    assert records[1]["prompt"][0]["content"] == copies[1]  # the text itself is left as it was


def test_prompt_text_joins_all_turns():
    assert prompt_text([SYSTEM, USER, FIVE, USER]) == "Be brief.\n\nWhat is 2 + 3?\n\n5\n\nWhat is 2 + 3?"


# ---- preferences and policies ----

def texts(pair):
    return pair and tuple(response["text"] for response in pair)


@pytest.mark.parametrize("row, pair", [
    (SHAPE_CASES["pairs"][0], ("5", "6")),
    (SHAPE_CASES["binarized"][0], ("5", "6")),
    (SHAPE_CASES["binarized without scores"][0], ("5", "6")),
    ({"chosen": [USER, FIVE], "rejected": [USER, SIX], "score_chosen": 4, "score_rejected": 4.0}, None),
    (feedback(2, 9), ("answer 1", "answer 0")),
    (feedback(9, 2, 9), ("answer 0", "answer 1")),
    (feedback(5, 5, 5), None),
    (feedback(5), None),
    (SHAPE_CASES["chat"][0], None),
])
def test_preference_pair(tmp_path, row, pair):
    record, = read(tmp_path, row)
    assert texts(preference_pair(record, 0)) == pair


def test_rejected_is_drawn_evenly_and_by_content(tmp_path):
    rows = [feedback(1, 8, 3, 8, 2, instruction=f"prompt {i}") for i in range(600)]
    records = read(tmp_path, *rows)
    pairs = [texts(preference_pair(record, 0)) for record in records]
    drawn = Counter(rejected for _, rejected in pairs)
    assert {chosen for chosen, _ in pairs} == {"answer 1"}
    assert set(drawn) == {"answer 0", "answer 2", "answer 4"} and min(drawn.values()) > 150
    again = read(tmp_path, *reversed(rows), name="reversed.jsonl")
    assert [texts(preference_pair(record, 0)) for record in reversed(again)] == pairs
    assert [texts(preference_pair(record, 1)) for record in records] != pairs


def test_has_policy_names(tmp_path):
    named = read(tmp_path, feedback(1, 2))
    assert has_policy_names(named)
    assert not has_policy_names(named + read(tmp_path, SHAPE_CASES["pairs"][0]))
    assert not has_policy_names(read(tmp_path, feedback(1, 2, model="")))


# ---- errors ----

GOOD = json.dumps(SHAPE_CASES["pairs"][0])
INSTRUCTION = {"instruction": "a", "output": "b"}


def completions(value):
    return {"instruction": "a", "completions": value}


BROKEN_FILES = [  # file name, bytes, how the sentence goes on after the path
    ("x.jsonl", b"", " is empty"),
    ("x.jsonl", b"\n \r\n", " is empty"),
    ("x.json", b"\xef\xbb\xbf", " is empty"),
    ("x.json", b"[]", " is empty"),
    ("x.csv", b"a,b\n", ": unknown extension '.csv'"),
    ("x", b"{}", ": unknown extension ''"),
    ("x.jsonl", GOOD.encode() + b'\n{"prompt": "caf\xe9"}\n', ":2: byte 0xe9 is not UTF-8"),
    ("x.json", b'[\n{"prompt":\n "caf\xe9"}]', ":3: byte 0xe9 is not UTF-8"),
    ("x.jsonl", GOOD.encode("utf-16"), ":1: byte 0xff is not UTF-8"),
    ("x.jsonl", (GOOD + "\n" + GOOD[:20]).encode(), ":2: not valid JSON"),
    ("x.json", b'[{"a": 1},\n{"b":', ":2: not valid JSON"),
    ("x.json", (GOOD + "\n" + GOOD).encode(), ":2: not valid JSON (Extra data"),
    ("x.jsonl", b"[" * 200_000, ":1: not valid JSON"),
    ("x.jsonl", b'{"a": ' + b"1" * 5000 + b"}", ":1: not valid JSON"),
    ("x.json", b'{"rows": []}', ": no list of rows"),
    ("x.json", b'"rows"', ": no list of rows"),
    ("x.json", b"[" + GOOD.encode() + b", 3]", "[1]: the row must be an object, not int"),
    ("x.parquet", b"PAR1 nonsense", ": unreadable as parquet"),
    ("x.parquet", b"", ": unreadable as parquet"),
]
BROKEN_ROWS = [  # row, how the sentence goes on after its place
    ([1], "the row must be an object, not list"),
    ({}, "no known shape has these columns: none"),
    ({"input": "a", "output_1": "b"}, "no known shape has these columns: 'input', 'output_1'"),
    ({"a\nb": 1}, "no known shape has these columns: 'a\\nb'"),
    ({"messages": [USER], "chosen": "a"}, "no known shape has these columns"),
    ({"chosen": "a", "rejected": "b"}, "chosen and rejected without their prompt"),
    ({"prompt": "a", "chosen": 1, "rejected": "b"}, "chosen must be a string, not int"),
    ({"prompt": {}, "chosen": "a", "rejected": "b"}, "prompt must be a list of messages, not dict"),
    ({"chosen": [USER, FIVE], "rejected": "b"}, "rejected must be a list of messages, not str"),
    ({"chosen": [USER, FIVE], "rejected": [SYSTEM, USER, SIX]}, "chosen and rejected have different prompts"),
    (completions({"model": "m"}), "completions must be a list, not dict"),
    (completions(["b"]), "completions[0] must be an object, not str"),
    (completions([{"response": "b"}, {"text": "b"}]), "completions[1] has no `response`"),
    (completions([{"response": ["b"]}]), "completions[0] response must be a string, not list"),
    (completions([{"response": "b", "model": 4}]), "completions[0] model must be a string, not int"),
    ({**INSTRUCTION, "instruction": ["a"]}, "instruction must be a string, not list"),
    ({**INSTRUCTION, "input": 3}, "input must be a string, not int"),
    ({**INSTRUCTION, "output": {}}, "output must be a string, not dict"),
    ({**INSTRUCTION, "group": []}, "group must be a string or an integer, not list"),
    ({"messages": "hello"}, "messages must be a list of messages, not str"),
    ({"messages": ["hello"]}, "messages[0] must have one of the roles system, user, assistant"),
    ({"messages": [USER, {"content": "a"}]}, "messages[1] must have one of the roles"),
    ({"messages": [{"role": "human", "content": "a"}]}, "messages[0] must have one of the roles"),
    ({"messages": [{"role": []}]}, "messages[0] must have one of the roles"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0] content must be a string"),
]
BROKEN = BROKEN_FILES + [
    ("x.jsonl", f"{GOOD}\n{json.dumps(row)}\n".encode(), f":2: {part}") for row, part in BROKEN_ROWS
]


@pytest.mark.parametrize("name, raw, part", BROKEN, ids=[f"{name}{part}" for name, _, part in BROKEN])
def test_every_error_is_one_sentence_that_names_the_place(tmp_path, name, raw, part):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(BadInput) as error:
        read_data(path, log=quiet)
    message = str(error.value)
    assert message.startswith(f"{path}{part}"), message
    assert "\n" not in message and len(message) < len(str(path)) + 400
    assert "; " in message  # what is wrong; what to do about it


@pytest.mark.parametrize("source", ["a.jsonl", "a/b.json", "a", "a/b/c", "./a", "", "a/b.parquet:train"])
def test_missing_file_is_named_and_not_looked_up_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, None)
    with pytest.raises(BadInput) as error:
        read_data(source, log=quiet)
    assert str(error.value).startswith(f"{source or repr(source)}: no such file; give")


def test_folder_and_unreadable_file(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="is a folder; give one"):
        read_data(tmp_path, log=quiet)
    path = write(tmp_path, "x.jsonl", GOOD)

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # chmod would not stop root
    with pytest.raises(BadInput, match="Permission denied"):
        read_data(path, log=quiet)


def test_the_terminal_shows_the_sentence_and_status_1(tmp_path):
    path = write(tmp_path, "x.jsonl", "[1]")
    code = f"import plumbing.data; plumbing.data.read_data({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"{path}:1: the row must be an object, not list; correct the row\n"


ODD = [None, True, 0, -3, 10, 1.5, math.nan, 1e400, 10**400, "", " ", "N/A", "10", "user", "\ud800",
       [], {}, [[]], [{}], ["a"], {"role": "user"}, [USER], [FIVE, FIVE], {"Rating": "1"}]


def damaged(value, draw):
    """A copy of a JSON value in which each part is, now and then, replaced, removed or doubled."""
    if draw.random() < 0.06:
        return draw.choice(ODD)
    if isinstance(value, list):
        return [damaged(part, draw) for part in value for _ in range(draw.choices([1, 0, 2], [20, 1, 1])[0])]
    if isinstance(value, dict):
        return {key: damaged(part, draw) for key, part in value.items() if draw.random() > 0.03}
    return value


@pytest.mark.slow
def test_damaged_rows_give_records_or_bad_input_and_nothing_else(tmp_path):
    draw = random.Random(0)
    rated = feedback(10, "9", annotations=ratings("1", "2"), **{"fine-grained_score": None})
    sound = [rated, *(row for row, _, _ in SHAPE_CASES.values())]
    outcomes = Counter()
    for _ in range(4000):
        row = damaged({**draw.choice(sound), "group": "g"}, draw)
        path = write(tmp_path, "x.jsonl", json.dumps(row))
        try:
            record, = read_data(path, allow_dropped=True, log=quiet)
        except BadInput as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            outcomes["bad input"] += 1
            continue
        outcomes[record["shape"]] += 1
        preference_pair(record, 0)
        split_of(prompt_text(record["prompt"]), 0)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")
    assert len(outcomes) == 6 and min(outcomes.values()) > 100, outcomes


@pytest.mark.slow
def test_damaged_rows_read_for_their_prompts(tmp_path):
    """The same where only prompts are wanted; what is right otherwise is right here."""
    draw, outcomes = random.Random(1), Counter()
    sound = [*(row for row, _, _ in SHAPE_CASES.values()), {"instruction": "a", "input": "b"},
             {"prompt": "c"}]
    for _ in range(2000):
        row = damaged({**draw.choice(sound), "group": "g"}, draw)
        path = write(tmp_path, "x.jsonl", json.dumps(row))
        try:
            found, = read_data(path, allow_dropped=True, log=quiet, needs="prompts")
            assert found["responses"] == [] and found["prompt"][-1]["role"] == "user"
            outcomes["prompt"] += 1
        except BadInput as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            found = None
            outcomes["bad input"] += 1
        try:
            record, = read_data(path, allow_dropped=True, log=quiet)
        except BadInput:
            continue
        assert found is not None and found["prompt"] == record["prompt"] and found["group"] == record["group"]
    assert min(outcomes.values()) > 100, outcomes


def test_damaged_bytes_give_rows_or_bad_input_and_nothing_else(tmp_path):
    import pyarrow
    import pyarrow.parquet

    draw = random.Random(0)
    table = pyarrow.Table.from_pylist([json.loads(GOOD)] * 50)
    pyarrow.parquet.write_table(table, tmp_path / "sound.parquet")
    sound = {
        "x.json": f"[{GOOD},\n{GOOD}]".encode(),
        "x.jsonl": f"{GOOD}\n{GOOD}".encode(),
        "x.parquet": (tmp_path / "sound.parquet").read_bytes(),
    }
    stopped = Counter()
    for _ in range(600):
        name = draw.choice(list(sound))
        raw = bytearray(sound[name])
        for _ in range(draw.randrange(1, 8)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path = tmp_path / name
        path.write_bytes(raw)
        try:
            read_data(path, allow_dropped=True, log=quiet)
        except BadInput as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            stopped[name] += 1
    assert len(stopped) == 3, stopped


def test_a_pair_is_drawn_from_what_may_be_taken():
    """Of the responses that are short enough: the best of them is chosen, a pair that lost one is none."""
    responses = [{"text": text, "policy": None, "score": score}
                 for text, score in (("a very long answer", 9.0), ("short", 5.0), ("bad", 2.0))]
    record = {"shape": "ultrafeedback", "prompt": [{"role": "user", "content": "q"}], "responses": responses}
    assert preference_pair(record, 0)[0]["text"] == "a very long answer"
    assert [r["text"] for r in preference_pair(record, 0, responses[1:])] == ["short", "bad"]
    assert preference_pair(record, 0, responses[:1]) is None and preference_pair(record, 0, []) is None
    assert preference_pair({**record, "shape": "pairs", "responses": responses[:2]}, 0, responses[:1]) is None


def test_all_pairs_are_every_two_of_unequal_score():
    """By hand: 9 > 5 = 5 > 2 gives five pairs; an answer without a score is in none; a pair stays a pair."""
    responses = [{"text": text, "policy": None, "score": score}
                 for text, score in (("b", 5.0), ("a", 9.0), ("none", None), ("c", 5.0), ("d", 2.0))]
    record = {"shape": "ultrafeedback", "prompt": [{"role": "user", "content": "q"}], "responses": responses}
    found = sorted((chosen["text"], rejected["text"]) for chosen, rejected in all_pairs(record, responses))
    assert found == [("a", "b"), ("a", "c"), ("a", "d"), ("b", "d"), ("c", "d")]
    assert all_pairs(record, responses[:1]) == []
    pair = {**record, "shape": "pairs", "responses": responses[:2]}
    assert [[r["text"] for r in two] for two in all_pairs(pair, responses[:2])] == [["b", "a"]]
    assert all_pairs(pair, responses[:1]) == []
