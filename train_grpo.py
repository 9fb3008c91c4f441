"""GRPO (Shao et al. 2024, arXiv 2402.03300): the baseline is the mean reward of several answers to a prompt.

`diff train_remax.py train_grpo.py` is the method: the greedy answer goes, more sampled ones come, and with
them the clipped ratio and the passes over a rollout batch of train_ppo.py.
    r_t = -beta KL_t, plus the reward model's score at the last token, as in train_ppo.py
    A   = (R - mean R) / (std R + 1e-4),   R = sum_t r_t,  mean and std over the answers to one prompt
    L   = -mean min(w A, clip(w, 1 - eps, 1 + eps) A),   w = pi(a_t | s_t) / pi_old(a_t | s_t)
Every token of an answer has its advantage. Three models, of which the policy is trained.

Departures:
D1  The reward model's score is standardized to about [-1, 1] (rm.json), as in train_ppo.py: one beta and one
    KL target suit both scripts. A model without rm.json keeps its own scale.
D2  beta KL is part of the reward, as in train_ppo.py, and of the group's mean; in the paper, of the loss.
D3  The loss is a mean over the tokens of an optimizer batch, as in train_ppo.py. The paper's, the mean over
    answers of the mean over their tokens, is --loss_mean answer; Dr. GRPO's advantage, --std_norm False.

    python train_grpo.py                                             the toy, on one CPU rank
    deepspeed train_grpo.py --model meta-llama/Meta-Llama-3-8B       openbmb/UltraFeedback, ZeRO-3, bf16

reads   prompts of the RL share (20 %), the SFT model (policy and reference), the reward model
writes  runs/<model name>/grpo: the policy, tokenizer, args.json, metrics.jsonl, samples.jsonl; a killed run
        loses the steps since its last checkpoint; --resume True continues it exactly (plumbing/checkpoint.py)

Legend: B rows, P prompt columns (left padded), R response columns (right padded), T = P + R, V vocabulary.
"""

import functools
from collections import namedtuple
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from common import (Run, batch_normalize, collate, epoch_rows, freeze, generate, keyed_rng, load_policy,
                    lora_config, micro_batches, row_seed, train_only)
from plumbing.args import RunArgs, parse_args
from plumbing.checkpoint import Checkpoints
from plumbing.checks import check_finite
from plumbing.deepspeed_config import adamw, dtype_of, step_norm
from plumbing.folders import output_folder
from plumbing.inputs import reference_inputs, reward_inputs, rl_inputs
from plumbing.lean import LogProbs, OneBase
from plumbing.log import Clock, MetricLog, due
from plumbing.ranks import all_sum, init_distributed, peak_memory_gb, seed_everything
from plumbing.rl import (check_scores_finite, held_out_metrics, held_out_rows, load_reward, load_truth,
                         rollout_metrics, score_metrics, self_check, show_samples, SHOWN, warn)
from plumbing.rows import rl_prompts
from plumbing.saving import save_model
from plumbing.texts import answer_text, ended


@dataclass
class Args(RunArgs):
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # where the policy starts, default runs/<model name>/sft
    reference_model: str = ""  # what KL is taken to, default: the model that the policy starts as
    reward_model: str = ""  # any causal one-label sequence classifier, default runs/<model name>/rm
    reward_fn: str = ""  # module:function that gives the reward in place of the reward model
    truth_fn: str = ""  # module:function that gives a true reward, which is logged and used by nothing
    lora_r: int = 0  # LoRA rank of what learns, merged at the end; 0 trains every weight
    lora_alpha: int = 32  # LoRA scale is alpha / r
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file; prompts only
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the prompts had to be dropped
    max_prompt_length: int = 1024  # longer prompts are dropped and counted [tokens]
    # rollout
    rollout_batch: int = 8  # answers per step on one rank
    group_size: int = 4  # of them to each prompt
    response_length: int = 1024  # longest sampled answer [tokens]
    temperature: float = 1.0  # of sampling and of every log-prob
    static_cache: bool = False  # compiled decoding on a GPU; costs a minute or more at the first rollout
    missing_eos_penalty: float = 0.0  # taken off the last token of a truncated answer [reward]
    # algorithm
    std_norm: bool = True  # divide advantages by the standard deviation of their group
    loss_mean: Literal["token", "answer"] = "token"  # over all tokens, or over answers of their tokens' mean
    ppo_epochs: int = 1  # passes over each rollout batch
    cliprange: float = 0.2  # ratio clip
    kl_coef: float = 0.2  # initial beta, weight of the per-token KL to the reference [reward per nat]
    kl_target: float = 6.0  # objective/kl that beta is steered to [nats per response]; 0 keeps beta fixed
    kl_horizon: int = 10000  # time constant of that controller [episodes]
    # optimisation
    lr: float = 1e-6  # learning rate of the policy, constant
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

def token_rewards(scores, penalty, mask):
    """r_t = -penalty_t, plus the answer's score on its last token.

    scores: [B] units of reward;  penalty: [B, R] beta KL_t and what a missing EOS costs;  mask: [B, R] bool
    """
    last = mask.long().sum(1, keepdim=True) - 1                         # [B, 1]
    return (-penalty * mask).scatter_add(1, last, scores[:, None])


def advantages(rewards, mask, group_size, std_norm):
    """A_t = (R - mean) / (std + 1e-4): R is an answer's return, mean and std are over those to one prompt.

    rewards: [B, R] units of reward, the answers to a prompt in successive rows;  mask: [B, R] bool
    returns  ([B, R], zero where mask is 0,  its mean and standard deviation over all ranks)
    """
    group = (rewards * mask).sum(1).view(-1, group_size)                # [B / G, G]
    advantage = group - group.mean(1, keepdim=True)
    advantage = advantage / (group.std(1, keepdim=True) + 1e-4) if std_norm else advantage
    advantage = advantage.view(-1, 1) * mask
    _, mean, std = batch_normalize(advantage, mask)  # the log's; nothing is normalized
    return advantage, mean, std


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
# score                   read at the last token   EOS, or the last one that was sampled
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


Scored = namedtuple("Scored", "batch entropy logp ref_logp scores")


@torch.no_grad()
def score(models, rows, run):
    """Old and reference log-probs of a rollout batch, in micro batches, and its scores.

    returns Scored: batch; entropy, logp, ref_logp [B, R]; scores [B]; no gradient
    """
    batch = collate([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                    run.tokenizer.pad_token_id, run.device)
    old, ref, entropy = torch.zeros(3, *batch.mask.shape, device=run.device)
    for micro, part in micro_batches(batch, range(len(rows)), run.args.micro_batch):
        R = part.mask.shape[1]
        old[micro, :R], entropy[micro, :R] = response_logprobs(models.policy, part, run)
        ref[micro, :R], _ = response_logprobs(models.reference, part, run)
    return Scored(batch, entropy, old, ref, models.reward(rows, models.policy))


def update(policy, scored, advantage, step, run):
    """--ppo_epochs passes of clipped policy gradient over a rollout batch, in optimizer batches of
    micro_batch x accum_steps rows a rank. advantage: [B, R]

    returns (metrics averaged over the tokens of all updates, largest |ratio - 1| of the first micro batch)
    """
    args, batch = run.args, scored.batch
    totals, tokens, updates, grad_norm, first_ratio = torch.zeros(5), 0, 0, 0.0, None
    policy.train()
    order = np.concatenate([keyed_rng("update", args.seed, step, epoch, run.rank).permutation(len(batch.ids))
                            for epoch in range(args.ppo_epochs)])
    for rows in np.split(order, len(order) // (args.micro_batch * args.accum_steps)):
        n, = all_sum(batch.mask[rows].sum(), device=run.device)  # response tokens of the optimizer batch
        sums, weight = torch.zeros(5), 1.0
        if args.loss_mean == "answer":
            weight = n / (len(rows) * run.world) / batch.mask.sum(1, keepdim=True)  # undoes / n
        for micro, part in micro_batches(batch, rows, args.micro_batch):
            R = part.mask.shape[1]
            logp, _ = response_logprobs(policy, part, run)
            loss, stats = policy_loss(logp, scored.logp[micro, :R], (weight * advantage)[micro, :R],
                                      part.mask, args.cliprange)
            # DeepSpeed averages gradients over ranks: a token mean is sum * ranks / tokens of all ranks
            policy.backward(loss * run.world / n)
            sums += torch.stack([*stats, loss.detach()]).cpu()
            if first_ratio is None:
                moved = (logp.detach() - scored.logp[micro, :R]) * part.mask  # log pi / pi_old
                first_ratio = moved.expm1().abs().max().item()
        sums = torch.tensor(all_sum(*sums.tolist(), device=run.device))
        check_finite(sums.sum().item(), step, "the loss", [f"{i} of the rollout batch" for i in rows])
        policy.step()
        grad_norm += step_norm(policy)
        totals, tokens, updates = totals + sums, tokens + n, updates + 1
    kl, clipped, ratio, ratio_square, loss = (totals / tokens).tolist()
    return {"policy/approxkl_avg": kl, "policy/clipfrac_avg": clipped, "val/ratio": ratio,
            "val/ratio_var": ratio_square - ratio ** 2, "loss/policy_avg": loss, "policy/updates": updates,
            "grad_norm": grad_norm / updates}, first_ratio


# ---- metrics -----------------------------------------------------------------------------------------------

def metrics_of(rows, scored, kl, raw_mean, raw_std, beta):
    metrics, sums = rollout_metrics(
        rows, scored.batch, kl, scored.entropy, beta, raw_mean, raw_std, scores=scored.scores.sum(),
        scores_square=(scored.scores ** 2).sum())
    return {**metrics, **score_metrics(sums, beta)}


@torch.no_grad()
def held_out(models, truth, test, run):
    """KL, length, score and true reward on held-out prompts, sampled with the same noise every time."""
    rows = rollout(models.policy, *held_out_rows(test, run), run)
    scored = score(models, rows, run)
    return held_out_metrics(rows, scored.batch, scored.logp - scored.ref_logp, truth, models.policy, run,
                            scores=scored.scores.sum())


# ---- models ------------------------------------------------------------------------------------------------

Models = namedtuple("Models", "policy reference reward")


def load_models(sft, reference, rm, config, run):
    """policy: a DeepSpeed engine, the only one that learns. reference: the frozen model that KL is taken to.
    reward: function (rows, policy) -> [B], by the frozen reward model (or by --reward_fn). With --lora_r a
    policy that starts as the reference is an adapter on its weights, which are in memory once.
    """
    import deepspeed
    args, dtype = run.args, dtype_of(config)
    reward = load_reward(rm, config, run)
    policy = load_policy(sft, run.tokenizer, dtype, "--sft_model")
    one = args.lora_r > 0 and reference == sft  # copy of the weights for policy and reference
    base = policy if one else load_policy(reference, run.tokenizer, dtype, "--reference_model")
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    lora = lora_config(policy, "CAUSAL_LM", args) if args.lora_r else None
    policy = OneBase(policy, lora=lora) if lora else LogProbs(policy)
    parameters, = train_only(policy, ".policy." if lora else "")  # nothing but the policy learns
    optimizer = adamw([(parameters, args.lr)], config, args.max_grad_norm)
    policy, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    shared = policy if one else freeze(OneBase(base), config, run.device)
    reference = functools.partial(shared, role="reference")
    return Models(policy, reference, reward)


def main(args):
    rank, world, device = init_distributed()
    seed_everything(args.seed)
    truth = load_truth(args)
    sft, tokenizer, config = rl_inputs(args, world)
    reference = reference_inputs(args, sft, tokenizer)
    rm = reward_inputs(args)
    out = output_folder(args)
    train, test = rl_prompts(tokenizer, args, world)
    run = Run(args, tokenizer, device, rank, world)
    checkpoints = Checkpoints(out, args, (train, test), {sft, reference, rm})

    models = load_models(sft, reference, rm, config, run)
    start, state = checkpoints.resume({"policy": models.policy})
    log = MetricLog(out, args, SHOWN, args.max_steps, start)
    beta = state.get("beta", args.kl_coef)
    global_batch = args.rollout_batch * world
    prompts_a_step = global_batch // args.group_size
    for step in range(start, args.max_steps):
        clock = Clock()
        # 1. roll out: sample a group of answers y ~ pi(.|x), all on one rank; the noise of a row is keyed by
        #    its global place, not by its rank
        picks = epoch_rows(len(train), step * prompts_a_step, prompts_a_step, args.seed)
        mine = range(rank * args.rollout_batch, (rank + 1) * args.rollout_batch)
        prompts = [train[picks[i // args.group_size]] for i in mine]
        seeds = [row_seed(args.seed, step * global_batch + i) for i in mine]
        rows = rollout(models.policy, prompts, seeds, run)
        clock("generation")

        # 2. score: log pi_old, log pi_ref and r(x, y), all without gradient
        scored = score(models, rows, run)
        batch = scored.batch
        check_scores_finite(step, rows, *scored[2:])  # logp and all that stands behind it
        clock("score")

        # 3. advantages: the score, beta KL_t and the cost of a missing EOS as rewards, their sum in the group
        kl = (scored.logp - scored.ref_logp) * batch.mask
        penalty = beta * kl
        for i, row in enumerate(rows):
            penalty[i, len(row["response_ids"]) - 1] += args.missing_eos_penalty * row["truncated"]
        rewards = token_rewards(scored.scores, penalty, batch.mask)
        advantage, raw_mean, raw_std = advantages(rewards, batch.mask, args.group_size, args.std_norm)
        metrics = metrics_of(rows, scored, kl, raw_mean, raw_std, beta)
        if truth:
            metrics["objective/true_reward"] = truth(rows, models.policy, run)
        clock("advantages")

        # 4. update: one pass of policy gradient or several
        update_stats, first_ratio = update(models.policy, scored, advantage, step, run)
        clock("train")

        # 5. log and steer beta
        if step == 0:
            self_check(rows[0], batch, metrics["objective/kl"], first_ratio, tokenizer, dtype_of(config),
                       apart=reference != sft)
        metrics.update(update_stats, lr=args.lr, episode=(step + 1) * global_batch,
                       **clock.row(global_batch), **{"memory/peak_gb": peak_memory_gb(device)})
        beta = next_kl_coef(beta, metrics["objective/kl"], args.kl_target, args.kl_horizon, global_batch)
        if test and due(step, args.max_steps, args.eval_every):
            metrics.update(held_out(models, truth, test, run))
        log.write(step, metrics)
        warn(log.last_rows)
        show_samples(step, rows, scored, out, run)
        checkpoints.after(step, args.max_steps, beta=beta)
    save_model(models.policy, tokenizer, out, base=sft if args.lora_r else None)
    checkpoints.finish()


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
