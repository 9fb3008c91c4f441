"""Judge what the other scripts trained: a value model, single answers, policies, whole runs.

gvm     How well the global value model ranks held-out pairs (Table 4) and how well it is calibrated. Both answers
        of a pair are valued under ONE tau, which the chosen one's and the rejected one's policy lend in turn: with
        each answer under its own policy's tau a model could rank by recognizing the policy, which is worth nothing
        in RL, where all rows share one policy. That own-tau figure and three baselines are printed beside it:
          policy mean    the answer of the policy with the better mean in training (score, or share of chosen)
          longer answer  more tokens win
          tau only       the answer whose own tau has the longer answers wins
        Intervals: 95 %, bootstrap over groups (prompts, or what the data calls a group), which are independent.
        With --reference_fn, also the distance of every token's value to the exact value and to the Bayes estimate,
        before and from the token on that decides the answer. Slot 0, the last prompt token, counts as before.
          rmse(policy) = sqrt(mean over its prefixes of error^2),  rmse = sqrt(mean over policies of rmse(policy)^2)
        so every policy weighs the same, however long its answers are.
values  The value of every token of two or more answers to one question (Figure 4): terminal, and a page by --html.
policy  Policies on held-out prompts, one sampled answer each: score, win/tie/lose, KL, length.
plot    Curves of runs over steps (Figure 3).

    python evaluate.py gvm                                            the toy, on one CPU rank
    deepspeed --num_gpus 1 evaluate.py gvm --model meta-llama/Meta-Llama-3-8B
    python evaluate.py values --html values.html
    python evaluate.py policy --policies sft=runs/toy/sft dvpo=runs/toy/dvpo
    python evaluate.py plot --runs dvpo=runs/toy/dvpo/metrics.jsonl --png curves.png

reads   the test share of the data (10 % of the prompts), models and logs of the other stages
writes  tables on the terminal; --json FILE in every command; --html, --out and --png as named

Legend: B rows, P prompt slots (left padded, tau included), R response slots (right padded), T tokens of a response.
"""

import html
import json
import os
import re
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm  # comes with transformers

from common import (answer_ids, chat_ids, collate, cut_pair, generate, init_distributed, keyed_rng, load_gvm,
                    load_plug, load_policy, load_tokenizer, parse_args, reward_model_scores, stage_folder,
                    tokenizer_fingerprint)
from data import BadInput, has_policy_names, parse_json, preference_pair, prompt_text, read_data, split_of


@dataclass
class GvmArgs:
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    value_model: str = ""  # the GVM's folder, default runs/<model name>/gvm
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # seed of the split by prompt; must be the GVM's own
    allow_dropped: bool = False  # go on when more than 10 % of the responses had to be dropped
    pairs: int = 1000  # at most this many held-out pairs, and twice as many responses for the calibration
    # exact values
    reference_fn: str = ""  # module:function giving exact and Bayes values, e.g. toy.reference:values
    reference_rows: int = 60  # held-out responses per policy compared with them; more if needed for 250 prefixes
    unseen_data: str = ""  # a file like --data, of policies the GVM was not trained on
    # run
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights
    micro_batch: int = 8  # rows of one forward pass
    seed: int = 1  # choice of rows, draws of tau
    json: str = ""  # write the tables to this file


@dataclass
class ValuesArgs:
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    value_model: str = ""  # the GVM's folder, default runs/<model name>/gvm
    # what to value
    question: str = ""  # default: a held-out question of --data with its best and its worst response
    responses: list[str] = field(default_factory=list)  # two or more answers to --question
    tau_policy: str = ""  # whose rows of --data tau is drawn from, default the most frequent policy
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # seed of the split by prompt; must be the GVM's own
    allow_dropped: bool = False  # go on when more than 10 % of the responses had to be dropped
    # run
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights
    micro_batch: int = 8  # rows of one forward pass
    seed: int = 1  # choice of the question, draw of tau
    html: str = ""  # write a page that shows the values to this file
    json: str = ""  # write the values to this file


@dataclass
class PolicyArgs:
    # models
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    policies: list[str] = field(default_factory=list)  # name=folder or folder; default those in runs/<model name>
    reference: str = ""  # where KL is measured from, default the first policy
    value_model: str = ""  # GVM that scores the answers, default runs/<model name>/gvm where it exists
    reward_model: str = ""  # one-label sequence classifier that scores the answers
    truth_fn: str = ""  # module:function giving true rewards, called as fn(rows, policy, tokenizer)
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file; only prompts are used
    split_seed: int = 0  # seed of the split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # go on when more than 10 % of the responses had to be dropped
    prompts: int = 256  # at most this many held-out prompts
    max_prompt_length: int = 1024  # longer prompts are left out and counted [tokens]
    # sampling
    response_length: int = 1024  # at most this many sampled tokens per answer [tokens]
    temperature: float = 1.0  # of the sampler and of the log-probs in KL; 0 is greedy, without KL
    # run
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the weights
    micro_batch: int = 8  # rows of one forward pass
    seed: int = 1  # choice of prompts, sampling, draws of tau
    out: str = ""  # write the answers with their scores to this jsonl file
    json: str = ""  # write the tables to this file


@dataclass
class PlotArgs:
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    runs: list[str] = field(default_factory=list)  # label=metrics.jsonl; files of one label are seeds
    metrics: list[str] = field(default_factory=list)  # one panel each; default reward, value, KL, length
    smooth: int = 1  # moving average over this many logged steps
    png: str = "curves.png"  # the picture
    json: str = ""  # write first, last and best value of each curve to this file


# ---- statistics ------------------------------------------------------------------------------------------------

STATISTICS = ("mean", "P1", "P5", "P10", "P90", "P95", "P99")  # Table 4


def summarize(values):
    """The STATISTICS of the token values of a response. values: [T], without slot 0;  returns [7]."""
    return np.array([np.mean(values), *np.percentile(values, [int(name[1:]) for name in STATISTICS[1:]])])


def hits(good, bad):
    """1 where the good response has the higher number, 1/2 where they tie, 0 elsewhere. Arrays of one shape."""
    good, bad = np.asarray(good), np.asarray(bad)
    return (good > bad) + 0.5 * (good == bad)


def accuracy(hit, groups, draws=1000):
    """Mean of hits and its 95 % interval, by bootstrap over groups: pairs of one group are not independent.

    hit: [N] in [0, 1];  groups: N names;  returns {"accuracy", "low", "high"}
    """
    _, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    total, count = np.bincount(index, hit), np.bincount(index)
    picks = keyed_rng(0).integers(len(count), size=(draws, len(count)))
    low, high = np.percentile(total[picks].sum(1) / count[picks].sum(1), [2.5, 97.5])
    return {"accuracy": float(np.mean(hit)), "low": float(low), "high": float(high)}


def calibration(predicted, actual, bins=10):
    """Mean predicted and mean actual reward in bins of equal count, ordered by prediction, and the RMSE over all."""
    predicted, actual = np.asarray(predicted), np.asarray(actual)
    parts = [part for part in np.array_split(np.argsort(predicted, kind="stable"), bins) if len(part)]
    return {"rmse": float(np.sqrt(np.mean((predicted - actual) ** 2))), "n": len(predicted),
            "bins": [{"n": len(part), "predicted": float(predicted[part].mean()),
                      "actual": float(actual[part].mean())} for part in parts]}


def equal_weight_rmse(errors):
    """RMSE in which every policy weighs the same, and that of each policy. errors: {policy: list of [N] arrays}."""
    square = {policy: np.mean(np.concatenate(parts) ** 2) for policy, parts in errors.items()
              if sum(map(len, parts))}
    by_policy = {policy: float(np.sqrt(value)) for policy, value in square.items()}
    return (float(np.sqrt(np.mean(list(square.values())))) if square else None), by_policy


def win_tie_lose(ours, theirs):
    """Shares of prompts on which our score is higher, equal within 1e-6, lower. Two lists of N scores."""
    gap = np.subtract(ours, theirs)
    return {"win": float((gap > 1e-6).mean()), "tie": float((abs(gap) <= 1e-6).mean()),
            "lose": float((gap < -1e-6).mean())}


def moving_average(values, window):
    """Centred mean over `window` entries, over fewer at both ends. values: [N];  returns [N]."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - (window - 1) // 2, 0)
    end = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    return (total[end] - total[start]) / (end - start)


# ---- value model and tau ---------------------------------------------------------------------------------------

Gvm = namedtuple("Gvm", "model tokenizer settings device micro_batch")


def open_gvm(args, device):
    """The value model with its tokenizer and gvm.json, held to the split that it was trained under."""
    folder = stage_folder(args.model, "gvm", args.value_model, "--value_model",
                          f"train_gvm.py --model {args.model}")
    model, settings = load_gvm(folder, getattr(torch, args.dtype))
    if settings["split_seed"] != args.split_seed:
        raise BadInput(f"--split_seed {args.split_seed}: {folder} was trained with {settings['split_seed']}, so "
                       f"what is held out now was not then; give --split_seed {settings['split_seed']}.")
    tokenizer = load_tokenizer(folder, "--value_model")
    tokenizer.chat_template = settings["chat_template"]
    return Gvm(model.to(device).eval(), tokenizer, settings, device, args.micro_batch)


@torch.no_grad()
def token_values(gvm, jobs):
    """Values along each response: slot 0 is V(s_1), read at the last prompt token, slot t is Q after token t.

    jobs: list of (prompt ids, response ids), tau included in the prompt;  returns list of [1 + T] float64
    """
    found = [None] * len(jobs)
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][0]) + len(jobs[i][1]))  # less padding
    for start in tqdm(range(0, len(order), gvm.micro_batch), "values", disable=None):
        part = order[start:start + gvm.micro_batch]
        batch = collate(*zip(*[jobs[i] for i in part]), gvm.tokenizer.pad_token_id, gvm.device)
        logits = gvm.model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions).logits
        q = logits[:, batch.P - 1:, 0].double().cpu().numpy()                                       # [B, 1 + R]
        for i, row in zip(part, q):
            found[i] = row[:1 + len(jobs[i][1])]
    return found


def lenders(rows):
    """Where tau is drawn from: {policy: rows}. The rows bring prompt, group, policy and response (text)."""
    pool = defaultdict(list)
    for row in rows:
        pool[row["policy"]].append(row)
    return pool


def draw_tau(gvm, pool, policy, group, rng):
    """K (question, answer) pairs by `policy` on other groups, cut to tau's budget; fewer where it wrote fewer."""
    rows, pairs = pool[policy] if gvm.settings["k"] else [], []
    for i in rng.permutation(len(rows)):
        if len(pairs) == gvm.settings["k"]:
            break
        if rows[i]["group"] != group:
            pairs.append(cut_pair(gvm.tokenizer, rows[i]["prompt"], rows[i]["response"], gvm.settings))
    return pairs


def under_tau(gvm, tau, rows):
    """[(tau + prompt ids, response ids)] of rows that share one tau, and the tau that fits before all of them.

    As in training, what exceeds the context loses whole pairs of tau, the first one first.
    """
    for first in range(len(tau) + 1):
        jobs = [(chat_ids(gvm.tokenizer, row["prompt"], tau[first:]), row["response_ids"]) for row in rows]
        if max(len(prompt) + len(response) for prompt, response in jobs) <= gvm.settings["context"]:
            return jobs, tau[first:]
    raise BadInput(f"A prompt and its response exceed the value model's context of {gvm.settings['context']} tokens: "
                   f"{rows[0]['prompt'][-1]['content'][:80]!r}; shorten them.")


# ---- gvm -------------------------------------------------------------------------------------------------------

def in_share(records, share, seed):
    return [record for record in records if split_of(prompt_text(record["prompt"]), seed) == share]


def response_row(record, response):
    return {"prompt": record["prompt"], "group": record["group"], "policy": response["policy"],
            "response": response["text"], "score": response["score"]}


def lending_rows(records, seed):
    """Every response of the value and test shares: they may stand in tau of rows of other groups."""
    return [response_row(record, response) for share in ("value", "test")
            for record in in_share(records, share, seed) for response in record["responses"]]


def held_out(records, gvm, seed):
    """(rows, pairs, left out): responses of the test share, (good, bad) of each of its prompts, and a Counter."""
    rows, pairs, left_out = [], [], Counter()
    for record in in_share(records, "test", seed):
        prompt_ids, made = chat_ids(gvm.tokenizer, record["prompt"]), []
        for response in record["responses"]:
            ids = answer_ids(gvm.tokenizer, response["text"])
            made.append({**response_row(record, response), "response_ids": ids})
        fits = [len(prompt_ids) + len(row["response_ids"]) <= gvm.settings["max_length"] for row in made]
        rows += [row for row, fit in zip(made, fits) if fit]
        left_out[f"responses over {gvm.settings['max_length']} tokens with their prompt"] += fits.count(False)
        pair = preference_pair(record, seed)
        places = [record["responses"].index(response) for response in pair or ()]
        if pair is None:
            left_out["rows that prefer nothing"] += 1
        elif all(fits[i] for i in places):
            pairs.append(tuple(made[i] for i in places))
        else:
            left_out["pairs with such a response"] += 1
    return rows, pairs, {reason: count for reason, count in left_out.items() if count}


def some(items, n, seed):
    """At most n of the items, the same ones under the same seed."""
    return [items[i] for i in keyed_rng(seed).permutation(len(items))[:n]]


def policy_means(records, args, kind):
    """What was to be known of each policy in training: mean score, or share of chosen among its responses in pairs."""
    seen = defaultdict(list)
    for record in in_share(records, "value", args.split_seed):
        if kind == "preference":
            graded = zip(preference_pair(record, args.split_seed) or (), (1.0, 0.0))
        else:
            graded = ((r, r["score"]) for r in record["responses"] if r["score"] is not None)
        for response, grade in graded:
            seen[response["policy"]].append(grade)
    return {policy: float(np.mean(grades)) for policy, grades in seen.items()}


def rank_pairs(gvm, pairs, pool, means, seed):
    """Accuracy by each statistic under one shared tau and under own taus, the baselines, and mean values."""
    jobs, tau_length, shortened = [], [], 0
    for i, pair in enumerate(pairs):
        for turn, lender in enumerate(pair if gvm.settings["k"] else pair[:1]):
            drawn = draw_tau(gvm, pool, lender["policy"], lender["group"], keyed_rng(seed, i, turn))
            found, tau = under_tau(gvm, drawn, pair)
            jobs, shortened = jobs + found, shortened + (len(tau) < len(drawn))
            tau_length.append(np.mean([len(answer_ids(gvm.tokenizer, a)) for _, a in tau]) if tau else 0.0)
    summary = np.array([summarize(v[1:]) for v in token_values(gvm, jobs)])
    summary = summary.reshape(len(pairs), -1, 2, len(STATISTICS))           # [pair, lender of tau, good or bad, 7]
    groups = [good["group"] for good, _ in pairs]
    shared = hits(summary[:, :, 0], summary[:, :, 1]).mean(1)               # [pair, 7]
    own = hits(summary[:, 0, 0], summary[:, -1, 1])                         # [pair, 7]
    length = [[len(row["response_ids"]) for row in pair] for pair in pairs]
    baselines = {"longer answer": hits(*zip(*length))}
    if means:
        known = [[means.get(row["policy"], np.mean(list(means.values()))) for row in pair] for pair in pairs]
        baselines["policy mean"] = hits(*zip(*known))
    if gvm.settings["k"]:
        baselines["tau only"] = hits(tau_length[::2], tau_length[1::2])
    good, bad = summary[..., 0].mean((0, 1))
    return {"pairs": len(pairs), "groups": len(set(groups)), "shortened_tau": shortened,
            "mean_value": {"good": float(good), "bad": float(bad)},
            "shared_tau": {name: accuracy(shared[:, i], groups) for i, name in enumerate(STATISTICS)},
            "own_tau": {name: accuracy(own[:, i], groups) for i, name in enumerate(STATISTICS)},
            "baselines": {name: accuracy(hit, groups) for name, hit in baselines.items()}}


def calibrate(gvm, rows, pairs, pool, args):
    """Final-token value, under the own policy's tau, against the reward as the GVM was taught it.

    Of a GVM taught by scores every held-out response counts: the best of a prompt alone would be lucky ones.
    """
    reward = gvm.settings["reward"]
    if reward["kind"] == "preference":
        rows = [(row, sign) for pair in pairs for row, sign in zip(pair, (1.0, -1.0))]
    elif reward["kind"] == "model":
        rows = some(rows, 2 * args.pairs, args.seed)
        scores = reward_model_scores(reward["reward_model"], [(row["prompt"], row["response"]) for row in rows],
                                     getattr(torch, args.dtype), gvm.device, args.micro_batch)
        rows = [(row, (score - reward["center"]) / reward["scale"]) for row, score in zip(rows, scores)]
    else:
        rows = some([row for row in rows if row["score"] is not None], 2 * args.pairs, args.seed)
        rows = [(row, (row["score"] - reward["center"]) / reward["scale"]) for row in rows]
    if not rows:
        return None  # a GVM taught by scores, on pairs without any
    final = [v[-1] for v in values_under_own_tau(gvm, [row for row, _ in rows], pool, args.seed)[0]]
    return calibration(final, [actual for _, actual in rows])


def values_under_own_tau(gvm, rows, pool, seed):
    """([1 + T] values, tau) of each row, with tau drawn from its own policy: two lists."""
    jobs, taus = [], []
    for i, row in enumerate(rows):
        found, tau = under_tau(gvm, draw_tau(gvm, pool, row["policy"], row["group"], keyed_rng(seed, 1, i)), [row])
        jobs, taus = jobs + found, taus + [tau]
    return token_values(gvm, jobs), taus


def compare_with_reference(gvm, rows, pool, reference, args):
    """RMSE between GVM, exact value and Bayes estimate, before and from the deciding token on."""
    chosen, by_policy = [], lenders(some(rows, len(rows), args.seed))
    for candidates in by_policy.values():
        prefixes = 0
        for i, row in enumerate(candidates):
            if i < args.reference_rows or prefixes < 250:
                chosen.append(row)
                prefixes += 1 + len(row["response_ids"])
    values, taus = values_under_own_tau(gvm, chosen, pool, args.seed)
    known = reference([{**row, "tau": tau} for row, tau in zip(chosen, taus)])
    if [len(v) for v in values] != [len(k["exact"]) for k in known]:
        raise BadInput(f"--reference_fn {args.reference_fn}: it must give one value more than response_ids has for "
                       "every row.")
    errors = defaultdict(lambda: defaultdict(list))                    # [(half, comparison)][policy]: list of [N]
    for row, v, k in zip(chosen, values, known):
        exact, bayes, decided = (np.asarray(k[name]) for name in ("exact", "bayes", "decided"))
        gaps = {"gvm_exact": v - exact, "gvm_bayes": v - bayes, "bayes_exact": bayes - exact}
        for half, here in (("before", ~decided), ("decided", decided)):
            for name, gap in gaps.items():
                errors[half, name][row["policy"]].append(gap[here])
    result = {"rows": len(chosen), "before": {}, "decided": {}, "policies": {policy: {} for policy in by_policy}}
    for (half, name), found in errors.items():
        result[half][name], each = equal_weight_rmse(found)
        for policy, parts in found.items():
            entry = result["policies"][policy].setdefault(half, {"prefixes": sum(map(len, parts))})
            entry[name] = each.get(policy)
    return result


def evaluate_gvm(args, device):
    gvm = open_gvm(args, device)
    records = read_named(args.data, gvm, args)
    named = has_policy_names(records)
    pool = lenders(lending_rows(records, args.split_seed))
    rows, pairs, left_out = held_out(records, gvm, args.split_seed)
    pairs = some(pairs, args.pairs, args.seed)
    if not pairs:
        raise BadInput(f"--data {args.data}: no held-out pair is left; its prompts are too few or prefer nothing.")
    result = {"k": gvm.settings["k"], "left_out": left_out}
    means = policy_means(records, args, gvm.settings["reward"]["kind"]) if named else {}
    result["ranking"] = rank_pairs(gvm, pairs, pool, means, args.seed)
    result["calibration"] = calibrate(gvm, rows, pairs, pool, args)
    if args.reference_fn:
        reference = load_plug(args.reference_fn, "--reference_fn")
        result["reference"] = {"seen": compare_with_reference(gvm, rows, pool, reference, args)}
        if args.unseen_data:
            records = read_named(args.unseen_data, gvm, args)
            rows, _, _ = held_out(records, gvm, args.split_seed)
            pool = lenders(lending_rows(records, args.split_seed))
            result["reference"]["unseen"] = compare_with_reference(gvm, rows, pool, reference, args)
    print_gvm(result)
    return result


def read_named(source, gvm, args):
    """The records of a source, which must name its policies where the GVM is told the policy."""
    records = read_data(source, args.allow_dropped)
    if gvm.settings["k"] and not has_policy_names(records):
        raise BadInput(f"{source}: its responses carry no policy name (`model`), so tau cannot be drawn; this needs a "
                       "GVM trained with --k 0.")
    return records


def print_gvm(result):
    ranking, shown = result["ranking"], lambda a: f"{a['accuracy']:.3f} [{a['low']:.3f}, {a['high']:.3f}]"
    print(f"\nranking of {ranking['pairs']} held-out pairs of {ranking['groups']} groups, K = {result['k']}; left out: "
          + (", ".join(f"{n} {reason}" for reason, n in result["left_out"].items()) or "nothing")
          + f"; tau lost pairs to the context in {ranking['shortened_tau']} draws")
    print_table(["accuracy by", "one shared tau", "each its own tau"],
                [[name, shown(ranking["shared_tau"][name]), shown(ranking["own_tau"][name])] for name in STATISTICS])
    print_table(["baseline", "accuracy"], [[name, shown(a)] for name, a in ranking["baselines"].items()])
    print(f"\nmean token value: good {ranking['mean_value']['good']:+.3f}, bad {ranking['mean_value']['bad']:+.3f}")
    found = result["calibration"]
    if found:
        print(f"\ncalibration of the final value on {found['n']} responses, RMSE {found['rmse']:.3f}")
        print_table(["bin", "n", "predicted", "actual"],
                    [[str(i + 1), b["n"], b["predicted"], b["actual"]] for i, b in enumerate(found["bins"])])
    for kind, found in result.get("reference", {}).items():
        print(f"\nRMSE on {found['rows']} held-out responses of {kind} policies, every policy weighing the same")
        names = ("gvm_exact", "gvm_bayes", "bayes_exact")
        lines = [["all", half, None, *(found[half][name] for name in names)] for half in ("before", "decided")]
        lines += [[policy, half, entry[half]["prefixes"], *(entry[half][name] for name in names)]
                  for policy, entry in sorted(found["policies"].items()) for half in ("before", "decided")]
        print_table(["policy", "answer", "prefixes", "GVM to exact", "GVM to Bayes", "Bayes to exact"], lines)


# ---- values ----------------------------------------------------------------------------------------------------

def question_and_answers(records, args):
    """(prompt messages, group, [(label, text)]): what was typed, or a held-out question with best and worst answer."""
    if args.question:
        prompt = [{"role": "user", "content": args.question}]
        group = next((r["group"] for r in records if prompt_text(r["prompt"]) == prompt_text(prompt)), args.question)
        return prompt, group, [(f"response {i + 1}", text) for i, text in enumerate(args.responses)]
    candidates = [(record, pair) for record in in_share(records, "test", args.split_seed)
                  if (pair := preference_pair(record, args.split_seed))]
    if not candidates:
        raise BadInput(f"--data {args.data}: no held-out question prefers one answer; give --question and --responses.")
    (record, (best, worst)), = some(candidates, 1, args.seed)
    if best["score"] is not None:
        worst = min((r for r in record["responses"] if r["score"] is not None), key=lambda r: r["score"])
    labels = [name if r["score"] is None else f"{name} (score {r['score']:g})"
              for name, r in (("best", best), ("worst", worst))]
    return record["prompt"], record["group"], list(zip(labels, (best["text"], worst["text"])))


def token_texts(tokenizer, ids):
    """What each token adds to the text. A character spread over several tokens appears at the last of them."""
    texts, shown = [], ""
    for t in range(len(ids)):
        text = tokenizer.decode(ids[:t + 1], clean_up_tokenization_spaces=False)
        partial = text.endswith("\ufffd") and t + 1 < len(ids)
        texts.append("" if partial else text[len(shown):])
        shown = shown if partial else text
    return texts


def colour(value, low, high):
    """(red, green, blue), light enough for dark text: red at low, pale yellow half way, green at high."""
    x = 0.5 if high == low else (value - low) / (high - low)
    red, middle, green = (np.array(c) for c in ((244, 150, 140), (255, 247, 205), (140, 210, 150)))
    mixed = red + 2 * x * (middle - red) if x < 0.5 else middle + (2 * x - 1) * (green - middle)
    return tuple(int(round(c)) for c in mixed)


def painted(text, value, low, high):
    """The text in dark letters on the colour of its value, by ANSI escape codes."""
    red, green, blue = colour(value, low, high)
    return f"\033[48;2;{red};{green};{blue}m\033[38;2;0;0;0m{text}\033[0m"


def terminal_text(found, low, high, coloured):
    """One response for the terminal: coloured tokens, or plain ones with their value in brackets."""
    parts = []
    for text, value in zip(["(question)", *found["tokens"]], found["values"]):
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)  # no escape codes from a text
        parts.append(painted(text, value, low, high) if coloured else f"{text}[{value:+.2f}]")
    return "".join(parts)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light }}
body {{ font: 17px/1.3 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem; margin: 0 auto;
        padding: 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1.05rem; margin: 1.4rem 0 .4rem }}
p {{ white-space: pre-wrap; overflow-wrap: anywhere }}
.bar {{ display: flex; align-items: center; gap: .6rem; margin: .8rem 0 }}
.bar i {{ flex: 1; max-width: 20rem; height: 1rem; border-radius: .2rem; background: linear-gradient(to right, {stops}) }}
.tokens span {{ display: inline-block; max-width: 100%; margin: .1rem .06rem; padding: .08rem .2rem;
                border-radius: .2rem; text-align: center; vertical-align: top; overflow-wrap: anywhere;
                white-space: pre-wrap }}
.tokens small {{ display: block; font-size: .68rem; color: #333; font-variant-numeric: tabular-nums }}
</style></head><body>
<h1>{title}</h1>
<p>{question}</p>
<div class="bar">{low:+.2f}<i></i>{high:+.2f}</div>
<p>{note}</p>
{responses}
</body></html>
"""


def page(result, low, high):
    """A page of its own, no network: every token with its value under it. All texts are escaped."""
    rgb = lambda value: "rgb({},{},{})".format(*colour(value, low, high))
    sections = []
    for found in result["responses"]:
        spans = []
        for text, value in zip(["question", *found["tokens"]], found["values"]):
            shown = html.escape(text.strip(" ").replace("\n", "\u23ce")) or "\u00a0"
            spans.append(f'<span style="background:{rgb(value)}">{shown}<small>{value:+.2f}</small></span>'
                         + "<br>" * text.count("\n"))
        sections.append(f"<h2>{html.escape(found['label'])}: mean {found['mean']:+.2f}, last {found['last']:+.2f}</h2>\n"
                        f'<div class="tokens">{"".join(spans)}</div>')
    note = "Each number is the value after its token; the first one, on the question, is the value before anything is said."
    if result["k"]:
        note += f" The model was shown {result['k']} answers of {result['tau_policy']} to other questions."
    stops = ", ".join(rgb(low + x * (high - low)) for x in (0, 0.5, 1))
    return PAGE.format(title="What each token is worth", question=html.escape(result["question"]), low=low, high=high,
                       note=html.escape(note), stops=stops, responses="\n".join(sections))


def evaluate_values(args, device):
    if bool(args.question) != bool(args.responses):
        raise BadInput("--question and --responses belong together: give both, or neither for a held-out question.")
    gvm = open_gvm(args, device)
    k = gvm.settings["k"]
    records = read_named(args.data, gvm, args) if k or not args.question else []
    prompt, group, answers = question_and_answers(records, args)
    pool = lenders(lending_rows(records, args.split_seed)) if k else {}
    policy = (args.tau_policy or max(pool, key=lambda name: len(pool[name]))) if k else None
    if k and policy not in pool:
        raise BadInput(f"--tau_policy {policy}: no policy of {args.data}; it has {', '.join(sorted(pool))}.")
    rows = [{"prompt": prompt, "response_ids": answer_ids(gvm.tokenizer, text)} for _, text in answers]
    jobs, tau = under_tau(gvm, draw_tau(gvm, pool, policy, group, keyed_rng(args.seed)), rows)
    result = {"question": prompt_text(prompt), "k": len(tau), "tau_policy": policy, "tau": tau, "responses": []}
    for (label, text), row, v in zip(answers, rows, token_values(gvm, jobs)):
        result["responses"].append({"label": label, "text": text, "tokens": token_texts(gvm.tokenizer, row["response_ids"]),
                                    "values": v.tolist(), "mean": float(v[1:].mean()), "last": float(v[-1])})
    low, high = (limit(v for found in result["responses"] for v in found["values"]) for limit in (min, max))
    print_values(result, low, high)
    if args.html:
        Path(args.html).write_text(page(result, low, high), encoding="utf-8")
        print(f"page: {args.html}")
    return result


def print_values(result, low, high):
    """Coloured where a person looks at it (a terminal, NO_COLOR not set), else with the numbers."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\n{result['question']}")
    if result["k"]:
        print(f"tau: {result['k']} answers of {result['tau_policy']} to other questions")
    if coloured:
        steps = np.linspace(low, high, 5)
        print("value after each token: " + "".join(painted(f" {v:+.2f} ", v, low, high) for v in steps))
    for found in result["responses"]:
        print(f"\n{found['label']}: {terminal_text(found, low, high, coloured)}")
    print_table(["response", "tokens", "before", "mean", "last"],
                [[f["label"], len(f["tokens"]), f["values"][0], f["mean"], f["last"]] for f in result["responses"]])


# ---- policy ----------------------------------------------------------------------------------------------------

def named_folders(args):
    """{name: folder} of --policies, or of what runs/<model name> holds."""
    if not args.policies:
        runs = Path("runs") / Path(args.model).name
        found = {stage: str(runs / stage) for stage in ("sft", "dvpo", "ppo") if (runs / stage / "config.json").exists()}
        if not found:
            raise BadInput(f"{runs} holds no policy yet: run sft.py and train_dvpo.py first, or give --policies.")
        return found
    found = {}
    for spec in args.policies:
        name, _, folder = spec.rpartition("=") if not Path(spec).exists() else ("", "", spec)
        name = name or Path(folder).name
        if name in found:
            raise BadInput(f"--policies: two are called {name}; name them, as in {name}-2={folder}.")
        found[name] = folder
    return found


def held_out_prompts(records, tokenizer, args):
    """Prompt rows (prompt, group, prompt_ids) of the test share, each prompt once, at most --prompts of them."""
    prompts = {prompt_text(r["prompt"]): r for r in in_share(records, "test", args.split_seed)}
    rows = [{"prompt": r["prompt"], "group": r["group"], "prompt_ids": chat_ids(tokenizer, r["prompt"])}
            for r in prompts.values()]
    short = [row for row in rows if len(row["prompt_ids"]) <= args.max_prompt_length]
    if not short:
        raise BadInput(f"--data {args.data}: no held-out prompt of at most --max_prompt_length {args.max_prompt_length} "
                       f"tokens; {len(rows)} are longer.")
    chosen = some(short, args.prompts, args.seed)
    print(f"evaluate policy: {len(chosen)} of {len(short)} held-out prompts; {len(rows) - len(short)} over "
          f"--max_prompt_length {args.max_prompt_length} left out")
    return chosen


def sampled(policy, prompts, tokenizer, args, device):
    """One answer per prompt row, with noise that is the same for every policy: equal policies answer alike."""
    seeds = [int(keyed_rng(args.seed, 2, i).integers(2**62)) for i in range(len(prompts))]
    answers = generate(policy, [row["prompt_ids"] for row in prompts], seeds, args.response_length, args.temperature,
                       tokenizer, device, batch=args.micro_batch)
    return [{**row, "response_ids": ids, "truncated": ids[-1] != tokenizer.eos_token_id,
             "response": tokenizer.decode(ids, skip_special_tokens=True)} for row, ids in zip(prompts, answers)]


@torch.no_grad()
def sequence_logprobs(policy, rows, tokenizer, args, device):
    """log pi(y | x), summed over the response's tokens, at the sampler's temperature. One float a row.

    The token at P + t is predicted at P + t - 1: logits of positions P - 1 .. T - 2 are read.
    """
    found = []
    for i in range(0, len(rows), args.micro_batch):
        part = rows[i:i + args.micro_batch]
        batch = collate([row["prompt_ids"] for row in part], [row["response_ids"] for row in part],
                        tokenizer.pad_token_id, device)
        logits = policy(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                        logits_to_keep=batch.mask.shape[1] + 1, use_cache=False).logits
        logp = torch.log_softmax(logits[:, :-1].float() / args.temperature, dim=-1)                 # [B, R, V]
        logp = logp.gather(-1, batch.ids[:, batch.P:, None]).squeeze(-1)                            # [B, R]
        found += (logp * batch.mask).sum(1).tolist()
    return found


def open_policy(folder, flag, tokenizer, prompts, args, device):
    """A policy ready to answer, after checking that it shares the tokenizer and that the answers fit its context."""
    if tokenizer_fingerprint(load_tokenizer(folder, flag)) != tokenizer_fingerprint(tokenizer):
        raise BadInput(f"{flag} {folder}: its tokenizer is not that of the reference, so KL between them has no meaning; "
                       "compare policies of one family.")
    policy = load_policy(folder, tokenizer, getattr(torch, args.dtype), flag).to(device).eval()
    context = getattr(policy.config, "max_position_embeddings", 10**9)
    if max(len(row["prompt_ids"]) for row in prompts) + args.response_length > context:
        raise BadInput(f"--response_length {args.response_length}: with the longest prompt it exceeds the context of "
                       f"{folder}, {context} tokens; lower it or --max_prompt_length.")
    return policy


def answers_of(folder, prompts, truth, tokenizer, args, device):
    """One policy's answers, with their log-probs and true rewards. The model is let go of when this returns."""
    policy = open_policy(folder, "--policies", tokenizer, prompts, args, device)
    rows = sampled(policy, prompts, tokenizer, args, device)
    true = truth(rows, policy, tokenizer) if truth else [None] * len(rows)
    logp = sequence_logprobs(policy, rows, tokenizer, args, device) if args.temperature > 0 else [None] * len(rows)
    return [{**row, "logp": own, "scores": {} if score is None else {"truth": float(score)}}
            for row, own, score in zip(rows, logp, true)]


def add_kl(answers, reference, tokenizer, args, device):
    """kl of each row: sum over its tokens of log pi - log pi_ref, whose mean over samples of pi is KL(pi, pi_ref)."""
    rows = [row for found in answers.values() for row in found]
    model = open_policy(reference, "--reference", tokenizer, rows, args, device)
    for row, logp in zip(rows, sequence_logprobs(model, rows, tokenizer, args, device)):
        row["kl"] = row["logp"] - logp


def add_gvm_scores(answers, tokenizer, args, device):
    """The GVM's value of each final token; tau: K of the same policy's own answers to prompts of other groups."""
    gvm = open_gvm(args, device)
    if gvm.settings["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise BadInput("--value_model: it was trained with another tokenizer than the policies have; train a GVM on "
                       "this family of models.")
    for name, rows in answers.items():
        named = [{**row, "policy": name} for row in rows]
        for row, values in zip(rows, values_under_own_tau(gvm, named, lenders(named), args.seed)[0]):
            row["scores"]["gvm"] = float(values[-1])


def add_reward_scores(answers, args, device):
    """What --reward_model says of each answer; it is loaded once for all policies."""
    rows = [row for found in answers.values() for row in found]
    chats = [(row["prompt"], row["response"]) for row in rows]
    scores = reward_model_scores(args.reward_model, chats, getattr(torch, args.dtype), device, args.micro_batch)
    for row, score in zip(rows, scores):
        row["scores"]["reward model"] = score


def mean_and_error(values):
    """Mean and its standard error over prompts."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "stderr": None if error is None else float(error)}


def policy_report(rows, first):
    """What is printed of one policy. rows, first: its answers and the first policy's, prompt by prompt."""
    scorers = rows[0]["scores"]
    scores = {s: [row["scores"][s] for row in rows] for s in scorers}
    return {"scores": {s: mean_and_error(scores[s]) for s in scorers},
            "against_first": {s: win_tie_lose(scores[s], [row["scores"][s] for row in first]) for s in scorers},
            "kl": mean_and_error([row["kl"] for row in rows]) if "kl" in rows[0] else None,
            "length": float(np.mean([len(row["response_ids"]) for row in rows])),
            "truncated": float(np.mean([row["truncated"] for row in rows]))}


def evaluate_policy(args, device):
    folders = named_folders(args)
    first, reference = next(iter(folders)), args.reference or next(iter(folders.values()))
    truth = load_plug(args.truth_fn, "--truth_fn") if args.truth_fn else None
    tokenizer = load_tokenizer(reference, "--reference" if args.reference else "--policies")
    prompts = held_out_prompts(read_data(args.data, args.allow_dropped), tokenizer, args)
    answers = {name: answers_of(folder, prompts, truth, tokenizer, args, device) for name, folder in folders.items()}
    if args.temperature > 0:
        add_kl(answers, reference, tokenizer, args, device)
    if args.value_model or (Path("runs") / Path(args.model).name / "gvm" / "gvm.json").exists():
        add_gvm_scores(answers, tokenizer, args, device)
    if args.reward_model:
        add_reward_scores(answers, args, device)
    result = {"reference": reference, "first": first, "prompts": len(prompts), "temperature": args.temperature,
              "policies": {name: policy_report(rows, answers[first]) for name, rows in answers.items()}}
    if args.out:
        keys = ("prompt", "response", "truncated", "kl", "scores")
        lines = [{"policy": name, "folder": folders[name], "tokens": len(row["response_ids"]),
                  **{key: row[key] for key in keys if key in row}} for name, rows in answers.items() for row in rows]
        Path(args.out).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    print_policies(result)
    return result


def print_policies(result):
    shown = lambda m: None if m is None else f"{m['mean']:.3f} +- {m['stderr'] or 0:.3f}"
    reports = result["policies"]
    scorers = list(reports[result["first"]]["scores"])
    print(f"\nmeans over {result['prompts']} held-out prompts, +- standard error; KL from {result['reference']} "
          f"[nats per response], temperature {result['temperature']:g}")
    print_table(["policy", *scorers, "KL", "tokens", "truncated"],
                [[name, *(shown(r["scores"][s]) for s in scorers), shown(r["kl"]), f"{r['length']:.1f}",
                  f"{r['truncated']:.1%}"] for name, r in reports.items()])
    others = [name for name in reports if name != result["first"]]
    if others and scorers:
        print(f"\nshare of prompts against {result['first']}")
        print_table(["policy", "by", "win", "tie", "lose"],
                    [[name, s, *reports[name]["against_first"][s].values()] for name in others for s in scorers])


# ---- plot ------------------------------------------------------------------------------------------------------

DEFAULT_METRICS = ("objective/true_reward", "gvm/mean", "objective/kl", "completions/mean_length")


def run_files(args):
    """{label: [metrics.jsonl paths]} of --runs, or of what runs/<model name> holds. A folder stands for its file."""
    specs = args.runs
    if not specs:
        runs = Path("runs") / Path(args.model).name
        specs = [f"{stage}={runs / stage}" for stage in ("dvpo", "ppo") if (runs / stage / "metrics.jsonl").exists()]
        if not specs:
            raise BadInput(f"{runs} holds no metrics.jsonl of dvpo or ppo yet: train one, or give --runs label=file.")
    found = defaultdict(list)
    for spec in specs:
        label, equals, path = spec.partition("=")
        if not equals:
            raise BadInput(f"--runs {spec}: expected label=metrics.jsonl, for example dvpo=runs/toy/dvpo/metrics.jsonl.")
        path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
        if not path.exists():
            raise BadInput(f"--runs {spec}: no such file; a run writes metrics.jsonl into its folder.")
        found[label].append(path)
    return dict(found)


def read_metrics(path):
    """Rows of a metrics.jsonl, each an object with a whole-numbered step."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            row = parse_json(line, path, first_line=number)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise BadInput(f"{path}:{number}: not a row of a metrics.jsonl, which is an object with a number `step`.")
            rows.append(row)
    if not rows:
        raise BadInput(f"{path}: no rows yet; let the run make a step.")
    return rows


def curve(rows, metric, where):
    """(steps [N], values [N]) of the rows that have the metric, or None."""
    found = {row["step"]: row[metric] for row in rows if row.get(metric) is not None}
    for step, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadInput(f"{where}: {metric} at step {step} is {value!r}, not a number; choose another of --metrics.")
    return (np.array(list(found)), np.array(list(found.values()), dtype=float)) if found else None


def mean_and_band(curves, window):
    """Mean and standard deviation over seeds at the steps that all of them have, each smoothed first.

    curves: list of (steps, values);  returns (steps [N], mean [N], std [N])
    """
    steps = sorted(set.intersection(*[set(s.tolist()) for s, _ in curves]))
    smooth = [dict(zip(s.tolist(), moving_average(v, window))) for s, v in curves]
    values = np.array([[found[step] for step in steps] for found in smooth])                        # [seeds, N]
    return np.array(steps), values.mean(0), values.std(0)


def evaluate_plot(args, device):
    if args.smooth < 1:
        raise BadInput(f"--smooth {args.smooth}: the moving average needs at least 1 step.")
    runs = {label: [(path, read_metrics(path)) for path in paths] for label, paths in run_files(args).items()}
    every = [(path, rows) for found in runs.values() for path, rows in found]
    metrics = args.metrics or [m for m in DEFAULT_METRICS if all(curve(rows, m, path) for path, rows in every)]
    if not metrics:
        raise BadInput(f"--runs: no metric of {', '.join(DEFAULT_METRICS)} is in all files; choose with --metrics.")
    panels = {}
    for metric in metrics:
        for path, rows in every:
            if curve(rows, metric, path) is None:
                raise BadInput(f"--metrics {metric}: {path} has none; it has {', '.join(rows[-1])}.")
        panels[metric] = {label: mean_and_band([curve(rows, metric, path) for path, rows in found], args.smooth)
                          for label, found in runs.items()}
        for label, (steps, _, _) in panels[metric].items():
            if not len(steps):
                raise BadInput(f"--runs: the files called {label} have no step with {metric} in common; name them apart.")
    draw(panels, {label: len(found) for label, found in runs.items()}, args)
    result = {metric: {label: {"seeds": len(runs[label]), "steps": len(steps), "first": float(mean[0]),
                               "last": float(mean[-1]), "highest": float(mean.max())}
                       for label, (steps, mean, _) in lines.items()} for metric, lines in panels.items()}
    print_table(["metric", "run", "seeds", "steps", "first", "last", "highest"],
                [[metric, label, *line.values()] for metric, lines in result.items() for label, line in lines.items()])
    print(f"picture: {args.png}")
    return result


def draw(panels, seeds, args):
    """One panel per metric, one line per label, and where a label has several seeds a band of one deviation."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.5 * columns, 3.6 * lines), squeeze=False,
                                   layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.set_visible(False)
    for axis, (metric, curves) in zip(axes.flat, panels.items()):
        for label, (steps, mean, std) in curves.items():
            name = label if seeds[label] == 1 else f"{label} ({seeds[label]} seeds)"
            line, = axis.plot(steps, mean, label=name, marker="o" if len(steps) == 1 else None)
            if seeds[label] > 1:
                axis.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=metric, xlabel="step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.savefig(args.png, dpi=120, format="png")
    pyplot.close(figure)


# ---- command line ----------------------------------------------------------------------------------------------

COMMANDS = {"gvm": (GvmArgs, evaluate_gvm), "values": (ValuesArgs, evaluate_values),
            "policy": (PolicyArgs, evaluate_policy), "plot": (PlotArgs, evaluate_plot)}
USAGE = "usage: evaluate.py gvm|values|policy|plot [flags]; `evaluate.py gvm --help` lists the flags of gvm."


def print_table(header, rows):
    """Aligned columns: numbers to the right, the first column and texts to the left."""
    def cell(value):
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    right = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    lines = [header, *[[cell(value) for value in row] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    print()
    for line in lines:
        print("  ".join(text.rjust(w) if r else text.ljust(w) for text, w, r in zip(line, widths, right)).rstrip())


def check_outputs(args):
    """Make the folders of the files to write, so that an unwritable place shows before the expensive work."""
    for flag in ("json", "html", "out", "png"):
        path = getattr(args, flag, "")
        try:
            if path:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                open(path, "a").close()
        except OSError as e:
            raise BadInput(f"--{flag} {path}: cannot write there ({e.strerror}); choose another file.") from None


def main(argv=None):
    """argv: the words after `evaluate.py`. The deepspeed launcher puts --local_rank before the command: one rank
    evaluates, so it is left out."""
    argv = [word for word in (sys.argv[1:] if argv is None else argv) if not re.match("--local[-_]rank=", word)]
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    if argv[:1] == [] or argv[0] not in COMMANDS:
        raise BadInput(USAGE)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("evaluate.py works on one rank: start it with python, or with deepspeed --num_gpus 1.")
    arguments, command = COMMANDS[argv[0]]
    args = parse_args(arguments, argv[1:])
    check_outputs(args)
    device = init_distributed()[2] if command is not evaluate_plot else None
    result = command(args, device)
    if args.json:
        Path(args.json).write_text(json.dumps({"command": argv[0], "args": vars(args), **result}, indent=1, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    main()
