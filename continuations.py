"""Values by sampling: what the prefixes of an answer are worth under the policy that wrote it.

Where no closed form exists this is the truth to hold a value model against. From several places of an answer
its policy goes on, --continuations times; the mean score of the answers that come out is an unbiased estimate
of Q(s, a) (of V(s_1) at place 0), with a standard error. `evaluate.py gvm --continuations FILE` compares.
Answers in which nothing is said count, too: the policy does say nothing there.

It costs policies x answers x places x continuations samples. An interrupted run goes on with the same
command.

    python continuations.py --model smol
    python continuations.py --policies dvpo=runs/toy/dvpo --temperatures 1 --data answers.jsonl

reads   held-out answers with their policies' names, as label.py writes them; these policies, by the same
        flags; a reward model, or a function
writes  runs/<model name>/continuations.jsonl: for each answer the places, as shares and in tokens, and all
        scores at each
"""

import functools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from common import (answer_ids, chat_ids, generate, keyed_rng, load_policy, load_reward_tokenizer,
                    row_seed)
from plumbing.args import parse_args
from plumbing.checks import tokenizer_fingerprint, weights_fingerprint
from plumbing.data import prompt_text, read_data, report_drops, split_of
from plumbing.errors import BadInput
from plumbing.files import write_whole
from plumbing.inputs import reward_inputs
from plumbing.lean import can_share_prefix, read_once
from plumbing.policies import (SCORING, check_settings, digest, let_go, lock_file, policies_of, sampled_by,
                               score, tokenizers_of, turns_for)
from plumbing.ranks import init_distributed, print0
from plumbing.rows import reward_fits
from plumbing.texts import answer_text, ended, readable
from plumbing.work import Kept, remove_kept


@dataclass
class Args:
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    data: str = ""  # answers of the policies, default runs/<model name>/labels.jsonl
    policies: list[str] = field(default_factory=list)  # name=folder or FILE.json, as for label.py
    temperatures: list[float] = field(default_factory=lambda: [0.7, 1.0, 1.3])  # as for label.py
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the responses had to be dropped
    examples: int = 50  # at most this many answers of each policy
    places: list[float] = field(default_factory=lambda: [0, 0.25, 0.5, 0.75])  # shares of an answer's tokens
    continuations: int = 16  # from each place
    reward_model: str = ""  # one-label sequence classifier, default runs/<model name>/rm
    reward_fn: str = ""  # module:function that gives the score in its place: (rows, None, None) -> numbers
    max_prompt_length: int = 1024  # prompts that are longer are left out [tokens]
    response_length: int = 1024  # at most this many tokens of an answer, its prefix counted [tokens]
    micro_batch: int = 16  # rows of one forward pass on one rank
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights
    seed: int = 1  # choice of the answers, sampling
    out: str = ""  # the file to write, default runs/<model name>/continuations.jsonl
    local_rank: int = -1  # set by the deepspeed launcher


def chosen_answers(policies, tokenizers, args):
    """--examples held-out answers of each policy, as rows: the record of the prompt, policy, response, and
    places, for each of --places (tokens of the answer after which the policy goes on, EOS not counted; key)
    """
    found, dropped = {name: [] for name in policies}, Counter()
    for record in read_data(args.data, args.allow_dropped, log=print0, needs="answers"):
        text = prompt_text(record["prompt"])
        for response in record["responses"] if split_of(text, args.split_seed) == "test" else ():
            name, answer = response["policy"], response["text"]
            if name not in policies:
                continue
            prompt, said = ids_of(record["prompt"], answer, policies[name], tokenizers)
            if not prompt or not said:
                dropped["cannot become token ids"] += 1
            elif len(prompt) > args.max_prompt_length:
                dropped["to prompts over --max_prompt_length"] += 1
            elif max(tokens := [int(share * len(said)) for share in args.places]) >= args.response_length:
                dropped["with a place at or behind --response_length"] += 1
            else:
                found[name].append({"record": record, "policy": name, "response": answer, "places": [
                    (t, digest([name, text, answer, t])) for t in tokens]})
    kept = sum(map(len, found.values()))
    if kept + dropped.total():
        report_drops(dropped, kept + dropped.total(), f"--data {args.data}: held-out answers of --policies",
                     args.allow_dropped, log=print0)
    empty = [name for name, rows in found.items() if not rows]
    if empty:
        raise BadInput(f"--data {args.data}: no held-out answer of {', '.join(empty)} that can be read; the "
                       f"names are label.py's, with the temperature where that is a flag.")
    order = {name: keyed_rng("continued", args.seed, name).permutation(len(rows))[:args.examples]
             for name, rows in found.items()}
    return [rows[i] for name, rows in found.items() for i in sorted(order[name])]


def ids_of(prompt, answer, policy, tokenizers):
    """(ids of the prompt as the policy reads it, ids of the answer without EOS); None of what has none."""
    tokenizer = tokenizers[policy.folder]
    said = readable(answer_ids, tokenizer, answer)
    return readable(chat_ids, tokenizer, turns_for(prompt, policy.system)), said and said[:-1]


def sample(folder, policies, tokenizers, rows, kept, args, device):
    """Append what the policies of this folder say from the places of their rows to `kept`: whole answers, the
    prefixes included."""
    todo = {name: {} for name, policy in policies.items() if policy.folder == folder}
    for row in rows:
        if row["policy"] in todo:
            prompt, said = ids_of(row["record"]["prompt"], row["response"], policies[row["policy"]],
                                  tokenizers)
            todo[row["policy"]].update({key: (key, prompt, said[:t]) for t, key in row["places"]
                                        if key not in kept.rows})
    if not any(todo.values()):
        return
    tokenizer, at_once = tokenizers[folder], max(1, args.micro_batch // args.continuations)
    model = load_policy(folder, tokenizer, getattr(torch, args.dtype), "--policies").to(device).eval()
    longest = max(len(prompt + said) for jobs in todo.values() for _, prompt, said in jobs.values())
    # Asked here, as all ranks have to ask the same
    once = args.micro_batch >= args.continuations and can_share_prefix(model, longest, device)
    begin = functools.partial(read_once, each=args.continuations)
    how = {"batch": at_once * args.continuations, "begin": begin} if once else {"batch": args.micro_batch}

    def go_on(part, name):
        found = []
        for t, jobs in groupby(part, lambda job: len(job[2])):  # as many tokens are left to all of these
            jobs = [(*job, i) for job in jobs for i in range(args.continuations)]
            seeds = [row_seed(args.seed, name, key, i) for key, _, _, i in jobs]
            answers = generate(model, [prompt + said for _, prompt, said, _ in jobs], seeds,
                               args.response_length - t, policies[name].temperature, tokenizer, device,
                               **how)
            found += [(key, said + answer) for (key, _, said, _), answer in zip(jobs, answers)]
        return [{"key": key, "answers": [[answer_text(tokenizer, y).strip(), not ended(tokenizer, y)]
                                         for _, y in whole]}
                for key, whole in groupby(found, lambda pair: pair[0])]
    for name, jobs in todo.items():
        kept.work(sorted(jobs.values(), key=lambda job: len(job[2])),
                  at_once, functools.partial(go_on, name=name), name, device)


def answers_to_score(rows, kept, reader, args):
    """{key: (text of the prompt, policy, answer, truncated)} of all continuations, and the rows that they are
    of: those of which the reward model can read each.  reader: its tokenizer, if there is one"""
    answers, readable_rows, dropped = {}, [], Counter()
    for row in rows:
        prompt = row["record"]["prompt"]
        found = {f"{key} {i}": (prompt_text(prompt), row["policy"], text, cut)
                 for _, key in row["places"] for i, (text, cut) in enumerate(kept.rows[key]["answers"])}
        if reader is None or all(reward_fits(reader, prompt, text) for _, _, text, _ in found.values()):
            answers.update(found)
            readable_rows.append(row)
        else:
            dropped["with a continuation that the reward model cannot read"] += 1
    report_drops(dropped, len(rows), "answers", args.allow_dropped, log=print0)
    return answers, readable_rows


def main(args):
    _, world, device = init_distributed()
    folder = Path("runs") / Path(args.model).name
    args.data = args.data or str(folder / "labels.jsonl")
    out = Path(args.out or folder / "continuations.jsonl")
    policies, reward_model = policies_of(args.policies, args.temperatures), reward_inputs(args)
    if not policies:
        raise BadInput("--policies: name those whose answers are in --data, as for label.py.")
    greedy = [name for name, policy in policies.items() if policy.temperature == 0]
    if greedy or not args.places or not all(0 <= share < 1 for share in args.places):
        raise BadInput(f"--policies: {', '.join(greedy)} at temperature 0 has one continuation; leave it out."
                       if greedy else "--places: give shares of an answer, from 0 to below 1.")
    tokenizers = tokenizers_of(policies, args)
    lock_file(out)
    rows = chosen_answers(policies, tokenizers, args)
    keys = list(dict.fromkeys(key for row in rows for _, key in row["places"]))
    settings = {**sampled_by(policies, tokenizers, reward_model, args), "continuations": args.continuations,
                "places": [row["places"] for row in rows]}
    digests = {name: digest(value) for name, value in settings.items()}
    if check_settings(out, digests):
        remove_kept(out)
        print0(f"{out}: finished, nothing is left to do")
        return
    kept = Kept(out, digest([x for name, x in digests.items() if name not in SCORING])[:8], "answers")
    scores = Kept(out, digest(digests)[:8], "scores")
    print0(f"continuations: {len(rows)} answers of {len(policies)} policies, {len(keys)} places on {world} "
           f"ranks, {args.continuations} continuations from each, {len(kept.rows)} places are there already")

    # 1. sample: one model after the other is in memory
    for path in tokenizers:
        sample(path, policies, tokenizers, rows, kept, args, device)
        let_go()
    kept.read()

    # 2. score
    prompts = {prompt_text(row["record"]["prompt"]): row["record"] for row in rows}
    reader = load_reward_tokenizer(reward_model) if reward_model else None
    answers, rows = answers_to_score(rows, kept, reader, args)
    score(answers, prompts, scores, args, reward_model, device)
    scores.read()

    # 3. write
    if dist.get_rank() == 0:
        lines, means = [], defaultdict(list)
        by = ({"reward_model": weights_fingerprint(reward_model)} if reward_model else
              {"reward_fn": args.reward_fn})
        for row in rows:
            found = [[scores.rows[f"{key} {i}"]["score"] for i in range(args.continuations)]
                     for _, key in row["places"]]
            means[row["policy"]].append(sum(found[0]) / args.continuations)
            reader = tokenizer_fingerprint(tokenizers[policies[row["policy"]].folder])
            lines.append(json.dumps({
                "prompt": row["record"]["prompt"], "policy": row["policy"], "response": row["response"],
                "tokenizer": reader, **by, "places": args.places, "tokens": [t for t, _ in row["places"]],
                "scores": found}, ensure_ascii=False) + "\n")
        write_whole(out, "".join(lines))
        for name, found in means.items():
            print(f"  {name}: {len(found)} answers, mean value at place {args.places[0]:g}: "
                  f"{sum(found) / len(found):.3f}")
        print(f"{out}: {len(lines)} answers, {len(keys)} places")
    dist.barrier()
    remove_kept(out)


if __name__ == "__main__":
    try:
        main(parse_args(Args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; what is sampled is kept, the same command goes on") from None
    dist.destroy_process_group()  # else NCCL warns of a group left behind
