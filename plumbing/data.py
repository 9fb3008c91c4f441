"""Reads prompts, responses, scores and the names of the policies that wrote them.

A source is a local .json (a list of rows, or {"data": rows}), .jsonl or .parquet file, or a hub id
`owner/name` or `owner/name:split` (default split `train`); a local path that exists always wins. The columns
of each row decide how it is read. The first line of this table that fits is taken:

  shape          columns                              prompt                       responses
  ultrafeedback  instruction, completions             instruction, one user turn   each completion's response,
                 (openbmb/UltraFeedback)                                           model and overall_score
  binarized      chosen, rejected: message lists      all turns before the last,   the last turns; scores of
                 (ultrafeedback_binarized)            or as for pairs if none are  score_chosen and _rejected
  pairs          chosen, rejected: strings            messages, else prompt        chosen, rejected
                                                      (string or messages)
  chat           messages                             all turns before the last    the last, an assistant turn
  instruction    instruction, output, maybe input     instruction, blank, input    output

A multi-turn chat row gives one record: only its last assistant turn is a response, the others are prompt. All
other columns are ignored, UltraFeedback's custom_system_prompt too (as in its binarized version). Any row may
have a `group`: rows of one group never show each other's answers. By default each prompt is its own group.

Every row becomes one record:
  {"where": "x.jsonl:3",    # file and line, from 1; rows of other sources are "x.json[2]", counted from 0
   "shape": "pairs", "prompt": [{"role": "user", "content": "..."}], "group": "...",
   "responses": [{"policy": "gpt-4" or None, "text": "...", "score": 7.5 or None}]}  # chosen before rejected

Noise (no score, an empty text, turns out of order) is dropped, counted and printed; above 10 % it stops the
run. Whatever else is wrong stops it at once, with one sentence that names the row.
"""

import hashlib
import json
import math
import unicodedata
from collections import Counter
from decimal import Decimal

from plumbing.errors import BadInput, one_line
from plumbing.files import read_rows, wrong_type


ROLES = ("system", "user", "assistant")


MESSAGE = {"role": None, "content": None}
COLUMNS = {  # all that is read of a row, see read_rows
    **dict.fromkeys(("instruction", "input", "output", "group", "score_chosen", "score_rejected")),
    **dict.fromkeys(("messages", "prompt", "chosen", "rejected"), MESSAGE),
    "completions": {**dict.fromkeys(("model", "response", "overall_score", "fine-grained_score")),
                    "annotations": {"*": {"Rating": None}}}}


MAX_DROPPED = 0.10  # fraction of the responses; above it a file is more likely misread than noisy


def normalized(text):
    """The text under which two copies of a prompt count as one: outer space, line ends, accents unified."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()


def prompt_text(messages):
    """The identity of a prompt: the contents of its turns, a system turn included, joined by blank lines."""
    return normalized("\n\n".join(message["content"] for message in messages))


def fraction_of(text):
    """A float in [0, 1) that depends on the text alone; 48 bits, so that it cannot round up to 1."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(text, seed):
    """The share of the data a prompt belongs to: "sft", "value", "rl" or "test".

    10 % are test; the other 90 % are cut 30/50/20, so sft, value and rl are 27, 45 and 18 % of all prompts.
    A hash, not a shuffle: a prompt keeps its share when rows are reordered, removed or added.
    text: str, from prompt_text; seed: int
    """
    u = fraction_of(f"{seed}:{normalized(text)}")
    if u < 0.10:
        return "test"
    rest = (u - 0.10) / 0.90
    return "sft" if rest < 0.30 else "value" if rest < 0.80 else "rl"


def shape_of(row):
    """The shape in the table above that a row (dict) has, or None. A column counts even where it is null."""
    if {"instruction", "completions"} <= row.keys():
        return "ultrafeedback"
    if {"chosen", "rejected"} <= row.keys():
        return "binarized" if isinstance(row["chosen"], list) else "pairs"
    if "chosen" in row or "rejected" in row:  # half a pair: its `messages` must not pass for a chat
        return None
    if "messages" in row:
        return "chat"
    return "instruction" if {"instruction", "output"} <= row.keys() else None


def text_of(value, where, name):
    """A string any tokenizer takes: null becomes "", half a surrogate pair (JSON can hold one) U+FFFD."""
    if not isinstance(value, (str, type(None))):
        raise wrong_type(where, name, value, "a string")
    return (value or "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def messages_of(value, where, name):
    """Checked [{"role", "content"}], other keys left out; prompt_fault looks at the order."""
    if not isinstance(value, list):
        raise wrong_type(where, name, value, "a list of messages")
    messages = []
    for i, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise BadInput(f"{where}: {name}[{i}] must have one of the roles {', '.join(ROLES)}; name it so")
        content = text_of(message.get("content"), where, f"{name}[{i}] content")
        messages.append({"role": role, "content": content})
    return messages


def last_turn(messages):
    """(prompt, response); the response is empty where the assistant did not have the last word."""
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, ""


def user_turn(text):
    return [{"role": "user", "content": text}]


def separate_prompt(row, where):
    """The prompt of a pair, from a column of its own."""
    for name in ("messages", "prompt"):  # in this order: `prompt` may be a rendering, "Human: ... Assistant:"
        value = row.get(name)
        if isinstance(value, str):
            return user_turn(text_of(value, where, name))
        if value is not None:
            return messages_of(value, where, name)
    raise BadInput(f"{where}: chosen and rejected without their prompt; add a column `prompt` or `messages`")


def parse_row(row, shape, where):
    """(prompt, responses) of a row, with its types checked and its noise still in: messages, list of dict."""
    if shape == "ultrafeedback":
        completions = row["completions"] or []
        if not isinstance(completions, list):
            raise wrong_type(where, "completions", completions, "a list")
        prompt = user_turn(text_of(row["instruction"], where, "instruction"))
        return prompt, [parse_completion(c, where, f"completions[{i}]") for i, c in enumerate(completions)]
    if shape == "instruction":
        parts = [text_of(row.get(name), where, name) for name in ("instruction", "input")]
        prompt = user_turn("\n\n".join(part for part in parts if part.strip()))
        texts, scores = [text_of(row["output"], where, "output")], [None]
    elif shape == "chat":
        prompt, text = last_turn(messages_of(row["messages"], where, "messages"))
        texts, scores = [text], [None]
    elif shape == "pairs":
        prompt = separate_prompt(row, where)
        texts, scores = [text_of(row[name], where, name) for name in ("chosen", "rejected")], [None, None]
    else:  # binarized
        prompt, chosen = last_turn(messages_of(row["chosen"], where, "chosen"))
        other, rejected = last_turn(messages_of(row["rejected"], where, "rejected"))
        if prompt != other:
            raise BadInput(f"{where}: chosen and rejected have different prompts; give them the same one")
        prompt = prompt or separate_prompt(row, where)
        texts = [chosen, rejected]
        scores = [number_of(row.get("score_chosen")), number_of(row.get("score_rejected"))]
    return prompt, [{"policy": None, "text": text, "score": score} for text, score in zip(texts, scores)]


def parse_completion(completion, where, name):
    if not isinstance(completion, dict):
        raise wrong_type(where, name, completion, "an object")
    if "response" not in completion:
        raise BadInput(f"{where}: {name} has no `response`; add it, or remove the completion")
    policy = text_of(completion.get("model"), where, f"{name} model") or None
    text = text_of(completion["response"], where, f"{name} response")
    return {"policy": policy, "text": text, "score": score_of(completion)}


def number_of(value):
    """float of a number or a string that spells one; None for "N/A", "", NaN, infinities, anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Decimal)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def mistaken_ten(completion):
    """True for an overall_score of 10 whose critique said 1 (OpenBMB/UltraFeedback#8, some 2,000 cases).

    The ratings by aspect, 1 to 5, were not affected: where their mean (fine-grained_score) is 2 or less, the
    10 is a 1. The dataset was corrected on 2023-12-29, older copies are still in use.
    """
    mean = number_of(completion.get("fine-grained_score"))
    if mean is None:
        annotations = completion.get("annotations")
        aspects = annotations.values() if isinstance(annotations, dict) else ()
        ratings = [number_of(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
        ratings = [rating for rating in ratings if rating is not None]
        mean = sum(ratings) / len(ratings) if ratings else math.inf
    return (number_of(completion.get("overall_score")) or 0.0) >= 10 and mean <= 2


def score_of(completion):
    """overall_score of an UltraFeedback completion, 1 to 10, as float; a mistaken ten is 1.0; or None.

    fine-grained_score, 1 to 5, does not stand in for a missing one: it would make a good response a bad one.
    """
    return 1.0 if mistaken_ten(completion) else number_of(completion.get("overall_score"))


def prompt_fault(prompt):
    """Why a prompt is of no use, or None. Chat templates want [system,] user, assistant, ..., user."""
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if not turns or not turns[-1]["content"].strip():
        return "empty prompt"
    expected = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    return None if [turn["role"] for turn in turns] == expected else "turns out of order"


def record_of(where, row, needs="scores"):
    """(record or None, [reason] of each dropped response) of a row.

    needs: "scores": UltraFeedback's responses must have one; "answers": without one is fine; "prompts": rows
           of `instruction` or `prompt` alone are fine, too, and the record has no responses
    """
    if needs == "prompts":
        prompt = prompt_of(row, where)
        fault = prompt_fault(prompt)
        return (None, [fault]) if fault else (new_record(where, row, "prompt", prompt, []), [])
    shape = shape_of(row)
    if shape is None:
        raise no_shape(where, row)
    prompt, responses = parse_row(row, shape, where)
    if not responses:
        return None, ["no completions"]
    faults = []
    for response in responses:
        empty = None if response["text"].strip() else "empty response"
        needed = needs == "scores" and shape == "ultrafeedback"
        unscored = "no score" if needed and response["score"] is None else None
        faults.append(prompt_fault(prompt) or empty or unscored)
    if shape in ("binarized", "pairs"):
        # Half a pair says nothing, and a rejected response left alone would pass for the best one.
        faults = [faults[0] or faults[1]] * 2
    kept = [response for response, fault in zip(responses, faults) if fault is None]
    record = new_record(where, row, shape, prompt, kept) if kept else None
    return record, [fault for fault in faults if fault is not None]


def prompt_of(row, where):
    """The prompt of a row of any shape, or of one that has `instruction` or `prompt` alone."""
    shape = shape_of(row)
    if shape is None and "instruction" in row:
        return parse_row({**row, "output": ""}, "instruction", where)[0]
    if shape is None and "prompt" in row:
        return separate_prompt(row, where)
    if shape is None:
        raise no_shape(where, row)
    return parse_row(row, shape, where)[0]


def no_shape(where, row):
    columns = one_line(", ".join(map(repr, row))) if row else "none"
    return BadInput(f"{where}: no known shape has these columns: {columns}; see docs/data.md")


def new_record(where, row, shape, prompt, responses):
    group = row.get("group")
    if not isinstance(group, (str, int, type(None))):
        raise wrong_type(where, "group", group, "a string or an integer")
    group = prompt_text(prompt) if group in (None, "") else text_of(str(group), where, "group")
    return {"where": where, "shape": shape, "prompt": prompt, "group": group, "responses": responses}


def read_data(source, allow_dropped=False, log=print, needs="scores"):
    """The records of a source, in its order; duplicate rows stay, a row without a usable response goes.
    needs: as in record_of

    Logs one line: source, rows of each shape, repaired scores, kept and dropped responses.
    """
    records, shapes, dropped, first = [], Counter(), Counter(), {}
    repaired = kept = 0
    for where, row in read_rows(source, COLUMNS):
        record, faults = record_of(where, row, needs)
        shape = shape_of(row) or "prompt"
        shapes[shape] += 1
        if shape == "ultrafeedback":
            repaired += sum(map(mistaken_ten, row["completions"] or []))
        for fault in faults:
            dropped[fault] += 1
            first.setdefault(fault, where)
        if record is not None:
            records.append(record)
            kept += 1 if needs == "prompts" else len(record["responses"])
    found = ", ".join(f"{count} {shape} rows" for shape, count in shapes.items())
    found += f", 10 repaired to 1 in {repaired} of their scores" if repaired else ""
    what = "prompts" if needs == "prompts" else "responses"
    report_drops(dropped, kept + dropped.total(), f"{source} ({found}), {what}", allow_dropped, log, first)
    return records


def report_drops(dropped, total, source, allow, log=print, first=None):
    """Logs one line; BadInput if more than 10 % are dropped and allow is False, or if nothing is left.

    dropped: Counter, reason -> count; total: int, kept and dropped together; source: str, begins the line;
    first: dict, reason -> where it was first seen, or None
    """
    count = dropped.total()
    share = count / total if total else 0.0
    line = f"{source}: kept {total - count} of {total}, dropped {count} ({share:.1%})"
    seen = {reason: f" (first: {where})" for reason, where in (first or {}).items()}
    if count:
        line += ": " + ", ".join(f"{n} {reason}{seen.get(reason, '')}" for reason, n in dropped.most_common())
    if count >= total:
        raise BadInput(f"{line}; nothing is left, correct the data")
    if share > MAX_DROPPED and not allow:
        raise BadInput(f"{line}; more than {MAX_DROPPED:.0%}: correct the data or pass --allow_dropped")
    log(line)


def preference_pair(record, seed, responses=None):
    """(chosen, rejected), two responses of a record, or None where it prefers neither.

    responses: those of the record's that may be taken (the ones that are short enough); default all.

    Pairs keep their order, except that equal scores prefer nothing. Of several scored responses the best (the
    first of equals) is chosen, and the rejected one is drawn from the strictly lower ones, as
    ultrafeedback_binarized does; the draw depends on seed, prompt and texts, not on the place of the row.
    """
    responses = record["responses"] if responses is None else responses
    if record["shape"] in ("binarized", "pairs"):
        if len(responses) < 2:
            return None
        chosen, rejected = responses
        equal = chosen["score"] is not None and chosen["score"] == rejected["score"]
        return None if equal else (chosen, rejected)
    scored = [response for response in responses if response["score"] is not None]
    chosen = max(scored, key=lambda response: response["score"], default=None)
    lower = [response for response in scored if response["score"] < chosen["score"]]  # empty if none scored
    if not lower:
        return None
    key = json.dumps([seed, prompt_text(record["prompt"]), [response["text"] for response in scored]])
    return chosen, lower[int(fraction_of(key) * len(lower))]


def best_response(record):
    """The chosen one of a pair; else the best-scored one, the first of equals or where none has a score."""
    if record["shape"] in ("binarized", "pairs"):
        return record["responses"][0]
    scored = [response for response in record["responses"] if response["score"] is not None]
    return max(scored or record["responses"][:1], key=lambda response: response["score"] or 0.0)


def all_pairs(record, responses):
    """Every (chosen, rejected) of unequal scores among a record's responses; of a record that is a pair, that
    one."""
    if record["shape"] in ("binarized", "pairs"):
        pair = preference_pair(record, 0, responses)
        return [pair] if pair else []
    scored = [response for response in responses if response["score"] is not None]
    return [(a, b) for a in scored for b in scored if a["score"] > b["score"]]


def has_policy_names(records):
    """True if every response names the policy that wrote it, as tau (K > 0) needs."""
    return all(response["policy"] is not None for record in records for response in record["responses"])
