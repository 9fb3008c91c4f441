"""Decoupled Value Policy Optimization (DVPO): PPO without a reward model and without a critic in the loop.

The frozen global value model (GVM) says what every token of an answer is worth; what a token added to that,
accumulated by GAE and normalized over the batch, is its advantage.
    Q_t = Q(tau, s_t, a_t) of the GVM, Q_0 = V(s_1)
    gae     A_t = N( sum_l lambda^l (Q_(t+l) - Q_(t+l-1) - beta KL_(t+l)) )         the default here
    q       A_t = N( Q_t - beta KL_t )                                              Eq. 2, the paper
    N(x) = (x - mu) / (sigma + eps)   over response tokens, all ranks
    Eq. 3   L = -mean min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)
            rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)
Why no terminal score: Q already estimates the return-to-go of every token, the reward at the end included.
Why no critic: tau, K answers of the current policy, tells the one frozen GVM which policy it is valuing now.

Departures:
D1  The KL penalty is folded into Q before the normalization, so that beta is in units of reward in every
    variant.
D2  tau is drawn anew each step from the policy's previous rollouts, one draw for all rows and ranks.
D3  --advantage gae is the default: on the same GVM it ended above the paper's q in every seed, at no more KL
    (results/README.md, a). `released` is the advantage of the authors' code.
D4  The paper's "target KL 0.1" is read as the early stop on KL(old, new) per token; the controller has its
    own target.

    python train_dvpo.py                                              the toy, on one CPU rank
    deepspeed train_dvpo.py --model meta-llama/Meta-Llama-3-8B        openbmb/UltraFeedback, ZeRO-3, bf16

reads   prompts of the RL share (20 %), the SFT model (policy and reference), the GVM
writes  runs/<model name>/dvpo: the policy, tokenizer, args.json, metrics.jsonl, samples.jsonl

Legend: B rows, P prompt slots (left padded), R response slots (right padded), T = P + R, V vocabulary.
"""

import copy
import functools
import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import DynamicCache

from checkpoint import Checkpoints
from common import (MetricLog, OneBase, all_sum, batch_normalize, chat_ids, check_finite, check_model,
                    clip_in_step, collate, cut_pair, ds_config, dtype_of, due, epoch_rows, freeze,
                    gather_rows, generate, gvm_settings, init_distributed, keyed_rng, load_gvm, load_plug,
                    load_policy, load_tokenizer, lora_targets, micro_batches, model_place, output_folder,
                    parse_args, peak_memory_gb, print0, rendered_end, save_model, seed_everything, set_lr,
                    stage_folder, step_norm, tokenizer_fingerprint, writing)
from data import BadInput, prompt_text, read_data, report_drops, split_of


@dataclass
class Args:
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # policy and reference, default runs/<model name>/sft
    value_model: str = ""  # the GVM's folder, default runs/<model name>/gvm
    value_fn: str = ""  # module:function giving values in place of the GVM, e.g. toy.exact:values
    truth_fn: str = ""  # module:function giving a true reward that is logged and used by nothing
    lora_r: int = 0  # LoRA rank of the policy, merged at the end; 0 trains every weight
    lora_alpha: int = 32  # LoRA scale is alpha / r
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file; prompts only
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # go on when more than 10 % of the prompts had to be dropped
    max_prompt_length: int = 1024  # longer prompts are dropped and counted [tokens]
    # rollout
    rollout_batch: int = 8  # prompts per step on one rank
    response_length: int = 1024  # at most this many sampled tokens per answer [tokens]
    temperature: float = 1.0  # of the sampler and of every log-prob
    static_cache: bool = False  # compiled decoding on a GPU; costs a minute or more at the first rollout
    missing_eos_penalty: float = 0.0  # taken off the last token of a truncated answer [reward]
    # algorithm
    advantage: Literal["gae", "q", "released"] = "gae"  # GAE on the values, the paper's, the authors' code
    gae_lam: float = 0.95  # lambda of --advantage gae and released
    cliprange: float = 0.2  # epsilon of Eq. 3
    ppo_epochs: int = 4  # passes over each rollout batch
    kl_coef: float = 0.2  # initial beta, weight of the per-token KL to the reference [reward per nat]
    kl_target: float = 6.0  # where the controller steers objective/kl [nats per response]; 0 keeps beta fixed
    kl_horizon: int = 10000  # how slowly it does [episodes]
    early_stop_kl: float = 0.1  # ends a step's updates when KL(old, new) passes it [nats per token]; 0: never
    # optimisation
    lr: float = 2e-6  # learning rate, constant
    micro_batch: int = 2  # rows of one forward pass on one rank
    accum_steps: int = 2  # micro batches of one optimizer step
    max_steps: int = 800  # rollout batches
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # keep one tensor a layer and compute the rest again in backward
    # run
    ds_config: str = "ds_configs/zero3.json"  # DeepSpeed JSON: precision, ZeRO stage, offload
    output_dir: str = ""  # default runs/<model name>/dvpo
    resume: bool = False  # go on from the last complete checkpoint of the output folder, if there is one
    save_every: int = 100  # checkpoints [steps]; 0: only when the run is told to end
    keep: int = 2  # so many of the latest checkpoints stay
    sample_every: int = 20  # two samples with their token values [steps]
    eval_every: int = 50  # held-out prompts: KL, length, GVM value, true reward [steps]
    eval_prompts: int = 64  # how many of them
    seed: int = 1  # prompt order, sampling, tau
    local_rank: int = -1  # set by the deepspeed launcher


# ---- the algorithm -----------------------------------------------------------------------------------------

def gae(delta, mask, lam):
    """A_t = delta_t + lam A_{t+1} (gamma 1), backwards over response tokens.

    delta, result: [B, R];  mask: [B, R] bool
    """
    advantage = torch.zeros_like(delta)
    ahead = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        ahead = (delta[:, t] + lam * ahead) * mask[:, t]
        advantage[:, t] = ahead
    return advantage


def advantages(kind, values, penalty, mask, lam):
    """What each token was worth, normalized over the batch of all ranks.

    gae       N(GAE(Q_t - Q_{t-1} - penalty_t))      Q_0 = V(s_1); the last token keeps its value:
                                                     Q_T is the return
    q         N(Q_t - penalty_t)                     the paper's Eq. 2
    released  N(GAE(V_{t+1} - V_t - penalty_t))      the authors' code; V = N(values before the action),
                                                     V_{T+1} = 0
    values:  [B, 1 + R] of the frozen GVM: slot 0 = V(s_1), slot 1 + t = Q(tau, s_t, a_t), units of reward
    penalty: [B, R] beta KL_t and what a missing EOS costs;  mask: [B, R] bool
    returns  ([B, R] unitless, zero where mask is 0,  mean and standard deviation before the normalization)
    """
    if kind == "gae":
        raw = gae(values[:, 1:] - values[:, :-1] - penalty, mask, lam)
    elif kind == "q":
        raw = values[:, 1:] - penalty
    else:
        # V(s_t) of each token, zero past the end and so without a bootstrap behind the last one
        v, _, _ = batch_normalize(values[:, :-1], mask)
        v_next = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], dim=1)
        raw = gae(v_next - v - penalty, mask, lam)
    return batch_normalize(raw, mask)


def policy_loss(logp, old_logp, advantage, mask, cliprange):
    """Clipped surrogate (Eq. 3) summed over response tokens, and what the log wants to know of it.

    logp, old_logp, advantage: [B, R] float32;  mask: [B, R] bool
    returns (loss, stats); stats = sums over tokens of approx KL(old, new) (k2: half the squared
    log-ratio), of clipped tokens, of the ratio and of its square. Log-ratios are clamped to +-20 so that
    one token cannot make exp overflow.
    """
    log_ratio = ((logp - old_logp) * mask).clamp(-20, 20)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = -(torch.min(ratio * advantage, clipped * advantage) * mask).sum()
    with torch.no_grad():
        stats = torch.stack([0.5 * (log_ratio ** 2).sum(),
                             ((clipped * advantage < ratio * advantage) & mask).sum(),
                             (ratio * mask).sum(), (ratio ** 2 * mask).sum()])
    return loss, stats


def next_kl_coef(beta, kl, target, horizon, episodes):
    """Adaptive controller of Ziegler et al. 2019:
    beta *= 1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon."""
    if target <= 0:
        return beta
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


# ---- rollout and scoring -----------------------------------------------------------------------------------
# ids            p0  p1 | y0  y1  y2  EOS pad      P = 2 prompt slots (left padded), R = 5 response slots
# action a_t              0   1   2   3   -        a_t is the token at P + t
# log pi(a_t|s_t)         read at P + t - 1        slice [:, P-1 : T-1]   (state before the action)
# V(s_1)                  read at P - 1            before anything is said
# Q(tau, s_t, a_t)        read at P + t            slice [:, P   : T  ]   (after the action; tau in front)
# mask                    1   1   1   1   0        EOS is an action and is trained; nothing after it is

def response_logprobs(model, batch, args):
    """log pi(a_t | s_t) and the entropy at each response token, [B, R] float32 each, at the sampler's
    temperature; the logits at P-1 .. T-2 are made about 1,024 tokens at a time, see common.with_logprobs."""
    return model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                 answers=batch.mask, temperature=args.temperature, use_cache=False,
                 chunks=-(-len(batch.ids) * args.response_length // 1024))


def read_prefix(gvm, ids, device):
    """Keys and values of tokens with which every row begins."""
    cache = DynamicCache()
    gvm(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
    return cache


def response_values(gvm, batch, shared=None):
    """[B, 1 + R] float32: slot 0 = V(s_1) at the last prompt token, slot 1 + t = Q(tau, s_t, a_t).
    shared: what read_prefix made of the tokens in front of the batch's own"""
    attention, positions = batch.attention, batch.positions
    if shared is not None:
        n, shared = shared.get_seq_length(), copy.deepcopy(shared)  # a forward pass appends to it
        shared.batch_repeat_interleave(len(batch.ids))
        attention = torch.cat([attention.new_ones(len(attention), n), attention], dim=1)
        positions = positions + n
    logits = gvm(input_ids=batch.ids, attention_mask=attention, position_ids=positions,
                 past_key_values=shared, use_cache=shared is not None).logits
    return logits[:, batch.P - 1:, 0].float()


def row_seed(seed, place):
    """Sampling seed of one row: a function of the run's seed and the row's place in the stream of prompts."""
    return int(keyed_rng(seed, place + 2**32).integers(2**62))


def rollout(policy, rows, seeds, tokenizer, args, device):
    """Sample one answer per prompt row. Adds response_ids, response (text) and
    truncated to copies of the rows."""
    answers = generate(policy, [row["prompt_ids"] for row in rows], seeds, args.response_length,
                       args.temperature, tokenizer, device, args.static_cache)
    return [{**row, "response_ids": ids, "truncated": ids[-1] != tokenizer.eos_token_id,
             "response": tokenizer.decode(ids, skip_special_tokens=True)} for row, ids in zip(rows, answers)]


def draw_tau(previous, groups, k, rng):
    """tau of this step: K rollouts of the policy's previous batch, on groups outside the current one
    while there are any. The same for every row, so that no row sees itself and the result does not
    depend on the number of ranks."""
    order = [previous[i] for i in rng.permutation(len(previous))]
    order.sort(key=lambda row: row["group"] in groups)  # stable: outsiders first, shuffled among themselves
    return order[:k]


def fit_tau(pairs, rows, tokenizer, settings):
    """The last pairs of tau that leave room for the longest row of all ranks: as in training, whole pairs are
    left out, the first one first."""
    for first in range(len(pairs) + 1):
        longest = max(len(chat_ids(tokenizer, row["prompt"], pairs[first:])) + len(row["response_ids"])
                      for row in rows)
        if max(gather_rows([longest])) <= settings["context"]:
            break
    return pairs[first:]


@torch.no_grad()
def score(policy, reference, value, rows, tau, tokenizer, args, device):
    """Old and reference log-probs and the values of a rollout batch, in micro batches.

    value: function (policy, rows, tau) -> list of 1 + len(response) values a row
    returns (batch, old_logp [B, R], ref_logp [B, R], values [B, 1 + R], entropy [B, R]), float32, no gradient
    """
    policy.eval()  # in train mode --gradient_checkpointing would drop the cache of tau's keys and values
    batch = collate([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                    tokenizer.pad_token_id, device)
    old, ref, entropy = torch.zeros(3, *batch.mask.shape, device=device)
    for micro, part in micro_batches(batch, range(len(rows)), args.micro_batch):
        R = part.mask.shape[1]
        old[micro, :R], entropy[micro, :R] = response_logprobs(policy, part, args)
        ref[micro, :R], _ = response_logprobs(reference, part, args)
    values = torch.zeros(len(rows), 1 + batch.mask.shape[1], device=device)
    for i, v in enumerate(value(policy, rows, tau)):
        values[i, :len(v)] = torch.as_tensor(v, device=device)
    return batch, old, ref, values, entropy


@torch.no_grad()
def gvm_values(gvm, rows, tau, tokenizer, args, device, share=True):
    """The frozen GVM's values, with tau in front of each prompt. One list of 1 + len(response) floats a row.

    share: all rows begin with the same tau, so that its keys and values are computed once and copied into
           each micro batch. Not for sliding-window attention, which would count the padding behind tau
    """
    prompts = [chat_ids(tokenizer, row["prompt"], tau) for row in rows]
    shared, n = None, 0
    if tau and share:
        # the last prompt token stays a row's own: V(s_1) is read there
        n = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        shared = read_prefix(gvm, prompts[0][:max(n, 1)], device)
    batch = collate([ids[n:] for ids in prompts], [row["response_ids"] for row in rows],
                    tokenizer.pad_token_id, device)
    result = [None] * len(rows)
    for micro, part in micro_batches(batch, range(len(rows)), args.micro_batch):
        for i, q in zip(micro, response_values(gvm, part, shared if n else None).tolist()):
            result[i] = q[:1 + len(rows[i]["response_ids"])]
    return result


def update(engine, batch, old_logp, advantage, step, args, device):
    """args.ppo_epochs passes of clipped policy gradient over a rollout batch, in optimizer batches of
    micro_batch x accum_steps rows a rank. Shapes as in policy_loss.

    returns (metrics averaged over the tokens of all updates,
             largest |ratio - 1| of the very first micro batch)
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    totals, tokens, updates, grad_norm, first_ratio, stopped = torch.zeros(5), 0, 0, 0.0, None, False
    engine.train()
    for epoch in range(args.ppo_epochs):
        order = keyed_rng(args.seed, step, epoch, rank).permutation(len(batch.ids))
        for rows in np.split(order, len(order) // (args.micro_batch * args.accum_steps)):
            n, = all_sum(batch.mask[rows].sum(), device=device)  # response tokens of the optimizer batch
            sums = torch.zeros(5)
            for micro, part in micro_batches(batch, rows, args.micro_batch):
                R = part.mask.shape[1]
                logp, _ = response_logprobs(engine, part, args)
                loss, stats = policy_loss(logp, old_logp[micro, :R], advantage[micro, :R], part.mask,
                                          args.cliprange)
                # DeepSpeed averages gradients over ranks: a token mean is sum * ranks / tokens of all ranks
                engine.backward(loss * world / n)
                sums += torch.cat([stats, loss.detach()[None]]).cpu()
                if first_ratio is None:
                    moved = (logp.detach() - old_logp[micro, :R]) * part.mask
                    first_ratio = moved.expm1().abs().max().item()
            sums = torch.tensor(all_sum(*sums.tolist(), device=device))
            check_finite(sums.sum().item(), step, "the loss", [f"{i} of the rollout batch" for i in rows])
            set_lr(engine, args.lr)
            engine.step()
            totals, tokens, updates = totals + sums, tokens + n, updates + 1
            grad_norm += step_norm(engine)
            # The statistic is the same number on all ranks, so all of them leave
            # together and none is waited for
            stopped = 0 < args.early_stop_kl < sums[0] / n
            if stopped:
                break
        if stopped:
            break
    kl, clipped, ratio, ratio_square, loss = (totals / tokens).tolist()
    return {"policy/approxkl_avg": kl, "policy/clipfrac_avg": clipped, "val/ratio": ratio,
            "val/ratio_var": ratio_square - ratio ** 2, "loss/policy_avg": loss, "policy/updates": updates,
            "policy/early_stopped": float(stopped), "grad_norm": grad_norm / updates}, first_ratio


# ---- reporting ---------------------------------------------------------------------------------------------

def self_check(row, batch, values, kl, first_ratio, tokenizer, args):
    """Printed once, at step 0: what must hold before the first update, on the first row of rank 0."""
    ids = row["prompt_ids"]
    bos = (ids.count(tokenizer.bos_token_id)
           if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id) else "no")
    trained = tokenizer.decode(batch.ids[0, batch.P:][batch.mask[0]])
    print0(f"self-check: max |ratio - 1| {first_ratio:.1e} (0) | KL {kl:.1e} (0) | {bos} BOS (1, or no where "
           f"the tokenizer has none) | values finite: {bool(values.isfinite().all())}\n"
           f"self-check: prompt  {tokenizer.decode(ids)!r}\nself-check: trained {trained!r}")


def warn(metrics):
    if metrics["objective/kl"] < -1:
        print0("warning: KL below -1: the samples do not come from the policy that is trained "
               "(temperature, truncation?)")
    if metrics["policy/clipfrac_avg"] > 0.3:
        print0("warning: more than 30 % of the tokens are clipped: lower --lr or --ppo_epochs")
    if metrics["completions/clipped_ratio"] > 0.5:
        print0("warning: most answers are truncated: raise --response_length")


def show_samples(rows, values, tokenizer, step, out):
    """Two answers with the value of every token: seeing them rise and fall along a
    sentence is DVPO's best picture."""
    path = out / "samples.jsonl"
    with writing(path), open(path, "w" if step == 0 else "a", encoding="utf-8") as f:
        for row, v in list(zip(rows, values.tolist()))[:2]:
            tokens = [tokenizer.decode([i]) for i in row["response_ids"]]
            f.write(json.dumps({"step": step, "prompt": row["prompt"], "response": row["response"],
                                "tokens": tokens, "values": v[:1 + len(tokens)]}, ensure_ascii=False) + "\n")
            print0(f"  {row['prompt'][-1]['content'][:100]!r} [{v[0]:+.2f}]  " +
                   " ".join(f"{t.strip()}[{q:+.2f}]" for t, q in list(zip(tokens, v[1:]))[:40]))


def rollout_metrics(rows, batch, kl, values, entropy, raw_mean, raw_std, beta, device):
    """Averages over all ranks. objective/kl is the sum over a response's tokens,
    averaged over responses (as TRL).

    gvm/drift is the mean of Q(s_T, a_T) - V(s_1), last value less first. E[Q_(t+1) | s_t, a_t] = Q_t for the
    values of the policy that sampled, so it is 0 while the GVM knows whom it is valuing; it needs no truth.
    """
    mask = batch.mask
    length = mask.sum(1)
    n, tokens, kl_sum, h, cut, v, v2, ended, drift = all_sum(
        len(rows), mask.sum(), (kl * mask).sum(), (entropy * mask).sum(),
        sum(row["truncated"] for row in rows), (values[:, 1:] * mask).sum(),
        (values[:, 1:] ** 2 * mask).sum(), sum(not row["truncated"] for row in rows),
        (values.gather(1, length[:, None])[:, 0] - values[:, 0]).sum(), device=device)
    return {"objective/kl": kl_sum / n, "objective/kl_coef": beta, "objective/entropy": h / n,
            "objective/non_score_reward": -beta * kl_sum / n, "policy/entropy_avg": h / tokens,
            "completions/mean_length": tokens / n,
            "completions/max_length": max(gather_rows([int(length.max())])),
            "completions/clipped_ratio": cut / n, "val/num_eos_tokens": ended, "gvm/mean": v / tokens,
            "gvm/std": max(v2 / tokens - (v / tokens) ** 2, 0.0) ** 0.5, "gvm/drift": drift / n,
            "advantages/mean": raw_mean, "advantages/std": raw_std}


@torch.no_grad()
def held_out(engine, reference, value, truth, test, tau, settings, tokenizer, args, device):
    """KL, length, value and true reward on held-out prompts, sampled with noise
    that is the same every time."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    n = min(args.eval_prompts, len(test)) // world * world
    if n == 0:
        return {}
    rows = rollout(engine, test[:n][rank::world],
                   [row_seed(args.seed, -1000 - p) for p in range(rank, n, world)], tokenizer, args, device)
    tau = fit_tau(tau, rows, tokenizer, settings) if tau else []
    batch, old, ref, values, _ = score(engine, reference, value, rows, tau, tokenizer, args, device)
    length = batch.mask.sum(1)
    kl, tokens, value_sum = all_sum(((old - ref) * batch.mask).sum(), length.sum(),
                                    values.gather(1, length[:, None]).sum(), device=device)
    result = {"eval/kl": kl / n, "eval/mean_length": tokens / n, "eval/final_value": value_sum / n}
    if truth:
        result["eval/true_reward"] = all_sum(sum(truth(rows, engine, tokenizer)), device=device)[0] / n
    return result


# ---- data --------------------------------------------------------------------------------------------------

def rl_prompts(records, tokenizer, args):
    """(train, held-out) lists of prompt rows: dicts (prompt, group, prompt_ids), each prompt once."""
    train, test, seen, dropped = [], [], set(), Counter()
    for record in records:
        text = prompt_text(record["prompt"])
        share = split_of(text, args.split_seed)
        if share not in ("rl", "test") or text in seen:
            continue
        seen.add(text)
        row = {"prompt": record["prompt"], "group": record["group"],
               "prompt_ids": chat_ids(tokenizer, record["prompt"])}
        if len(row["prompt_ids"]) > args.max_prompt_length:
            dropped[f"prompt over --max_prompt_length {args.max_prompt_length}"] += 1
        else:
            (train if share == "rl" else test).append(row)
    if train or test or dropped:
        report_drops(dropped, len(train) + len(test) + sum(dropped.values()), args.data, args.allow_dropped,
                     log=print0)
    if not train:
        raise BadInput(f"--data {args.data}: no prompt is left to train on; its prompts are too few for the "
                       f"RL share.")
    return train, test


def plugged_values(plug, policy, rows, tokenizer, args):
    """What --value_fn says of each row: 1 + R numbers for a response of R tokens."""
    found = list(plug(rows, policy, tokenizer))
    if [len(values) for values in found] != [1 + len(row["response_ids"]) for row in rows]:
        raise BadInput(f"--value_fn {args.value_fn}: it must return, for each row, one value more than the "
                       f"response has tokens.")
    return found


def check_batches(args, world):
    if args.temperature <= 0 or args.response_length < 1:
        raise BadInput(f"--temperature {args.temperature:g} must be above 0 (log-probs are taken at it) and "
                       f"--response_length {args.response_length} at least 1.")
    if min(args.ppo_epochs, args.max_steps) < 1:
        raise BadInput(f"--ppo_epochs {args.ppo_epochs} and --max_steps {args.max_steps} must be at least 1.")
    size = args.micro_batch * args.accum_steps
    if min(args.rollout_batch, args.micro_batch, args.accum_steps) < 1 or args.rollout_batch % size:
        raise BadInput(f"--rollout_batch {args.rollout_batch} must be a positive multiple of --micro_batch x "
                       f"--accum_steps = {args.micro_batch} x {args.accum_steps}: change one of the three.")
    print0(f"{Path(__file__).stem}: rollouts/step {args.rollout_batch * world} = {world} ranks x rollout "
           f"batch {args.rollout_batch}; optimizer batch {size * world} = {world} ranks x micro batch "
           f"{args.micro_batch} x {args.accum_steps} accumulation; updates/step "
           f"{args.ppo_epochs * args.rollout_batch // size} = {args.ppo_epochs} PPO epochs x "
           f"{args.rollout_batch // size}")


def main(args):
    import deepspeed  # here, so that --help and a mistyped flag answer at once
    rank, world, device = init_distributed()
    check_batches(args, world)
    seed_everything(args.seed)
    sft = stage_folder(args.model, "sft", args.sft_model, "--sft_model", f"sft.py --model {args.model}")
    truth = load_plug(args.truth_fn, "--truth_fn") if args.truth_fn else None
    config = ds_config(args.ds_config, args.micro_batch, args.max_grad_norm)
    tokenizer = load_tokenizer(sft, "--sft_model")
    tokens = args.max_prompt_length + args.response_length
    asked = f"--max_prompt_length {args.max_prompt_length} + --response_length {args.response_length}"
    check_model(sft, tokenizer, "--sft_model", tokens, asked)
    models = [sft]
    if args.value_fn and args.value_model:
        raise BadInput("--value_fn and --value_model both give the values: leave one out.")
    if args.value_fn:
        k, settings, plug = 0, {}, load_plug(args.value_fn, "--value_fn")
    else:
        folder = stage_folder(args.model, "gvm", args.value_model, "--value_model",
                              f"train_gvm.py --model {args.model}")
        settings = gvm_settings(folder)
        check_model(settings["base_model"], tokenizer, f"base model of --value_model {folder}:")
        models += [folder, settings["base_model"]]
        if tokens > settings["context"]:
            raise BadInput(f"{asked}: more than the {settings['context']} tokens that --value_model {folder} "
                           f"can read: lower one.")
        if settings["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
            raise BadInput(f"--value_model {folder}: it was trained with another tokenizer than {sft} has; "
                           f"train a GVM on this SFT model.")
        tokenizer.chat_template, k = settings["chat_template"], settings["k"]
        rendered_end(tokenizer, folder, "--value_model")
    out = output_folder(args, "dvpo")
    train, test = rl_prompts(read_data(args.data, args.allow_dropped, log=print0), tokenizer, args)
    run = Checkpoints(out, args, (train, test), models)

    policy = load_policy(sft, tokenizer, dtype_of(config), "--sft_model")
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    # The reference's weights are in memory once: a GVM that is LoRA on them, and a LoRA policy, use the same
    on_sft = not args.value_fn and settings["base_model"] == model_place(sft)
    lora = None
    if args.lora_r:
        from peft import LoraConfig
        lora = LoraConfig(task_type="CAUSAL_LM", r=args.lora_r, lora_alpha=args.lora_alpha,
                          target_modules=lora_targets(policy))
    base = policy if lora else load_policy(sft, tokenizer, dtype_of(config), "--sft_model")
    gvm = None if args.value_fn else load_gvm(folder, dtype_of(config), lm=base if on_sft else None)[0]
    frozen = OneBase(base, gvm if on_sft else None, lora)
    policy = frozen if lora else policy
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=args.lr,
                                  weight_decay=0.0, fused=True)
    clip_in_step(optimizer, config, args.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    frozen = engine if lora else freeze(frozen, config, device)
    reference = functools.partial(frozen, role="reference")
    if args.value_fn:
        value = lambda policy, rows, tau: plugged_values(plug, policy, rows, tokenizer, args)
    else:
        share = not getattr(gvm.config.get_text_config(), "sliding_window", None)
        gvm = functools.partial(frozen, role="gvm") if on_sft else freeze(gvm, config, device)
        value = lambda policy, rows, tau: gvm_values(gvm, rows, tau, tokenizer, args, device, share)

    start, state = run.resume({"policy": engine})
    log = MetricLog(out, show=["objective/true_reward", "objective/kl", "objective/kl_coef", "gvm/mean",
                               "completions/mean_length", "policy/clipfrac_avg", "timing/step_total"],
                    steps=args.max_steps, start=start)
    beta, previous = state.get("beta", args.kl_coef), state.get("previous", [])
    global_batch = args.rollout_batch * world
    for step in range(start, args.max_steps):
        clock = [time.time()]
        # 1. roll out: sample y ~ pi(.|x); the noise of a row is keyed by its global place, not by its rank
        picks = epoch_rows(len(train), step * global_batch, global_batch, args.seed)
        mine = range(rank * args.rollout_batch, (rank + 1) * args.rollout_batch)
        rows = rollout(engine, [train[picks[i]] for i in mine],
                       [row_seed(args.seed, step * global_batch + i) for i in mine], tokenizer, args, device)
        groups = {train[i]["group"] for i in picks}
        if step == 0 and k > 0:
            # tau needs answers of the current policy: K extra prompts, outside the batch if possible
            extra = sorted(keyed_rng(args.seed, 0).permutation(len(train))[:4 * k + global_batch],
                           key=lambda i: train[i]["group"] in groups)[:k]
            previous = rollout(engine, [train[i] for i in extra],
                               [row_seed(args.seed, -1 - j) for j in range(len(extra))],
                               tokenizer, args, device)
        clock.append(time.time())

        # 2. score: log pi_old, log pi_ref and Q(tau, s, a), nothing of it with a gradient
        tau = [cut_pair(tokenizer, row["prompt"], row["response"], settings)
               for row in draw_tau(previous, groups, k, keyed_rng(args.seed, step))]
        tau = fit_tau(tau, rows, tokenizer, settings) if tau else []
        batch, old_logp, ref_logp, values, entropy = score(engine, reference, value, rows, tau, tokenizer,
                                                           args, device)
        scored = old_logp.sum(1) + ref_logp.sum(1) + values.sum(1)  # [B]
        check_finite(all_sum(scored.sum(), device=device)[0], step, "a log-prob or a value",
                     [repr(row["prompt"][-1]["content"][:80])
                      for row, x in zip(rows, scored) if not x.isfinite()])
        clock.append(time.time())

        # 3. advantages: beta KL_t (units of reward) and the missing-EOS penalty folded in, then Eq. 2
        kl = (old_logp - ref_logp) * batch.mask
        penalty = beta * kl
        for i, row in enumerate(rows):
            penalty[i, len(row["response_ids"]) - 1] += args.missing_eos_penalty * row["truncated"]
        advantage, raw_mean, raw_std = advantages(args.advantage, values, penalty, batch.mask, args.gae_lam)
        metrics = rollout_metrics(rows, batch, kl, values, entropy, raw_mean, raw_std, beta, device)
        if truth:
            total, count = all_sum(sum(truth(rows, engine, tokenizer)), len(rows), device=device)
            metrics["objective/true_reward"] = total / count
        clock.append(time.time())

        # 4. update: clipped surrogate (Eq. 3)
        update_stats, first_ratio = update(engine, batch, old_logp, advantage, step, args, device)
        clock.append(time.time())

        # 5. log, steer beta, and hand this batch to the next step's tau
        if step == 0:
            self_check(rows[0], batch, values, metrics["objective/kl"], first_ratio, tokenizer, args)
        timing = dict(zip(("timing/generation", "timing/score", "timing/advantages", "timing/train"),
                          (b - a for a, b in zip(clock, clock[1:]))))
        metrics.update(update_stats, lr=args.lr, episode=(step + 1) * global_batch, **timing,
                       **{"timing/step_total": clock[-1] - clock[0],
                          "memory/peak_gb": peak_memory_gb(device)})
        metrics["eps"] = global_batch / metrics["timing/step_total"]
        beta = next_kl_coef(beta, metrics["objective/kl"], args.kl_target, args.kl_horizon, global_batch)
        if test and due(step, args.max_steps, args.eval_every):
            metrics.update(held_out(engine, reference, value, truth, test, tau, settings, tokenizer, args,
                                    device))
        log.write(step, metrics)
        warn(metrics)
        if rank == 0 and args.sample_every and step % args.sample_every == 0:
            show_samples(rows, values, tokenizer, step, out)
        previous = gather_rows([{key: row[key] for key in ("prompt", "group", "response")} for row in rows])
        run.after(step, args.max_steps, beta=beta, previous=previous)
    save_model(engine, tokenizer, out, base=sft if args.lora_r else None)
    run.finish()
    print0(f"{Path(__file__).stem}: saved to {out}")


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
