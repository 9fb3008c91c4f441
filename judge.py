"""Answers in the formats of the field's evaluation tools, and an LLM judge over them.

generate  A policy's answers to the questions of a tool, in the format of that tool: AlpacaEval (instruction),
          Arena-Hard (uid, prompt), MT-Bench (question_id, turns; the second turn sees the first answer); or
          to the held-out prompts of --data. The same command continues an interrupted run.
judge     Answers of policies against those of one other (Figure 2: win / tie / lose; Tables 1 and 2), by any
          OpenAI-compatible endpoint or a local model.
          --mode score   each answer alone gets 0 to 5 points, one for each of five criteria (the paper's
                         Appendix D); more points win
          --mode grade   each answer alone gets 1 to 10, as in MT-Bench; more points win
          --mode pair    two answers side by side, in both orders; two orders that disagree are a tie
table     Both for several policies and question files at once (Tables 1 and 2): grades for MT-Bench; for the
          others pairs against the baseline's answers, which AlpacaEval's question file holds.
rank      No judge: how often a reward model and the GVM rank the chosen answer of --pairs above the rejected
          one, by column `subset` or `source`. The GVM reads no tau: such files do not say who wrote them.
meta      The judge itself: how often --mode pair agrees with the labels that people gave.

    python judge.py generate --policy runs/toy/dvpo
    python judge.py generate --policy runs/Meta-Llama-3-8B/dvpo --questions alpaca_eval.json
    JUDGE_API_KEY=... python judge.py judge --judge_url https://api.openai.com/v1 --judge_model gpt-4o
        --answers dvpo=dvpo.json --against sft=sft.json --mode score

Every verdict is saved to --verdicts at once: the same command continues an interrupted run, and no question
is paid for twice. A verdict that cannot be read is counted as unread and left out. The key comes from
JUDGE_API_KEY (or OPENAI_API_KEY) and is written nowhere.
"""

import functools
import hashlib
import json
import re
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm  # comes with transformers

from common import (answer_ids, chat_ids, generate, keyed_rng, load_gvm, load_policy, load_reward_model,
                    load_tokenizer, reward_scores, row_seed)
from plumbing.args import command_args
from plumbing.checks import check_model, fingerprint, finite, gvm_settings, read_as_gvm
from plumbing.data import preference_pair, prompt_text, read_data
from plumbing.errors import BadInput, one_line
from plumbing.endpoint import api_key, chat_url, hidden, plain, post, said_in
from plumbing.files import read_rows, write_whole
from plumbing.kept import RESULTS, appended, kept_lines, settings_that_differ
from plumbing.ranks import init_distributed
from plumbing.table import percent, print_table, win_tie_lose
from plumbing.texts import answer_text, readable, text_ids
from evaluate import Gvm, accuracy, held_out_prompts, hits, named_paths, some, token_values


@dataclass
class Args:
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    policy: str = ""  # generate: folder or hub id, default runs/<model name>/dvpo
    policies: list[str] = field(default_factory=list)  # table: name=folder, default sft, ppo, dvpo
    benchmarks: list[str] = field(default_factory=list)  # table: question file, or baseline's answers=file
    name: str = ""  # generate: the policy's name in the answers, default its folder's
    questions: str = ""  # generate, judge: a tool's question file, default the held-out prompts of --data
    data: str = "openbmb/UltraFeedback"  # generate: hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # generate, rank: seed of the split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # generate, rank: continue when more than 10 % of the data had to be dropped
    prompts: int = 256  # generate: at most this many held-out prompts
    temperature: float | None = None  # generate, table: of sampling, 0 is greedy; default each tool's own
    response_length: int = 1024  # generate, table: at most this many tokens per answer [tokens]
    micro_batch: int = 8  # rows of one forward pass
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # number format of the weights
    seed: int = 1  # of the choice of prompts and of sampling
    out: str = ""  # generate: the answers, default runs/<model name>/answers/<name>.<json or jsonl>
    answers: list[str] = field(default_factory=list)  # judge: name=file of each policy that the judge reads
    against: str = ""  # judge: name=file of the answers they are compared with
    mode: Literal["score", "grade", "pair"] = "score"  # judge: points, grades, or two answers side by side
    pairs: str = ""  # rank: json, jsonl or parquet file of preference pairs
    value_model: str = ""  # rank: the GVM's folder
    reward_model: str = ""  # rank: folder of a reward model
    labels: str = ""  # meta: file with rows of input, output_1, output_2 and label
    judge_url: str = ""  # judge, table, meta: https://host/v1, OpenAI-compatible; "": a local model
    judge_model: str = ""  # judge, table, meta: its name there, or the folder or hub id of a local one
    judge_tokens: int = 512  # judge, table, meta: longest verdict [tokens]
    parallel: int = 8  # judge, table, meta: how many requests are sent at the same time
    retries: int = 6  # judge, table, meta: how often to repeat a request after 429, 5xx or a timeout
    timeout: float = 120.0  # judge, table, meta: longest wait for one whole answer [seconds]
    verdicts: str = "verdicts.jsonl"  # judge, table, meta: file that keeps what the judge said
    dry_run: bool = False  # judge, table, meta: only count the requests and tokens
    json: str = ""  # judge, table, rank, meta: write the results to this file


# ---- questions and answers ---------------------------------------------------------------------------------

# temperature by MT-Bench's categories, as its own generator has it; greedy for the other tools
SAMPLING = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
COLUMNS = {"alpaca_eval": {"instruction"}, "arena_hard": {"uid", "prompt"},
           "mt_bench": {"question_id", "turns"}}


def read_questions(path):
    """(kind, questions): id, category, turns (the user's) and the tool's own row of each."""
    rows = list(read_rows(path))
    kind, questions = next((k for k, columns in COLUMNS.items() if columns <= rows[0][1].keys()), None), []
    if kind is None:
        raise BadInput(f"{path}: not a question file of AlpacaEval (instruction), Arena-Hard (uid, prompt) "
                       f"or MT-Bench (question_id, turns); give one of them.")
    for i, (where, row) in enumerate(rows):
        if not COLUMNS[kind] <= row.keys():
            raise BadInput(f"{where}: {', '.join(sorted(COLUMNS[kind] - row.keys()))} is missing; add it.")
        ident = {"alpaca_eval": i, "arena_hard": row.get("uid"), "mt_bench": row.get("question_id")}[kind]
        turns = {"alpaca_eval": [row.get("instruction")], "arena_hard": [row.get("prompt")],
                 "mt_bench": row.get("turns")}[kind]
        if (not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns)
                or not isinstance(ident, (str, int))):
            raise BadInput(f"{where}: its question must be text, its id text or a number; correct the row.")
        questions.append({"id": ident, "category": str(row.get("category", "")), "turns": turns, "row": row})
    if len({question["id"] for question in questions}) < len(questions):
        raise BadInput(f"{path}: two questions have one id; give each its own.")
    return kind, questions


def held_out_questions(args):
    """The held-out prompts of --data, as questions of one turn; earlier turns of a chat come before it."""
    records = held_out_prompts(args)
    if not records:
        raise BadInput(f"--data {args.data}: no prompt of it is held out; give more data.")
    return "prompts", [{"id": hashlib.sha256(text.encode()).hexdigest()[:16], "category": "",
                        "turns": [records[text]["prompt"][-1]["content"]],
                        "before": records[text]["prompt"][:-1], "row": {}}
                       for text in some(list(records), args.prompts, args.seed)]


def markdown_of(text):
    """What Arena-Hard's style control counts: headers, list items and bold text outside of code blocks."""
    text = re.sub(r"```.*?(```|\Z)", "", text, flags=re.S)
    headers = Counter(len(marks) for marks in re.findall(r"^(#{1,6})\s", text, re.M))
    return {"header_count": {f"h{n}": headers[n] for n in range(1, 7)},
            "list_count": {"ordered": len(re.findall(r"^\s*\d+\.\s", text, re.M)),
                           "unordered": len(re.findall(r"^\s*[-*+]\s", text, re.M))},
            "bold_count": {"**": len(re.findall(r"\*\*[^*\n]+\*\*", text)),
                           "__": len(re.findall(r"__[^_\n]+__", text))}}


def tool_row(kind, question, name, answers, tokens, when):
    """One answer as the tool reads it. answers, tokens: texts and lengths of the turns; when: seconds.

    Arena-Hard counts tokens as gpt-4o does, here they are the policy's own: for its style control by length
    let the tool count again.
    """
    ident = hashlib.sha256(json.dumps([name, question["id"]]).encode()).hexdigest()[:22]
    if kind == "alpaca_eval":
        return {"dataset": question["row"].get("dataset", ""), "instruction": question["turns"][0],
                "output": answers[0], "generator": name}
    if kind == "mt_bench":
        return {"question_id": question["id"], "answer_id": ident, "model_id": name,
                "choices": [{"index": 0, "turns": answers}], "tstamp": when}
    messages = [*question.get("before", []), {"role": "user", "content": question["turns"][0]},
                {"role": "assistant", "content": {"answer": answers[0]}}]
    return {"uid": question["id"], "ans_id": ident, "model": name, "messages": messages, "tstamp": when,
            "metadata": {"token_len": tokens[0], **markdown_of(answers[0])}}


def answers_of(policy, tokenizer, questions, temperature, context, args, device):
    """[(texts of the turns, their lengths in tokens, answers that had less room than asked)] of questions,
    all sampled at one temperature. The noise of an answer depends on its question and turn alone."""
    chats = [list(question.get("before", [])) for question in questions]
    texts, lengths, short = [[] for _ in questions], [[] for _ in questions], [0] * len(questions)
    for turn in range(max(len(question["turns"]) for question in questions)):
        here = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
        for i in here:
            chats[i].append({"role": "user", "content": questions[i]["turns"][turn]})
        ids = {i: readable(chat_ids, tokenizer, chats[i]) for i in here}
        room = {i: min(args.response_length, context - len(ids[i])) if ids[i] else 0 for i in here}
        together = [i for i in here if room[i] == args.response_length]
        alone = [[i] for i in here if 0 < room[i] < args.response_length]
        found = {i: [] for i in here}  # empty where the prompt alone fills the context, or has no ids
        for part in filter(None, [together, *alone]):
            seeds = [row_seed(args.seed, str(questions[i]["id"]), turn) for i in part]
            found.update(zip(part, generate(policy, [ids[i] for i in part], seeds, room[part[0]], temperature,
                                            tokenizer, device, batch=args.micro_batch)))
        for i in here:
            text = answer_text(tokenizer, found[i]).strip()
            chats[i].append({"role": "assistant", "content": text})
            texts[i].append(text)
            lengths[i].append(len(readable(text_ids, tokenizer, text) or found[i]))
            short[i] += room[i] < args.response_length
    return list(zip(texts, lengths, short))


def answers_file(args, kind, name):
    suffix = "json" if kind == "alpaca_eval" else "jsonl"
    return Path("runs") / Path(args.model).name / "answers" / f"{name}.{suffix}"


def generate_answers(args, device):
    folder = args.policy or str(Path("runs") / Path(args.model).name / "dvpo")
    name = args.name or Path(folder).name
    kind, questions = read_questions(args.questions) if args.questions else held_out_questions(args)
    out = Path(args.out or answers_file(args, kind, name))
    asked = hashlib.sha256(json.dumps([(q["id"], q["turns"]) for q in questions]).encode()).hexdigest()[:16]
    settings = {"policy": folder, "weights": fingerprint(folder), "name": name, "kind": kind,
                "questions": asked, "seed": args.seed,
                "temperature": args.temperature, "response_length": args.response_length, "dtype": args.dtype}
    partial, record = (out.with_name(f"{out.name}.{part}") for part in ("partial.jsonl", "settings.json"))
    differ = settings_that_differ(record, settings, partial)
    if differ:
        raise BadInput(f"--out {out}: begun with other settings ({', '.join(differ)}); delete {record} "
                       f"and {partial}, or name another file.")
    kept, size = kept_lines(partial, "id", "answers", "tokens")
    done = {row["id"]: row for row in kept}
    begun, finished = partial.exists(), out.exists()
    if (begun or finished) if differ is None else (begun and finished and len(done) < len(questions)):
        raise BadInput(f"--out {out}: a file that judge.py did not write, or {partial} is one; name another.")
    if finished and not begun:
        print(f"{out}: all {len(questions)} answers are there, nothing is left to do")
        return
    tokenizer = load_tokenizer(folder, "--policy")
    context = check_model(folder, tokenizer, "--policy")
    read = functools.partial(readable, chat_ids) if kind == "prompts" else chat_ids  # a tool's are all needed
    known = [question for question in questions if read(tokenizer, [
        *question.get("before", []), {"role": "user", "content": question["turns"][0]}])]
    if len(known) < len(questions):
        print(f"{len(questions) - len(known)} of {len(questions)} prompts cannot become token ids: left out")
    questions = known
    policy = load_policy(folder, tokenizer, getattr(torch, args.dtype), "--policy").to(device).eval()
    write_whole(record, json.dumps(settings, indent=1))
    groups = defaultdict(list)
    for question in questions:
        if question["id"] not in done:
            own = SAMPLING.get(question["category"], 0.0) if kind == "mt_bench" else 0.0
            groups[own if args.temperature is None else args.temperature].append(question)
    with appended(partial, size) as f, tqdm(total=len(questions), initial=len(done), desc="answers",
                                            disable=None) as bar:
        for temperature, group in groups.items():
            for i in range(0, len(group), args.micro_batch):
                part = group[i:i + args.micro_batch]
                found = answers_of(policy, tokenizer, part, temperature, context, args, device)
                for question, (texts, tokens, short) in zip(part, found):
                    row = dict(id=question["id"], answers=texts, tokens=tokens, short=short, when=time.time())
                    done[row["id"]] = row
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
                bar.update(len(part))
    rows = [done[question["id"]] for question in questions]
    written = [tool_row(kind, q, name, r["answers"], r["tokens"], r["when"]) for q, r in zip(questions, rows)]
    if kind == "mt_bench":  # FastChat's own files are in this order
        written.sort(key=lambda row: row["question_id"])
    write_whole(out, json.dumps(written, indent=1, ensure_ascii=False) if kind == "alpaca_eval" else
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    partial.unlink()
    short = sum(row["short"] for row in rows)
    print(f"{out}: {len(rows)} answers of {name}; {short} of them had less room than --response_length in "
          f"the context, {sum('' in row['answers'] for row in rows)} are empty")


def read_answers(path, questions=None):
    """{id: {"turns": the user's, "answers": texts}} of an answer file of any of the formats. An AlpacaEval
    answer's id is its instruction. questions: {id: turns}, which MT-Bench's answers do not bring."""
    found = {}
    for where, row in read_rows(path):
        try:
            if "choices" in row:
                turns = (questions or {}).get(row["question_id"])
                if turns is None:
                    raise BadInput(f"{where}: no question {row['question_id']}; give MT-Bench's question "
                                   f"file with --questions.")
                answer = {"id": row["question_id"], "turns": turns, "answers": row["choices"][0]["turns"]}
            elif "messages" in row:
                *before, last = row["messages"]
                content = last["content"]
                answer = {"id": row["uid"], "turns": ["\n\n".join(m["content"] for m in before)],
                          "answers": [content["answer"] if isinstance(content, dict) else content]}
            else:
                answer = {"id": row["instruction"], "turns": [row["instruction"]], "answers": [row["output"]]}
            texts = [*answer["turns"], *answer["answers"]]
            if len(texts) != 2 * len(answer["turns"]) or not all(isinstance(text, str) for text in texts):
                raise TypeError("not one text for each turn")
            if not isinstance(answer["id"], (str, int)) or not isinstance(answer["answers"], list):
                raise TypeError("its id is no text or number")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
            raise BadInput(f"{where}: not an answer of AlpacaEval, Arena-Hard or MT-Bench "
                           f"({one_line(repr(e))}); correct the row.") from None
        if answer["id"] in found:
            raise BadInput(f"{where}: a second answer to {str(answer['id'])[:60]!r}; keep one.")
        found[answer["id"]] = answer
    return found


# ---- what the judge is asked -------------------------------------------------------------------------------

SCORE = """You grade one response to a user's question. Start at 0 and add one point for each of these that \
holds, so that the total is a whole number from 0 to 5:
1. It is about the question and gives some of the information that was asked for.
2. It covers a good part of what was asked, even if not everything.
3. It answers the main points of the question in a way that is of use.
4. It is complete, clearly written and well organised, in the voice of a helpful assistant.
5. It fits this user and this question exactly, shows real knowledge, and nothing in it is superfluous.
Give your evidence briefly. End with one line of this form:
Score: <total> Evaluation evidence: <your evidence>"""
GRADE = """You grade how good the last answer of an assistant in a conversation is: is it helpful, to the \
point, correct, deep, and detailed enough? Explain briefly. Then give a whole number from 1 to 10 in double \
brackets, like this: Rating: [[5]]"""
PAIR = """You compare the answers that two assistants, A and B, gave to a user. Which one follows the user's \
instructions better and is more helpful, correct and relevant? Neither the order in which they are shown \
nor their length nor their names should matter. Explain briefly. Then give your verdict in double brackets: \
[[A]] if A is better, [[B]] if B is better, [[C]] if they are equally good."""


def conversation(turns, answers, judged):
    """The turns before the last one as a transcript, for a question that has several."""
    return "".join(f"<earlier question>: {q}\n\n<earlier response>: {a}\n\n"
                   for q, a in zip(turns[:judged], answers[:judged]))


def single_request(mode, answer, turn):
    """Messages that have the judge grade the answer to one turn."""
    user = (conversation(answer["turns"], answer["answers"], turn)
            + f"<Question>: {answer['turns'][turn]}\n\n<response>: {answer['answers'][turn]}")
    return [{"role": "system", "content": SCORE if mode == "score" else GRADE},
            {"role": "user", "content": user}]


def pair_request(first, second, turn):
    """Messages that have the judge compare two answers to one turn; `first` is A."""
    parts = [f"[Question]\n{first['turns'][turn]}"]
    for name, answer in (("A", first), ("B", second)):
        before = conversation(answer["turns"], answer["answers"], turn)
        parts.append(f"[The start of assistant {name}'s answer]\n{before}{answer['answers'][turn]}\n"
                     f"[The end of assistant {name}'s answer]")
    return [{"role": "system", "content": PAIR}, {"role": "user", "content": "\n\n".join(parts)}]


# What marks a line that says something, and the form of one verdict; of brackets, from the line's last [[ on
NUMBER = r"([0-9]{1,2}(?:\.[0-9]{1,3})?)"
VERDICTS = {"score": (r"^\W*Score:", r"\W*?Score:[\s*_`<(\[]*" + NUMBER + r"(?: ?/ ?5| out of 5)?"
                                    r"[\s*_`>)\].,;:|–-]*(?:(?:Evaluation|Evidence)\b.*)?"),
            "grade": (r"\[\[[^][]*[0-9]", r"\[\[\s*" + NUMBER + r"\s*\]\](?: ?/ ?10| out of 10)?[\s*_.]*"),
            "pair": (r"\[\[", r"\[\[\s*([ABC])\s*\]\][\s*_.]*")}


def verdict(mode, text):
    """Points of --mode score (0 to 5) and grade (1 to 10), "A", "B" or "C" of --mode pair; None when the text
    does not say. The last line that says something counts, because judges think aloud. Where that is anything
    but one verdict of the scale, as "3 or 4" is, nothing is guessed; of a score the evidence may come behind
    it, and of the others words may stand before it."""
    mark, form = VERDICTS[mode]
    line = ([line for line in (text or "").splitlines() if re.search(mark, line)] or [""])[-1]
    found = re.fullmatch(form, line if mode == "score" else line[max(0, line.rfind("[[")):])
    brackets = {inside.strip() for inside in re.findall(r"\[\[([^][]*)", line)
                if re.match(mark, f"[[{inside}")}
    if not found or (mode != "score" and brackets != {found[1]}):
        return None
    if mode == "pair":
        return found[1]
    low, high = {"score": (0, 5), "grade": (1, 10)}[mode]
    return float(found[1]) if low <= float(found[1]) <= high else None


# ---- asking it ---------------------------------------------------------------------------------------------

class Failed(Exception):
    """A request that got no answer in spite of all retries."""


class Endpoint:
    """Any OpenAI-compatible chat endpoint; called with messages, returns the text."""

    def __init__(self, args):
        self.url, self.key, self.args = chat_url(args.judge_url), api_key(), args

    def __call__(self, messages):
        body = {"model": self.args.judge_model, "messages": messages, "temperature": 0.0,
                "max_tokens": self.args.judge_tokens}
        for attempt in range(self.args.retries + 1):
            wait = 2 ** attempt
            try:
                status, headers, reply = post(self.url, body, self.key, self.args.timeout)
            except Exception as e:  # a timeout, no connection, no HTTP
                last = self.without_key(e)
            else:
                if reply is None:
                    raise Failed("a reply of more bytes than any verdict has")
                text = said_in(reply) if status < 300 else None
                if text is not None:
                    return hidden(text, self.key)
                last = self.without_key(f"status {status} {headers.get('location', '')} {plain(reply)}")
                if status in (401, 403, 404) or 300 <= status < 400:
                    raise BadInput(f"--judge_url: {last}; check the address, --judge_model and "
                                   f"JUDGE_API_KEY.")
                if 400 <= status < 500 and status != 429:  # this question, and asking again would not help
                    raise Failed(last)
                asked = headers.get("retry-after", "")
                wait = float(asked) if re.fullmatch("[0-9]+", asked) else wait
            if attempt < self.args.retries:
                time.sleep(min(wait, 60))
        raise Failed(last)

    def without_key(self, error):
        return one_line(hidden(str(error), self.key))


def ask_local(todo, args, keep):
    """All of todo, {key: messages}, by a model on this machine, greedily; keep(key, text) for each."""
    device = init_distributed()[2]
    tokenizer = load_tokenizer(args.judge_model, "--judge_model")
    context = check_model(args.judge_model, tokenizer, "--judge_model")
    model = load_policy(args.judge_model, tokenizer, getattr(torch, args.dtype), "--judge_model").to(device)
    ids = {key: found for key, (a, b) in todo.items()  # many templates have no system turn
           if (found := readable(chat_ids, tokenizer, [
               {"role": "user", "content": f"{a['content']}\n\n{b['content']}"}]))}
    keys = [key for key in sorted(ids, key=lambda key: len(ids[key]))  # sorted: less padding in a batch
            if len(ids[key]) + args.judge_tokens <= context]
    left = {f"longer than the judge's context of {context} tokens": len(ids) - len(keys),
            "without token ids, for its template fails or a control token is spelt out": len(todo) - len(ids)}
    for i in tqdm(range(0, len(keys), args.micro_batch), "verdicts", disable=None):
        part = keys[i:i + args.micro_batch]
        for key, found in zip(part, generate(model, [ids[key] for key in part], [0] * len(part),
                                             args.judge_tokens, 0.0, tokenizer, device,
                                             batch=args.micro_batch)):
            keep(key, answer_text(tokenizer, found))
    return {reason: n for reason, n in left.items() if n}


def ask_endpoint(todo, ask, parallel, keep):
    """All of todo, {key: messages}, `parallel` at a time; keep(key, text) as each comes back. Returns
    {reason: number} of those that failed."""
    failed, kept = Counter(), set()
    with ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(ask, messages): key for key, messages in todo.items()}
        try:
            for future in tqdm(as_completed(waiting), "verdicts", len(waiting), disable=None):
                kept.add(future)
                try:
                    keep(waiting[future], future.result())
                except Failed as e:
                    failed[str(e)] += 1
                    if len(kept) == failed.total() == 20:  # an hour may go by before all have failed
                        raise BadInput(f"--judge_url: the first 20 requests all failed ({e}); check the "
                                       f"address and --judge_model.") from None
        except BaseException:  # Ctrl-C, a wrong key: nothing more is asked, what is under way is paid for
            pool.shutdown(wait=True, cancel_futures=True)
            for future in set(waiting) - kept:
                if not future.cancelled() and not future.exception():
                    keep(waiting[future], future.result())
            raise
    return failed


KEPT = "key", "judge", "text"  # what a row of --verdicts has


def ask_all(wanted, mode, args, ask=None):
    """What the judge says on all requests, from --verdicts or asked now.

    wanted: {name: messages}, where two names may have the same messages
    ask: function messages -> text in place of the endpoint
    returns {name: verdict or None}, and the numbers of requests; a dry run has no verdicts
    """
    same = (args.judge_url, args.judge_model, args.judge_tokens)  # what a verdict depends on, beside messages
    keys = {name: hashlib.sha256(json.dumps([*same, messages]).encode()).hexdigest()[:32]
            for name, messages in wanted.items()}
    requests = {keys[name]: messages for name, messages in wanted.items()}
    path = Path(args.verdicts)
    rows, size = kept_lines(path, *KEPT)
    texts = {row["key"]: row["text"] for row in rows if str(row["key"]) in requests
             and isinstance(row["text"], str)}
    todo = {key: messages for key, messages in requests.items() if key not in texts}
    letters = sum(len(m["content"]) for messages in todo.values() for m in messages)
    print(f"{len(requests)} requests, {len(requests) - len(todo)} of them answered in {path}; {len(todo)} to "
          f"ask: about {letters // 4} tokens to read and at most {len(todo) * args.judge_tokens} to write")
    if args.dry_run:
        return {}, {"requests": len(requests), "to_ask": len(todo)}
    failed = {}
    if todo:
        with appended(path, size) as f:
            def keep(key, text):
                texts[key] = text
                row = dict(zip(KEPT, (key, args.judge_model, text)))
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
            failed = (ask_endpoint(todo, ask or Endpoint(args), args.parallel, keep) if ask or args.judge_url
                      else ask_local(todo, args, keep))
    for reason, count in failed.items():
        print(f"warning: {count} requests failed ({reason}); the same command asks them again")
    said = {name: verdict(mode, texts.get(key)) for name, key in keys.items()}
    unread = sum(said[name] is None and key in texts for name, key in keys.items())
    return said, {"judge": args.judge_model, "mode": mode, "requests": len(requests),
                  "failed": sum(failed.values()), "unread": unread,
                  "read": sum(found is not None for found in said.values())}


def check_read(asked):
    """A judge that said nothing ends in an error, behind what is written and shown."""
    if asked.get("read") == 0:
        raise BadInput(f"{ASKED.format(**asked)}: nothing could be read, so nothing is compared; look at "
                       f"--judge_url, --judge_model and --judge_tokens.")


# ---- statistics --------------------------------------------------------------------------------------------

def length_controlled(outcome, ours, theirs, groups, draws=200):
    """Win rate at equal length, in the spirit of AlpacaEval 2; 95 % interval by bootstrap over groups.

    P(win) = sigmoid(a + b tanh(d / s)),  d = characters of our answer less theirs, s = root mean square of d
    returns sigmoid(a), where the lengths are equal, in {"win_rate", "low", "high", "length_coefficient": b}

    a and b maximize the likelihood of the outcomes (1, 0, and 1/2 for a tie) less b^2 / 2, which keeps b
    finite where length explains everything. AlpacaEval also has a difficulty for each of its instructions,
    from a table; here questions are not told apart. Swapping the policies gives -a and b: the mirror image.
    """
    y, d = np.asarray(outcome, float), np.asarray(ours, float) - np.asarray(theirs, float)
    x = np.tanh(d / max(np.sqrt(np.mean(d ** 2)), 1e-9))
    _, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    n = index.max() + 1
    picks = keyed_rng("bootstrap").integers(n, size=(draws, n))
    weights = np.stack([np.ones(n), *[np.bincount(pick, minlength=n) for pick in picks]])[:, index]
    a, b = np.zeros((2, 1 + draws))
    for _ in range(30):  # Newton's method, all draws at once; 1e-6: also with wins only
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        ga, gb = (weights * (y - p)).sum(1) - 1e-6 * a, (weights * (y - p) * x).sum(1) - b
        v = weights * p * (1 - p)
        haa, hab, hbb = v.sum(1) + 1e-6, (v * x).sum(1), (v * x * x).sum(1) + 1
        det = haa * hbb - hab ** 2
        step_a, step_b = (hbb * ga - hab * gb) / det, (haa * gb - hab * ga) / det
        a, b = a + np.clip(step_a, -2, 2), b + np.clip(step_b, -2, 2)
    rates = 1 / (1 + np.exp(-a))
    low, high = np.percentile(rates[1:], [2.5, 97.5])
    return {"win_rate": float(rates[0]), "low": float(low), "high": float(high),
            "length_coefficient": float(b[0])}


def mean_of(values):
    return float(np.mean(values)) if len(values) else None


def compare(outcome, ours, theirs, groups):
    """What is said of one policy against another.

    outcome: [N] 1 win, 1/2 tie, 0 lose;  ours, theirs: [N] characters of the answers;  groups: [N] questions
    """
    outcome, ours, theirs = (np.asarray(x, float) for x in (outcome, ours, theirs))
    rate = accuracy(outcome, groups)
    longer_wins = np.where(ours > theirs, outcome, 1 - outcome)[ours != theirs]
    return {"n": len(outcome), "win": float(np.mean(outcome == 1)), "tie": float(np.mean(outcome == 0.5)),
            "lose": float(np.mean(outcome == 0)), "win_rate": rate["accuracy"], "low": rate["low"],
            "high": rate["high"], "length_controlled": length_controlled(outcome, ours, theirs, groups),
            "characters": {"ours": float(ours.mean()), "theirs": float(theirs.mean())},
            "longer_wins": mean_of(longer_wins)}


def of_both_orders(first, second):
    """Outcome of a pair for the answer that was A in the first order and B in the second; None when a verdict
    is missing. Orders that disagree are a tie."""
    if first is None or second is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((first, second), 0.5)


def position_bias(pairs):
    """Of [(verdict, verdict with the answers swapped)]: share of decided verdicts for the first answer, 1/2
    for a judge that ignores the order; share of the pairs with both verdicts in which the two agree."""
    decided = [v for pair in pairs for v in pair if v in ("A", "B")]
    agree = [pair in (("A", "B"), ("B", "A"), ("C", "C")) for pair in pairs if None not in pair]
    return {"first_wins": mean_of([v == "A" for v in decided]), "orders_agree": mean_of(agree)}


# ---- commands ----------------------------------------------------------------------------------------------

def check_judge(args):
    if not args.judge_model:
        raise BadInput("--judge_model: name the judge, a model of --judge_url or a local folder or hub id.")
    if args.judge_url:
        Endpoint(args)  # its address and key are good, or this ends here
    kept_lines(Path(args.verdicts), *KEPT)
    if not args.dry_run:
        with appended(Path(args.verdicts)):  # an unwritable place shows before the expensive work
            pass


def named_file(flag, spec):
    name, _, path = spec.partition("=")
    if not name or not path:
        raise BadInput(f"{flag} {spec!r}: expected name=file, as in dvpo=runs/toy/answers/dvpo.jsonl.")
    return name, path


def judge_answers(args, ask=None):
    check_judge(args)
    named = [named_file("--answers", spec) for spec in args.answers]
    other = named_file("--against", args.against) if args.against else None
    if not named or (other is None and args.mode == "pair"):
        raise BadInput("--answers name=file says what is judged; --mode pair needs --against name=file, too.")
    names = [name for name, _ in [*named, *([other] if other else [])]]
    if len(set(names)) < len(names):
        raise BadInput("--answers, --against: two of them have one name; give each its own.")
    questions = ({q["id"]: q["turns"] for q in read_questions(args.questions)[1]} if args.questions else None)
    answers = {name: read_answers(path, questions) for name, path in [*named, *([other] if other else [])]}
    shared = set.intersection(*map(set, answers.values()))
    left_out = {name: len(found) - len(shared) for name, found in answers.items() if len(found) > len(shared)}
    if not shared:
        raise BadInput("--answers, --against: no question in common; give answers to the same questions.")
    if left_out:
        print(f"warning: answers to questions that not all files have are left out: {left_out}")
    turns = [(i, turn) for i in sorted(shared, key=str) for turn in range(len(answers[names[0]][i]["turns"]))]

    wanted = {}
    for i, turn in turns:
        if args.mode == "pair":
            theirs = answers[other[0]][i]
            for name, _ in named:
                wanted[name, i, turn, 0] = pair_request(answers[name][i], theirs, turn)
                wanted[name, i, turn, 1] = pair_request(theirs, answers[name][i], turn)
        else:
            for name in names:
                wanted[name, i, turn] = single_request(args.mode, answers[name][i], turn)
    said, asked = ask_all(wanted, args.mode, args, ask)
    if args.dry_run:
        return asked
    result = {**asked, "policies": {}}
    for name in names[:len(named)] if args.mode == "pair" else names:
        report = result["policies"][name] = {}
        if args.mode != "pair":
            report["points"] = mean_of([p for at in turns if (p := said[(name, *at)]) is not None])
        if other is None or name == other[0]:
            continue
        if args.mode == "pair":
            verdicts = [(said[name, i, turn, 0], said[name, i, turn, 1]) for i, turn in turns]
            outcomes = [of_both_orders(*pair) for pair in verdicts]
        else:
            verdicts = [(said[name, i, turn], said[other[0], i, turn]) for i, turn in turns]
            outcomes = [None if None in pair else (1 + np.sign(pair[0] - pair[1])) / 2 for pair in verdicts]
        rows = [(outcome, *(len(answers[n][i]["answers"][turn]) for n in (name, other[0])), i)
                for (i, turn), outcome in zip(turns, outcomes) if outcome is not None]
        report["against"] = other[0]
        report.update(compare(*zip(*rows)) if rows else {"n": 0})
        report["left_out"] = len(turns) - len(rows)
        if args.mode == "pair":
            report["position"] = position_bias(verdicts)
    return result


def judge_the_judge(args, ask=None):
    """Agreement with people's labels; a tie, or orders that disagree, count half."""
    check_judge(args)
    if not args.labels:
        raise BadInput("--labels: name a file with rows of input, output_1, output_2 and label.")
    rows, wanted = [], {}
    columns = dict.fromkeys(("input", "output_1", "output_2", "label", "source"))
    for n, (where, row) in enumerate(read_rows(args.labels, columns)):
        texts = [row.get(name) for name in ("input", "output_1", "output_2")]
        if not all(isinstance(text, str) for text in texts) or repr(row.get("label")) not in ("1", "2"):
            raise BadInput(f"{where}: needs texts input, output_1, output_2, and label 1 or 2; correct it.")
        good, bad = ({"turns": texts[:1], "answers": [texts[i]]} for i in (row["label"], 3 - row["label"]))
        wanted.update({(n, 0): pair_request(good, bad, 0), (n, 1): pair_request(bad, good, 0)})
        rows.append({"source": str(row.get("source", "")), "input": texts[0]})
    said, asked = ask_all(wanted, "pair", args, ask)
    if args.dry_run:
        return asked
    verdicts = [(said[n, 0], said[n, 1]) for n in range(len(rows))]
    outcomes = [of_both_orders(*pair) for pair in verdicts]
    result = {**asked, "pairs": len(rows), "position": position_bias(verdicts), "agreement": {}}
    for source in ["all", *sorted({row["source"] for row in rows})]:
        kept = [(outcome, row["input"]) for outcome, row in zip(outcomes, rows)
                if outcome is not None and source in ("all", row["source"])]
        result["agreement"][source] = {"n": len(kept), **(accuracy(*zip(*kept)) if kept else {})}
    return result


def paper_table(args, ask=None):
    """Answers and verdicts of all policies on all question files; what is there already is not made again."""
    check_judge(args)
    policies = named_paths("--policies", args.policies, ("sft", "ppo", "dvpo"), "config.json", args)
    if not args.benchmarks:
        raise BadInput("--benchmarks: name question files, as in alpaca_eval.json, mt_bench/question.jsonl "
                       "or gpt-4-0314.jsonl=arena_hard/question.jsonl.")
    benchmarks = []
    for spec in args.benchmarks:  # all are read before the first answer is sampled
        baseline, _, path = spec.rpartition("=")
        kind, questions = read_questions(path)
        baseline = baseline or (path if kind == "alpaca_eval" else "")
        if kind == "arena_hard" and not baseline:
            raise BadInput(f"--benchmarks {path}: name the baseline's answers, too: answers.jsonl={path}.")
        if baseline and kind != "mt_bench":
            read_answers(baseline)
        benchmarks.append((kind, path, baseline, sum(len(question["turns"]) for question in questions)))
    result = {"judge": args.judge_model, "policies": {}}
    if args.dry_run:  # a grade a turn, or two orders of a pair
        result["policies"]["each"] = {f"{kind}: requests": turns * (1 if kind == "mt_bench" else 2)
                                      for kind, _, _, turns in benchmarks}
        return result
    device = init_distributed()[2]
    for kind, path, baseline, _ in benchmarks:
        files = []
        for name, policy in policies:
            out = answers_file(args, kind, f"{kind}/{name}")
            generate_answers(replace(args, policy=policy, name=name, questions=path, out=str(out)), device)
            files.append(f"{name}={out}")
        how = ({"mode": "grade", "against": "", "questions": path} if kind == "mt_bench" else
               {"mode": "pair", "against": f"baseline={baseline}", "questions": ""})
        found = judge_answers(replace(args, answers=files, **how), ask)
        check_read(found)
        for name, _ in policies:
            report, row = found["policies"][name], result["policies"].setdefault(name, {})
            row[kind] = report.get("points") if kind == "mt_bench" else None
            if report.get("n"):  # AlpacaEval's number is the one at equal length, Arena-Hard's the plain one
                rate = report["length_controlled"] if kind == "alpaca_eval" else report
                row[kind] = 100 * rate["win_rate"]
    return result


def rank_pairs(args, device):
    """Accuracy of the rankers on a file of preference pairs; a tie counts half."""
    if not args.pairs or not (args.value_model or args.reward_model):
        raise BadInput("--pairs FILE with --value_model, --reward_model or both: give them.")
    if args.value_model:
        settings = gvm_settings(args.value_model)
    subsets = {at: str(row.get("subset") or row.get("source") or "") for at, row in
               read_rows(args.pairs, {"subset": None, "source": None})}
    records = [(record, pair) for record in read_data(args.pairs, args.allow_dropped)
               if (pair := preference_pair(record, args.split_seed))]
    if not records:
        raise BadInput(f"--pairs {args.pairs}: no row prefers an answer; give rows of chosen and rejected.")
    chats = [(record["prompt"], response["text"]) for record, pair in records for response in pair]
    scores = {}
    if args.reward_model:
        model, tokenizer, _, _ = load_reward_model(args.reward_model, getattr(torch, args.dtype))
        found = reward_scores(model.to(device), tokenizer, chats, device, args.micro_batch)
        scores["reward model"] = finite(found, f"--reward_model {args.reward_model}", "scores")
        del model
    if args.value_model:
        tokenizer = load_tokenizer(args.value_model, "--value_model")
        read_as_gvm(tokenizer, settings)
        jobs = [(chat_ids(tokenizer, prompt), answer_ids(tokenizer, text)) for prompt, text in chats]
        longest = max(len(prompt) + len(answer) for prompt, answer in jobs)
        if longest > settings["context"]:
            raise BadInput(f"--pairs {args.pairs}: a row of {longest} tokens, and --value_model reads "
                           f"{settings['context']}; take such rows out.")
        model, _ = load_gvm(args.value_model, getattr(torch, args.dtype))
        gvm = Gvm(model.to(device).eval(), tokenizer, settings, device, args.micro_batch)
        values = token_values(gvm, jobs)
        scores["GVM, mean value"] = [v[1:].mean() for v in values]
        scores["GVM, last value"] = [v[-1] for v in values]
    groups = [prompt_text(record["prompt"]) for record, _ in records]
    of = [subsets[record["where"]] for record, _ in records]
    same = [a["text"] == b["text"] for _, (a, b) in records]  # a tie, whatever each is padded with
    result = {"pairs": len(records), "accuracy": {}}
    for name, found in scores.items():
        hit = np.where(same, 0.5, hits(found[::2], found[1::2]))
        for subset in ["all", *sorted(set(of) - {""})]:
            kept = [i for i, own in enumerate(of) if subset in ("all", own)]
            result["accuracy"][f"{name}: {subset}"] = {
                "n": len(kept), **accuracy(hit[kept], [groups[i] for i in kept])}
    return result


def show_judge(result):
    rows, against = [], {found["against"] for found in result["policies"].values() if "against" in found}
    for name, found in result["policies"].items():
        fair, position = found.get("length_controlled", {}), found.get("position", {})
        rows.append([name, found.get("points"), win_tie_lose(found), percent(found.get("win_rate"), found),
                     percent(fair.get("win_rate"), fair), percent(found.get("longer_wins")),
                     percent(position.get("first_wins")), percent(position.get("orders_agree")),
                     found.get("n"), found.get("left_out")])
    print_table(f"{ASKED.format(**result)}; against {' '.join(against) or 'nothing'}",
                ["policy", "points", "win / tie / lose\n[%]", "win rate\n[%] (95 % interval)",
                 "at equal length\n[%] (95 % interval)", "longer\nwins [%]", "first\nwins [%]",
                 "orders\nagree [%]", "compared", "left out"], rows)


def show_table(result):
    names = {"alpaca_eval": "AlpacaEval, win rate\nat equal length [%]",
             "arena_hard": "Arena-Hard,\nwin rate [%]", "mt_bench": "MT-Bench,\ngrade 1 to 10"}
    print_table(f"Judge {result['judge']}; win rates are against the baseline's answers",
                ["policy", *(names.get(kind, kind) for kind in next(iter(result["policies"].values())))],
                [[name, *(x if x is None else f"{x:.4g}" for x in row.values())]
                 for name, row in result["policies"].items()])


def show_meta(result):
    position = {"all": result["position"]}
    print_table(ASKED.format(**result), ["source", "pairs", "agree with people\n[%] (95 % interval)",
                                         "first\nwins [%]", "orders\nagree [%]"],
                [[source or "no source", part["n"], percent(part.get("accuracy"), part),
                  *(percent(position.get(source, {}).get(key)) for key in ("first_wins", "orders_agree"))]
                 for source, part in result["agreement"].items()])


def show_rank(result):
    print_table("How often the chosen answer ranks above the rejected one; a tie counts half",
                ["ranker", "subset", "pairs", "[%] (95 % interval)"],
                [[*name.split(": ", 1), part["n"], percent(part["accuracy"], part)]
                 for name, part in result["accuracy"].items()], left=2)


ASKED = "Judge {judge}, --mode {mode}: {requests} requests, {failed} failed, {unread} not readable"
COMMANDS = {"generate": lambda args: generate_answers(args, init_distributed()[2]), "judge": judge_answers,
            "table": paper_table, "rank": lambda args: rank_pairs(args, init_distributed()[2]),
            "meta": judge_the_judge}
TABLES = {"judge": show_judge, "table": show_table, "rank": show_rank, "meta": show_meta}


def main(argv=None):
    command, args = command_args(Args, COMMANDS, argv, outputs={"json": RESULTS})
    result = {"command": command, "args": vars(args), **(COMMANDS[command](args) or {})}
    if args.json:
        write_whole(Path(args.json), json.dumps(result, indent=1, ensure_ascii=False))
    if command != "generate" and not (args.dry_run and command != "table"):
        TABLES[command](result)
    check_read(result)


if __name__ == "__main__":
    main()
