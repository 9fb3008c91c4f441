"""Values by sampling: what the prefixes of an answer are worth under the policy that wrote it.

Where no closed form exists this is the truth to hold a value model against. From several places of an answer
its policy goes on, --continuations times; the mean score of the answers that come out is an unbiased estimate
of Q(s, a) (of V(s_1) at place 0), with a standard error. `evaluate.py gvm --continuations FILE` compares.

It costs policies x answers x places x continuations samples. An interrupted run goes on with the same
command.

    python continuations.py --model smol
    python continuations.py --policies dvpo=runs/toy/dvpo --temperatures 1 --data answers.jsonl

reads   held-out answers with their policies' names, as label.py writes them; these policies, by the same
        flags; a reward model, or a function
writes  runs/<model name>/continuations.jsonl: for each answer the places, in tokens, and all scores at each
"""

import functools
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from common import (answer_ids, chat_ids, generate, keyed_rng, load_policy, load_reward_tokenizer,
                    load_tokenizer, row_seed)
from label import check_settings, digest, let_go, policies_of, score, source_of, turns_for
from plumbing.args import parse_args
from plumbing.checks import check_model, fingerprint, tokenizer_fingerprint, weights_fingerprint
from plumbing.data import prompt_text, read_data, split_of
from plumbing.errors import BadInput
from plumbing.files import write_whole
from plumbing.folders import take_lock
from plumbing.inputs import reward_inputs, room
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
    """{name of a policy: [(record of the prompt, answer, ids of the prompt as the policy reads it, ids of the
    answer)]}: --examples held-out answers of each."""
    found = {name: [] for name in policies}
    for record in read_data(args.data, args.allow_dropped, log=print0, needs="answers"):
        if split_of(prompt_text(record["prompt"]), args.split_seed) != "test":
            continue
        for response in record["responses"]:
            if response["policy"] in found:
                policy = policies[response["policy"]]
                tokenizer = tokenizers[policy.folder]
                turns = turns_for(record["prompt"], policy.system)
                prompt = readable(chat_ids, tokenizer, turns)
                ids = readable(answer_ids, tokenizer, response["text"])
                if prompt and ids and len(prompt) <= args.max_prompt_length and len(ids) > 1:
                    found[response["policy"]].append((record, response["text"], prompt, ids[:-1]))
    empty = [name for name, rows in found.items() if not rows]
    if empty:
        raise BadInput(f"--data {args.data}: no held-out answer of {', '.join(empty)} that can be read; the "
                       f"names are label.py's, with the temperature where that is a flag.")
    order = {name: keyed_rng("continued", args.seed, name).permutation(len(rows))[:args.examples]
             for name, rows in found.items()}
    return {name: [rows[i] for i in sorted(order[name])] for name, rows in found.items()}


def places_of(ids, args):
    """Numbers of tokens after which the policy goes on, each once: shares of the answer, EOS not counted."""
    return sorted({int(share * len(ids)) for share in args.places})


def go_on(name, policy, model, tokenizer, args, device, part):
    """Rows to keep, one for each (key, prompt ids, answer ids, t) of the part: whole answers that begin with
    the first t tokens."""
    asked = [(prompt + ids[:t], row_seed(args.seed, name, key, i)) for key, prompt, ids, t in part
             for i in range(args.continuations)]
    length = args.response_length - min(t for *_, t in part)
    found = iter(generate(model, [ids for ids, _ in asked], [seed for _, seed in asked], length,
                          policy.temperature, tokenizer, device, batch=args.micro_batch))
    rows = []
    for key, _, ids, t in part:
        whole = [(ids[:t] + next(found))[:args.response_length] for _ in range(args.continuations)]
        rows.append({"key": key, "answers": [[answer_text(tokenizer, y), not ended(tokenizer, y)]
                                             for y in whole]})
    return rows


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
    tokenizers = {policy.folder: load_tokenizer(policy.folder, "--policies") for policy in policies.values()}
    for path, tokenizer in tokenizers.items():
        check_model(path, tokenizer, "--policies", *room(args))
    take_lock(out.with_name(f".{out.name}.lock"), f"--out {out}")
    chosen = chosen_answers(policies, tokenizers, args)
    jobs = {name: [(digest([name, prompt, ids, t]), prompt, ids, t) for _, _, prompt, ids in rows
                   for t in places_of(ids, args)] for name, rows in chosen.items()}
    weights = {path: fingerprint(path) for path in tokenizers}
    settings = {"reward": (f"{reward_model} {fingerprint(reward_model)}" if reward_model else
                           [args.reward_fn, source_of(args.reward_fn)]),
                "policies": {name: [*policy, weights[policy.folder]] for name, policy in policies.items()},
                "jobs": jobs, "continuations": args.continuations, "response_length": args.response_length,
                "dtype": args.dtype, "seed": args.seed}
    digests = {name: digest(value) for name, value in settings.items()}
    if check_settings(out, digests):
        remove_kept(out)
        print0(f"{out}: finished, nothing is left to do")
        return
    kept = Kept(out, digest([x for name, x in digests.items() if name != "reward"])[:8], "answers")
    scores = Kept(out, digest(digests)[:8], "scores")
    total = sum(map(len, jobs.values()))
    print0(f"continuations: {sum(map(len, chosen.values()))} answers of {len(policies)} policies, {total} "
           f"places, {args.continuations} continuations from each, {len(kept.rows)} places are there already")

    # 1. sample: one model after the other is in memory
    for path, tokenizer in tokenizers.items():
        model = load_policy(path, tokenizer, getattr(torch, args.dtype), "--policies").to(device).eval()
        for name, policy in policies.items():
            if policy.folder == path:
                todo = [job for job in jobs[name] if job[0] not in kept.rows]
                do = functools.partial(go_on, name, policy, model, tokenizer, args, device)
                kept.work(todo, max(1, args.micro_batch // args.continuations), do, name, device)
        del model
        let_go()
    kept.read()

    # 2. score
    prompts = {prompt_text(record["prompt"]): record for rows in chosen.values() for record, *_ in rows}
    reader, answers, unread = load_reward_tokenizer(reward_model) if reward_model else None, {}, 0
    for name, rows in chosen.items():
        for record, _, prompt, ids in rows:
            for t in places_of(ids, args):
                key = digest([name, prompt, ids, t])
                for i, (text, cut) in enumerate(kept.rows[key]["answers"]):
                    if reader is None or reward_fits(reader, record["prompt"], text):
                        answers[f"{key} {i}"] = prompt_text(record["prompt"]), name, text, cut
                    else:
                        unread += 1
    if unread:
        raise BadInput(f"--reward_model: {unread} of {len(answers) + unread} continuations are longer than "
                       f"it can read; lower --response_length.")
    score(answers, prompts, scores, args, reward_model, device)
    scores.read()

    # 3. write
    if dist.get_rank() == 0:
        lines, spread = [], defaultdict(list)
        scored_by = weights_fingerprint(reward_model) if reward_model else args.reward_fn
        for name, rows in chosen.items():
            reader = tokenizer_fingerprint(tokenizers[policies[name].folder])
            for record, text, prompt, ids in rows:
                places = {t: [scores.rows[f"{digest([name, prompt, ids, t])} {i}"]["score"]
                              for i in range(args.continuations)] for t in places_of(ids, args)}
                spread[name] += [sum(found) / len(found) for found in places.values()]
                lines.append(json.dumps({"prompt": record["prompt"], "policy": name, "response": text,
                                         "tokenizer": reader, "scored_by": scored_by, "tokens": list(places),
                                         "scores": list(places.values())}, ensure_ascii=False) + "\n")
        write_whole(out, "".join(lines))
        for name, means in spread.items():
            print(f"  {name}: {len(chosen[name])} answers, mean value {sum(means) / len(means):.3f}")
        print(f"{out}: {len(lines)} answers, {total} places")
    dist.barrier()
    remove_kept(out)


if __name__ == "__main__":
    try:
        main(parse_args(Args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; what is sampled is kept, the same command goes on") from None
    dist.destroy_process_group()  # else NCCL warns of a group left behind
