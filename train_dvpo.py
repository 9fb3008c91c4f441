"""Decoupled Value Policy Optimization (DVPO, arXiv 2502.16944): PPO without reward model and critic.

The frozen global value model (GVM) says what every token of an answer is worth. What a token added to that,
accumulated by GAE and normalized over the batch, is its advantage:
    Q_t = Q(tau, s_t, a_t) of the GVM,  Q_0 = V(s_1),  KL_t = log pi_old - log pi_ref of a_t,  t = 1, 2, .. n
    gae     A_t = N( sum_l lambda^l (Q_(t+l) - Q_(t+l-1) - beta KL_(t+l)) )         the default here
    q       A_t = N( Q_t - beta KL_t )                                              Eq. 2, the paper
    N(x) = (x - mu) / (sigma + 1e-8)   over the response tokens of the batch, all ranks
    Eq. 3   L = -mean min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)
            rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)
Why no terminal score: Q already estimates the return of every token, the reward at the end included.
Why no critic: tau, K recent questions and answers of the policy, tells the one frozen GVM whom it is valuing.
Another reward: train the GVM on it (train_gvm.py --reward), or give values of your own with --value_fn.

Departures from the paper:
D1  The KL penalty is inside N: beta is in units of the values per nat, and weighs beta / sigma in A_t (sigma:
    advantages/std). gae takes from A_t also lambda^l beta KL of the tokens behind t, q beta KL_t alone.
D2  tau is drawn anew each step from the policy's previous rollouts: one draw for all rows and ranks.
D3  --advantage gae is the default: on the same GVM it ended at a higher true reward than the paper's q in
    every seed, at no more KL (results/README.md, a).
D4  Two KLs. KL(policy, reference) is steered by beta to --kl_target. The paper's "target KL 0.1" is read as
    --early_stop_kl: no more updates of a step once KL(pi_old, pi) per token has passed it.

    python train_dvpo.py                                              the toy, on one CPU rank
    deepspeed train_dvpo.py --model meta-llama/Meta-Llama-3-8B        openbmb/UltraFeedback, ZeRO-3, bf16

reads   prompts of the RL share (20 %), the SFT model (policy and reference), the GVM
writes  runs/<model name>/dvpo: the policy, tokenizer, args.json, metrics.jsonl, samples.jsonl; a killed run
        loses the steps since its last checkpoint; --resume True continues it exactly (plumbing/checkpoint.py)

Legend: B rows, P prompt columns (left padded), R response columns (right padded), T = P + R, V vocabulary.
"""

import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from common import (Run, batch_normalize, chat_ids, collate, epoch_rows, freeze, generate, keyed_rng,
                    load_gvm, load_policy, lora_config, micro_batches, row_seed, train_only)
from plumbing.args import RunArgs, parse_args
from plumbing.checkpoint import Checkpoints
from plumbing.checks import check_finite
from plumbing.deepspeed_config import adamw, dtype_of, step_norm
from plumbing.folders import output_folder
from plumbing.inputs import gvm_inputs, reference_inputs, rl_inputs
from plumbing.lean import LogProbs, OneBase, SharedPrefix
from plumbing.log import Clock, MetricLog, due
from plumbing.ranks import all_sum, gather_rows, init_distributed, peak_memory_gb, seed_everything
from plumbing.rl import (check_scores_finite, fit_tau, held_out_metrics, held_out_rows, load_truth,
                         load_value_fn, rollout_metrics, self_check, show_samples, SHOWN, warn)
from plumbing.rows import rl_prompts
from plumbing.saving import save_model
from plumbing.texts import answer_text, ended


@dataclass
class Args(RunArgs):
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # where the policy starts, default runs/<model name>/sft
    reference_model: str = ""  # what KL is taken to, default: the model that the policy starts as
    value_model: str = ""  # the GVM's folder, default runs/<model name>/gvm
    value_fn: str = ""  # module:function (rows, policy, tokenizer) -> Q_0 .. Q_n of each row; no GVM then
    truth_fn: str = ""  # module:function that gives a true reward, which is logged and used by nothing
    lora_r: int = 0  # LoRA rank of what learns, merged at the end; 0 trains every weight
    lora_alpha: int = 32  # LoRA scale is alpha / r
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file; prompts only
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the prompts had to be dropped
    max_prompt_length: int = 1024  # longer prompts are dropped and counted [tokens]
    # rollout
    rollout_batch: int = 8  # prompts per step on one rank
    response_length: int = 1024  # longest sampled answer [tokens]
    temperature: float = 1.0  # of the sampler and of every log-prob
    static_cache: bool = False  # compiled decoding on a GPU; costs a minute or more at the first rollout
    missing_eos_penalty: float = 0.0  # taken off the last token of a truncated answer [reward]
    # algorithm
    advantage: Literal["gae", "q"] = "gae"  # GAE on the values, or the paper's Eq. 2
    gae_lam: float = 0.95  # lambda of --advantage gae
    cliprange: float = 0.2  # epsilon of Eq. 3
    ppo_epochs: int = 4  # passes over each rollout batch
    kl_coef: float = 0.2  # initial beta, weight of the per-token KL to the reference [reward per nat]
    kl_target: float = 6.0  # objective/kl that beta is steered to [nats per response]; 0 keeps beta fixed
    kl_horizon: int = 10000  # time constant of that controller [episodes]
    early_stop_kl: float = 0.1  # ends a step's updates when KL(old, new) passes it [nats per token]; 0: never
    # optimisation
    lr: float = 2e-6  # learning rate of the policy, constant
    micro_batch: int = 2  # rows of one forward pass on one rank
    accum_steps: int = 2  # micro batches of one optimizer step
    max_steps: int = 800  # rollout batches
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    # run: also --ds_config, --output_dir, --resume, --save_every, --keep, --track, see plumbing/args.py
    sample_every: int = 20  # print two answers with their token values or scores this often [steps]
    eval_every: int = 50  # evaluate on held-out prompts this often [steps]
    eval_prompts: int = 64  # how many held-out prompts
    seed: int = 1  # of prompt order, sampling and everything else that is drawn


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
    """What each token was worth, normalized over the batch of all ranks (D1).

    gae   N(GAE(Q_t - Q_(t-1) - penalty_t))      Q_n stands for the return: there is no terminal reward
    q     N(Q_t - penalty_t)                     the paper's Eq. 2
    values:  [B, 1 + R] of the frozen GVM, Q_0 .. Q_R, units of reward
    penalty: [B, R] beta KL_t and what a missing EOS costs;  mask: [B, R] bool
    returns  ([B, R] unitless, zero where mask is 0,  mean and standard deviation before the normalization)
    """
    if kind == "gae":
        raw = gae(values[:, 1:] - values[:, :-1] - penalty, mask, lam)
    else:
        raw = values[:, 1:] - penalty
    return batch_normalize(raw, mask)


def policy_loss(logp, old_logp, advantage, mask, cliprange):
    """Clipped surrogate (Eq. 3) summed over response tokens, and what the log wants to know of it.

    logp, old_logp, advantage: [B, R] float32;  mask: [B, R] bool
    returns (loss, stats); stats = sums over tokens of 1/2 log_ratio^2 (an estimate of KL(pi_old, pi)), of
    clipped tokens, of the ratio and of its square. Log-ratios are clamped to +-20: exp cannot overflow.
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
# ids            p1  p2 | y1  y2  y3  EOS pad      P = 2 prompt columns (left padded), R = 5 response columns
# action a_t              1   2   3   4   -        a_t = y_t, in column P + t - 1
# log pi(a_t|s_t)         read at P + t - 2        slice [:, P-1 : T-1]   (the state before the action)
# Q_0 = V(s_1)            read at P - 1            the last prompt token, before anything is said
# Q_t                     read at P + t - 1        slice [:, P   : T  ]   (after the action; tau in front)
# mask                    1   1   1   1   0        EOS is an action and is trained; nothing after it is

def response_logprobs(model, batch, run):
    """(log pi(a_t | s_t), entropy), [B, R] float32 each, at the sampler's temperature. plumbing.lean has the
    definition; the logits in columns P-1 .. T-2 are made for about 1,024 tokens at a time."""
    P, T = batch.P, batch.ids.shape[1]
    return model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                 states=slice(P - 1, T - 1), actions=batch.ids[:, P:T], mask=batch.mask, use_cache=False,
                 temperature=run.args.temperature,  # chunks: the same number on every rank, as ZeRO-3 needs
                 chunks=-(-len(batch.ids) * run.args.response_length // 1024))


def rollout(policy, rows, seeds, run):
    """Sample one answer per prompt row. Adds response_ids, response (text) and truncated (it has no EOS) to
    copies of the rows."""
    args, tokenizer = run.args, run.tokenizer
    answers = generate(policy, [row["prompt_ids"] for row in rows], seeds, args.response_length,
                       args.temperature, tokenizer, run.device, args.static_cache)
    return [{**row, "response_ids": ids, "truncated": not ended(tokenizer, ids),
             "response": answer_text(tokenizer, ids)} for row, ids in zip(rows, answers)]


def draw_tau(previous, groups, k, rng):
    """tau of this step: K rollouts of the policy's previous batch, so that no row sees its own answer, about
    other things (`group`) than the current batch while there are any. One draw for all rows and ranks."""
    order = [previous[i] for i in rng.permutation(len(previous))]
    order.sort(key=lambda row: row["group"] in groups)  # stable: outsiders first, shuffled among themselves
    return order[:k]


Scored = namedtuple("Scored", "batch entropy logp ref_logp values")


@torch.no_grad()
def score(models, rows, tau, run):
    """Old and reference log-probs and the GVM's values of a rollout batch, in micro batches.

    returns Scored: batch, without tau; entropy, logp, ref_logp [B, R]; values [B, 1 + R]; no gradient
    """
    models.policy.eval()  # with --lora_r the GVM is in it, and train mode may drop the cache of tau
    batch = collate([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                    run.tokenizer.pad_token_id, run.device)
    old, ref, entropy = torch.zeros(3, *batch.mask.shape, device=run.device)
    for micro, part in micro_batches(batch, range(len(rows)), run.args.micro_batch):
        R = part.mask.shape[1]
        old[micro, :R], entropy[micro, :R] = response_logprobs(models.policy, part, run)
        ref[micro, :R], _ = response_logprobs(models.reference, part, run)
    return Scored(batch, entropy, old, ref, models.value(rows, tau))


@torch.no_grad()
def gvm_values(gvm, rows, tau, run):
    """Q_0 .. Q_R of each row by the frozen GVM, [B, 1 + R] float32, 0 behind an answer's end. tau stands in
    front of every prompt; it is the same for all rows, so that it is read once, and P does not count it."""
    prompts = [chat_ids(run.tokenizer, row["prompt"], tau) for row in rows]
    model = SharedPrefix(gvm, prompts, len(tau) > 0, run.device, [row["response_ids"] for row in rows])
    batch = collate(model.rest, [row["response_ids"] for row in rows], run.tokenizer.pad_token_id, run.device)
    values = torch.zeros(len(rows), 1 + batch.mask.shape[1], device=run.device)
    for micro, part in micro_batches(batch, range(len(rows)), run.args.micro_batch):
        q = model(part)[:, part.P - 1:, 0].float()                      # [B, 1 + R]: columns P - 1 .. T - 1
        values[micro, 0], values[micro, 1:q.shape[1]] = q[:, 0], q[:, 1:] * part.mask
    return values


def update(models, scored, advantage, step, run):
    """--ppo_epochs passes of clipped policy gradient over a rollout batch, in optimizer batches of
    micro_batch x accum_steps rows a rank: that is ppo_epochs x rollout_batch / (micro_batch x accum_steps)
    optimizer steps, or fewer after an early stop. advantage: [B, R]

    returns (metrics averaged over the tokens of all updates, largest |ratio - 1| of the first micro batch)
    """
    args, batch, policy = run.args, scored.batch, models.policy
    totals, tokens, updates, grad_norm, first_ratio, stopped = 0, 0, 0, 0.0, None, False
    policy.train()
    for epoch in range(args.ppo_epochs):
        order = keyed_rng("update", args.seed, step, epoch, run.rank).permutation(len(batch.ids))
        for rows in np.split(order, len(order) // (args.micro_batch * args.accum_steps)):
            n, = all_sum(batch.mask[rows].sum(), device=run.device)  # response tokens of the optimizer batch
            sums = 0
            for micro, part in micro_batches(batch, rows, args.micro_batch):
                R = part.mask.shape[1]
                old_logp = scored.logp[micro, :R]
                logp, _ = response_logprobs(policy, part, run)
                loss, stats = policy_loss(logp, old_logp, advantage[micro, :R], part.mask, args.cliprange)
                # backward adds to the gradients, step applies them. DeepSpeed averages over ranks: a token
                # mean is sum * ranks / tokens of all ranks
                policy.backward(loss * run.world / n)
                sums += torch.stack([*stats, loss.detach()]).cpu()
                if first_ratio is None:
                    first_ratio = ((logp.detach() - old_logp) * part.mask).expm1().abs().max().item()
            sums = torch.tensor(all_sum(*sums.tolist(), device=run.device))
            check_finite(sums.sum().item(), step, "the loss", [f"{i} of the rollout batch" for i in rows])
            policy.step()
            totals, tokens, updates = totals + sums, tokens + n, updates + 1
            grad_norm += step_norm(policy)
            # The same number on all ranks, so that all of them leave together and none is waited for
            stopped = 0 < args.early_stop_kl < sums[0] / n
            if stopped:
                break
        if stopped:
            break
    kl, clipped, ratio, ratio_square, loss = (totals / tokens).tolist()
    return {"policy/approxkl_avg": kl, "policy/clipfrac_avg": clipped, "val/ratio": ratio,
            "val/ratio_var": ratio_square - ratio ** 2, "loss/policy_avg": loss,
            "policy/updates": updates, "policy/early_stopped": float(stopped),
            "grad_norm": grad_norm / updates}, first_ratio


# ---- metrics -----------------------------------------------------------------------------------------------

def last_values(scored):
    """Q_n of each row's last token, [B]."""
    return scored.values.gather(1, scored.batch.mask.sum(1, keepdim=True))[:, 0]


def metrics_of(rows, scored, kl, raw_mean, raw_std, beta):
    """gvm/drift is the mean of Q_n - Q_0, about 0 if values are those of the policy that sampled. Above 0
    answers end better than the GVM foresaw: it underrates the policy, or is exploited."""
    q = scored.values[:, 1:] * scored.batch.mask
    metrics, sums = rollout_metrics(rows, scored.batch, kl, scored.entropy, beta, raw_mean, raw_std,
                                    q=q.sum(), q_square=(q ** 2).sum(),
                                    drift=(last_values(scored) - scored.values[:, 0]).sum())
    mean = sums["q"] / sums["tokens"]
    return {**metrics, "gvm/mean": mean, "gvm/drift": sums["drift"] / sums["answers"],
            "gvm/std": max(sums["q_square"] / sums["tokens"] - mean ** 2, 0.0) ** 0.5}


@torch.no_grad()
def held_out(models, truth, test, tau, settings, run):
    """KL, length, value and true reward on held-out prompts, sampled with the same noise every time."""
    rows = rollout(models.policy, *held_out_rows(test, run), run)
    scored = score(models, rows, fit_tau(tau, rows, settings, run), run)
    return held_out_metrics(rows, scored.batch, scored.logp - scored.ref_logp, truth, models.policy, run,
                            final_value=last_values(scored).sum())


# ---- models ------------------------------------------------------------------------------------------------

Models = namedtuple("Models", "policy reference value")


def load_models(sft, reference, gvm_folder, settings, config, run):
    """policy: a DeepSpeed engine, the only one that learns. reference: the frozen model that KL is taken to.
    value: function (rows, tau) -> Q_0 .. Q_n of each row, by the frozen GVM (or by --value_fn).

    The reference's weights are in memory once: a LoRA policy that starts as it is an adapter on them.
    So is a GVM that grew from it (on_reference). `shared` answers by role.
    """
    import deepspeed
    args, dtype = run.args, dtype_of(config)
    policy = load_policy(sft, run.tokenizer, dtype, "--sft_model")
    one = args.lora_r > 0 and reference == sft  # copy of the weights for policy and reference
    base = policy if one else load_policy(reference, run.tokenizer, dtype, "--reference_model")
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    lora = lora_config(policy, "CAUSAL_LM", args) if args.lora_r else None
    on_base = gvm_folder and settings["on_reference"]
    gvm = load_gvm(gvm_folder, dtype, lm=base if on_base else None)[0] if gvm_folder else None
    shared = OneBase(base, gvm if on_base else None, lora if one else None)
    policy = shared if one else OneBase(policy, lora=lora) if lora else LogProbs(policy)
    parameters, = train_only(policy, ".policy." if lora else "")  # nothing but the policy, by name, learns
    optimizer = adamw([(parameters, args.lr)], config, args.max_grad_norm)
    policy, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    shared = policy if one else freeze(shared, config, run.device)
    if gvm_folder:
        gvm = functools.partial(shared, role="gvm") if on_base else freeze(gvm, config, run.device)
        value = functools.partial(gvm_values, gvm, run=run)
    else:
        value = load_value_fn(policy, run)
    return Models(policy, functools.partial(shared, role="reference"), value)


def main(args):
    rank, world, device = init_distributed()
    seed_everything(args.seed)
    truth = load_truth(args)
    sft, tokenizer, config = rl_inputs(args, world)
    reference = reference_inputs(args, sft, tokenizer)
    gvm_folder, settings = gvm_inputs(args, reference, tokenizer)
    out = output_folder(args)
    train, test = rl_prompts(tokenizer, args, world)
    run = Run(args, tokenizer, device, rank, world)
    reads = {sft, reference, gvm_folder, settings.get("base_model")}
    checkpoints = Checkpoints(out, args, (train, test), reads)

    models = load_models(sft, reference, gvm_folder, settings, config, run)
    start, state = checkpoints.resume({"policy": models.policy})
    log = MetricLog(out, args, SHOWN, args.max_steps, start)
    beta, previous = state.get("beta", args.kl_coef), state.get("previous", [])
    global_batch = args.rollout_batch * world
    for step in range(start, args.max_steps):
        clock = Clock()
        # 1. roll out: sample y ~ pi(.|x); the noise of a row is keyed by its global place, not by its rank
        picks = epoch_rows(len(train), step * global_batch, global_batch, args.seed)
        mine = range(rank * args.rollout_batch, (rank + 1) * args.rollout_batch)
        rows = rollout(models.policy, [train[picks[i]] for i in mine],
                       [row_seed(args.seed, step * global_batch + i) for i in mine], run)
        groups, k = {train[i]["group"] for i in picks}, settings["k"]
        if step == 0 and k > 0:
            # tau needs answers of the current policy: K extra prompts, outside the batch if possible
            extra = sorted(keyed_rng("first tau", args.seed).permutation(len(train))[:4 * k + global_batch],
                           key=lambda i: train[i]["group"] in groups)[:k]
            previous = rollout(models.policy, [train[i] for i in extra],
                               [row_seed(args.seed, -1 - j) for j in range(len(extra))], run)
        clock("generation")

        # 2. score: log pi_old, log pi_ref and Q(tau, s, a), all without gradient
        tau = draw_tau(previous, groups, k, keyed_rng("tau", args.seed, step))
        scored = score(models, rows, fit_tau(tau, rows, settings, run), run)
        batch = scored.batch
        check_scores_finite(step, rows, *scored[2:])  # logp and all that stands behind it
        clock("score")

        # 3. advantages: beta KL_t and the cost of a missing EOS, both in units of reward, then GAE or Eq. 2
        kl = (scored.logp - scored.ref_logp) * batch.mask
        penalty = beta * kl
        for i, row in enumerate(rows):
            penalty[i, len(row["response_ids"]) - 1] += args.missing_eos_penalty * row["truncated"]
        advantage, raw_mean, raw_std = advantages(args.advantage, scored.values, penalty, batch.mask,
                                                  args.gae_lam)
        metrics = metrics_of(rows, scored, kl, raw_mean, raw_std, beta)
        if truth:
            metrics["objective/true_reward"] = truth(rows, models.policy, run)
        clock("advantages")

        # 4. update: clipped surrogate (Eq. 3)
        update_stats, first_ratio = update(models, scored, advantage, step, run)
        clock("train")

        # 5. log and steer beta
        if step == 0:
            self_check(rows[0], batch, metrics["objective/kl"], first_ratio, tokenizer, dtype_of(config),
                       apart=reference != sft)
        metrics.update(update_stats, lr=args.lr, episode=(step + 1) * global_batch,
                       **clock.row(global_batch), **{"memory/peak_gb": peak_memory_gb(device)})
        beta = next_kl_coef(beta, metrics["objective/kl"], args.kl_target, args.kl_horizon, global_batch)
        if test and due(step, args.max_steps, args.eval_every):
            metrics.update(held_out(models, truth, test, tau, settings, run))
        log.write(step, metrics)
        warn(log.last_rows)
        show_samples(step, rows, scored, out, run)
        # the next step's tau is drawn from these
        previous = gather_rows([{key: row[key] for key in ("prompt", "group", "response")} for row in rows])
        checkpoints.after(step, args.max_steps, beta=beta, previous=previous)
    save_model(models.policy, tokenizer, out, base=sft if args.lora_r else None)
    checkpoints.finish()


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
