"""Proximal Policy Optimization (PPO) with a reward model and a critic: the baseline that DVPO is measured
against.

`diff train_ppo.py train_dvpo.py` is the paper: DVPO drops the reward model, the critic and its training, and
reads the value of a token from one frozen model.
    r_t = -beta KL_t, plus the reward model's score at the last token
    A_t = sum_l lambda^l delta_(t+l),   delta_t = r_t + V(s_(t+1)) - V(s_t)
    Eq. 3   L = -mean min(rho_t N(A_t), clip(rho_t, 1 - eps, 1 + eps) N(A_t)),   N: normalized over the batch
            rho_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    L_V = mean 1/2 max( (V - G_t)^2, (clip(V, V_old - eps_V, V_old + eps_V) - G_t)^2 ),   G_t = A_t + V(s_t)
Four models: policy and critic are trained, reference and reward model are not.

Departures:
D1  The reward model's score is standardized to about [-1, 1] (rm.json), near the scale of train_gvm's
    rewards, so that one beta suits both scripts; what makes runs comparable is a common KL target. A model
    without rm.json keeps its own scale.
D2  The critic starts from the reward model, as in InstructGPT (with --reward_fn from the SFT model;
    --critic_model names another start), and --critic_warmup gives it rollout batches of its own before the
    policy moves.
D4  The paper's "target KL 0.1" is read as the early stop on KL(old, new) per token; the controller has its
    own target.

    python train_ppo.py                                               the toy, on one CPU rank
    deepspeed train_ppo.py --model meta-llama/Meta-Llama-3-8B         openbmb/UltraFeedback, ZeRO-3, bf16

reads   prompts of the RL share (20 %), the SFT model (policy and reference), the reward model
writes  runs/<model name>/ppo: the policy, tokenizer, args.json, metrics.jsonl, samples.jsonl

Legend: B rows, P prompt slots (left padded), R response slots (right padded), T = P + R, V vocabulary.
"""

import functools
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForTokenClassification

from checkpoint import Checkpoints
from common import (MetricLog, OneBase, all_sum, base_of, batch_normalize, chat_ids, check_finite,
                    check_model, clip_in_step, collate, disable_dropout, ds_config, dtype_of, due, epoch_rows,
                    freeze, gather_rows, generate, init_distributed, keyed_rng, load_gvm, load_plug,
                    load_policy, load_reward_model, load_tokenizer, load_value_base, lora_targets,
                    micro_batches, model_place, output_folder, parse_args, peak_memory_gb, pretrained, print0,
                    reward_scale, reward_scores, save_model, seed_everything, set_lr, stage_folder, step_norm,
                    tokenizer_fingerprint, value_head, writing)
from data import BadInput, prompt_text, read_data, report_drops, split_of


@dataclass
class Args:
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # policy and reference, default runs/<model name>/sft
    reward_model: str = ""  # any causal one-label sequence classifier, default runs/<model name>/rm
    reward_fn: str = ""  # module:function giving rewards in place of the model, e.g. toy.exact:sampled_reward
    critic_model: str = ""  # where the critic starts: reward model (default: that one), GVM or SFT model
    truth_fn: str = ""  # module:function giving a true reward that is logged and used by nothing
    lora_r: int = 0  # LoRA rank of policy and critic, merged at the end; 0 trains every weight
    lora_alpha: int = 32  # LoRA scale is alpha / r
    share_base: bool = False  # all four models as LoRA on one copy of the weights; needs --lora_r
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
    gae_lam: float = 0.95  # lambda of GAE
    cliprange: float = 0.2  # epsilon of Eq. 3
    cliprange_value: float = 0.2  # eps_V of the value loss [reward]
    critic_warmup: int = 0  # first steps in which only the critic is trained [rollout batches]
    ppo_epochs: int = 4  # passes over each rollout batch
    kl_coef: float = 0.2  # initial beta, weight of the per-token KL to the reference [reward per nat]
    kl_target: float = 6.0  # where the controller steers objective/kl [nats per response]; 0 keeps beta fixed
    kl_horizon: int = 10000  # how slowly it does [episodes]
    early_stop_kl: float = 0.1  # ends a step's updates when KL(old, new) passes it [nats per token]; 0: never
    # optimisation
    lr: float = 2e-6  # learning rate of the policy, constant
    critic_lr: float = 2e-6  # learning rate of the critic, constant
    micro_batch: int = 2  # rows of one forward pass on one rank
    accum_steps: int = 2  # micro batches of one optimizer step
    max_steps: int = 800  # rollout batches
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # keep one tensor a layer and compute the rest again in backward
    # run
    ds_config: str = "ds_configs/zero3.json"  # DeepSpeed JSON: precision, ZeRO stage, offload
    output_dir: str = ""  # default runs/<model name>/ppo
    resume: bool = False  # go on from the last complete checkpoint of the output folder, if there is one
    save_every: int = 100  # checkpoints [steps]; 0: only when the run is told to end
    keep: int = 2  # so many of the latest checkpoints stay
    sample_every: int = 20  # two samples with the critic's token values [steps]
    eval_every: int = 50  # held-out prompts: KL, length, score, true reward [steps]
    eval_prompts: int = 64  # how many of them
    seed: int = 1  # prompt order, sampling, a new critic head
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
# ids            p0  p1 | y0  y1  y2  EOS pad      P = 2 prompt slots (left padded), R = 5 response slots
# action a_t              0   1   2   3   -        a_t is the token at P + t
# log pi(a_t|s_t), V(s_t) read at P + t - 1        slice [:, P-1 : T-1]   (state before the action)
# score                   read at the last token   EOS, or the last one that was sampled
# mask                    1   1   1   1   0        EOS is an action and is trained; nothing after it is

def response_logprobs(model, batch, args):
    """log pi(a_t | s_t) and the entropy at each response token, [B, R] float32 each, at the sampler's
    temperature; the logits at P-1 .. T-2 are made about 1,024 tokens at a time, see common.with_logprobs."""
    return model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                 answers=batch.mask, temperature=args.temperature, use_cache=False,
                 chunks=-(-len(batch.ids) * args.response_length // 1024))


def response_values(critic, batch):
    """V(s_t) before each response token, [B, R] float32."""
    logits = critic(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                    use_cache=False).logits
    return logits[:, batch.P - 1:-1, 0].float()


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


@torch.no_grad()
def score(policy, reference, critic, reward, rows, tokenizer, args, device):
    """Old and reference log-probs, values and scores of a rollout batch, in micro batches.

    reward: function rows -> list of one score a row
    returns (batch, old_logp [B, R], ref_logp [B, R], values [B, R], scores [B], entropy [B, R]), float32, no
            gradient
    """
    batch = collate([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                    tokenizer.pad_token_id, device)
    old, ref, entropy, values = torch.zeros(4, *batch.mask.shape, device=device)
    for micro, part in micro_batches(batch, range(len(rows)), args.micro_batch):
        R = part.mask.shape[1]
        old[micro, :R], entropy[micro, :R] = response_logprobs(policy, part, args)
        ref[micro, :R], _ = response_logprobs(reference, part, args)
        values[micro, :R] = response_values(critic, part)
    scores = reward(rows)
    if len(scores) != len(rows):
        raise BadInput(f"--reward_fn returned {len(scores)} rewards for {len(rows)} rows: it must return one "
                       f"for each.")
    return batch, old, ref, values, torch.tensor(scores, device=device), entropy


def model_scores(reward_model, rows, tokenizer, args, device):
    """Standardized score of each row's answer, (score - center) / scale, a list of floats.

    reward_model: what load_reward_model returns. One with the policy's vocabulary and EOS reads the sampled
    ids. Another one reads the text in its own tokens, with an EOS where the answer ended.
    """
    model, rm_tokenizer, center, scale = reward_model
    if (tokenizer_fingerprint(rm_tokenizer) == tokenizer_fingerprint(tokenizer)
            and rm_tokenizer.eos_token_id == tokenizer.eos_token_id):
        answers = [row["response_ids"] for row in rows]
    else:
        answers = [rm_tokenizer(row["response"], add_special_tokens=False).input_ids
                   + [rm_tokenizer.eos_token_id] * (not row["truncated"]) for row in rows]
    scores = reward_scores(model, rm_tokenizer, [(row["prompt"], ids) for row, ids in zip(rows, answers)],
                           device, args.micro_batch)
    return [(x - center) / scale for x in scores]


def load_critic(folder, dtype):
    """V(s) on every token, from a reward model, a GVM or an SFT model (which gets a new head); adapters are
    merged, the head of a reward model is put on the scale of the standardized scores."""
    if (Path(folder) / "gvm.json").exists():
        return load_gvm(folder, dtype, "--critic_model")[0].merge_and_unload().requires_grad_(True)
    if (not (Path(folder) / "adapter_config.json").exists() and "SequenceClassification" not in
            str(pretrained(AutoConfig, folder, "--critic_model").architectures)):
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


def update(engine, critic, batch, old_logp, advantage, old_values, returns, step, args, device):
    """args.ppo_epochs passes of clipped policy gradient and of value regression over a rollout batch, in
    optimizer batches of micro_batch x accum_steps rows a rank. Shapes as in policy_loss and value_loss.

    critic: an engine of its own; with --share_base a role of `engine`, whose one step moves both, so that
            clipping sees the gradients of both
    returns (metrics averaged over the tokens of all updates,
             largest |ratio - 1| of the very first micro batch)
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    totals, tokens, updates, first_ratio, stopped = torch.zeros(7), 0, 0, None, False
    warming, grad_norm, critic_grad_norm = step < args.critic_warmup, 0.0, 0.0
    learner = engine if args.share_base else critic  # whose optimizer has the critic's weights
    engine.train()
    learner.train()
    for epoch in range(args.ppo_epochs):
        order = keyed_rng(args.seed, step, epoch, rank).permutation(len(batch.ids))
        for rows in np.split(order, len(order) // (args.micro_batch * args.accum_steps)):
            n, = all_sum(batch.mask[rows].sum(), device=device)  # response tokens of the optimizer batch
            sums = torch.zeros(7)
            for micro, part in micro_batches(batch, rows, args.micro_batch):
                R = part.mask.shape[1]
                with torch.set_grad_enabled(not warming):  # during the warm-up only the critic learns
                    logp, _ = response_logprobs(engine, part, args)
                loss, stats = policy_loss(logp, old_logp[micro, :R], advantage[micro, :R], part.mask,
                                          args.cliprange)
                # DeepSpeed averages gradients over ranks: a token mean is sum * ranks / tokens of all ranks
                if not warming:
                    engine.backward(loss * world / n)
                v_loss, v_clipped = value_loss(response_values(critic, part), old_values[micro, :R],
                                               returns[micro, :R], part.mask, args.cliprange_value)
                learner.backward(v_loss * world / n)
                sums += torch.cat([stats, torch.stack([loss, v_loss, v_clipped]).detach()]).cpu()
                if first_ratio is None:
                    moved = (logp.detach() - old_logp[micro, :R]) * part.mask
                    first_ratio = moved.expm1().abs().max().item()
            sums = torch.tensor(all_sum(*sums.tolist(), device=device))
            check_finite(sums.sum().item(), step, "the loss", [f"{i} of the rollout batch" for i in rows])
            if args.share_base:
                set_lr(engine, 0.0 if warming else args.lr, args.critic_lr)
            else:
                set_lr(engine, args.lr)
                set_lr(critic, args.critic_lr)
            for one in [engine] if args.share_base else [critic] if warming else [engine, critic]:
                one.step()
            grad_norm += step_norm(engine)  # none before its first step
            critic_grad_norm += step_norm(learner)
            totals, tokens, updates = totals + sums, tokens + n, updates + 1
            # The statistic is the same number on all ranks, so all of them leave
            # together and none is waited for
            stopped = 0 < args.early_stop_kl < sums[0] / n
            if stopped:
                break
        if stopped:
            break
    kl, clipped, ratio, ratio_square, loss, v_loss, v_clipped = (totals / tokens).tolist()
    return {"policy/approxkl_avg": kl, "policy/clipfrac_avg": clipped, "val/ratio": ratio,
            "val/ratio_var": ratio_square - ratio ** 2, "loss/policy_avg": loss, "loss/value_avg": v_loss,
            "val/clipfrac_avg": v_clipped, "policy/updates": 0 if warming else updates,
            "policy/early_stopped": float(stopped), "grad_norm": grad_norm / updates,
            "critic/grad_norm": critic_grad_norm / updates}, first_ratio


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


def show_samples(rows, values, scores, tokenizer, step, out):
    """Two answers with their score and the critic's value before every token."""
    path = out / "samples.jsonl"
    with writing(path), open(path, "w" if step == 0 else "a", encoding="utf-8") as f:
        for row, v, x in list(zip(rows, values.tolist(), scores.tolist()))[:2]:
            tokens = [tokenizer.decode([i]) for i in row["response_ids"]]
            f.write(json.dumps({"step": step, "prompt": row["prompt"], "response": row["response"],
                                "tokens": tokens, "values": v[:len(tokens)], "score": x},
                               ensure_ascii=False) + "\n")
            print0(f"  {row['prompt'][-1]['content'][:100]!r}  " +
                   " ".join(f"[{q:+.2f}]{t.strip()}" for t, q in list(zip(tokens, v))[:40]) + f" = {x:+.2f}")


def rollout_metrics(rows, batch, kl, values, returns, scores, entropy, raw_mean, raw_std, beta, device):
    """Averages over all ranks. objective/kl is the sum over a response's tokens,
    averaged over responses (as TRL)."""
    mask = batch.mask
    length = mask.sum(1)
    n, tokens, kl_sum, h, cut, v, ended, x, x2, g, g2, error, error2 = all_sum(
        len(rows), mask.sum(), (kl * mask).sum(), (entropy * mask).sum(),
        sum(row["truncated"] for row in rows), (values * mask).sum(),
        sum(not row["truncated"] for row in rows), scores.sum(), (scores ** 2).sum(), returns.sum(),
        (returns ** 2).sum(), ((returns - values) * mask).sum(), (((returns - values) * mask) ** 2).sum(),
        device=device)
    variance = max(g2 / tokens - (g / tokens) ** 2, 1e-8)
    return {"objective/kl": kl_sum / n, "objective/kl_coef": beta, "objective/entropy": h / n,
            "objective/non_score_reward": -beta * kl_sum / n, "objective/scores": x / n,
            "objective/scores_std": max(x2 / n - (x / n) ** 2, 0.0) ** 0.5,
            "objective/rlhf_reward": x / n - beta * kl_sum / n, "policy/entropy_avg": h / tokens,
            "completions/mean_length": tokens / n,
            "completions/max_length": max(gather_rows([int(length.max())])),
            "completions/clipped_ratio": cut / n, "val/num_eos_tokens": ended, "critic/mean": v / tokens,
            "critic/explained_variance": 1 - (error2 / tokens - (error / tokens) ** 2) / variance,
            "advantages/mean": raw_mean, "advantages/std": raw_std}


@torch.no_grad()
def held_out(engine, reference, critic, reward, truth, test, tokenizer, args, device):
    """KL, length, score and true reward on held-out prompts, sampled with noise
    that is the same every time."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    n = min(args.eval_prompts, len(test)) // world * world
    if n == 0:
        return {}
    rows = rollout(engine, test[:n][rank::world],
                   [row_seed(args.seed, -1000 - p) for p in range(rank, n, world)], tokenizer, args, device)
    batch, old, ref, _, scores, _ = score(engine, reference, critic, reward, rows, tokenizer, args, device)
    length = batch.mask.sum(1)
    kl, tokens, score_sum = all_sum(((old - ref) * batch.mask).sum(), length.sum(), scores.sum(),
                                    device=device)
    result = {"eval/kl": kl / n, "eval/mean_length": tokens / n, "eval/scores": score_sum / n}
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


def check_models(args, sft, rm, tokenizer):
    """Whether the models belong together and can read enough, from their small files: none is loaded yet."""
    tokens = args.max_prompt_length + args.response_length
    asked = f"--max_prompt_length {args.max_prompt_length} + --response_length {args.response_length}"
    check_model(sft, tokenizer, "--sft_model", tokens, asked)
    if not args.reward_fn:
        check_model(rm, load_tokenizer(rm, "--reward_model"), "--reward_model", tokens, asked, head=True)
        reward_scale(rm)
    critic, its_flag = args.critic_model or rm, "--critic_model" if args.critic_model else "--reward_model"
    its_tokenizer = load_tokenizer(critic, its_flag)
    check_model(critic, its_tokenizer, its_flag, tokens, asked, head=True)
    if tokenizer_fingerprint(its_tokenizer) != tokenizer_fingerprint(tokenizer):
        raise BadInput(f"--critic_model {critic}: another vocabulary than the policy's; name a model of the "
                       f"policy's family, for example the SFT model.")
    if args.share_base and (not args.lora_r or args.reward_fn or args.critic_model):
        raise BadInput("--share_base takes policy, critic and reward model as LoRA on the SFT model: give "
                       "--lora_r, a LoRA --reward_model and neither --reward_fn nor --critic_model.")
    if args.share_base and (rm == base_of(rm) or model_place(base_of(rm)) != model_place(sft)):
        raise BadInput(f"--share_base: the reward model {rm} is not LoRA on the SFT model {sft}; train "
                       f"one with train_rm.py, or leave --share_base out.")


def engine_of(model, groups, lr, args, config):
    """A DeepSpeed engine with AdamW over groups of the model's parameters."""
    import deepspeed
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=lr, weight_decay=0.0,
                                  fused=True)
    clip_in_step(optimizer, config, args.max_grad_norm)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def separate_models(args, sft, rm, tokenizer, config, device):
    """Policy and critic as engines, reference and reward model frozen, as in the paper. With --lora_r policy
    and critic are adapters, and the policy's is on the reference's weights, which are in memory once.

    returns (policy, critic, reference, what model_scores takes or None, {name: engine})
    """
    reward_model = None
    if not args.reward_fn:
        model, *of_its_own = load_reward_model(rm, dtype_of(config))  # tokenizer, center, scale
        reward_model = freeze(model, config, device), *of_its_own
    critic = load_critic(args.critic_model or rm, dtype_of(config))
    policy = load_policy(sft, tokenizer, dtype_of(config), "--sft_model")
    if args.gradient_checkpointing:
        for model in (policy, critic):
            model.activation_checkpointing_enable({"use_reentrant": False})
    if args.lora_r:
        from peft import get_peft_model
        policy = OneBase(policy, lora=adapter(policy, "CAUSAL_LM", args))
        head = "score" if hasattr(critic, "score") else "classifier"
        critic = get_peft_model(critic, adapter(critic, "TOKEN_CLS", args, modules_to_save=[head]),
                                autocast_adapter_dtype=False)
    engine, critic = (engine_of(model, [[p for p in model.parameters() if p.requires_grad]], lr, args, config)
                      for model, lr in ((policy, args.lr), (critic, args.critic_lr)))
    if args.lora_r:
        reference = functools.partial(engine, role="reference")
    else:
        reference = freeze(load_policy(sft, tokenizer, dtype_of(config), "--sft_model"), config, device)
    return engine, critic, reference, reward_model, {"policy": engine, "critic": critic}


def shared_models(args, sft, rm, tokenizer, config, device):
    """All four as adapters and heads on one copy of the SFT weights, under one engine and one optimizer.
    Returns what separate_models does."""
    policy = load_policy(sft, tokenizer, dtype_of(config), "--sft_model")
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    policy = OneBase(policy, lora=adapter(policy, "CAUSAL_LM", args), reward=(rm, *reward_scale(rm)))
    engine = engine_of(policy, [policy.trained["policy"], policy.trained["critic"]], args.lr, args, config)
    critic, reference, reward = (functools.partial(engine, role=role) for role in ("critic", "reference",
                                                                                   "reward"))
    reward_model = reward, load_tokenizer(rm, "--reward_model"), 0.0, 1.0  # standardized already
    return engine, critic, reference, reward_model, {"policy": engine}


def adapter(model, task, args, **more):
    from peft import LoraConfig
    return LoraConfig(task_type=task, r=args.lora_r, lora_alpha=args.lora_alpha,
                      target_modules=lora_targets(model), **more)


def main(args):
    rank, world, device = init_distributed()
    check_batches(args, world)
    if args.critic_warmup >= args.max_steps:
        print0(f"warning: --critic_warmup {args.critic_warmup} is all of --max_steps: no policy is trained")
    seed_everything(args.seed)
    sft = stage_folder(args.model, "sft", args.sft_model, "--sft_model", f"sft.py --model {args.model}")
    truth = load_plug(args.truth_fn, "--truth_fn") if args.truth_fn else None
    config = ds_config(args.ds_config, args.micro_batch, args.max_grad_norm)
    tokenizer = load_tokenizer(sft, "--sft_model")
    if args.reward_fn and args.reward_model:
        raise BadInput("--reward_fn and --reward_model both give the reward: leave one out.")
    if args.reward_fn:
        rm, plug = sft, load_plug(args.reward_fn, "--reward_fn")
    else:
        rm = stage_folder(args.model, "rm", args.reward_model, "--reward_model",
                          f"train_rm.py --model {args.model}")
    check_models(args, sft, rm, tokenizer)
    out = output_folder(args, "ppo")
    train, test = rl_prompts(read_data(args.data, args.allow_dropped, log=print0), tokenizer, args)
    run = Checkpoints(out, args, (train, test), {sft, rm, args.critic_model or rm})

    build = shared_models if args.share_base else separate_models
    engine, critic, reference, reward_model, engines = build(args, sft, rm, tokenizer, config, device)
    if args.reward_fn:
        reward = lambda rows: [float(x) for x in plug(rows, engine, tokenizer)]
    else:
        reward = lambda rows: model_scores(reward_model, rows, tokenizer, args, device)
    start, state = run.resume(engines)
    log = MetricLog(out, show=["objective/true_reward", "objective/kl", "objective/kl_coef",
                               "objective/scores", "completions/mean_length", "policy/clipfrac_avg",
                               "timing/step_total"],
                    steps=args.max_steps, start=start)
    beta, global_batch = state.get("beta", args.kl_coef), args.rollout_batch * world
    for step in range(start, args.max_steps):
        clock = [time.time()]
        # 1. roll out: sample y ~ pi(.|x); the noise of a row is keyed by its global place, not by its rank
        picks = epoch_rows(len(train), step * global_batch, global_batch, args.seed)
        mine = range(rank * args.rollout_batch, (rank + 1) * args.rollout_batch)
        rows = rollout(engine, [train[picks[i]] for i in mine],
                       [row_seed(args.seed, step * global_batch + i) for i in mine], tokenizer, args, device)
        clock.append(time.time())

        # 2. score: log pi_old, log pi_ref, V(s) and r(x, y), nothing of it with a gradient
        batch, old_logp, ref_logp, values, scores, entropy = score(engine, reference, critic, reward, rows,
                                                                   tokenizer, args, device)
        scored = old_logp.sum(1) + ref_logp.sum(1) + values.sum(1) + scores  # [B]
        check_finite(all_sum(scored.sum(), device=device)[0], step, "a log-prob, a value or a score",
                     [repr(row["prompt"][-1]["content"][:80])
                      for row, x in zip(rows, scored) if not x.isfinite()])
        clock.append(time.time())

        # 3. advantages: score, beta KL_t and the missing-EOS penalty as rewards, GAE on the critic's values
        kl = (old_logp - ref_logp) * batch.mask
        penalty = beta * kl
        for i, row in enumerate(rows):
            penalty[i, len(row["response_ids"]) - 1] += args.missing_eos_penalty * row["truncated"]
        advantage, returns, raw_mean, raw_std = advantages(token_rewards(scores, penalty, batch.mask), values,
                                                           batch.mask, args.gae_lam)
        metrics = rollout_metrics(rows, batch, kl, values, returns, scores, entropy, raw_mean, raw_std, beta,
                                  device)
        if truth:
            total, count = all_sum(sum(truth(rows, engine, tokenizer)), len(rows), device=device)
            metrics["objective/true_reward"] = total / count
        clock.append(time.time())

        # 4. update: clipped surrogate (Eq. 3), and the critic's clipped regression on its returns
        update_stats, first_ratio = update(engine, critic, batch, old_logp, advantage, values, returns, step,
                                           args, device)
        clock.append(time.time())

        # 5. log and steer beta
        if step == 0:
            self_check(rows[0], batch, values, metrics["objective/kl"], first_ratio, tokenizer, args)
        timing = dict(zip(("timing/generation", "timing/score", "timing/advantages", "timing/train"),
                          (b - a for a, b in zip(clock, clock[1:]))))
        metrics.update(update_stats, lr=args.lr * (step >= args.critic_warmup),
                       episode=(step + 1) * global_batch, **timing,
                       **{"timing/step_total": clock[-1] - clock[0],
                          "memory/peak_gb": peak_memory_gb(device)})
        metrics["eps"] = global_batch / metrics["timing/step_total"]
        if step >= args.critic_warmup:
            beta = next_kl_coef(beta, metrics["objective/kl"], args.kl_target, args.kl_horizon, global_batch)
        if test and due(step, args.max_steps, args.eval_every):
            metrics.update(held_out(engine, reference, critic, reward, truth, test, tokenizer, args, device))
        log.write(step, metrics)
        warn(metrics)
        if rank == 0 and args.sample_every and step % args.sample_every == 0:
            show_samples(rows, values, scores, tokenizer, step, out)
        run.after(step, args.max_steps, beta=beta)
    save_model(engine, tokenizer, out, base=sft if args.lora_r else None)
    run.finish()
    print0(f"{Path(__file__).stem}: saved to {out}")


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
