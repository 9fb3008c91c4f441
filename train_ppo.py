"""Proximal Policy Optimization (PPO) with a reward model and a critic: the baseline that DVPO is measured
against.

`diff train_ppo.py train_dvpo.py` is the paper: DVPO drops the reward model, the critic and its training, and
reads the value of a token from one frozen model.
    r_t = -beta KL_t, plus the reward model's score at the last token
    A_t = sum_l lambda^l delta_(t+l),   delta_t = r_t + V(s_(t+1)) - V(s_t),   tokens t = 1, 2, ..
    Eq. 3   L = -mean min(rho_t N(A_t), clip(rho_t, 1 - eps, 1 + eps) N(A_t)),   N: normalized over the batch
            rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    L_V = mean 1/2 max( (V - G_t)^2, (clip(V, V_old - eps_V, V_old + eps_V) - G_t)^2 ),   G_t = A_t + V(s_t)
Four models: policy and critic are trained, reference and reward model are not.

Departures from the paper:
D1  The reward model's score is standardized to about [-1, 1] (rm.json), near the scale of train_gvm's
    rewards, so that one beta suits both scripts; what makes runs comparable is a common KL target. A model
    without rm.json keeps its own scale.
D2  The critic starts from the reward model, as in InstructGPT (with --reward_fn from the SFT model;
    --critic_model names another start), and --critic_warmup gives it rollout batches of its own before the
    policy moves.
D4  Two KLs. KL(policy, reference) is steered by beta to --kl_target. The paper's "target KL 0.1" is read as
    --early_stop_kl: no more updates of a step once KL(pi_old, pi) per token has passed it.

    python train_ppo.py                                               the toy, on one CPU rank
    deepspeed train_ppo.py --model meta-llama/Meta-Llama-3-8B         openbmb/UltraFeedback, ZeRO-3, bf16

reads   prompts of the RL share (20 %), the SFT model (policy and reference), the reward model
writes  runs/<model name>/ppo: the policy, tokenizer, args.json, metrics.jsonl, samples.jsonl; a killed run
        loses the steps since its last checkpoint; --resume True continues it exactly (plumbing/checkpoint.py)

Legend: B rows, P prompt columns (left padded), R response columns (right padded), T = P + R, V vocabulary.
"""

import functools
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import torch

from common import (Run, batch_normalize, collate, epoch_rows, freeze, generate, keyed_rng, load_policy,
                    lora_config, micro_batches, row_seed, train_only)
from plumbing.args import RunArgs, parse_args
from plumbing.checkpoint import Checkpoints
from plumbing.checks import check_finite
from plumbing.deepspeed_config import adamw, dtype_of, step_norm
from plumbing.folders import output_folder
from plumbing.inputs import critic_inputs, reference_inputs, reward_inputs, rl_inputs
from plumbing.lean import LogProbs, OneBase, share_models
from plumbing.log import Clock, MetricLog, due
from plumbing.ranks import all_sum, init_distributed, peak_memory_gb, seed_everything
from plumbing.rl import (check_scores_finite, held_out_metrics, held_out_rows, keep_critic, load_critic,
                         load_reward, load_truth, rollout_metrics, score_metrics, self_check, show_samples,
                         SHOWN, warn)
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
    critic_model: str = ""  # where the critic starts: reward model (default: that one), GVM or SFT model
    truth_fn: str = ""  # module:function that gives a true reward, which is logged and used by nothing
    lora_r: int = 0  # LoRA rank of what learns, merged at the end; 0 trains every weight
    lora_alpha: int = 32  # LoRA scale is alpha / r
    share_base: bool = False  # all four models as LoRA on one copy of the weights; needs --lora_r
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
    gae_lam: float = 0.95  # lambda of --advantage gae
    cliprange: float = 0.2  # epsilon of Eq. 3
    cliprange_value: float = 0.2  # eps_V of the value loss [reward]
    critic_warmup: int = 0  # steps at the start in which only the critic is trained
    critic_every: int = 0  # keep the critic as a value model this often and at the end [steps]; 0: never
    ppo_epochs: int = 4  # passes over each rollout batch
    kl_coef: float = 0.2  # initial beta, weight of the per-token KL to the reference [reward per nat]
    kl_target: float = 6.0  # objective/kl that beta is steered to [nats per response]; 0 keeps beta fixed
    kl_horizon: int = 10000  # time constant of that controller [episodes]
    early_stop_kl: float = 0.1  # ends a step's updates when KL(old, new) passes it [nats per token]; 0: never
    # optimisation
    lr: float = 2e-6  # learning rate of the policy, constant
    critic_lr: float = 2e-6  # learning rate of the critic, constant
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


def token_rewards(scores, penalty, mask):
    """r_t = -penalty_t, plus the answer's score on its last token.

    scores: [B] units of reward;  penalty: [B, R] beta KL_t and what a missing EOS costs;  mask: [B, R] bool
    """
    last = mask.long().sum(1, keepdim=True) - 1                         # [B, 1]
    return (-penalty * mask).scatter_add(1, last, scores[:, None])


def advantages(rewards, values, mask, lam):
    """What each token was worth, normalized over the batch of all ranks, and the critic's target.

    delta_t = r_t + V(s_{t+1}) - V(s_t),  V_{T+1} = 0;  A = GAE(delta);  G_t = A_t + V(s_t)
    rewards, values: [B, R] units of reward, values = V(s_t) before the action;  mask: [B, R] bool
    returns  (N(A) [B, R] unitless, zero where mask is 0,  G [B, R] units of reward,
              mean and standard deviation of A)
    """
    values = values * mask
    v_next = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    raw = gae(rewards + v_next - values, mask, lam)
    normalized, mean, std = batch_normalize(raw, mask)
    return normalized, (raw + values) * mask, mean, std


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


def value_loss(values, old_values, returns, mask, cliprange):
    """1/2 max((V - G)^2, (V_clipped - G)^2) summed over response tokens, V_clipped within cliprange of V_old.

    values, old_values, returns: [B, R] float32, units of reward;  mask: [B, R] bool
    returns (loss, number of tokens whose clipped error is the larger)
    """
    clipped = values.clamp(old_values - cliprange, old_values + cliprange)
    plain, bounded = (values - returns) ** 2, (clipped - returns) ** 2
    return 0.5 * (torch.max(plain, bounded) * mask).sum(), ((bounded > plain) & mask).sum()


def next_kl_coef(beta, kl, target, horizon, episodes):
    """Adaptive controller of Ziegler et al. 2019:
    beta *= 1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon."""
    if target <= 0:
        return beta
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


# ---- rollout and scoring -----------------------------------------------------------------------------------
# ids            p1  p2 | y1  y2  y3  EOS pad      P = 2 prompt columns (left padded), R = 5 response columns
# action a_t              1   2   3   4   -        a_t = y_t, in column P + t - 1
# log pi(a_t|s_t), V(s_t) read at P + t - 2        slice [:, P-1 : T-1]   (the state before the action)
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


def response_values(critic, batch):
    """V(s_t) before each response token, [B, R] float32."""
    logits = critic(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                    use_cache=False).logits
    return logits[:, batch.P - 1:-1, 0].float()


def rollout(policy, rows, seeds, run):
    """Sample one answer per prompt row. Adds response_ids, response (text) and truncated (it has no EOS) to
    copies of the rows."""
    args, tokenizer = run.args, run.tokenizer
    answers = generate(policy, [row["prompt_ids"] for row in rows], seeds, args.response_length,
                       args.temperature, tokenizer, run.device, args.static_cache)
    return [{**row, "response_ids": ids, "truncated": not ended(tokenizer, ids),
             "response": answer_text(tokenizer, ids)} for row, ids in zip(rows, answers)]


Scored = namedtuple("Scored", "batch entropy logp ref_logp values scores")


@torch.no_grad()
def score(models, rows, run):
    """Old and reference log-probs, values and scores of a rollout batch, in micro batches.

    returns Scored: batch; entropy, logp, ref_logp, values [B, R]; scores [B]; no gradient
    """
    batch = collate([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                    run.tokenizer.pad_token_id, run.device)
    old, ref, entropy, values = torch.zeros(4, *batch.mask.shape, device=run.device)
    for micro, part in micro_batches(batch, range(len(rows)), run.args.micro_batch):
        R = part.mask.shape[1]
        old[micro, :R], entropy[micro, :R] = response_logprobs(models.policy, part, run)
        ref[micro, :R], _ = response_logprobs(models.reference, part, run)
        values[micro, :R] = response_values(models.critic, part)
    return Scored(batch, entropy, old, ref, values, models.reward(rows, models.policy))


def update(models, scored, advantage, returns, step, run):
    """--ppo_epochs passes of clipped policy gradient and of value regression over a rollout batch, in
    optimizer batches of micro_batch x accum_steps rows a rank. advantage, returns: [B, R]

    The critic is an engine of its own; with --share_base a role of the policy's engine, whose one step moves
    both, so that clipping sees the gradients of both.

    returns (metrics averaged over the tokens of all updates, largest |ratio - 1| of the first micro batch)
    """
    args, batch, policy = run.args, scored.batch, models.policy
    totals, tokens, updates, grad_norm, first_ratio, stopped = 0, 0, 0, 0.0, None, False
    warming, critic_grad_norm = step < args.critic_warmup, 0.0
    learner = policy if args.share_base else models.critic  # whose optimizer has the critic's weights
    policy.optimizer.param_groups[0]["lr"] = 0.0 if warming else args.lr
    policy.train()
    learner.train()
    for epoch in range(args.ppo_epochs):
        order = keyed_rng("update", args.seed, step, epoch, run.rank).permutation(len(batch.ids))
        for rows in np.split(order, len(order) // (args.micro_batch * args.accum_steps)):
            n, = all_sum(batch.mask[rows].sum(), device=run.device)  # response tokens of the optimizer batch
            sums = 0
            for micro, part in micro_batches(batch, rows, args.micro_batch):
                R = part.mask.shape[1]
                old_logp = scored.logp[micro, :R]
                with torch.set_grad_enabled(not warming):  # during the warm-up only the critic learns
                    logp, _ = response_logprobs(policy, part, run)
                loss, stats = policy_loss(logp, old_logp, advantage[micro, :R], part.mask, args.cliprange)
                # backward adds to the gradients, step applies them. DeepSpeed averages over ranks: a token
                # mean is sum * ranks / tokens of all ranks
                if not warming:
                    policy.backward(loss * run.world / n)
                v_loss, v_clipped = value_loss(response_values(models.critic, part), scored.values[micro, :R],
                                               returns[micro, :R], part.mask, args.cliprange_value)
                learner.backward(v_loss * run.world / n)
                sums += torch.stack([*stats, loss.detach(), v_loss.detach(), v_clipped]).cpu()
                if first_ratio is None:
                    first_ratio = ((logp.detach() - old_logp) * part.mask).expm1().abs().max().item()
            sums = torch.tensor(all_sum(*sums.tolist(), device=run.device))
            check_finite(sums.sum().item(), step, "the loss", [f"{i} of the rollout batch" for i in rows])
            for engine in {learner} if warming or args.share_base else (policy, models.critic):
                engine.step()
            totals, tokens, updates = totals + sums, tokens + n, updates + 1
            grad_norm += step_norm(policy)  # 0 before its first step
            critic_grad_norm += step_norm(learner)
            # The same number on all ranks, so that all of them leave together and none is waited for
            stopped = 0 < args.early_stop_kl < sums[0] / n
            if stopped:
                break
        if stopped:
            break
    kl, clipped, ratio, ratio_square, loss, v_loss, v_clipped = (totals / tokens).tolist()
    return {"policy/approxkl_avg": kl, "policy/clipfrac_avg": clipped, "val/ratio": ratio,
            "val/ratio_var": ratio_square - ratio ** 2, "loss/policy_avg": loss,
            "loss/value_avg": v_loss, "val/clipfrac_avg": v_clipped,
            "critic/grad_norm": critic_grad_norm / updates,
            "policy/updates": 0 if warming else updates, "policy/early_stopped": float(stopped),
            "grad_norm": grad_norm / updates}, first_ratio


# ---- metrics -----------------------------------------------------------------------------------------------

def metrics_of(rows, scored, kl, returns, raw_mean, raw_std, beta):
    mask, scores, error = scored.batch.mask, scored.scores, (returns - scored.values) * scored.batch.mask
    metrics, sums = rollout_metrics(
        rows, scored.batch, kl, scored.entropy, beta, raw_mean, raw_std, scores=scores.sum(),
        scores_square=(scores ** 2).sum(), values=(scored.values * mask).sum(), returns=returns.sum(),
        returns_square=(returns ** 2).sum(), error=error.sum(), error_square=(error ** 2).sum())
    variance = lambda name: sums[f"{name}_square"] / sums["tokens"] - (sums[name] / sums["tokens"]) ** 2
    return {**metrics, **score_metrics(sums, beta), "critic/mean": sums["values"] / sums["tokens"],
            "critic/explained_variance": 1 - variance("error") / max(variance("returns"), 1e-8)}


@torch.no_grad()
def held_out(models, truth, test, run):
    """KL, length, score and true reward on held-out prompts, sampled with the same noise every time."""
    rows = rollout(models.policy, *held_out_rows(test, run), run)
    scored = score(models, rows, run)
    return held_out_metrics(rows, scored.batch, scored.logp - scored.ref_logp, truth, models.policy, run,
                            scores=scored.scores.sum())


# ---- models ------------------------------------------------------------------------------------------------

Models = namedtuple("Models", "policy reference critic reward")


def load_models(sft, reference, rm, critic_folder, config, run):
    """policy and critic: DeepSpeed engines, which learn. reference: the frozen model that KL is taken to.
    reward: function (rows, policy) -> [B], by the frozen reward model (or by --reward_fn).

    The reference's weights are in memory once: a LoRA policy that starts as it is an adapter on them.
    """
    import deepspeed
    from peft import get_peft_model
    args, dtype = run.args, dtype_of(config)
    score_answers = load_reward(rm, config, run)
    critic = load_critic(critic_folder, dtype)
    policy = load_policy(sft, run.tokenizer, dtype, "--sft_model")
    one = args.lora_r > 0 and reference == sft  # copy of the weights for policy and reference
    base = policy if one else load_policy(reference, run.tokenizer, dtype, "--reference_model")
    if args.gradient_checkpointing:
        for model in (policy, critic):
            model.activation_checkpointing_enable({"use_reentrant": False})
    if args.lora_r:
        policy = OneBase(policy, lora=lora_config(policy, "CAUSAL_LM", args))
        head = "score" if hasattr(critic, "score") else "classifier"
        critic = get_peft_model(critic, lora_config(critic, "TOKEN_CLS", args, modules_to_save=[head]),
                                autocast_adapter_dtype=False)
    policy = policy if args.lora_r else LogProbs(policy)
    engines = []
    for model, part, lr in ((policy, ".policy.", args.lr), (critic, ".default.", args.critic_lr)):
        parameters, = train_only(model, part if args.lora_r else "")  # nothing but policy and critic learns
        optimizer = adamw([(parameters, lr)], config, args.max_grad_norm)
        engines.append(deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0])
    policy, critic = engines
    shared = policy if one else freeze(OneBase(base), config, run.device)
    reference = functools.partial(shared, role="reference")
    return Models(policy, reference, critic, score_answers)


def main(args):
    rank, world, device = init_distributed()
    seed_everything(args.seed)
    truth = load_truth(args)
    sft, tokenizer, config = rl_inputs(args, world)
    reference = reference_inputs(args, sft, tokenizer)
    rm = reward_inputs(args)
    critic_folder = critic_inputs(args, sft, rm, tokenizer)
    out = output_folder(args)
    train, test = rl_prompts(tokenizer, args, world)
    run = Run(args, tokenizer, device, rank, world)
    reads = {sft, reference, rm, critic_folder}
    checkpoints = Checkpoints(out, args, (train, test), reads)

    load = share_models if args.share_base else load_models
    models = Models(*load(sft, reference, rm, critic_folder, config, run))
    engines = {"policy": models.policy, **({} if args.share_base else {"critic": models.critic})}
    start, state = checkpoints.resume(engines)
    log = MetricLog(out, args, SHOWN, args.max_steps, start)
    beta = state.get("beta", args.kl_coef)
    global_batch = args.rollout_batch * world
    for step in range(start, args.max_steps):
        clock = Clock()
        # 1. roll out: sample y ~ pi(.|x); the noise of a row is keyed by its global place, not by its rank
        picks = epoch_rows(len(train), step * global_batch, global_batch, args.seed)
        mine = range(rank * args.rollout_batch, (rank + 1) * args.rollout_batch)
        rows = rollout(models.policy, [train[picks[i]] for i in mine],
                       [row_seed(args.seed, step * global_batch + i) for i in mine], run)
        clock("generation")

        # 2. score: log pi_old, log pi_ref, V(s) and r(x, y), all without gradient
        scored = score(models, rows, run)
        batch = scored.batch
        check_scores_finite(step, rows, *scored[2:])  # logp and all that stands behind it
        clock("score")

        # 3. advantages: the score, beta KL_t and the cost of a missing EOS as rewards, then GAE on the critic
        kl = (scored.logp - scored.ref_logp) * batch.mask
        penalty = beta * kl
        for i, row in enumerate(rows):
            penalty[i, len(row["response_ids"]) - 1] += args.missing_eos_penalty * row["truncated"]
        rewards = token_rewards(scored.scores, penalty, batch.mask)
        advantage, returns, raw_mean, raw_std = advantages(rewards, scored.values, batch.mask, args.gae_lam)
        metrics = metrics_of(rows, scored, kl, returns, raw_mean, raw_std, beta)
        if truth:
            metrics["objective/true_reward"] = truth(rows, models.policy, run)
        clock("advantages")

        # 4. update: clipped surrogate (Eq. 3), and the critic's clipped regression on its returns
        update_stats, first_ratio = update(models, scored, advantage, returns, step, run)
        clock("train")

        # 5. log and steer beta
        moves = step >= args.critic_warmup
        if step == 0:
            self_check(rows[0], batch, metrics["objective/kl"], first_ratio, tokenizer, dtype_of(config),
                       apart=reference != sft)
        metrics.update(update_stats, lr=args.lr * moves, episode=(step + 1) * global_batch,
                       **clock.row(global_batch), **{"memory/peak_gb": peak_memory_gb(device)})
        if moves:
            beta = next_kl_coef(beta, metrics["objective/kl"], args.kl_target, args.kl_horizon, global_batch)
        if test and due(step, args.max_steps, args.eval_every):
            metrics.update(held_out(models, truth, test, run))
        log.write(step, metrics)
        warn(log.last_rows)
        show_samples(step, rows, scored, out, run)
        if due(step, args.max_steps, args.critic_every):
            keep_critic(models.critic, critic_folder, step + 1, out, run)
        checkpoints.after(step, args.max_steps, beta=beta)
    save_model(models.policy, tokenizer, out, base=sft if args.lora_r else None)
    checkpoints.finish()


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
