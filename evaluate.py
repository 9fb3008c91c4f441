"""Evaluate what the other scripts trained: a value model, single answers, policies, whole runs.

gvm     How often the value model ranks the better answer of a held-out pair higher (Table 4), and how close
        its values are to the rewards. Both answers of a pair get the same tau (K questions and answers of one
        policy), once of the better one's policy, once of the worse one's. With a tau of its own policy each a
        model could rank by recognizing the policy, worth nothing in RL, where all answers are of one policy.
        Baselines: the longer answer; the policy with the higher mean score in training (policy mean); the own
        tau with the longer answers (tau only). 95 % intervals: bootstrap over groups of dependent pairs: of
        one prompt, or of one `group` of the data. With --reference_fn: how far the values are from the
        exact ones and from the Bayes estimate, before the token that decides the answer and from it on.
        With --continuations: how far they are from the values that continuations.py sampled.
values  The value of every token of two or more answers to one question (Figure 4), as text or as a web page.
policy  Policies on held-out prompts, one sampled answer each: scores, win / tie / lose against the first
        policy, KL from the first policy [nats per response], length [tokens], share of truncated answers.
plot    Curves of runs over steps (Figure 3), with a band of one standard deviation over the seeds of a label.

    python evaluate.py gvm                                            the toy, on one CPU rank
    deepspeed --num_gpus 1 evaluate.py gvm --model meta-llama/Meta-Llama-3-8B
    python evaluate.py values --html values.html
    python evaluate.py policy --policies sft=runs/toy/sft dvpo=runs/toy/dvpo
    python evaluate.py plot --runs dvpo=runs/toy/dvpo --png curves.png

Reads the held-out 10 % of the prompts, models, logs; writes the files that --json, --html, --out, --png name.

Legend: B rows, P prompt columns (left padded, tau included), R response columns (right padded).
"""

import io
import json
import os
import re
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm  # comes with transformers

from common import (answer_ids, chat_ids, collate, cut_pair, generate, keyed_rng, load_gvm, load_policy,
                    load_reward_model, load_reward_tokenizer, load_tokenizer, reward_scores, row_seed)
from plumbing.args import command_args, load_numbers, load_plug, split_words
from plumbing.checks import (check_model, finite, gvm_settings, read_as_gvm, tokenizer_fingerprint,
                             weights_fingerprint)
from plumbing.data import has_policy_names, preference_pair, prompt_text, read_data, split_of
from plumbing.errors import BadInput
from plumbing.files import check_place, read_rows, write_whole
from plumbing.folders import stage_folder
from plumbing.kept import RESULTS, check_ours
from plumbing.lean import can_share_prefix, in_one_sequence, pack
from plumbing.page import PAGE, limit_of, page, terminal_text, token_texts
from plumbing.ranks import init_distributed
from plumbing.rows import responses_that_fit, reward_chat, reward_fits
from plumbing.table import percent, plus_minus, print_table, win_tie_lose
from plumbing.texts import answer_text, ended, readable


@dataclass
class Args:
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    value_model: str = ""  # the GVM's folder, default runs/<model name>/gvm
    split_seed: int = 0  # seed of the split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the responses had to be dropped
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # number format of the weights
    micro_batch: int = 8  # rows of one forward pass
    seed: int = 1  # of the choice of rows, the draws of tau and the sampling
    json: str = ""  # write the results to this file
    pairs: int = 1000  # gvm: at most this many held-out pairs; calibration takes twice as many responses
    reference_fn: str = ""  # gvm: module:function of exact and Bayes values, e.g. toy.reference:values
    reference_rows: int = 480  # gvm: compare at most this many responses with --reference_fn
    continuations: list[str] = field(default_factory=list)  # gvm: files of continuations.py to compare with
    unseen_data: str = ""  # gvm: data of policies that the GVM was not trained on, for these two
    question: str = ""  # values: default a held-out one, with its better and its worse response
    responses: list[str] = field(default_factory=list)  # values: the answers to --question, each in quotes
    tau_policy: str = ""  # values: policy in --data that tau is drawn from, default the most frequent one
    html: str = ""  # values: write them as a web page to this file
    policies: list[str] = field(default_factory=list)  # policy: name=folder, default sft, dvpo, ppo
    reward_model: str = ""  # policy: folder of a reward model that scores the answers, too
    truth_fn: str = ""  # policy: module:function(rows, policy, tokenizer) that gives true rewards
    prompts: int = 256  # policy: at most this many held-out prompts
    max_prompt_length: int = 1024  # policy: longer prompts are left out and counted [tokens]
    response_length: int = 1024  # policy: at most this many sampled tokens per answer [tokens]
    temperature: float = 1.0  # policy: of sampling and of the log-probs in the KL; 0 is greedy, without KL
    out: str = ""  # policy: write the answers with their scores to this jsonl file
    runs: list[str] = field(default_factory=list)  # plot: label=folder; folders of one label are seeds
    metrics: list[str] = field(default_factory=list)  # plot: default reward, value, KL, length
    png: str = ""  # plot: file of the picture, default curves.png


PERCENTILES = {"P1": 1, "P5": 5, "P10": 10, "P90": 90, "P95": 95, "P99": 99}
STATISTICS = ("mean", *PERCENTILES)  # of the token values of a response (Table 4)


def hits(good, bad):
    """1 where the good response has the higher number, 1/2 where they tie, else 0. Arrays of one shape."""
    return np.greater(good, bad) + 0.5 * np.equal(good, bad)


def bootstrap(numbers, groups, draws=1000):
    """95 % interval of the mean of numbers [N], by bootstrap over groups [N]: a group's are dependent."""
    _, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    total, count = np.bincount(index, numbers), np.bincount(index)
    picks = keyed_rng("bootstrap").integers(len(count), size=(draws, len(count)))
    return np.percentile(total[picks].sum(1) / count[picks].sum(1), [2.5, 97.5])


def accuracy(hit, groups, draws=1000):
    """Mean of hits [N] and its 95 % interval."""
    low, high = bootstrap(hit, groups, draws)
    return {"accuracy": float(np.mean(hit)), "low": float(low), "high": float(high)}


def calibration(predicted, actual, bins=10):
    """Mean prediction and mean reward in bins of equal count, ordered by prediction; RMSE over all."""
    predicted, actual = np.asarray(predicted), np.asarray(actual)
    parts = [part for part in np.array_split(np.argsort(predicted, kind="stable"), bins) if len(part)]
    return {"rmse": float(np.sqrt(np.mean((predicted - actual) ** 2))), "n": len(predicted),
            "bins": [{"n": len(part), "predicted": float(predicted[part].mean()),
                      "actual": float(actual[part].mean())} for part in parts]}


# ---- value model, tau and held-out data --------------------------------------------------------------------

Gvm = namedtuple("Gvm", "model tokenizer settings device micro_batch")


def open_gvm(args, device, critic=False):
    """The value model with its tokenizer and gvm.json, refused if it was trained under another split.
    critic: whether it may be a critic of train_ppo.py"""
    folder = stage_folder(args.model, "gvm", args.value_model, "--value_model", "train_gvm.py")
    settings = gvm_settings(folder, critic=critic)
    if settings["split_seed"] != args.split_seed:
        raise BadInput(f"--split_seed {args.split_seed}: what it holds out was not held out from {folder}, "
                       f"trained under {settings['split_seed']}; give that one.")
    tokenizer = load_tokenizer(folder, "--value_model")
    read_as_gvm(tokenizer, settings)
    model, _ = load_gvm(folder, getattr(torch, args.dtype))
    return Gvm(model.to(device).eval(), tokenizer, settings, device, args.micro_batch)


@torch.no_grad()
def token_values(gvm, jobs):
    """Values along each response: V(s_1), read at the last prompt token, then Q_t of each of its tokens t. Of
    a critic V(s_1) .. V(s_n), of the states before them: nothing has trained what it says behind them.
    jobs: list of (prompt ids with tau, response ids), those to one prompt beside each other: it is read once
    returns list of [1 + response length] float64, [response length] of a critic"""
    found, longest = [], max((len(prompt) + len(response) for prompt, response in jobs), default=1)
    behind = 0 if gvm.settings["critic"] else 1
    shared = can_share_prefix(gvm.model, longest, gvm.device, in_one_sequence)
    for start in tqdm(range(0, len(jobs), gvm.micro_batch), "values", disable=None):  # a bar on a terminal
        part = jobs[start:start + gvm.micro_batch]
        rows = [(*job, tuple(job[0]) if shared else i) for i, job in enumerate(part)]
        inputs, places, _ = pack(rows, gvm.tokenizer.pad_token_id, gvm.device, gvm.model.dtype)
        q = gvm.model(**inputs).logits[..., 0][places].double().cpu().numpy()  # [B, 1 + R]
        found += [row[:len(response) + behind] for row, (_, response) in zip(q, part)]
    return finite(found, f"--value_model {gvm.settings['folder']}", "values")


def under_tau(gvm, pool, policy, rows, rng):
    """Draw one tau, K questions and answers of `policy`, and put it before the prompts of rows of one group.

    tau comes from other groups. It has fewer than K where the policy has fewer or where, as in training, they
    do not fit into the context: the first ones are left out. Returns [(prompt ids, response ids)], tau."""
    k, context, group = gvm.settings["k"], gvm.settings["context"], rows[0]["group"]
    answers = pool[policy] if k else []
    others = (answers[i] for i in rng.permutation(len(answers)) if answers[i]["group"] != group)
    cut = (readable(cut_pair, gvm.tokenizer, row["prompt"], row["response"], gvm.settings) for row in others)
    tau = list(islice(filter(None, cut), k))
    for first in range(len(tau) + 1):
        jobs = [(chat_ids(gvm.tokenizer, row["prompt"], tau[first:]), row["response_ids"]) for row in rows]
        if max(len(prompt) + len(response) for prompt, response in jobs) <= context:
            return jobs, tau[first:]
    raise BadInput(f"A prompt and its response exceed the value model's context of {context} tokens; shorten "
                   f"them: {rows[0]['prompt'][-1]['content'][:80]!r}.")


def values_under_own_tau(gvm, rows, pool, seed):
    """(values, taus): token values of each row under a tau of its own policy, and these taus."""
    found = [under_tau(gvm, pool, row["policy"], [row], keyed_rng("own tau", seed, i))
             for i, row in enumerate(rows)]
    return token_values(gvm, [job for (job,), _ in found]), [tau for _, tau in found]


def read_held_out(source, gvm, args):
    """The responses of --data or --unseen_data as rows: prompt, group, policy, response, score, split.

    returns  rows   held-out responses that are no longer than those of training, with response_ids
             pairs  (good, bad) of them, one of each record that prefers an answer
             pool   {policy: its rows of the value and test splits}, for tau; {reason: number left out}"""
    records, limit = read_data(source, args.allow_dropped), gvm.settings["max_length"]
    if gvm.settings["k"] and not has_policy_names(records):
        raise BadInput(f"{source}: its responses carry no policy name (`model`), so tau cannot be drawn; "
                       "this needs a GVM trained with --k 0.")
    rows, pairs, pool, left_out = [], [], defaultdict(list), Counter()
    for record in records:
        split = split_of(prompt_text(record["prompt"]), args.split_seed)
        for row in record["responses"]:
            row.update(prompt=record["prompt"], group=record["group"], response=row["text"], split=split)
            if split in ("value", "test"):
                pool[row["policy"]].append(row)
        if split != "test":
            continue
        _, fitting, unread = responses_that_fit(record, gvm.tokenizer, limit)
        rows, left_out = rows + fitting, left_out + unread
        over = len(record["responses"]) - len(fitting) - unread.total()
        left_out[f"responses over {limit} tokens with prompt"] += over
        pair = preference_pair(record, args.split_seed, fitting)
        pairs += [pair] if pair else []
        left_out["prompts without a pair"] += not pair
    return rows, pairs, pool, +left_out  # without zeros


def some(items, n, seed):
    """At most n of the items, the same ones under the same seed."""
    return [items[i] for i in keyed_rng("some", seed).permutation(len(items))[:n]]


# ---- gvm ---------------------------------------------------------------------------------------------------

def rank_pairs(gvm, pairs, pool, seed):
    """Accuracy by each statistic under one shared tau and under own taus, the baselines, and mean values."""
    jobs, tau_length, shortened, k = [], [], 0, gvm.settings["k"]
    for i, pair in enumerate(pairs):
        for turn, owner in enumerate(pair if k else pair[:1]):
            found, tau = under_tau(gvm, pool, owner["policy"], pair, keyed_rng("tau", seed, i, turn))
            jobs, shortened = jobs + found, shortened + (len(tau) < k)
            tau_length.append(np.mean([len(answer_ids(gvm.tokenizer, a)) for _, a in tau]) if tau else 0.0)
    values = [v if gvm.settings["critic"] else v[1:] for v in token_values(gvm, jobs)]
    summary = np.array([[v.mean(), *np.percentile(v, [*PERCENTILES.values()])] for v in values])
    summary = summary.reshape(len(pairs), -1, 2, len(STATISTICS))  # [pair, tau's owner, good or bad, 7]
    shared = hits(summary[:, :, 0], summary[:, :, 1]).mean(1)      # [pair, 7]
    own = hits(summary[:, 0, 0], summary[:, -1, 1])                # [pair, 7]
    good, bad = zip(*pairs)
    baselines = {"longer answer": hits(*[[len(row["response_ids"]) for row in side] for side in (good, bad)])}
    if None not in pool:  # policies have names, and named responses have scores
        seen = {policy: [row["score"] for row in rows if row["split"] == "value"]
                for policy, rows in pool.items()}
        every = sum(seen.values(), []) or [0.0]  # of a policy that is not in training one knows no more
        means = {policy: np.mean(scores or every) for policy, scores in seen.items()}
        baselines["policy mean"] = hits(*[[means[row["policy"]] for row in side] for side in (good, bad)])
    if k:
        baselines["tau only"] = hits(tau_length[::2], tau_length[1::2])
    groups = [row["group"] for row in good]
    return {"pairs": len(pairs), "groups": len(set(groups)), "shortened_tau": shortened,
            "mean_value": dict(zip(("good", "bad"), summary[..., 0].mean((0, 1)).tolist())),
            "shared_tau": {name: accuracy(shared[:, i], groups) for i, name in enumerate(STATISTICS)},
            "own_tau": {name: accuracy(own[:, i], groups) for i, name in enumerate(STATISTICS)},
            "baselines": {name: accuracy(hit, groups) for name, hit in baselines.items()}}


def calibrate(gvm, rows, pairs, pool, args):
    """Last token's value, under a tau of the own policy, against the reward that the GVM was trained on. With
    scores all responses count: the best alone would be the lucky ones. None if no response has a score, and
    of a critic, which values no whole answer."""
    reward = gvm.settings["reward"]
    if gvm.settings["critic"]:
        return None
    if reward["kind"] == "preference":
        rows, actual = [row for pair in pairs for row in pair], [1.0, -1.0] * len(pairs)
    else:
        reader = load_reward_tokenizer(reward["reward_model"]) if reward["kind"] == "model" else None
        rows = [row for row in rows if (reward_fits(reader, row["prompt"], row["response"]) if reader else
                                        row["score"] is not None)]
        rows = some(rows, 2 * args.pairs, args.seed)
        scores = [row["score"] for row in rows]
        if reward["kind"] == "model":
            if reward.get("fingerprint") not in (None, weights_fingerprint(reward["reward_model"])):
                raise BadInput(f"{reward['reward_model']}: this reward model has other weights than when the "
                               f"GVM was trained on its scores; train the GVM again.")
            scores = model_scores(reward["reward_model"], rows, args, gvm.device)
        actual = [(score - reward["center"]) / reward["scale"] for score in scores]
    values, _ = values_under_own_tau(gvm, rows, pool, args.seed)
    return calibration([v[-1] for v in values], actual) if rows else None


def model_scores(reward_model, rows, args, device):
    model, tokenizer, _, _ = load_reward_model(reward_model, getattr(torch, args.dtype))
    chats = [reward_chat(tokenizer, row["prompt"], row["response"], row.get("truncated")) for row in rows]
    scores = reward_scores(model.to(device), tokenizer, chats, device, args.micro_batch)
    return finite(scores, f"--reward_model {reward_model}", "scores")


def compare_with_reference(gvm, rows, pool, reference, args):
    """RMSE between GVM, exact value and Bayes estimate, before the deciding token and from it on.

    rmse(policy) = sqrt(mean of error^2 over its prefixes)
    rmse         = sqrt(mean of rmse(policy)^2 over policies), so that every policy weighs the same"""
    names, halves = ("gvm_exact", "gvm_bayes", "bayes_exact"), ("before", "decided")
    chosen, errors = some(rows, args.reference_rows, args.seed), defaultdict(list)
    values, taus = values_under_own_tau(gvm, chosen, pool, args.seed)
    known = reference([{**row, "tau": tau} for row, tau in zip(chosen, taus)])
    for row, v, k in zip(chosen, values, known):
        exact, bayes, decided = (np.asarray(k[name]) for name in ("exact", "bayes", "decided"))
        if gvm.settings["critic"]:
            exact, bayes, decided = exact[:-1], bayes[:-1], decided[:-1]
        if not v.shape == exact.shape == bayes.shape == decided.shape:
            raise BadInput(f"--reference_fn {args.reference_fn}: {len(exact)} values for a row of {len(v)}.")
        gaps = np.stack([v - exact, v - bayes, bayes - exact])  # [3, 1 + T]
        for half, here in zip(halves, (~decided, decided)):
            errors[half, row["policy"]].append(gaps[:, here])
    result = {"rows": len(chosen), "policies": {row["policy"]: {} for row in chosen}}
    for half in halves:
        squares = []
        for policy, entry in result["policies"].items():
            error = np.concatenate(errors[half, policy], axis=1)  # [3, prefixes]
            entry[half] = {"prefixes": error.shape[1], **dict.fromkeys(names)}
            if error.size:
                squares.append((error ** 2).mean(1))
                entry[half].update(zip(names, np.sqrt(squares[-1]).tolist()))
        result[half] = dict(zip(names, np.sqrt(np.mean(squares, axis=0)).tolist())) if squares else {}
    return result


def sampled_values(files, gvm):
    """{(text of the prompt, policy, answer): {place: (tokens, mean, its squared standard error)}} of files of
    continuations.py, in units of the GVM's reward. place: a share of the answer"""
    reward, found = gvm.settings["reward"], {}
    if files and gvm.settings["critic"]:
        raise BadInput("--continuations: means of scores, and a critic's values have the KL penalty in them.")
    if files and (reward["kind"] == "preference" or gvm.settings["gamma"] != 1):
        raise BadInput("--continuations: means of scores, and this GVM learned +1 and -1 of pairs, or "
                       "discounts; train one with --reward score or model, and --gamma 1.")
    for file in files:
        for where, row in read_rows(file):
            try:
                raw = np.array(row["scores"], dtype=float)
                scores = (raw - reward["center"]) / reward["scale"]
                if scores.ndim != 2 or scores.shape[1] < 2 or not np.isfinite(scores).all():
                    raise ValueError
                by = str(row["reward_model"]) if reward["kind"] == "model" else str(row["reward_fn"])
                known = zip(map(int, row["tokens"]), scores.mean(1), scores.var(1, ddof=1) / scores.shape[1])
                found[key_of(row)] = dict(zip(map(float, row["places"]), known, strict=True))
                reader = row["tokenizer"]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise BadInput(f"{where}: not a row of continuations.py that goes with --reward "
                               f"{reward['kind']}, which the GVM learned; name one that is.") from None
            if reward["kind"] == "model" and by != str(reward.get("fingerprint")):
                raise BadInput(f"{where}: scored by another reward model than the GVM learned from.")
            if reward["kind"] == "score" and np.abs(scores.mean(1)).max() > 2:  # it learned -1 to 1
                raise BadInput(f"{where}: mean scores up to {raw.mean(1).max():g}, far from those that the "
                               f"GVM learned: {by} is not what gave them.")
            if reader != tokenizer_fingerprint(gvm.tokenizer):
                raise BadInput(f"{where}: places of another tokenizer than the value model's.")
    return found


def compare_with_continuations(gvm, rows, pool, known, args):
    """RMSE of the GVM's values to the policies' own, by place in the answer: sqrt(mean of (q - m)^2 - se^2).
    m is a mean over continuations and se its standard error, which would else count as the GVM's error. What
    remains below 0 is 0. `constant`: the same of the mean of all m of the policy and place, which knows the
    policy and not the answer. 95 % intervals: bootstrap over groups of prompts.

    returns {policy or "all": [{place, tokens (mean), answers, value, sampled, rmse, low, high, constant}]}
    """
    chosen = [row for row in rows if key_of(row) in known]
    values, _ = values_under_own_tau(gvm, chosen, pool, args.seed)
    found = defaultdict(list)
    for row, v in zip(chosen, values):
        for place, (t, mean, noise) in known[key_of(row)].items():
            for name in (row["policy"], "all"):
                found[name, place].append((row["policy"], row["group"], t, v[t], mean, noise))
    result = defaultdict(list)
    for (name, place), here in sorted(found.items()):
        policies, groups, tokens, q, m, noise = map(np.array, zip(*here))
        error, constant = (q - m) ** 2 - noise, np.zeros(len(m))
        for policy in set(policies):
            own = policies == policy
            constant[own] = (m[own] - m[own].mean()) ** 2 * own.sum() / max(1, own.sum() - 1) - noise[own]
        root = lambda square: float(np.sqrt(max(0.0, square)))
        low, high = map(root, bootstrap(error, groups))
        result[name].append({"place": place, "tokens": float(tokens.mean()), "answers": len(m),
                             "value": float(q.mean()), "sampled": float(m.mean()), "rmse": root(error.mean()),
                             "low": low, "high": high, "constant": root(constant.mean())})
    return dict(result)


def key_of(row):
    return prompt_text(row["prompt"]), row["policy"], row["response"]


def evaluate_gvm(args, device):
    reference = load_plug(args.reference_fn, "--reference_fn") if args.reference_fn else None
    if args.unseen_data and not reference and not args.continuations:
        raise BadInput("--unseen_data is compared with --reference_fn or --continuations: give one, too.")
    gvm = open_gvm(args, device, critic=True)
    known = sampled_values(args.continuations, gvm)
    rows, pairs, pool, left_out = read_held_out(args.data, gvm, args)
    pairs = some(pairs, args.pairs, args.seed)
    if not pairs:
        raise BadInput(f"--data {args.data}: no held-out pair, left out: {dict(left_out)}; give more data.")
    result = {"k": gvm.settings["k"], "left_out": left_out,
              "ranking": rank_pairs(gvm, pairs, pool, args.seed),
              "calibration": calibrate(gvm, rows, pairs, pool, args)}
    unmatched = set(known)
    for kind in ("seen", "unseen")[:1 + bool(args.unseen_data)]:
        if kind == "unseen":
            rows, _, pool, _ = read_held_out(args.unseen_data, gvm, args)
        if reference:
            exact = compare_with_reference(gvm, rows, pool, reference, args)
            result.setdefault("reference", {})[kind] = exact
        here = known.keys() & set(map(key_of, rows))
        unmatched -= here
        if here:
            sampled = compare_with_continuations(gvm, rows, pool, known, args)
            result.setdefault("continuations", {})[kind] = sampled
    if known and len(unmatched) == len(known):
        raise BadInput(f"--continuations: none of their {len(known)} answers is a held-out one of --data or "
                       f"--unseen_data; name the data that continuations.py read.")
    if unmatched:
        left_out["answers of --continuations that are not in the data"] = len(unmatched)
    return result


def show_gvm(result):
    ranking, fit = result["ranking"], result["calibration"]
    good, bad = ranking["mean_value"].values()
    left_out = ", ".join(f"{n} {what}" for what, n in result["left_out"].items()) or "nothing"
    print_table(f"Accuracy on {ranking['pairs']} held-out pairs in {ranking['groups']} groups; K = "
                f"{result['k']}, tau shortened {ranking['shortened_tau']} times; left out: {left_out}\n"
                f"mean value of the better answers {good:.3f}, of the worse {bad:.3f}",
                ["ranked by", "one tau for both\n[%] (95 % interval)", "each its own tau\n[%]"],
                [[f"token values: {name}", percent(a["accuracy"], a), percent(own["accuracy"])]
                 for (name, a), own in zip(ranking["shared_tau"].items(), ranking["own_tau"].values())]
                + [[f"baseline: {name}", percent(a["accuracy"], a), None]
                   for name, a in ranking["baselines"].items()])
    if fit:
        print_table(f"Calibration: value of the last token against the reward; RMSE {fit['rmse']:.3f}",
                    ["bin by value", "responses", "mean value", "mean reward"],
                    [[i, *part.values()] for i, part in enumerate(fit["bins"], 1)])
    halves, errors = ("before", "decided"), ("gvm_exact", "gvm_bayes", "bayes_exact")
    print_table("RMSE of the values before the token that decides the answer, and from it on\n"
                "Bayes: the best estimate from tau; seen, unseen: the GVM was trained on the policy, or not",
                ["", "policy", *(f"{half}\n{error}" for half in ("before", "from it on")
                                 for error in ("to exact", "to Bayes", "Bayes to exact"))],
                [[kind, name, *(found[half].get(error) for half in halves for error in errors)]
                 for kind, ref in result.get("reference", {}).items()
                 for name, found in {f"all ({ref['rows']} answers)": ref, **ref["policies"]}.items()], left=2)
    print_table("Values against those of sampled continuations, whose noise is taken out of the RMSE\n"
                "constant: the RMSE of the policy's mean at that place, which knows the policy alone",
                ["", "policy", "place", "tokens\nread", "answers", "mean\nvalue", "mean of\nsampled", "RMSE",
                 "95 %\nfrom", "to", "constant"],
                [[kind, name, *place.values()] for kind, found in result.get("continuations", {}).items()
                 for name, places in found.items() for place in places], left=2)


# ---- values ------------------------------------------------------------------------------------------------

def evaluate_values(args, device):
    if bool(args.question) != bool(args.responses):
        raise BadInput("--question and --responses belong together: give both, or neither.")
    gvm = open_gvm(args, device)
    k, pairs, pool = gvm.settings["k"], [], {}
    if k or not args.question:
        _, pairs, pool, _ = read_held_out(args.data, gvm, args)
    policy = (args.tau_policy or max(pool, key=lambda name: len(pool[name]))) if k else None
    if k and policy not in pool:
        raise BadInput(f"--tau_policy {policy}: {args.data} only has {', '.join(sorted(pool))}.")
    if args.question:
        prompt = [{"role": "user", "content": args.question}]
        same = [row["group"] for rows in pool.values() for row in rows if row["prompt"] == prompt]
        rows = [{"prompt": prompt, "group": [*same, args.question][0], "response": text, "score": None,
                 "response_ids": answer_ids(gvm.tokenizer, text)} for text in args.responses]
    elif pairs:
        rows, = some(pairs, 1, args.seed)
    else:
        raise BadInput(f"--data {args.data}: no held-out question prefers an answer; give --question.")
    names = [f"response {i + 1}" for i in range(len(rows))] if args.question else ["good", "bad"]
    jobs, tau = under_tau(gvm, pool, policy, rows, keyed_rng("tau", args.seed))
    responses = [{"label": name if row["score"] is None else f"{name} (score {row['score']:g})",
                  "text": row["response"], "tokens": token_texts(gvm.tokenizer, row["response_ids"]),
                  "values": v.tolist(), "mean": float(v[1:].mean()), "last": float(v[-1])}
                 for name, row, v in zip(names, rows, token_values(gvm, jobs))]
    result = {"question": prompt_text(rows[0]["prompt"]), "k": len(tau), "tau_policy": policy, "tau": tau,
              "responses": responses}
    low, high = limit_of(result, min), limit_of(result, max)
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\n{result['question']}\nvalue after each token: {low:+.2f} is red, {high:+.2f} is green")
    for answer in responses:
        print(f"\n{answer['label']}: mean {answer['mean']:+.2f}, last {answer['last']:+.2f}")
        print(terminal_text(answer, low, high, coloured))
    return {**result, "files": {"html": page(result, low, high)}}


# ---- policy ------------------------------------------------------------------------------------------------

def check_policy(folder, tokenizer, prompts, args):
    """Whether a policy shares the tokenizer and has room for the answers, before any of them is loaded."""
    its_own = load_tokenizer(folder, "--policies")
    context = check_model(folder, its_own, "--policies")
    if tokenizer_fingerprint(its_own) != tokenizer_fingerprint(tokenizer):
        raise BadInput(f"--policies {folder}: another tokenizer than the first policy's; compare one family.")
    if max(len(row["prompt_ids"]) for row in prompts) + args.response_length > context:
        raise BadInput(f"--response_length: the longest prompt leaves less of {folder}'s {context} tokens.")


@torch.no_grad()
def sequence_logprobs(policy, rows, tokenizer, args, device):
    """log pi(y | x) of each row at the sampler's temperature, summed over the response's tokens."""
    jobs, found = [(row["prompt_ids"], row["response_ids"]) for row in rows], []
    for i in range(0, len(jobs), args.micro_batch):
        batch = collate(*zip(*jobs[i:i + args.micro_batch]), tokenizer.pad_token_id, device)
        out = policy(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                     logits_to_keep=batch.mask.shape[1] + 1, use_cache=False)
        logits = out.logits[:, :-1].float()  # [B, R, vocabulary], columns P - 1 .. T - 2
        logp = torch.log_softmax(logits / args.temperature, dim=-1)
        logp = logp.gather(-1, batch.ids[:, batch.P:, None]).squeeze(-1)  # [B, R]
        found += (logp * batch.mask).sum(1).tolist()
    return found


def answers_of(folder, prompts, truth, tokenizer, args, device):
    """One policy's answers, with log-probs and true rewards. The model is freed when this returns."""
    policy = load_policy(folder, tokenizer, getattr(torch, args.dtype), "--policies").to(device).eval()
    seeds = [row_seed(args.seed, i) for i in range(len(prompts))]  # for all policies
    answers = generate(policy, [row["prompt_ids"] for row in prompts], seeds, args.response_length,
                       args.temperature, tokenizer, device, batch=args.micro_batch)
    rows = [{**row, "response_ids": ids, "response": answer_text(tokenizer, ids),
             "truncated": not ended(tokenizer, ids), "kl": None, "scores": {}}
            for row, ids in zip(prompts, answers)]
    for row, score in zip(rows, truth(rows, policy, tokenizer) if truth else ()):
        row["scores"]["truth"] = score
    if args.temperature > 0:
        for row, logp in zip(rows, sequence_logprobs(policy, rows, tokenizer, args, device)):
            row["logp"] = logp
    return rows


def add_gvm_scores(answers, tokenizer, args, device):
    """The GVM's value of each final token; tau: K of the same policy's answers to other groups."""
    gvm = open_gvm(args, device)
    if gvm.settings["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise BadInput("--value_model: another tokenizer than the policies'; train a GVM on their family.")
    for name, rows in answers.items():
        named = [{**row, "policy": name} for row in rows]
        values, _ = values_under_own_tau(gvm, named, {name: named}, args.seed)
        for row, v in zip(rows, values):
            row["scores"]["gvm"] = float(v[-1])


def policy_report(rows, first):
    """Results of one policy. rows, first: its answers and the first policy's, prompt by prompt."""
    def mean_and_error(values):
        error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "stderr": error}

    report = {"scores": {}, "against_first": {},
              "kl": None if rows[0]["kl"] is None else mean_and_error([row["kl"] for row in rows]),
              "length": float(np.mean([len(row["response_ids"]) for row in rows])),
              "truncated": float(np.mean([row["truncated"] for row in rows]))}
    for name in rows[0]["scores"]:
        ours, theirs = (np.array([row["scores"][name] for row in side]) for side in (rows, first))
        sign = np.sign(np.round(ours - theirs, 6))
        report["scores"][name] = mean_and_error(ours)
        report["against_first"][name] = {outcome: float((sign == s).mean())
                                         for outcome, s in (("win", 1), ("tie", 0), ("lose", -1))}
    return report


def held_out_prompts(args):
    """{text: record} of the held-out prompts of --data, each once."""
    records = {prompt_text(r["prompt"]): r for r in read_data(args.data, args.allow_dropped, needs="prompts")}
    return {text: r for text, r in records.items() if split_of(text, args.split_seed) == "test"}


def evaluate_policy(args, device):
    """One model is in memory at a time: the policies in turn, then the reference, then each scorer."""
    named = named_paths("--policies", args.policies, ("sft", "dvpo", "ppo"), "config.json", args)
    if len(dict(named)) < len(named):
        raise BadInput("--policies: two of them have one name; give each its own.")
    first, reference = named[0]
    truth = load_numbers(args.truth_fn, "--truth_fn") if args.truth_fn else None
    tokenizer = load_tokenizer(reference, "--policies")
    if args.reward_model:
        reader = load_reward_tokenizer(args.reward_model)
    if args.value_model:
        gvm_settings(args.value_model)
    records = held_out_prompts(args).values()
    rows = [{"prompt": r["prompt"], "group": r["group"], "prompt_ids": ids} for r in records
            if (ids := readable(chat_ids, tokenizer, r["prompt"]))]
    short = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length]
    print(f"--max_prompt_length {args.max_prompt_length} keeps {len(short)} of {len(records)} held-out "
          "prompts" + f"; {len(records) - len(rows)} cannot become token ids" * (len(rows) < len(records)))
    if not short:
        raise BadInput(f"--data {args.data}: no held-out prompt is within --max_prompt_length.")
    prompts = some(short, args.prompts, args.seed)
    for _, folder in named:
        check_policy(folder, tokenizer, prompts, args)
    answers = {name: answers_of(folder, prompts, truth, tokenizer, args, device) for name, folder in named}
    if args.reward_model:
        kept = [i for i in range(len(prompts)) if all(
            reward_fits(reader, found[i]["prompt"], found[i]["response"]) for found in answers.values())]
        print(f"--reward_model can read all answers to {len(kept)} of {len(prompts)} prompts")
        if not kept:
            raise BadInput(f"--reward_model {args.reward_model}: no prompt and answer fit its context.")
        prompts, answers = kept, {name: [found[i] for i in kept] for name, found in answers.items()}
    rows = [row for found in answers.values() for row in found]
    if args.temperature > 0:  # KL = mean over y ~ pi of log pi(y | x) - log pi_ref(y | x)
        policy = load_policy(reference, tokenizer, getattr(torch, args.dtype), "--policies").to(device).eval()
        for row, logp in zip(rows, sequence_logprobs(policy, rows, tokenizer, args, device)):
            row["kl"] = row["logp"] - logp
        del policy
    if args.value_model or Path("runs", Path(args.model).name, "gvm", "gvm.json").exists():
        add_gvm_scores(answers, tokenizer, args, device)
    if args.reward_model:
        for row, score in zip(rows, model_scores(args.reward_model, rows, args, device)):
            row["scores"]["reward model"] = score
    lines = [json.dumps({"policy": name, **row}) for name, found in answers.items() for row in found]
    return {"reference": reference, "first": first, "prompts": len(prompts), "temperature": args.temperature,
            "policies": {name: policy_report(found, answers[first]) for name, found in answers.items()},
            "files": {"out": "\n".join(lines) + "\n"}}


def show_policy(result):
    first, policies = result["first"], result["policies"]
    names = {score: {"truth": "true reward", "gvm": "GVM value"}.get(score, score)
             for score in policies[first]["scores"]}
    print_table(f"{result['prompts']} held-out prompts, one answer each, temperature "
                f"{result['temperature']:g}, against {first} ({result['reference']}); mean ± standard error",
                ["policy", *names.values(), "KL\n[nats]", "length\n[tokens]", "truncated\n[%]",
                 *(f"win / tie / lose\n[%] by {name}" for name in names.values())],
                [[policy, *(plus_minus(found["scores"][score]) for score in names), plus_minus(found["kl"]),
                  f"{found['length']:.1f}", percent(found["truncated"]),
                  *(win_tie_lose(found["against_first"][score]) if policy != first else None
                    for score in names)] for policy, found in policies.items()])


# ---- plot --------------------------------------------------------------------------------------------------

def read_metrics(path):
    """{metric: {step: value}} of a metrics.jsonl; of a step that was logged twice the last line counts."""
    curves = defaultdict(dict)
    for where, row in read_rows(path):
        for name, value in row.items():
            try:
                if not isinstance(row.get("step"), int) or not isinstance(value, (int, float, type(None))):
                    raise ValueError
                if value is not None:
                    curves[name][row["step"]] = float(value)
            except (ValueError, OverflowError):
                raise BadInput(f"{where}: not a row of metrics (numbers, whole `step`); remove it.") from None
    return curves


def mean_and_band(metric, label, seeds):
    """(steps [N], mean [N], std [N]) over seeds, {path: curves}, at the steps that all of them have."""
    for path, curves in seeds.items():
        if metric not in curves:
            raise BadInput(f"--metrics {metric}: {path} has none; it has {', '.join(sorted(curves))}.")
    steps = sorted(set.intersection(*[set(curves[metric]) for curves in seeds.values()]))
    if not steps:
        raise BadInput(f"--runs {label}=...: no step with {metric} in common; give them different labels.")
    values = np.array([[curves[metric][step] for step in steps] for curves in seeds.values()])  # [seeds, N]
    return steps, values.mean(0), values.std(0)


def draw_band(axis, metric, label, seeds):
    """Draw the mean over the seeds of a label and its band; return what mean_and_band returns."""
    steps, mean, std = mean_and_band(metric, label, seeds)
    line, = axis.plot(steps, mean, label=label, marker="o" if len(steps) == 1 else None)
    axis.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    return steps, mean, std


PICTURE = rb"\x89PNG.{,100}evaluate\.py plot"


def evaluate_plot(args, device):
    from matplotlib.figure import Figure
    args.png = args.png or "curves.png"
    check_ours("--png", args.png, PICTURE)
    check_place(args.png, "--png")  # before the work
    runs, result = defaultdict(dict), defaultdict(dict)
    for label, path in named_paths("--runs", args.runs, ("dvpo", "ppo"), "metrics.jsonl", args):
        path = path if path.endswith(".jsonl") else f"{path}/metrics.jsonl"
        runs[label][path] = read_metrics(path)
    files = [curves for seeds in runs.values() for curves in seeds.values()]
    usual = ("objective/true_reward", "gvm/mean", "objective/kl", "completions/mean_length")
    metrics = args.metrics or [name for name in usual if all(name in curves for curves in files)] or usual
    figure = Figure(figsize=(7, 3 * len(metrics)), layout="constrained")
    for axis, metric in zip(figure.subplots(len(metrics), squeeze=False).flat, metrics):
        for label, seeds in runs.items():
            steps, mean, _ = draw_band(axis, metric, label, seeds)
            result[metric][label] = {"seeds": len(seeds), "steps": len(steps), "first": float(mean[0]),
                                     "last": float(mean[-1]), "highest": float(mean.max())}
        axis.set(title=metric, xlabel="step")
        axis.legend()
    figure.savefig(picture := io.BytesIO(), dpi=120, format="png",
                   metadata={"Software": "evaluate.py plot"})
    return {"curves": result, "files": {"png": picture.getvalue()}}


def show_plot(result):
    print_table(f"Curves, mean over the seeds of a label; drawn in {result['args']['png'] or 'curves.png'}",
                ["metric", "label", "seeds", "steps", "first", "last", "highest"],
                [[metric, label, *found.values()] for metric, labels in result["curves"].items()
                 for label, found in labels.items()], left=2)


# ---- command line ------------------------------------------------------------------------------------------

COMMANDS = {"gvm": evaluate_gvm, "values": evaluate_values, "policy": evaluate_policy, "plot": evaluate_plot}
OUTPUTS = {"json": RESULTS, "html": re.escape(PAGE[:200].encode()),  # flag: how what it names begins
           "out": rb'\{"policy": ".*?", "prompt": ', "png": PICTURE}
TABLES = {"gvm": show_gvm, "policy": show_policy, "plot": show_plot}  # `values` prints its texts itself


def named_paths(flag, specs, stages, file, args):
    """[[name, path]] of name=path words, or of those stages of runs/<model name> that have the file."""
    runs = Path("runs") / Path(args.model).name
    specs = specs or [f"{stage}={runs / stage}" for stage in stages if (runs / stage / file).exists()]
    if not specs:
        raise BadInput(f"{runs} holds no {' or '.join(stages)} yet: train one, or give {flag} name=path.")
    return split_words(flag, specs)


def main(argv=None):
    command, args = command_args(Args, COMMANDS, argv, outputs=OUTPUTS)
    device = init_distributed()[2] if command != "plot" else None
    result = {"command": command, "args": vars(args), **COMMANDS[command](args, device)}
    files = result.pop("files", {})
    files["json"] = json.dumps(result, indent=1, ensure_ascii=False)
    if command in TABLES:  # first: what a full disk does not take has been seen
        TABLES[command](result)
    for flag, content in files.items():
        if getattr(args, flag):
            write_whole(getattr(args, flag), content)


if __name__ == "__main__":
    main()
