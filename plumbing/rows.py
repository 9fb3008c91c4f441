"""From records (data.py) to the rows a stage trains on: which fit, which are held out, what was dropped."""

from collections import Counter

import numpy as np
import torch.distributed as dist

from common import (answer_ids, chat_ids, load_reward_model, load_reward_tokenizer, reward_ids,
                    reward_scores)
from plumbing.checks import weights_fingerprint
from plumbing.data import (all_pairs, has_policy_names, preference_pair, prompt_text, read_data, report_drops,
                           split_of)
from plumbing.errors import BadInput
from plumbing.folders import model_place, stage_folder
from plumbing.ranks import gather_rows, print0
from plumbing.texts import BadText, readable, text_ids


def responses_that_fit(record, tokenizer, max_length):
    """(prompt ids, those of the record's responses that fit into max_length tokens behind it, a Counter of
    the reasons why others cannot become token ids).

    Each response gets its token ids as `response_ids`, so that nothing is tokenized a second time.
    """
    prompt_ids, fitting, unread = [], [], Counter()
    for response in record["responses"]:
        try:
            prompt_ids = prompt_ids or chat_ids(tokenizer, record["prompt"])
            response["response_ids"] = answer_ids(tokenizer, response["text"])
            if len(prompt_ids) + len(response["response_ids"]) <= max_length:
                fitting.append(response)
        except BadText as e:
            unread[e.reason] += 1
    return prompt_ids, fitting, unread


def preference_rows(tokenizer, args):
    """(train, held-out) lists of pairs of --data: (prompt ids, chosen ids, rejected ids)."""
    train, test, kept, dropped = [], [], 0, Counter()
    for record in read_data(args.data, args.allow_dropped, log=print0):
        share = split_of(prompt_text(record["prompt"]), args.split_seed)
        if share not in ("value", "test"):
            continue
        prompt_ids, fitting, unread = responses_that_fit(record, tokenizer, args.max_length)
        pair = preference_pair(record, args.split_seed, fitting)
        if pair:
            kept += 1
            (train if share == "value" else test).extend(
                (prompt_ids, chosen["response_ids"], rejected["response_ids"])
                for chosen, rejected in (all_pairs(record, fitting) if args.pairs == "all" else [pair]))
        elif len(fitting) < 2:
            short = f"no two responses within --max_length {args.max_length} with the prompt"
            dropped[next(iter(unread), short)] += 1
        else:
            dropped["no pair of unequal scores"] += 1
    report_kept(train, kept, dropped, args, "pair", "value")
    return train, test[:args.eval_pairs]


def trajectories(tokenizer, args):
    """Scored responses of --data as trajectories, and the held-out preference pairs.

    returns (train, pairs): train is a list of dicts (prompt, group, policy, text, reward, prompt_ids,
    response_ids); pairs is a list of (good, bad), two such dicts each, of held-out prompts.
    """
    train, pairs, dropped, kept = [], [], Counter(), 0
    reader = load_reward_tokenizer(args.reward_model) if args.reward == "model" else None
    records = read_data(args.data, args.allow_dropped, log=print0)
    if args.k > 0 and not has_policy_names(records):
        raise BadInput(f"--data {args.data}: its responses carry no policy name (`model`), so tau cannot be "
                       f"drawn: use --k 0.")
    for record in records:
        share = split_of(prompt_text(record["prompt"]), args.split_seed)
        if share not in ("value", "test"):
            continue
        prompt_ids, fitting, unread = responses_that_fit(record, tokenizer, args.max_length)
        dropped += unread
        dropped[f"prompt + response over --max_length {args.max_length}"] += (
            len(record["responses"]) - len(fitting) - unread.total())
        if reader and share == "value":
            known, fitting = fitting, [response for response in fitting
                                       if reward_fits(reader, record["prompt"], response["text"])]
            dropped["more than --reward_model can read"] += len(known) - len(fitting)
        pair = preference_pair(record, args.split_seed, fitting)
        if share == "value" and args.reward == "score":
            chosen = [(response, score_reward(response, record, args)) for response in fitting]
        elif share == "value" and args.reward == "model":
            chosen = [(response, 0.0) for response in fitting]  # filled in by model_rewards
        elif pair:
            chosen = [(pair[0], 1.0), (pair[1], -1.0)]
        else:
            dropped["no pair of unequal scores"] += len(fitting)
            continue
        rows = [{"prompt": record["prompt"], "group": record["group"], "policy": response["policy"],
                 "reward": reward, "text": response["text"], "prompt_ids": prompt_ids,
                 "response_ids": response["response_ids"]} for response, reward in chosen]
        kept += len(rows)
        if share == "value":
            train += rows
        else:
            pairs.append(tuple(rows))
    report_kept(train, kept, dropped, args, "trajectory", "value")
    return train, pairs[:args.eval_pairs]


def score_reward(response, record, args):
    """The data's score mapped linearly from [score_min, score_max] to [-1, 1]."""
    if response["score"] is None:
        raise BadInput(f"{record['where']}: no score, but --reward score needs one; use --reward preference.")
    if not args.score_min <= response["score"] <= args.score_max:
        raise BadInput(f"{record['where']}: score {response['score']:g} lies outside --score_min "
                       f"{args.score_min:g} and --score_max {args.score_max:g}, which become -1 and +1: "
                       f"set them to the data's range.")
    return (2 * response["score"] - args.score_min - args.score_max) / (args.score_max - args.score_min)


def reward_map(train, args, dtype, device):
    """How scores became rewards, for gvm.json. With --reward model the rewards are filled in here:
    (score - mean) / (2 standard deviations), about [-1, 1]. Every rank scores its share, in the micro batches
    that one rank would make: the numbers do not depend on the ranks."""
    if args.reward == "preference":
        return {"kind": "preference"}
    if args.reward == "score":
        return {"kind": "score", "center": (args.score_max + args.score_min) / 2,
                "scale": (args.score_max - args.score_min) / 2}
    chats = [(row["prompt"], row["text"]) for row in train]
    model, tokenizer, *_ = load_reward_model(args.reward_model, dtype)
    fingerprint = weights_fingerprint(args.reward_model)
    model, size, found = model.to(device), args.micro_batch, []
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for i in range(rank * size, len(chats), world * size):
        found.append((i, reward_scores(model, tokenizer, chats[i:i + size], device, size)))
    scores = np.array([score for _, part in sorted(gather_rows(found)) for score in part])
    center, scale = float(scores.mean()), float(2 * scores.std() + 1e-8)
    for row, score in zip(train, scores):
        row["reward"] = float((score - center) / scale)
    return {"kind": "model", "reward_model": model_place(args.reward_model), "center": center, "scale": scale,
            "fingerprint": fingerprint}


def rl_prompts(tokenizer, args, world):
    """(train, held-out) lists of prompt rows of --data: dicts (prompt, group, prompt_ids), each prompt once.
    Held out are --eval_prompts of them, or fewer: equally many for each rank."""
    train, test, seen, dropped = [], [], set(), Counter()
    reader = reward_reader(args)
    for record in read_data(args.data, args.allow_dropped, log=print0, needs="prompts"):
        text = prompt_text(record["prompt"])
        share = split_of(text, args.split_seed)
        if share not in ("rl", "test") or text in seen:
            continue
        seen.add(text)
        row = {"prompt": record["prompt"], "group": record["group"]}
        try:
            row["prompt_ids"] = chat_ids(tokenizer, record["prompt"])
        except BadText as e:
            dropped[e.reason] += 1
            continue
        if len(row["prompt_ids"]) > args.max_prompt_length:
            dropped[f"prompt over --max_prompt_length {args.max_prompt_length}"] += 1
        elif reader and not reward_fits(reader, record["prompt"], "", args.response_length):
            dropped["prompt that leaves less than --response_length of --reward_model's context"] += 1
        else:
            (train if share == "rl" else test).append(row)
    report_kept(train, len(train) + len(test), dropped, args, "prompt", "RL")
    return train, test[:min(args.eval_prompts, len(test)) // world * world]


def reward_fits(tokenizer, prompt, answer, more=0):
    """Whether a reward model can read an answer of `answer` and `more` tokens; see load_reward_tokenizer."""
    ids = readable(reward_ids, tokenizer, prompt, answer)
    return ids is not None and len(ids) + more <= tokenizer.context


def reward_chat(tokenizer, prompt, answer, cut):
    """What reward_scores takes of a text that was sampled: a foreign model reads a cut answer as one that has
    not ended, ours as a complete one."""
    return ((prompt, text_ids(tokenizer, answer), answer) if cut and tokenizer.whole_chat else
            (prompt, answer))


def reward_reader(args):
    """The tokenizer of the reward model that a run samples for, None where it asks none."""
    if getattr(args, "reward_fn", "DVPO asks none"):
        return None
    return load_reward_tokenizer(stage_folder(args.model, "rm", args.reward_model, "--reward_model", ""))


def report_kept(train, kept, dropped, args, what, share):
    """Say what was dropped; BadInput where it is too much or where nothing is left to train on."""
    if kept or dropped:
        report_drops(+dropped, kept + dropped.total(), args.data, args.allow_dropped, log=print0)
    if not train:
        raise BadInput(f"--data {args.data}: no {what} is left to train on; its prompts are too few for the "
                       f"{share} share.")
