"""Answers of several policies, scored by a reward model: the data of the paper's Instruction setting, which
starts from an instruction-tuned model and has nobody's preferences.

Each policy answers at each temperature, and that is a policy of its own: its name stands on each answer, as
`sft@0.7`, so that tau shows real samples of real policies. An existing reward model scores all answers; its
scores are mapped linearly, the lowest 1 % to 1 and the highest 1 % to 10, which `train_gvm.py --reward score`
takes as -1 and +1. train_gvm.py, train_dvpo.py and the baselines then read the file by --data, as any other.

An answer that --response_length cut has `"truncated": true`; our reward models score it as if it ended there.
An interrupted run goes on with the same command: what is sampled and scored is kept beside --out. The noise
of an answer depends on its prompt and policy alone: but for rounding the number of ranks changes nothing.

    python label.py                                                   the toy, on one CPU rank
    deepspeed label.py --model mistralai/Mistral-7B-Instruct-v0.2 --reward_model <a sequence classifier>

reads   prompts of --data (in any of its shapes, or rows of `instruction` or `prompt` alone; its answers are
        not looked at), policies, a reward model: any causal one-label sequence classifier
writes  runs/<model name>/labels.jsonl in the schema of openbmb/UltraFeedback, and labels.jsonl.settings
"""

import functools
import gc
import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm  # comes with transformers

from common import (chat_ids, generate, keyed_rng, load_policy, load_reward_model, load_reward_tokenizer,
                    load_tokenizer, reward_scores, row_seed)
from plumbing.args import parse_args
from plumbing.checks import check_model, fingerprint
from plumbing.data import prompt_text, read_data, report_drops, split_of
from plumbing.errors import BadInput
from plumbing.files import write_whole
from plumbing.folders import stage_folder, take_lock
from plumbing.kept import appended, kept_lines, settings_that_differ
from plumbing.ranks import all_sum, init_distributed, print0
from plumbing.rows import reward_chat, reward_fits
from plumbing.texts import answer_text, ended, readable
from evaluate import split_words

SHARES = ("sft", "value", "rl", "test")
SCORING = {"reward_model", "answers"}  # settings that change no sampled answer


@dataclass
class Args:
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    policies: list[str] = field(default_factory=list)  # name=folder; default the SFT model, else --model
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0, 1.3])  # of the sampler, 0 is greedy
    per_prompt: int = 4  # how many of them answer each prompt, drawn for it; 0: all
    answers: list[str] = field(default_factory=list)  # files like --data; name=file names their policy
    reward_model: str = ""  # one-label sequence classifier, default runs/<model name>/rm
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file; prompts only
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    shares: list[str] = field(default_factory=lambda: ["value", "rl", "test"])  # whose prompts to take
    prompts: int = 10**9  # at most this many prompts, drawn from all
    allow_dropped: bool = False  # continue when more than 10 % of the prompts had to be dropped
    max_prompt_length: int = 1024  # longer prompts are dropped and counted [tokens]
    response_length: int = 1024  # at most this many sampled tokens per answer [tokens]
    micro_batch: int = 16  # rows of one forward pass on one rank
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights
    seed: int = 1  # choice of prompts and of the policies of each, sampling
    out: str = ""  # the file to write, default runs/<model name>/labels.jsonl
    local_rank: int = -1  # set by the deepspeed launcher


# ---- prompts and jobs --------------------------------------------------------------------------------------

def prompts_of(records, tokenizers, args):
    """{text of the prompt: its record}, of the shares that are asked for, each prompt once."""
    found, seen, dropped = {}, set(), Counter()
    for record in records:
        text, turns = prompt_text(record["prompt"]), record["prompt"]
        if split_of(text, args.split_seed) not in args.shares or text in seen:
            continue
        seen.add(text)
        if len(turns) > 1:
            dropped["prompt of several turns or with a system turn; UltraFeedback's schema has one turn"] += 1
        elif None in (ids := [readable(chat_ids, t, turns) for t in tokenizers]):
            dropped["prompt that a chat template fails on, or with a control token spelt out"] += 1
        elif max(map(len, ids)) > args.max_prompt_length:
            dropped[f"prompt over --max_prompt_length {args.max_prompt_length}"] += 1
        else:
            found[text] = record
    if not found and not dropped:
        raise BadInput(f"--data {args.data}: no prompt of --shares {' '.join(args.shares)} is in it; give "
                       f"more data or other shares.")
    report_drops(dropped, len(found) + dropped.total(), args.data, args.allow_dropped, log=print0)
    kept = sorted(keyed_rng("prompts", args.seed).permutation(len(found))[:args.prompts])
    texts = list(found)
    return {texts[i]: found[texts[i]] for i in kept}


def sampling_jobs(prompts, policies, args):
    """{name@temperature: (folder, temperature, texts of the prompts that it answers)}"""
    jobs = {f"{name}@{t:g}": (folder, t, []) for name, folder in policies for t in args.temperatures}
    names = list(jobs)
    for text in prompts:
        draw = keyed_rng("policies", args.seed, text).permutation(len(names))
        for i in sorted(draw[:args.per_prompt or len(names)]):
            jobs[names[i]][2].append(text)
    return jobs


def given_answers(prompts, args):
    """[(text of the prompt, policy, answer)] of the files of --answers, those to other prompts left out."""
    found = []
    for spec in args.answers:
        name, equals, path = spec.partition("=")
        name, path = (name, path) if equals and not Path(spec).exists() else ("", spec)
        kept = other = 0
        for record in read_data(path, args.allow_dropped, log=print0, needs="answers"):
            for response in record["responses"]:
                policy = name or response["policy"]
                if not policy:
                    raise BadInput(f"{record['where']}: no policy name on its answers; give it with "
                                   f"--answers name={path}.")
                if prompt_text(record["prompt"]) in prompts:
                    found.append((prompt_text(record["prompt"]), policy, response["text"]))
                    kept += 1
                else:
                    other += 1
        print0(f"--answers {path}: {kept} answers taken, {other} are to prompts that are not labelled here")
    return found


# ---- work that is kept -------------------------------------------------------------------------------------

class Kept:
    """Rows {"key": ..., ...} that all ranks append to files of their own beside --out, and read together. The
    files' names have a digest of what made the rows, so that none of other settings is ever taken."""

    def __init__(self, out, digest, kind):
        self.folder, self.name = out.parent, f"{out.name}.{digest}.{kind}.rank"
        self.path = self.folder / f"{self.name}{dist.get_rank()}.jsonl"
        self.rows, self.size = {}, 0
        self.read()

    def files(self):
        return sorted(path for path in self.folder.iterdir() if path.name.startswith(self.name))

    def read(self):
        """Every rank gets what all of them have written."""
        dist.barrier()
        for path in self.files():
            rows, size = kept_lines(path, "key")
            self.rows.update((row["key"], row) for row in rows)
            self.size = size if path == self.path else self.size
        dist.barrier()  # nobody writes before all have read

    def work(self, todo, batch, do, title, device):
        """do(part) -> rows, for the parts of todo, dealt to the ranks `batch` at a time; the rows are kept.
        The ranks stay together, so that none of them waits for longer than a batch takes. What the others
        have written is in `rows` after the next read()."""
        rank, world = dist.get_rank(), dist.get_world_size()
        with appended(self.path, self.size) as f, tqdm(total=len(todo), desc=title,
                                                       disable=None if rank == 0 else True) as bar:
            for i in range(0, len(todo), batch * world):
                part = todo[i:i + batch * world][rank::world]
                for row in do(part) if part else ():
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                f.flush()
                bar.update(int(all_sum(len(part), device=device)[0]))
        self.size = None  # the file ends with a whole line from here on


def remove_kept(out):
    """Called by every rank when the file is whole."""
    for path in list(out.parent.iterdir()) if dist.get_rank() == 0 else ():
        if re.fullmatch(re.escape(out.name) + r"\.\w+\.(answers|scores)\.rank\d+\.jsonl", path.name):
            path.unlink()


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def answer_key(text, policy):
    return digest([text, policy])


def check_settings(out, settings):
    """Whether the file is finished already; BadInput where it was begun with other settings.

    settings: {name: digest}. Of a file that is not finished only the sampling ones must be the same: another
              reward model may score what is sampled
    """
    record = out.with_name(f"{out.name}.settings")
    differ = settings_that_differ(record, settings, out)
    finished = out.exists()
    if differ is None and finished:
        raise BadInput(f"--out {out}: exists, and was not written by label.py; name another file.")
    binding = [key for key in differ or () if finished or key not in SCORING]
    if binding:
        raise BadInput(f"--out {out}: begun with other settings ({', '.join(differ)}); delete {record} and "
                       f"{out}, or name another file.")
    dist.barrier()  # all have looked, before the first one writes
    if dist.get_rank() == 0 and differ != []:
        write_whole(record, json.dumps(settings, indent=1))
    return finished


# ---- sampling and scoring ----------------------------------------------------------------------------------

def sample(folder, jobs, prompts, kept, args, device):
    """Append a policy's answers to `kept`. jobs: those of sampling_jobs whose folder is this one"""
    todo = {name: [text for text in texts if answer_key(text, name) not in kept.rows]
            for name, (_, _, texts) in jobs.items()}
    if not any(todo.values()):
        return
    tokenizer = load_tokenizer(folder, "--policies")
    policy = load_policy(folder, tokenizer, getattr(torch, args.dtype), "--policies").to(device).eval()

    def answer(part, name):
        ids = [chat_ids(tokenizer, prompts[text]["prompt"]) for text in part]
        seeds = [row_seed(args.seed, text, name) for text in part]
        found = generate(policy, ids, seeds, args.response_length, jobs[name][1], tokenizer, device,
                         batch=args.micro_batch)
        return [{"key": answer_key(text, name), "text": answer_text(tokenizer, y).strip(),
                 "truncated": not ended(tokenizer, y)} for text, y in zip(part, found)]
    for name, texts in todo.items():
        kept.work(texts, args.micro_batch, functools.partial(answer, name=name), name, device)


def let_go():
    """Free the memory of the last model at once: the next one needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score(answers, prompts, kept, args, reward_model, device):
    """Append the reward model's score of each answer to `kept`; answers: {key: (text of the prompt, policy,
    answer, truncated)}. Ours reads them as complete answers, EOS behind them, as every stage will."""
    todo = [key for key in answers if key not in kept.rows]
    if not todo:
        return
    model, tokenizer, *_ = load_reward_model(reward_model, getattr(torch, args.dtype))
    model = model.to(device)

    def scores(part):
        chats = [reward_chat(tokenizer, prompts[a[0]]["prompt"], *a[2:]) for a in map(answers.get, part)]
        found = reward_scores(model, tokenizer, chats, device, args.micro_batch)
        if not np.isfinite(found).all():
            bad = next(chat for chat, x in zip(chats, found) if not np.isfinite(x))
            raise BadInput(f"--reward_model {reward_model}: its score of an answer to "
                           f"{bad[0][-1]['content'][:80]!r} is not finite; take another, or --dtype float32 "
                           f"(which samples anew).")
        return [{"key": key, "score": x} for key, x in zip(part, found)]
    kept.work(todo, args.micro_batch, scores, "scores", device)


def answers_to_score(found, prompts, tokenizer, args):
    """{key: (text of the prompt, policy, answer, truncated)} of what can be scored; the rest is counted.
    truncated: None where it is not known;  tokenizer: the reward model's"""
    answers, dropped, twice = {}, Counter(), 0
    for text, policy, answer, truncated in found:
        key = digest([text, policy, answer])  # a file may have several answers of one policy
        if not answer.strip():
            dropped["empty"] += 1
        elif key in answers:
            twice += 1
        elif not reward_fits(tokenizer, prompts[text]["prompt"], answer):
            dropped[f"longer than the {tokenizer.context} tokens of the reward model's context"] += 1
        else:
            answers[key] = text, policy, answer, truncated
    source = f"{len(found)} answers, {twice} of them said before by the same policy"
    report_drops(dropped, len(found) - twice, source, args.allow_dropped, log=print0)
    return answers


def labelled_rows(prompts, answers, scores):
    """Rows in the schema of openbmb/UltraFeedback. The lowest 1 % of all scores become 1, the highest 1 % 10:
    between them the map is linear, and one absurd answer does not press the others together."""
    low, high = np.quantile(list(scores.values()), [0.01, 0.99])
    if low == high:
        raise BadInput(f"98 % of the {len(scores)} scores of --reward_model are {low:g}: it tells nothing "
                       f"apart; take another.")
    completions = defaultdict(list)
    for key, (text, policy, answer, truncated) in answers.items():
        mapped = 1 + 9 * min(1.0, max(0.0, float((scores[key] - low) / (high - low))))
        completions[text].append({"model": policy, "response": answer, "overall_score": round(mapped, 6),
                                  "reward_model_score": scores[key],
                                  **({} if truncated is None else {"truncated": truncated})})
    rows = []
    for text, record in prompts.items():
        if completions[text]:
            group = {} if record["group"] == text else {"group": record["group"]}
            rows.append({"source": "label.py", "instruction": record["prompt"][0]["content"],
                         "models": [c["model"] for c in completions[text]], "completions": completions[text],
                         **group})
    return rows, low, high


def check_args(args):
    wrong = [t for t in args.temperatures if not 0 <= t < float("inf")]
    if wrong or (not args.temperatures and not args.answers):
        raise BadInput(f"--temperatures {' '.join(map(str, wrong))}: give numbers from 0 on.")
    if len({f"{t:g}" for t in args.temperatures}) < len(args.temperatures):
        raise BadInput("--temperatures: two of them are one; they name the policies.")
    if not args.shares or set(args.shares) - set(SHARES):
        raise BadInput(f"--shares {' '.join(args.shares)}: some of {', '.join(SHARES)}.")
    if args.per_prompt < 0:
        raise BadInput(f"--per_prompt {args.per_prompt}: a number of policies, or 0 for all.")


def default_policies(args):
    """The model of sft.py where there is one, else --model itself; none where the answers are given."""
    sft = Path("runs") / Path(args.model).name / "sft"
    found = f"sft={sft}" if (sft / "config.json").exists() else f"{Path(args.model).name}={args.model}"
    return [] if args.answers else [found]


def main(args):
    _, world, device = init_distributed()
    check_args(args)
    policies = split_words("--policies", args.policies or default_policies(args))
    if len(dict(policies)) < len(policies):
        raise BadInput("--policies: two of them have one name; give each its own.")
    reward_model = stage_folder(args.model, "rm", args.reward_model, "--reward_model",
                                f"train_rm.py --model {args.model}")
    tokens = args.max_prompt_length + args.response_length
    asked = f"--max_prompt_length {args.max_prompt_length} + --response_length {args.response_length}"
    tokenizers = [load_tokenizer(folder, "--policies") for _, folder in policies]
    for (_, folder), tokenizer in zip(policies, tokenizers):
        check_model(folder, tokenizer, "--policies", tokens, asked)
    rm_tokenizer = load_reward_tokenizer(reward_model, "--reward_model", tokens, asked)
    out = Path(args.out or Path("runs") / Path(args.model).name / "labels.jsonl")
    if out.is_dir() or not out.name:
        raise BadInput(f"--out {out} is a folder: name a file in it.")
    take_lock(out.with_name(f".{out.name}.lock"), f"--out {out}")

    records = read_data(args.data, args.allow_dropped, log=print0, needs="prompts")
    prompts = prompts_of(records, [*tokenizers, rm_tokenizer], args)
    jobs, given = sampling_jobs(prompts, policies, args), given_answers(prompts, args)
    settings = {"reward_model": f"{reward_model} {fingerprint(reward_model)}", "answers": given,
                "policies": {name: f"{folder} {fingerprint(folder)}" for name, folder in policies},
                "jobs": {name: job[2] for name, job in jobs.items()}, "prompts": list(prompts),
                "response_length": args.response_length, "dtype": args.dtype, "seed": args.seed}
    digests = {name: digest(value) for name, value in settings.items()}
    if check_settings(out, digests):
        remove_kept(out)  # left by a run that was killed when it had written all
        print0(f"{out}: finished, nothing is left to do")
        return
    texts = Kept(out, digest([x for name, x in digests.items() if name not in SCORING])[:8], "answers")
    scores = Kept(out, digest(digests)[:8], "scores")
    print0(f"label: {len(prompts)} prompts, {sum(len(job[2]) for job in jobs.values())} answers to sample "
           f"on {world} ranks, {len(texts.rows)} of them there already; {len(given)} are given")

    # 1. sample: one policy after the other is in memory
    for folder in dict.fromkeys(folder for _, folder in policies):
        its_own = {name: job for name, job in jobs.items() if job[0] == folder}
        sample(folder, its_own, prompts, texts, args, device)
        let_go()
    texts.read()

    # 2. score
    sampled = [(text, name, texts.rows[answer_key(text, name)])
               for name, (_, _, its_prompts) in jobs.items() for text in its_prompts]
    found = [(text, name, row["text"], row["truncated"]) for text, name, row in sampled]
    found += [(*answer, None) for answer in given]
    answers = answers_to_score(found, prompts, rm_tokenizer, args)
    score(answers, prompts, scores, args, reward_model, device)
    scores.read()

    # 3. write
    rows, low, high = labelled_rows(prompts, answers, {key: scores.rows[key]["score"] for key in answers})
    if dist.get_rank() == 0:
        write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        of_policy = defaultdict(list)
        for key, (_, policy, _, truncated) in answers.items():
            of_policy[policy].append((scores.rows[key]["score"], truncated))
        for policy, pairs in of_policy.items():
            cut = [truncated for _, truncated in pairs if truncated is not None]
            text = f", {np.mean(cut):.0%} cut at --response_length" if cut else ""
            text += "; warning: that is most of them: raise it" * (sum(cut) > len(cut) / 2)
            print(f"  {policy}: {len(pairs)} answers, mean score {np.mean([x for x, _ in pairs]):.3f}{text}")
        print(f"{out}: {len(rows)} rows, {len(answers)} answers; scores from {low:.3f} to {high:.3f} became "
              f"1 to 10")
    dist.barrier()
    remove_kept(out)


if __name__ == "__main__":
    try:
        main(parse_args(Args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; what is sampled and scored is kept, the same command goes on") from None
    dist.destroy_process_group()  # else NCCL warns of a group left behind
