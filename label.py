"""Answers of several policies, scored by a reward model or by a rule: the data of the paper's Instruction
setting, which starts from an instruction-tuned model and has nobody's preferences.

Each policy answers at each temperature, and that is a policy of its own: its name stands on each answer, as
`sft@0.7`, so that tau shows real samples of real policies. An existing reward model scores all answers; its
scores are mapped linearly, the lowest 1 % to 1 and the highest 1 % to 10, which `train_gvm.py --reward score`
takes as -1 and +1. Or a function does (--reward_fn), whose numbers are kept as they are. train_gvm.py,
train_dvpo.py and the baselines then read the file by --data, as any other.

A file of policies, `--policies policies.json`, can give each a system prompt, which is not in the data: what
tau shows of a policy is what it wrote. Its rows: {"name": "gloomy", "model": a folder or an id, and, where
wanted, "system": "You expect the worst.", "temperature": 1.0}; without the last at each of --temperatures.

An answer that --response_length cut has `"truncated": true`; our reward models score it as if it ended there.
An interrupted run goes on with the same command: what is sampled and scored is kept beside --out. The noise
of an answer depends on its prompt and policy alone: but for rounding the number of ranks changes nothing.

    python label.py                                                   the toy, on one CPU rank
    deepspeed label.py --model mistralai/Mistral-7B-Instruct-v0.2 --reward_model <a sequence classifier>

reads   prompts of --data (in any of its shapes, or rows of `instruction` or `prompt` alone; its answers are
        not looked at), policies, a reward model: any causal one-label sequence classifier, or a function
writes  runs/<model name>/labels.jsonl in the schema of openbmb/UltraFeedback, and labels.jsonl.settings
"""

import functools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from common import (chat_ids, generate, keyed_rng, load_policy, load_reward_tokenizer, load_tokenizer,
                    row_seed)
from plumbing.args import parse_args
from plumbing.data import prompt_text, read_data, report_drops, split_of
from plumbing.errors import BadInput
from plumbing.files import write_whole
from plumbing.inputs import reward_inputs
from plumbing.policies import (SCORING, check_settings, digest, let_go, lock_file, policies_of, sampled_by,
                               score, tokenizers_of, turns_for)
from plumbing.ranks import init_distributed, print0
from plumbing.rows import reward_fits
from plumbing.texts import answer_text, ended, readable
from plumbing.work import Kept, remove_kept

SHARES = ("sft", "value", "rl", "test")


@dataclass
class Args:
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    policies: list[str] = field(default_factory=list)  # name=folder or FILE.json; default the SFT model
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0, 1.3])  # of the sampler, 0 is greedy
    per_prompt: int = 4  # how many of them answer each prompt, drawn for it; 0: all
    answers: list[str] = field(default_factory=list)  # files like --data; name=file names their policy
    reward_model: str = ""  # one-label sequence classifier, default runs/<model name>/rm
    score_range: list[float] = field(default_factory=list)  # scores that become 1 and 10; see labelled_rows
    reward_fn: str = ""  # module:function that gives the score in its place: (rows, None, None) -> numbers
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

def prompts_of(records, readers, args):
    """{text of the prompt: its record}, of the shares that are asked for, each prompt once.
    readers: (tokenizer, system prompt) of all who read it"""
    found, seen, dropped = {}, set(), Counter()
    for record in records:
        text, turns = prompt_text(record["prompt"]), record["prompt"]
        if split_of(text, args.split_seed) not in args.shares or text in seen:
            continue
        seen.add(text)
        if len(turns) > 1:
            dropped["prompt of several turns or with a system turn; UltraFeedback's schema has one turn"] += 1
        elif None in (ids := [readable(chat_ids, t, turns_for(turns, system)) for t, system in readers]):
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
    """{name of a policy: texts of the prompts that it answers}"""
    names, jobs = list(policies), {name: [] for name in policies}
    for text in prompts:
        draw = keyed_rng("policies", args.seed, text).permutation(len(names))
        for i in sorted(draw[:args.per_prompt or len(names)]):
            jobs[names[i]].append(text)
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


# ---- sampling ----------------------------------------------------------------------------------------------

def answer_key(text, policy):
    return digest([text, policy])


def sample(folder, policies, jobs, prompts, kept, args, device):
    """Append the answers of the policies that are this folder's to `kept`."""
    todo = {name: [text for text in jobs[name] if answer_key(text, name) not in kept.rows]
            for name, policy in policies.items() if policy.folder == folder}
    if not any(todo.values()):
        return
    tokenizer = load_tokenizer(folder, "--policies")
    policy = load_policy(folder, tokenizer, getattr(torch, args.dtype), "--policies").to(device).eval()

    def answer(part, name):
        ids = [chat_ids(tokenizer, turns_for(prompts[text]["prompt"], policies[name].system))
               for text in part]
        seeds = [row_seed(args.seed, text, name) for text in part]
        found = generate(policy, ids, seeds, args.response_length, policies[name].temperature, tokenizer,
                         device, batch=args.micro_batch)
        return [{"key": answer_key(text, name), "text": answer_text(tokenizer, y).strip(),
                 "truncated": not ended(tokenizer, y)} for text, y in zip(part, found)]
    for name, texts in todo.items():
        kept.work(texts, args.micro_batch, functools.partial(answer, name=name), name, device)


def answers_to_score(found, prompts, tokenizer, args):
    """{key: (text of the prompt, policy, answer, truncated)} of what can be scored; the rest is counted.
    truncated: None where it is not known;  tokenizer: the reward model's, if there is one"""
    answers, dropped, twice = {}, Counter(), 0
    for text, policy, answer, truncated in found:
        key = digest([text, policy, answer])  # a file may have several answers of one policy
        if not answer.strip():
            dropped["empty"] += 1
        elif key in answers:
            twice += 1
        elif tokenizer and not reward_fits(tokenizer, prompts[text]["prompt"], answer):
            dropped[f"longer than the {tokenizer.context} tokens of the reward model's context"] += 1
        else:
            answers[key] = text, policy, answer, truncated
    source = f"{len(found)} answers, {twice} of them said before by the same policy"
    report_drops(dropped, len(found) - twice, source, args.allow_dropped, log=print0)
    return answers


def labelled_rows(prompts, answers, scores, args):
    """Rows in the schema of openbmb/UltraFeedback. Of a reward model's scores the lowest 1 % become 1, the
    highest 1 % 10: between them the map is linear, and one absurd answer does not press the others together.
    With --score_range LOW HIGH several files have one map. A function's are kept: what they mean is known."""
    low, high = args.score_range or np.quantile(list(scores.values()), [0, 1] if args.reward_fn else
                                                [0.01, 0.99])
    if low == high:
        raise BadInput(f"all {len(scores)} numbers of --reward_fn {args.reward_fn} are {low:g}: it tells "
                       f"nothing apart; take another." if args.reward_fn else
                       f"98 % of the {len(scores)} scores of --reward_model are {low:g}: it tells "
                       f"nothing apart; take another.")
    completions = defaultdict(list)
    for key, (text, policy, answer, truncated) in answers.items():
        mapped = 1 + 9 * min(1.0, max(0.0, float((scores[key] - low) / (high - low))))
        score = ({"overall_score": scores[key]} if args.reward_fn else
                 {"overall_score": round(mapped, 6), "reward_model_score": scores[key]})
        completions[text].append({"model": policy, "response": answer, **score,
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
    if args.score_range and (len(args.score_range) != 2 or not args.score_range[0] < args.score_range[1]
                             or args.reward_fn):
        raise BadInput("--score_range: two scores of a reward model, the lower one first; a function's "
                       "numbers are kept as they are.")
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
    policies = policies_of(args.policies or default_policies(args), args.temperatures)
    reward_model = reward_inputs(args)
    tokenizers = tokenizers_of(policies, args)
    rm_tokenizer = load_reward_tokenizer(reward_model) if reward_model else None
    readers = [(tokenizers[folder], system) for folder, system in dict.fromkeys(
        (policy.folder, policy.system) for policy in policies.values())]
    readers += [(rm_tokenizer, "")] if reward_model else []
    out = Path(args.out or Path("runs") / Path(args.model).name / "labels.jsonl")
    lock_file(out)

    records = read_data(args.data, args.allow_dropped, log=print0, needs="prompts")
    prompts = prompts_of(records, readers, args)
    jobs, given = sampling_jobs(prompts, policies, args), given_answers(prompts, args)
    settings = {**sampled_by(policies, tokenizers, reward_model, args), "answers": given, "jobs": jobs,
                "prompts": list(prompts), **({"range": args.score_range} if args.score_range else {})}
    digests = {name: digest(value) for name, value in settings.items()}
    if check_settings(out, digests):
        remove_kept(out)  # left by a run that was killed when it had written all
        print0(f"{out}: finished, nothing is left to do")
        return
    texts = Kept(out, digest([x for name, x in digests.items() if name not in SCORING])[:8], "answers")
    scores = Kept(out, digest(digests)[:8], "scores")
    print0(f"label: {len(prompts)} prompts, {sum(map(len, jobs.values()))} answers to sample "
           f"on {world} ranks, {len(texts.rows)} of them there already; {len(given)} are given")

    # 1. sample: one policy after the other is in memory
    for folder in tokenizers:
        sample(folder, policies, jobs, prompts, texts, args, device)
        let_go()
    texts.read()

    # 2. score
    sampled = [(text, name, texts.rows[answer_key(text, name)])
               for name, its_prompts in jobs.items() for text in its_prompts]
    found = [(text, name, row["text"], row["truncated"]) for text, name, row in sampled]
    found += [(*answer, None) for answer in given]
    answers = answers_to_score(found, prompts, rm_tokenizer, args)
    score(answers, prompts, scores, args, reward_model, device)
    scores.read()

    # 3. write
    found = {key: scores.rows[key]["score"] for key in answers}
    rows, low, high = labelled_rows(prompts, answers, found, args)
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
        flags = f": train_gvm.py --reward score --score_min {float(low)} --score_max {float(high)}"
        use = flags if args.reward_fn else f" became 1 to 10 (--score_range {float(low)} {float(high)})"
        print(f"{out}: {len(rows)} rows, {len(answers)} answers; scores from {low:.3f} to {high:.3f}{use}")
    dist.barrier()
    remove_kept(out)


if __name__ == "__main__":
    try:
        main(parse_args(Args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; what is sampled and scored is kept, the same command goes on") from None
    dist.destroy_process_group()  # else NCCL warns of a group left behind
