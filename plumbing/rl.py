"""What the scripts that sample share and what is not their method: the reward model or function, the
self-check, samples, and the metrics that all of them log."""

import functools
import json
from itertools import zip_longest
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForTokenClassification

from common import (chat_ids, cut_pair, disable_dropout, freeze, load_gvm, load_reward_model,
                    load_reward_tokenizer, load_value_base, reward_scores, row_seed, value_head)
from plumbing.args import load_numbers, load_plug, numbers_of
from plumbing.checks import base_record, check_finite, pretrained, tokenizer_fingerprint
from plumbing.deepspeed_config import dtype_of
from plumbing.errors import BadInput, writing
from plumbing.folders import base_of
from plumbing.inputs import room
from plumbing.ranks import all_sum, gather_rows, print0
from plumbing.saving import save_model
from plumbing.texts import legible, readable, run_date, text_ids


# ---- tau ---------------------------------------------------------------------------------------------------

def fit_tau(pairs, rows, settings, run):
    """tau as (question, answer) texts, cut to their token limits; without the first pairs where the longest
    row of all ranks would not fit into the GVM's context behind them. pairs: rows with an answer"""
    pairs = [cut for row in pairs
             if (cut := readable(cut_pair, run.tokenizer, row["prompt"], row["response"], settings))]
    for first in range(len(pairs)):
        longest = max(len(chat_ids(run.tokenizer, row["prompt"], pairs[first:])) + len(row["response_ids"])
                      for row in rows)
        if max(gather_rows([longest])) <= settings["context"]:
            return pairs[first:]
    return []


# ---- functions of your own, and the reward model -----------------------------------------------------------

def load_truth(args):
    """--truth_fn as a function (rows, policy, run) -> mean over all ranks; None without."""
    plug = load_numbers(args.truth_fn, "--truth_fn") if args.truth_fn else None

    def truth(rows, policy, run):
        total, count = all_sum(sum(plug(rows, policy, run.tokenizer)), len(rows), device=run.device)
        return total / count
    return truth if plug else None


def load_value_fn(policy, run):
    """--value_fn as a function (rows, tau) -> [B, 1 + R]: 1 + n numbers for each row's answer of n tokens."""
    plug = load_plug(run.args.value_fn, "--value_fn")

    def values(rows, tau):
        found = plug(rows, policy, run.tokenizer)
        found = [numbers_of(values) for values in (found if hasattr(found, "__iter__") else ())]
        if [len(values) for values in found] != [1 + len(row["response_ids"]) for row in rows]:
            raise BadInput(f"--value_fn {run.args.value_fn}: it must return, for each row, one finite value "
                           f"more than the response has tokens.")
        longest = max(map(len, found))
        return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in found], device=run.device)
    return values


def load_reward(rm, config, run, model=None):
    """The reward of answers, as a function (rows, policy) -> [B] float32: --reward_fn, or the frozen reward
    model's score, standardized, (score - center) / scale.

    model: in place of the one in the folder rm, and standardized already
    """
    if run.args.reward_fn:
        plug = load_numbers(run.args.reward_fn, "--reward_fn")
        score = lambda rows, policy: plug(rows, policy, run.tokenizer)
    else:
        if model is None:
            model, *of_its_own = load_reward_model(rm, dtype_of(config))  # tokenizer, center, scale
            model = freeze(model, config, run.device)
        else:
            of_its_own = load_reward_tokenizer(rm), 0.0, 1.0
        score = lambda rows, policy: model_scores((model, *of_its_own), rows, run)

    return lambda rows, policy: torch.tensor(score(rows, policy), device=run.device)


def model_scores(reward_model, rows, run):
    """Standardized score of each row's answer, a list of floats.

    reward_model: what load_reward_model returns. One with the policy's vocabulary reads the sampled ids, with
    its own EOS where the answer ended. Another one reads the text in its own tokens.
    """
    model, tokenizer, center, scale = reward_model
    same, chats = tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(run.tokenizer), []
    for row in rows:
        end, text = 0 if row["truncated"] else 1, legible(tokenizer, row["response"])
        sampled = row["response_ids"][:len(row["response_ids"]) - end]
        ids = sampled if same else text_ids(tokenizer, text)
        chats.append((row["prompt"], ids + [tokenizer.eos_token_id] * end, text))
    scores = reward_scores(model, tokenizer, chats, run.device, run.args.micro_batch)
    return [(x - center) / scale for x in scores]


def load_critic(folder, dtype):
    """V(s) on every token, from a reward model, a GVM or an SFT model (which gets a new head); adapters are
    merged, the head of a reward model is put on the scale of the standardized scores."""
    if (Path(folder) / "gvm.json").exists():
        model = load_gvm(folder, dtype, "--critic_model")[0]
        return (model.merge_and_unload() if hasattr(model, "peft_config") else model).requires_grad_(True)
    if base_of(folder) == folder and "SequenceClassification" not in str(
            pretrained(AutoConfig, folder, "--critic_model").architectures):
        return load_value_base(folder, dtype, "--critic_model")
    model, _, center, scale = load_reward_model(folder, dtype, "--critic_model")
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    model.config.pad_token_id = None  # not the -1: an embedding's padding row would never be trained
    critic = disable_dropout(AutoModelForTokenClassification.from_config(model.config, dtype=dtype))
    critic.base_model.load_state_dict(model.base_model.state_dict())
    head = value_head(critic)
    with torch.no_grad():  # V = (score - center) / scale
        head.weight.copy_(value_head(model).weight / scale)
        head.bias.fill_(-center / scale)
    return critic


def keep_critic(critic, start, steps, out, run):
    """Write PPO's critic behind so many steps to <out>/critic_<steps>, for `evaluate.py gvm`. Adapters are
    merged.  start: the folder that it started from"""
    args, tokenizer = run.args, run.tokenizer
    save_model(critic, tokenizer, Path(out) / f"critic_{steps}", adapter="default",
               base=functools.partial(load_critic, start) if args.lora_r else None,
               extra={"gvm.json": {
                   **base_record(base_of(start)), "critic": True, "k": 0, "tau_question_tokens": 0,
                   "tau_answer_tokens": 0, "max_length": room(args)[0], "context": room(args)[0],
                   "chat_template": tokenizer.chat_template, "date": run_date(),
                   "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), "split_seed": args.split_seed,
                   "reward": {"kind": "preference"}}})


# Metrics on the terminal, those of them that a script has
SHOWN = ["objective/true_reward", "objective/kl", "objective/kl_coef", "objective/scores",
         "objective/baseline", "gvm/mean", "completions/mean_length", "policy/clipfrac_avg",
         "timing/step_total"]


# ---- what is checked and shown -----------------------------------------------------------------------------

def check_scores_finite(step, rows, *scores):
    """End the run where a log-prob, value or reward of an answer is not finite; scores: [B, ...] each."""
    total = sum(score.reshape(len(rows), -1).sum(1) for score in scores)  # [B]
    check_finite(all_sum(total.sum(), device=total.device)[0], step, "a log-prob, a value or a score",
                 [repr(row["prompt"][-1]["content"][:80])
                  for row, x in zip(rows, total) if not x.isfinite()])


def self_check(row, batch, kl, first_ratio, tokenizer, dtype, apart=False):
    """Printed once, at step 0: what must hold before the first update, on the first row of rank 0. Ends the
    run where it does not hold: within rounding, which in bf16 depends on the rows beside a row.
    apart: the reference is another model than the one that the policy starts as, and KL not 0"""
    ids, fp32 = row["prompt_ids"], dtype == torch.float32
    bos = (ids.count(tokenizer.bos_token_id)
           if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id) else "no")
    trained = tokenizer.decode(batch.ids[0, batch.P:][batch.mask[0]])
    to = "to another model" if apart else 0
    print0(f"self-check: max |ratio - 1| {first_ratio:.1e} (0) | KL {kl:.1e} ({to}) | {bos} BOS (1, or no "
           f"where the tokenizer has none)\n"
           f"self-check: prompt  {tokenizer.decode(ids)!r}\nself-check: trained {trained!r}")
    length = batch.mask.sum().item() / len(batch.mask)
    holds = {"the policy that is trained does not say what the one that sampled said":
                 first_ratio <= (0.01 if fp32 else 1.0),
             "the policy does not start as its reference":
                 apart or abs(kl) <= (1e-4 if fp32 else 1e-2) * length,
             "the prompt begins with two BOS tokens, its chat template writes one too many":
                 bos == "no" or ids[:2] != 2 * [tokenizer.bos_token_id]}
    wrong = gather_rows([what for what, right in holds.items() if not right])
    if wrong:
        raise BadInput(f"self-check: {wrong[0]} (max |ratio - 1| {first_ratio:.1e}, KL {kl:.1e}, {bos} BOS): "
                       f"the run would go by false numbers, choose another model or template; nothing is "
                       f"saved.")


MOST_DRIFT = 0.4  # mean of five steps; values are about -1 to 1. Measured: results/README.md, part (e)


def warn(last_rows):
    """Print what is doubtful about the last step, given the rows of the last five (MetricLog.last_rows)."""
    metrics = last_rows[-1]
    drift = sum(row.get("gvm/drift", 0.0) for row in last_rows) / len(last_rows)
    if metrics["objective/kl"] < -1:
        print0("warning: KL below -1: the samples do not come from the policy that is trained "
               "(temperature, truncation?)")
    if metrics.get("policy/clipfrac_avg", 0.0) > 0.3:
        print0("warning: more than 30 % of the tokens are clipped: lower --lr or --ppo_epochs")
    if metrics["completions/clipped_ratio"] > 0.5:
        print0("warning: most answers are truncated: raise --response_length")
    if len(last_rows) == last_rows.maxlen and drift > MOST_DRIFT:
        print0(f"warning: gvm/drift is {drift:.2f} on average of five steps, above {MOST_DRIFT}: "
               "the GVM does not follow the policy (docs/metrics.md)")


def show_samples(step, rows, scored, out, run):
    """The first two answers of rank 0 every --sample_every steps, in samples.jsonl and as lines: the values
    between their tokens; behind them the score, the greedy answer and its score, where a script has these."""
    if run.rank or not run.args.sample_every or step % run.args.sample_every:
        return
    path = Path(out) / "samples.jsonl"
    with writing(path), open(path, "w" if step == 0 else "a", encoding="utf-8") as f:
        for i, row in enumerate(rows[:2]):
            tokens = [run.tokenizer.decode([token]) for token in row["response_ids"]]
            sample = {"step": step, "prompt": row["prompt"], "response": row["response"], "tokens": tokens}
            if hasattr(scored, "values"):  # with V(s_1) in front one more than there are tokens
                n = len(tokens) + scored.values.shape[1] - scored.batch.mask.shape[1]
                sample["values"] = scored.values[i, :n].tolist()
            behind = {name: getattr(scored, f"{name}s")[i].item() for name in ("score", "baseline")
                      if hasattr(scored, f"{name}s")}
            behind.update({"greedy": row["greedy"]} if "greedy" in row else {})
            f.write(json.dumps({**sample, **behind}, ensure_ascii=False) + "\n")
            values = [f"[{v:+.2f}]" for v in sample.get("values", [])]
            words = [x for pair in zip_longest(values, map(str.strip, tokens)) for x in pair if x]
            print0(f"  {row['prompt'][-1]['content'][:100]!r}  {' '.join(words[:80])}",
                   *[f" {name} {x:+.2f}" if isinstance(x, float) else f" {name} {x[:100]!r}"
                     for name, x in behind.items()])


# ---- metrics -----------------------------------------------------------------------------------------------

def rollout_metrics(rows, batch, kl, entropy, beta, raw_mean, raw_std, **own):
    """What all three log of a rollout batch, averaged over all ranks; docs/metrics.md says what each is.
    objective/kl is the sum over a response's tokens, averaged over responses (as TRL).

    kl, entropy: [B, R];  own: numbers of this rank that the script wants summed as well
    returns (metrics, {name: sum over all ranks}, the number of `answers` and `tokens` among them)
    """
    mask = batch.mask
    sums = {"answers": len(rows), "tokens": mask.sum(), "kl": (kl * mask).sum(),
            "entropy": (entropy * mask).sum(), "truncated": sum(row["truncated"] for row in rows), **own}
    sums = dict(zip(sums, all_sum(*sums.values(), device=mask.device)))
    n, tokens = sums["answers"], sums["tokens"]
    return {"objective/kl": sums["kl"] / n, "objective/kl_coef": beta,
            "objective/entropy": sums["entropy"] / n, "objective/non_score_reward": -beta * sums["kl"] / n,
            "policy/entropy_avg": sums["entropy"] / tokens,
            "completions/mean_length": tokens / n,
            "completions/max_length": max(gather_rows([int(mask.sum(1).max())])),
            "completions/clipped_ratio": sums["truncated"] / n, "val/num_eos_tokens": n - sums["truncated"],
            "advantages/mean": raw_mean, "advantages/std": raw_std}, sums


def score_metrics(sums, beta):
    """Of a reward model's scores; sums: what rollout_metrics returned, with `scores` and `scores_square`."""
    n, x = sums["answers"], sums["scores"] / sums["answers"]
    return {"objective/scores": x,
            "objective/scores_std": max(sums["scores_square"] / n - x ** 2, 0.0) ** 0.5,
            "objective/rlhf_reward": x - beta * sums["kl"] / n}


def held_out_rows(test, run):
    """(this rank's held-out prompts, the seeds of their answers: the same noise every time)"""
    places = range(run.rank, len(test), run.world)
    return [test[p] for p in places], [row_seed(run.args.seed, -1000 - p) for p in places]


def held_out_metrics(rows, batch, kl, truth, policy, run, **own):
    """KL, length, true reward and `own` numbers of this rank, averaged over all held-out answers."""
    sums = {"kl": (kl * batch.mask).sum(), "mean_length": batch.mask.sum(), **own}
    n, *sums_of_all = all_sum(len(rows), *sums.values(), device=run.device)
    result = {f"eval/{name}": x / n for name, x in zip(sums, sums_of_all)}
    return {**result, **({"eval/true_reward": truth(rows, policy, run)} if truth else {})}
