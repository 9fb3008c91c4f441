"""ReMax (Li et al. 2023, arXiv 2310.10505): REINFORCE whose baseline is the reward of the greedy answer.

`diff train_ppo.py train_remax.py` is the method: the critic, GAE, the clipped ratio and the passes over a
rollout batch go; a second, greedy answer to each prompt comes.
    r_t = -beta KL_t, plus the reward model's score at the last token, as in train_ppo.py
    A_t = sum_(s >= t) r_s - b(x),   b(x) = score of the greedy answer to x
    L   = -mean A_t log pi(a_t | s_t)
b(x) does not depend on the sampled answer, so that it takes variance away and, summed over an answer, adds no
bias. Three models: the policy is trained, reference and reward model are not.

Departures:
D1  The reward model's score is standardized to about [-1, 1] (rm.json), as in train_ppo.py: one beta and one
    KL target suit both scripts. A model without rm.json keeps its own scale.
D2  A rollout batch is used once, in optimizer batches as in train_ppo.py. Only the first sees the policy that
    sampled; with --rollout_batch = --micro_batch x --accum_steps there is no other.
D3  beta KL is part of the return, so that a token answers for the KL of those behind it; the authors' code
    takes from each token its own. The baseline has none. The authors also clip score - b(x) to +-5.
D4  The loss is a mean over the tokens of an optimizer batch, as in train_ppo.py and in the authors' code; the
    paper's is a sum over each answer.

    python train_remax.py                                             the toy, on one CPU rank
    deepspeed train_remax.py --model meta-llama/Meta-Llama-3-8B       openbmb/UltraFeedback, ZeRO-3, bf16

reads   prompts of the RL share (20 %), the SFT model (policy and reference), the reward model
writes  runs/<model name>/remax: the policy, tokenizer, args.json, metrics.jsonl, samples.jsonl

Legend: B rows, P prompt slots (left padded), R response slots (right padded), T = P + R, V vocabulary.
"""

import functools
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from checkpoint import Checkpoints
from common import (MetricLog, OneBase, all_sum, batch_normalize, chat_ids, check_finite, check_model,
                    clip_in_step, collate, ds_config, dtype_of, due, epoch_rows, freeze, gather_rows,
                    generate, init_distributed, keyed_rng, load_plug, load_policy, load_reward_model,
                    load_tokenizer, lora_targets, micro_batches, output_folder, parse_args, peak_memory_gb,
                    print0, reward_scale, reward_scores, save_model, seed_everything, set_lr, stage_folder,
                    step_norm, tokenizer_fingerprint, writing)
from data import BadInput, prompt_text, read_data, report_drops, split_of


@dataclass
class Args:
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # policy and reference, default runs/<model name>/sft
    reward_model: str = ""  # any causal one-label sequence classifier, default runs/<model name>/rm
    reward_fn: str = ""  # module:function giving rewards in place of the model, e.g. toy.exact:sampled_reward
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
    temperature: float = 1.0  # of the sampled answer and of every log-prob; the baseline's is greedy
    static_cache: bool = False  # compiled decoding on a GPU; costs a minute or more at the first rollout
    missing_eos_penalty: float = 0.0  # taken off the last token of a truncated answer [reward]
    # algorithm
    kl_coef: float = 0.2  # initial beta, weight of the per-token KL to the reference [reward per nat]
    kl_target: float = 6.0  # where the controller steers objective/kl [nats per response]; 0 keeps beta fixed
    kl_horizon: int = 10000  # how slowly it does [episodes]
    # optimisation
    lr: float = 1e-6  # learning rate, constant
    micro_batch: int = 2  # rows of one forward pass on one rank
    accum_steps: int = 2  # micro batches of one optimizer step
    max_steps: int = 800  # rollout batches
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # keep one tensor a layer and compute the rest again in backward
    # run
    ds_config: str = "ds_configs/zero3.json"  # DeepSpeed JSON: precision, ZeRO stage, offload
    output_dir: str = ""  # default runs/<model name>/remax
    resume: bool = False  # go on from the last complete checkpoint of the output folder, if there is one
    save_every: int = 100  # checkpoints [steps]; 0: only when the run is told to end
    keep: int = 2  # so many of the latest checkpoints stay
    sample_every: int = 20  # two samples with their scores and baselines [steps]
    eval_every: int = 50  # held-out prompts: KL, length, score, true reward [steps]
    eval_prompts: int = 64  # how many of them
    seed: int = 1  # prompt order, sampling
    local_rank: int = -1  # set by the deepspeed launcher


# ---- the algorithm -----------------------------------------------------------------------------------------

def token_rewards(scores, penalty, mask):
    """r_t = -penalty_t, plus the answer's score on its last token.

    scores: [B] units of reward;  penalty: [B, R] beta KL_t and what a missing EOS costs;  mask: [B, R] bool
    """
    last = mask.long().sum(1, keepdim=True) - 1                         # [B, 1]
    return (-penalty * mask).scatter_add(1, last, scores[:, None])


def advantages(rewards, baselines, mask):
    """A_t = r_t + r_{t+1} + ... + r_T - b(x): the return of each token less the greedy answer's score.

    rewards: [B, R];  baselines: [B], both in units of reward;  mask: [B, R] bool
    returns  ([B, R] units of reward, zero where mask is 0,  its mean and standard deviation over all ranks)
    """
    rewards = rewards * mask
    to_go = rewards.flip(1).cumsum(1).flip(1)
    advantage = (to_go - baselines[:, None]) * mask
    _, mean, std = batch_normalize(advantage, mask)  # the log's; nothing is normalized
    return advantage, mean, std


def reinforce_loss(logp, advantage, mask):
    """-A_t log pi(a_t | s_t), summed over response tokens.  logp, advantage: [B, R];  mask: [B, R] bool"""
    return -(advantage * logp * mask).sum()


def next_kl_coef(beta, kl, target, horizon, episodes):
    """Adaptive controller of Ziegler et al. 2019:
    beta *= 1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon."""
    if target <= 0:
        return beta
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


# ---- rollout and scoring -----------------------------------------------------------------------------------
# ids            p0  p1 | y0  y1  y2  EOS pad      P = 2 prompt slots (left padded), R = 5 response slots
# action a_t              0   1   2   3   -        a_t is the token at P + t
# log pi(a_t|s_t)         read at P + t - 1       slice [:, P-1 : T-1]   (state before the action)
# score                   read at the last token   EOS, or the last one that was sampled
# mask                    1   1   1   1   0        EOS is an action and is trained; nothing after it is

def response_logprobs(model, batch, args):
    """log pi(a_t | s_t) and the entropy at each response token, [B, R] float32 each, at the sampler's
    temperature; the logits at P-1 .. T-2 are made about 1,024 tokens at a time, see common.with_logprobs."""
    return model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                 answers=batch.mask, temperature=args.temperature, use_cache=False,
                 chunks=-(-len(batch.ids) * args.response_length // 1024))


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
def score(policy, reference, reward, rows, greedy, tokenizer, args, device):
    """Old and reference log-probs of a rollout batch, in micro batches, its scores and those of the greedy
    answers to the same prompts.

    reward: function rows -> list of one score a row;  rows, greedy: what rollout returns
    returns (batch, old_logp [B, R], ref_logp [B, R], scores [B], baselines [B], entropy [B, R]), float32, no
            gradient
    """
    batch = collate([row["prompt_ids"] for row in rows], [row["response_ids"] for row in rows],
                    tokenizer.pad_token_id, device)
    old, ref, entropy = torch.zeros(3, *batch.mask.shape, device=device)
    for micro, part in micro_batches(batch, range(len(rows)), args.micro_batch):
        R = part.mask.shape[1]
        old[micro, :R], entropy[micro, :R] = response_logprobs(policy, part, args)
        ref[micro, :R], _ = response_logprobs(reference, part, args)
    scores = reward(rows + greedy)
    if len(scores) != len(rows + greedy):
        raise BadInput(f"--reward_fn returned {len(scores)} rewards for {len(rows + greedy)} rows: it must "
                       f"return one for each.")
    scores, baselines = torch.tensor(scores, device=device).split((len(rows), len(greedy)))
    return batch, old, ref, scores, baselines, entropy


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


def update(engine, batch, old_logp, advantage, step, args, device):
    """One pass of policy gradient over a rollout batch, in optimizer batches of micro_batch x accum_steps
    rows a rank. Shapes as in reinforce_loss.

    returns (metrics averaged over the tokens of all updates,
             largest |ratio - 1| of the very first micro batch)
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    totals, tokens, updates, first_ratio, grad_norm = torch.zeros(2), 0, 0, None, 0.0
    engine.train()
    order = keyed_rng(args.seed, step, 0, rank).permutation(len(batch.ids))
    for rows in np.split(order, len(order) // (args.micro_batch * args.accum_steps)):
        n, = all_sum(batch.mask[rows].sum(), device=device)  # response tokens of the optimizer batch
        sums = torch.zeros(2)
        for micro, part in micro_batches(batch, rows, args.micro_batch):
            R = part.mask.shape[1]
            logp, _ = response_logprobs(engine, part, args)
            loss = reinforce_loss(logp, advantage[micro, :R], part.mask)
            # DeepSpeed averages gradients over ranks: a token mean is sum * ranks / tokens of all ranks
            engine.backward(loss * world / n)
            moved = (logp.detach() - old_logp[micro, :R]) * part.mask  # log pi / pi_old
            sums += torch.stack([0.5 * (moved ** 2).sum(), loss.detach()]).cpu()
            if first_ratio is None:
                first_ratio = moved.expm1().abs().max().item()
        sums = torch.tensor(all_sum(*sums.tolist(), device=device))
        check_finite(sums.sum().item(), step, "the loss", [f"{i} of the rollout batch" for i in rows])
        set_lr(engine, args.lr)
        engine.step()
        grad_norm += step_norm(engine)
        totals, tokens, updates = totals + sums, tokens + n, updates + 1
    kl, loss = (totals / tokens).tolist()
    return {"policy/approxkl_avg": kl, "loss/policy_avg": loss, "policy/updates": updates,
            "grad_norm": grad_norm / updates}, first_ratio


# ---- reporting ---------------------------------------------------------------------------------------------

def self_check(row, batch, kl, first_ratio, tokenizer):
    """Printed once, at step 0: what must hold before the first update, on the first row of rank 0."""
    ids = row["prompt_ids"]
    bos = (ids.count(tokenizer.bos_token_id)
           if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id) else "no")
    trained = tokenizer.decode(batch.ids[0, batch.P:][batch.mask[0]])
    print0(f"self-check: max |ratio - 1| {first_ratio:.1e} (0) | KL {kl:.1e} (0) | {bos} BOS (1, or no where "
           f"the tokenizer has none)\n"
           f"self-check: prompt  {tokenizer.decode(ids)!r}\nself-check: trained {trained!r}")


def warn(metrics):
    if metrics["objective/kl"] < -1:
        print0("warning: KL below -1: the samples do not come from the policy that is trained "
               "(temperature, truncation?)")
    if metrics["completions/clipped_ratio"] > 0.5:
        print0("warning: most answers are truncated: raise --response_length")


def show_samples(rows, greedy, scores, baselines, tokenizer, step, out):
    """Two answers and the greedy answers to the same prompts, with their scores."""
    path = out / "samples.jsonl"
    with writing(path), open(path, "w" if step == 0 else "a", encoding="utf-8") as f:
        for row, other, x, b in list(zip(rows, greedy, scores.tolist(), baselines.tolist()))[:2]:
            f.write(json.dumps({"step": step, "prompt": row["prompt"], "response": row["response"],
                                "score": x, "greedy": other["response"], "baseline": b},
                               ensure_ascii=False) + "\n")
            print0(f"  {row['prompt'][-1]['content'][:100]!r}  {row['response'][:100]!r} = {x:+.2f}  "
                   f"greedy: {other['response'][:100]!r} = {b:+.2f}")


def rollout_metrics(rows, greedy, batch, kl, scores, baselines, entropy, raw_mean, raw_std, beta, device):
    """Averages over all ranks. objective/kl is the sum over a response's tokens,
    averaged over responses (as TRL)."""
    mask = batch.mask
    length = mask.sum(1)
    n, tokens, kl_sum, h, cut, ended, x, x2, b, greedy_tokens = all_sum(
        len(rows), mask.sum(), (kl * mask).sum(), (entropy * mask).sum(),
        sum(row["truncated"] for row in rows), sum(not row["truncated"] for row in rows), scores.sum(),
        (scores ** 2).sum(), baselines.sum(), sum(len(row["response_ids"]) for row in greedy), device=device)
    return {"objective/kl": kl_sum / n, "objective/kl_coef": beta, "objective/entropy": h / n,
            "objective/non_score_reward": -beta * kl_sum / n, "objective/scores": x / n,
            "objective/scores_std": max(x2 / n - (x / n) ** 2, 0.0) ** 0.5,
            "objective/rlhf_reward": x / n - beta * kl_sum / n, "objective/baseline": b / n,
            "policy/entropy_avg": h / tokens,
            "completions/mean_length": tokens / n, "completions/greedy_length": greedy_tokens / n,
            "completions/max_length": max(gather_rows([int(length.max())])),
            "completions/clipped_ratio": cut / n, "val/num_eos_tokens": ended,
            "advantages/mean": raw_mean, "advantages/std": raw_std}


@torch.no_grad()
def held_out(engine, reference, reward, truth, test, tokenizer, args, device):
    """KL, length, score and true reward on held-out prompts, sampled with noise
    that is the same every time."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    n = min(args.eval_prompts, len(test)) // world * world
    if n == 0:
        return {}
    rows = rollout(engine, test[:n][rank::world],
                   [row_seed(args.seed, -1000 - p) for p in range(rank, n, world)], tokenizer, args, device)
    batch, old, ref, scores, _, _ = score(engine, reference, reward, rows, [], tokenizer, args, device)
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
    if args.max_steps < 1:
        raise BadInput(f"--max_steps {args.max_steps} must be at least 1.")
    size = args.micro_batch * args.accum_steps
    if min(args.rollout_batch, args.micro_batch, args.accum_steps) < 1 or args.rollout_batch % size:
        raise BadInput(f"--rollout_batch {args.rollout_batch} must be a positive multiple of --micro_batch x "
                       f"--accum_steps = {args.micro_batch} x {args.accum_steps}: change one of the three.")
    print0(f"{Path(__file__).stem}: rollouts/step {args.rollout_batch * world} = {world} ranks x rollout "
           f"batch {args.rollout_batch}, and as many greedy answers; optimizer batch {size * world} = "
           f"{world} ranks x micro batch {args.micro_batch} x {args.accum_steps} accumulation; updates/step "
           f"{args.rollout_batch // size}")


def check_models(args, sft, rm, tokenizer):
    """Whether the models belong together and can read enough, from their small files: none is loaded yet."""
    tokens = args.max_prompt_length + args.response_length
    asked = f"--max_prompt_length {args.max_prompt_length} + --response_length {args.response_length}"
    check_model(sft, tokenizer, "--sft_model", tokens, asked)
    if not args.reward_fn:
        check_model(rm, load_tokenizer(rm, "--reward_model"), "--reward_model", tokens, asked, head=True)
        reward_scale(rm)


def load_models(args, sft, rm, tokenizer, config, device):
    """The policy as an engine, reference and reward model frozen. With --lora_r the policy is an adapter on
    the reference's weights, which are in memory once.

    returns (policy, reference, what model_scores takes or None)
    """
    import deepspeed
    reward_model = None
    if not args.reward_fn:
        model, *of_its_own = load_reward_model(rm, dtype_of(config))  # tokenizer, center, scale
        reward_model = freeze(model, config, device), *of_its_own
    policy = load_policy(sft, tokenizer, dtype_of(config), "--sft_model")
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    if args.lora_r:
        from peft import LoraConfig
        policy = OneBase(policy, lora=LoraConfig(task_type="CAUSAL_LM", r=args.lora_r,
                                                 lora_alpha=args.lora_alpha,
                                                 target_modules=lora_targets(policy)))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=args.lr,
                                  weight_decay=0.0, fused=True)
    clip_in_step(optimizer, config, args.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config)
    if args.lora_r:
        reference = functools.partial(engine, role="reference")
    else:
        reference = freeze(load_policy(sft, tokenizer, dtype_of(config), "--sft_model"), config, device)
    return engine, reference, reward_model


def main(args):
    rank, world, device = init_distributed()
    check_batches(args, world)
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
    out = output_folder(args, "remax")
    train, test = rl_prompts(read_data(args.data, args.allow_dropped, log=print0), tokenizer, args)
    run = Checkpoints(out, args, (train, test), {sft, rm})

    engine, reference, reward_model = load_models(args, sft, rm, tokenizer, config, device)
    if args.reward_fn:
        reward = lambda rows: [float(x) for x in plug(rows, engine, tokenizer)]
    else:
        reward = lambda rows: model_scores(reward_model, rows, tokenizer, args, device)
    start, state = run.resume({"policy": engine})
    log = MetricLog(out, show=["objective/true_reward", "objective/kl", "objective/kl_coef",
                               "objective/scores", "objective/baseline", "completions/mean_length",
                               "timing/step_total"],
                    steps=args.max_steps, start=start)
    beta, global_batch = state.get("beta", args.kl_coef), args.rollout_batch * world
    for step in range(start, args.max_steps):
        clock = [time.time()]
        # 1. roll out: sample y ~ pi(.|x) and take the greedy answer, too; the noise of a row is keyed by its
        #    global place, not by its rank
        picks = epoch_rows(len(train), step * global_batch, global_batch, args.seed)
        mine = range(rank * args.rollout_batch, (rank + 1) * args.rollout_batch)
        prompts = [train[picks[i]] for i in mine]
        seeds = [row_seed(args.seed, step * global_batch + i) for i in mine]
        rows = rollout(engine, prompts, seeds, tokenizer, args, device)
        greedy = rollout(engine, prompts, seeds, tokenizer, replace(args, temperature=0.0), device)
        clock.append(time.time())

        # 2. score: log pi_old, log pi_ref, r(x, y) and b(x), nothing of it with a gradient
        batch, old_logp, ref_logp, scores, baselines, entropy = score(engine, reference, reward, rows, greedy,
                                                                      tokenizer, args, device)
        scored = old_logp.sum(1) + ref_logp.sum(1) + scores + baselines  # [B]
        check_finite(all_sum(scored.sum(), device=device)[0], step, "a log-prob or a score",
                     [repr(row["prompt"][-1]["content"][:80])
                      for row, x in zip(rows, scored) if not x.isfinite()])
        clock.append(time.time())

        # 3. advantages: score, beta KL_t and the missing-EOS penalty as rewards, summed to the end, less b(x)
        kl = (old_logp - ref_logp) * batch.mask
        penalty, greedy_penalty = beta * kl, torch.zeros_like(baselines)
        for i, (row, other) in enumerate(zip(rows, greedy)):
            penalty[i, len(row["response_ids"]) - 1] += args.missing_eos_penalty * row["truncated"]
            greedy_penalty[i] += args.missing_eos_penalty * other["truncated"]
        advantage, raw_mean, raw_std = advantages(token_rewards(scores, penalty, batch.mask),
                                                  baselines - greedy_penalty, batch.mask)
        metrics = rollout_metrics(rows, greedy, batch, kl, scores, baselines, entropy, raw_mean, raw_std,
                                  beta, device)
        if truth:
            total, count = all_sum(sum(truth(rows, engine, tokenizer)), len(rows), device=device)
            metrics["objective/true_reward"] = total / count
        clock.append(time.time())

        # 4. update: one pass of policy gradient
        update_stats, first_ratio = update(engine, batch, old_logp, advantage, step, args, device)
        clock.append(time.time())

        # 5. log and steer beta
        if step == 0:
            self_check(rows[0], batch, metrics["objective/kl"], first_ratio, tokenizer)
        timing = dict(zip(("timing/generation", "timing/score", "timing/advantages", "timing/train"),
                          (b - a for a, b in zip(clock, clock[1:]))))
        metrics.update(update_stats, lr=args.lr, episode=(step + 1) * global_batch, **timing,
                       **{"timing/step_total": clock[-1] - clock[0],
                          "memory/peak_gb": peak_memory_gb(device)})
        metrics["eps"] = global_batch / metrics["timing/step_total"]
        beta = next_kl_coef(beta, metrics["objective/kl"], args.kl_target, args.kl_horizon, global_batch)
        if test and due(step, args.max_steps, args.eval_every):
            metrics.update(held_out(engine, reference, reward, truth, test, tokenizer, args, device))
        log.write(step, metrics)
        warn(metrics)
        if rank == 0 and args.sample_every and step % args.sample_every == 0:
            show_samples(rows, greedy, scores, baselines, tokenizer, step, out)
        run.after(step, args.max_steps, beta=beta)
    save_model(engine, tokenizer, out, base=sft if args.lora_r else None)
    run.finish()
    print0(f"{Path(__file__).stem}: saved to {out}")


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
