"""The global value model (GVM): one frozen-to-be value Q(tau, s, a) for many policies,
trained once on offline data.

It is told which policy it is valuing by tau: K question-answer pairs that this policy wrote for other
prompts, put in front of the prompt as earlier turns of the same chat. The target comes from the data's own
reward; no policy is sampled, no reward model is asked.
    TD loss (Eq. 1, lambda = 0):  ( r_t + gamma sg[Q(tau, s_{t+1}, a_{t+1})] - Q(tau, s_t, a_t) )^2,
                                  r_t = 0 before the end
    TD(lambda):                   G_t = r_t + gamma ((1 - lambda) sg[Q_{t+1}] + lambda G_{t+1})
                                  in place of the bootstrap

Departures:
D1  lambda defaults to 0.95, as in the authors' code; Eq. 1 is --lam 0, which learns far more slowly
    (README, results).
D2  The last prompt token is trained too: V(s_1), which GAE needs and Q does not give.
D3  The authors' code has no tau (that is --k 0) and reads a state value before the action.
D4  Eq. 2's normalization is a read-out of the advantage (train_dvpo.py), not part of this loss.

    python train_gvm.py                                              the toy, on one CPU rank
    deepspeed train_gvm.py --model meta-llama/Meta-Llama-3-8B        openbmb/UltraFeedback, ZeRO-3, bf16

reads   the value share (50 % of the prompts) of scored responses or pairs, and the SFT model
writes  runs/<model name>/gvm: LoRA adapter + head, tokenizer, gvm.json (K, tau's format and budget, gamma,
        lambda, reward map), args.json, metrics.jsonl

Legend: B rows, P prompt slots (left padded, tau included), R response slots (right padded), T = P + R.
"""

import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from checkpoint import Checkpoints
from common import (MetricLog, all_sum, chat_ids, check_finite, check_model, clip_in_step, collate, cut_pair,
                    ds_config, dtype_of, due, epoch_rows, gather_rows, init_distributed, keyed_rng,
                    load_reward_model, load_tokenizer, load_value_base, lora_targets, model_place,
                    output_folder, parse_args, peak_memory_gb, print0, responses_that_fit, reward_scores,
                    save_model, seed_everything, set_lr, split_batch, stage_folder, step_norm, td_loss,
                    tokenizer_fingerprint)
from data import BadInput, has_policy_names, preference_pair, prompt_text, read_data, report_drops, split_of


@dataclass
class Args:
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # what the GVM grows from, default runs/<model name>/sft
    lora_r: int = 8  # LoRA rank
    lora_alpha: int = 32  # LoRA scale is alpha / r
    lora_dropout: float = 0.1  # dropout on the LoRA input while training
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # go on when more than 10 % of the responses had to be dropped
    max_length: int = 1024  # prompt + response, tau not counted; longer rows are dropped and counted [tokens]
    reward: Literal["preference", "score", "model"] = "preference"  # +1 / -1 of a pair, score, --reward_model
    reward_model: str = ""  # one-label sequence classifier whose scores, standardized, are the reward
    score_min: float = 1.0  # score that becomes reward -1 [score units]
    score_max: float = 10.0  # score that becomes reward +1 [score units]
    # policy conditioning
    k: int = 4  # question-answer pairs in tau; 0: the GVM is not told the policy
    tau_warmup: float = 0.6  # share of the steps in which tau is first empty, then grows to k pairs
    tau_question_tokens: int = 128  # each question of tau is cut to this [tokens]
    tau_answer_tokens: int = 256  # each answer of tau is cut to this [tokens]
    # algorithm
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of TD(lambda); 0 is Eq. 1, 1 the Monte-Carlo return
    # optimisation
    lr: float = 2e-6  # peak learning rate, linear decay to 0
    epochs: int = 1  # passes over the data
    max_steps: int = -1  # stop after this many, whatever epochs says; below 1: no limit [optimizer steps]
    batch_size: int = 32  # rows of one optimizer step, over all ranks
    micro_batch: int = 2  # rows of one forward pass on one rank
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # keep one tensor a layer and compute the rest again in backward
    # run
    ds_config: str = "ds_configs/zero3.json"  # DeepSpeed JSON: precision, ZeRO stage, offload
    output_dir: str = ""  # default runs/<model name>/gvm
    resume: bool = False  # go on from the last complete checkpoint of the output folder, if there is one
    save_every: int = 100  # checkpoints [steps]; 0: only when the run is told to end
    keep: int = 2  # so many of the latest checkpoints stay
    eval_every: int = 200  # ranking accuracy on held-out pairs [optimizer steps]
    eval_pairs: int = 200  # held-out pairs it is measured on
    seed: int = 1  # initial weights, dropout, data order and the draws of tau
    local_rank: int = -1  # set by the deepspeed launcher


# ---- the algorithm -----------------------------------------------------------------------------------------

def read_values(logits, P):
    """Values of the last prompt token and of every response token.

    # ids            tau.. p0  p1 | y0  y1  y2  EOS pad    P prompt slots (left padded, tau in front), R = 5
    # action a_t                   0   1   2   3   -       a_t is the token at P + t
    # V(s_1)         read at P - 1                         before anything is said
    # Q(tau, s_t, a_t)             read at P + t           slice [:, P : T], after the action was consumed
    # mask                         1   1   1   1   0       EOS is an action and is valued; nothing after it is
    logits: [B, T, 1];  returns [B, 1 + R] float32: slot 0 is V(s_1), slot 1 + t is Q(tau, s_t, a_t)
    """
    return logits[:, P - 1:, 0].float()


def learning_rate(step, steps, args):
    """Linear decay from --lr to 0 after the last of `steps` optimizer steps."""
    return args.lr * (1 - step / steps)


def tau_pairs(step, steps, args):
    """Pairs of tau at this step: none in the first half of the warm-up, growing to k
    in the second half, then k."""
    progress = (step + 1) / (args.tau_warmup * steps + 1e-9)
    return min(args.k, max(0, int(2 * args.k * (progress - 0.5))))


def rows_of_step(n, step, args):
    """Which of the n trajectories an optimizer batch holds, from an endless stream of shuffled epochs.

    With --reward preference they are pairs, rows 2 i and 2 i + 1, and the two share a batch: where both
    answers are equally good, +1 and -1 then cancel instead of being noise. Dealt apart, the toy's GVM learned
    nothing in 700 steps; together, it did in 100.
    """
    unit = 2 if args.reward == "preference" else 1
    units = epoch_rows(n // unit, step * args.batch_size // unit, args.batch_size // unit, args.seed)
    return [unit * i + j for i in units for j in range(unit)]


def ranking_accuracy(good, bad):
    """Share of pairs in which the good response has the higher number, ties counted half."""
    good, bad = np.asarray(good), np.asarray(bad)
    return float(((good > bad) + 0.5 * (good == bad)).mean())


# ---- data --------------------------------------------------------------------------------------------------

def trajectories(records, tokenizer, args):
    """Scored responses as trajectories, and the held-out preference pairs.

    returns (train, pairs): train is a list of dicts (prompt, group, policy, text, reward, prompt_ids,
    response_ids); pairs is a list of (good, bad), two such dicts each, of held-out prompts.
    """
    train, pairs, dropped, kept = [], [], Counter(), 0
    for record in records:
        share = split_of(prompt_text(record["prompt"]), args.split_seed)
        if share not in ("value", "test"):
            continue
        prompt_ids, fitting = responses_that_fit(record, tokenizer, args.max_length)
        dropped[f"prompt + response over --max_length {args.max_length}"] += (len(record["responses"])
                                                                              - len(fitting))
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
    if kept or dropped:
        report_drops(+dropped, kept + sum(dropped.values()), args.data, args.allow_dropped, log=print0)
    if not train:
        raise BadInput(f"--data {args.data}: no trajectory is left to train on; its prompts are too few for "
                       f"the value share.")
    return train, pairs


def score_reward(response, record, args):
    """The data's score mapped linearly from [score_min, score_max] to [-1, 1]."""
    if response["score"] is None:
        raise BadInput(f"{record['where']}: no score, but --reward score needs one; use --reward preference.")
    if not args.score_min <= response["score"] <= args.score_max:
        raise BadInput(f"{record['where']}: score {response['score']:g} lies outside --score_min "
                       f"{args.score_min:g} and --score_max {args.score_max:g}, which become -1 and +1: "
                       f"set them to the data's range.")
    return (2 * response["score"] - args.score_min - args.score_max) / (args.score_max - args.score_min)


def model_rewards(train, args, dtype, device):
    """Fill in rewards from a reward model: (score - mean) / (2 standard deviations), about [-1, 1].
    Returns the map."""
    chats = [(row["prompt"], row["text"]) for row in train]
    model, tokenizer, _, _ = load_reward_model(args.reward_model, dtype)
    scores = np.array(reward_scores(model.to(device), tokenizer, chats, device, args.micro_batch))
    center, scale = float(scores.mean()), float(2 * scores.std() + 1e-8)
    for row, score in zip(train, scores):
        row["reward"] = float((score - center) / scale)
    return {"kind": "model", "reward_model": args.reward_model, "center": center, "scale": scale}


class TauSource:
    """Draws tau: answers of one policy to prompts of other groups, texts cut to their budget."""

    def __init__(self, rows, tokenizer, context, settings):
        self.tokenizer, self.context, self.settings = tokenizer, context, settings
        self.by_policy = defaultdict(list)
        for row in rows:
            self.by_policy[row["policy"]].append(row)
        self.shortened = 0  # rows whose tau lost pairs because tau + prompt + response exceeded the context

    def draw(self, policy, group, rng, k):
        """k (question, answer) text pairs of `policy`, none of them about `group`;
        fewer where it wrote fewer."""
        if k == 0:
            return []
        rows, pairs = self.by_policy[policy], []
        for i in rng.permutation(len(rows)):
            if rows[i]["group"] != group:
                if "cut" not in rows[i]:
                    rows[i]["cut"] = cut_pair(self.tokenizer, rows[i]["prompt"], rows[i]["text"],
                                              self.settings)
                pairs.append(rows[i]["cut"])
            if len(pairs) == k:
                break
        return pairs

    def prompts(self, rows, tau):
        """Token ids of tau + prompt for rows that share one tau. Where tau + prompt + response exceed the
        context of any of them, whole pairs of tau are left out for all, the first one first."""
        for first in range(len(tau) + 1):
            prompts = [chat_ids(self.tokenizer, row["prompt"], tau[first:]) for row in rows]
            longest = max(len(prompt) + len(row["response_ids"]) for prompt, row in zip(prompts, rows))
            if longest <= self.context or first == len(tau):
                self.shortened += first > 0
                return prompts


# ---- evaluation --------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_ranking(engine, pairs, tau_source, tokenizer, args, rank, world, device):
    """Ranking accuracy on held-out pairs by the mean token value, BOTH answers of a pair under ONE tau.

    The chosen one's and the rejected one's policy lend tau in turn. With each answer under its own tau the
    model could rank by recognizing the policy, which is worth nothing in RL, where all rows share one policy.
    """
    engine.eval()
    jobs = []
    for i, (good, bad) in enumerate(pairs):
        for lender in (good, bad) if args.k else (good,):
            tau = tau_source.draw(lender["policy"], good["group"], keyed_rng(args.split_seed, i), args.k)
            prompts = tau_source.prompts((good, bad), tau)
            jobs.append([(prompt, row["response_ids"]) for prompt, row in zip(prompts, (good, bad))])
    # Every rank runs the same number of batches: ZeRO-3 would hang otherwise
    jobs = jobs[:len(jobs) // world * world]
    means = []
    for i in range(rank, len(jobs), world * args.micro_batch):
        prompts, responses = zip(*[row for job in jobs[i:i + world * args.micro_batch:world] for row in job])
        q, batch = values(engine, prompts, responses, tokenizer, device)
        means += ((q[:, 1:] * batch.mask).sum(1) / batch.mask.sum(1)).tolist()
    engine.train()
    means = gather_rows(list(zip(means[::2], means[1::2])))
    if not means:
        return {}
    good, bad = zip(*means)
    return {"eval/accuracy": ranking_accuracy(good, bad), "eval/margin": float(np.mean(good) - np.mean(bad))}


def values(model, prompts, responses, tokenizer, device):
    """[B, 1 + R] values of lists of prompt ids (tau included) and response ids, and the collated batch."""
    batch = collate(prompts, responses, tokenizer.pad_token_id, device)
    logits = model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                   use_cache=False).logits
    return read_values(logits, batch.P), batch


def main(args):
    import deepspeed  # here, so that --help and a mistyped flag answer at once
    from peft import LoraConfig, get_peft_model
    rank, world, device = init_distributed()
    accum = split_batch(args.batch_size, args.micro_batch, world)
    if args.reward == "preference" and args.batch_size % 2:
        raise BadInput(f"--batch_size {args.batch_size} must be even with --reward preference: the two "
                       f"answers of a pair share a batch.")
    if (args.reward == "model") != bool(args.reward_model):
        raise BadInput("--reward model and --reward_model FOLDER belong together: give both or neither.")
    if args.lora_r < 1 or args.gamma <= 0 or args.score_min >= args.score_max:
        raise BadInput(f"--lora_r {args.lora_r} must be at least 1, --gamma {args.gamma:g} above 0 and "
                       f"--score_min {args.score_min:g} below --score_max {args.score_max:g}.")
    seed_everything(args.seed)
    sft = stage_folder(args.model, "sft", args.sft_model, "--sft_model", f"sft.py --model {args.model}")
    out = output_folder(args, "gvm")
    config = ds_config(args.ds_config, args.micro_batch, args.max_grad_norm)
    tokenizer = load_tokenizer(sft, "--sft_model")
    context = check_model(sft, tokenizer, "--sft_model", args.max_length, f"--max_length {args.max_length}")
    records = read_data(args.data, args.allow_dropped, log=print0)
    if args.k > 0 and not has_policy_names(records):
        raise BadInput(f"--data {args.data}: its responses carry no policy name (`model`), so tau cannot be "
                       f"drawn: use --k 0.")
    train, pairs = trajectories(records, tokenizer, args)
    pairs = pairs[:args.eval_pairs]
    models = [sft]
    if args.reward_model:
        models.append(args.reward_model)
        check_model(args.reward_model, load_tokenizer(args.reward_model, "--reward_model"), "--reward_model",
                    args.max_length, f"--max_length {args.max_length}", head=True)
    run = Checkpoints(out, args, (train, pairs), models)
    reward_map = {"kind": args.reward}
    if args.reward == "score":
        reward_map.update(center=(args.score_max + args.score_min) / 2,
                          scale=(args.score_max - args.score_min) / 2)
    elif args.reward == "model":
        reward_map = model_rewards(train, args, dtype_of(config), device)

    model = load_value_base(sft, dtype_of(config))
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    head = "score" if hasattr(model, "score") else "classifier"
    model = get_peft_model(model, LoraConfig(task_type="TOKEN_CLS", r=args.lora_r, lora_alpha=args.lora_alpha,
                                             lora_dropout=args.lora_dropout,
                                             target_modules=lora_targets(model), modules_to_save=[head]),
                           autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                                  weight_decay=0.0, fused=True)
    clip_in_step(optimizer, config, args.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tau_source = TauSource(train, tokenizer, context, vars(args))
    held_out_tau = TauSource([row for pair in pairs for row in pair], tokenizer, context, vars(args))

    steps = math.ceil(args.epochs * len(train) / args.batch_size)
    steps = min(steps, args.max_steps) if args.max_steps > 0 else steps
    print0(f"train_gvm: {len(train)} trajectories of {len(tau_source.by_policy)} policies, "
           f"{len(pairs)} held-out pairs; optimizer batch {args.batch_size} = {world} ranks x micro batch "
           f"{args.micro_batch} x {accum} accumulation; {steps} steps")
    print0(f"tau: {args.k} pairs, questions cut to {args.tau_question_tokens} and answers to "
           f"{args.tau_answer_tokens} tokens; where tau + prompt + response exceed {context}, whole pairs "
           f"are left out, the first one first")

    start, state = run.resume({"model": engine})
    tau_source.shortened = state.get("shortened", 0)
    log = MetricLog(out, show=["loss", "value/mean", "eval/accuracy", "lr", "timing/step_total"], steps=steps,
                    start=start)
    for step in range(start, steps):
        started = time.time()
        # 1. batch: rows of this optimizer step, each with a fresh tau of the policy that wrote it.
        #    tau is empty at first: the model learns to value answers, then whose they are. Both at once
        #    took far longer
        k = tau_pairs(step, steps, args)
        picks = list(enumerate(rows_of_step(len(train), step, args)))[rank::world]
        rows = []
        for place, i in picks:
            tau = tau_source.draw(train[i]["policy"], train[i]["group"], keyed_rng(args.seed, step, place), k)
            prompt, = tau_source.prompts([train[i]], tau)
            rows.append((prompt, train[i]["response_ids"], train[i]["reward"]))
        slots = sum(len(response) + 1 for _, response, _ in rows)   # + 1: the last prompt token
        all_slots, = all_sum(slots, device=device)

        # 2. update: DeepSpeed averages gradients over ranks, so a mean over slots is sum * ranks / slots of
        #    all ranks
        engine.train()
        total, value_sum, bad = 0.0, 0.0, []
        for i in range(0, len(rows), args.micro_batch):
            prompts, responses, reward = zip(*rows[i:i + args.micro_batch])
            q, batch = values(engine, prompts, responses, tokenizer, device)
            loss, _ = td_loss(q, torch.tensor(reward, device=device), batch.mask, args.gamma, args.lam)
            engine.backward(loss * world / all_slots)
            total, value_sum = total + loss.item(), value_sum + (q[:, 1:] * batch.mask).sum().item()
            if not loss.isfinite():
                bad += [repr(tokenizer.decode(prompt)[-80:]) for prompt in prompts]
        total, value_sum = all_sum(total, value_sum, device=device)
        check_finite(total, step, "the loss", bad)
        set_lr(engine, learning_rate(step, steps, args))
        engine.step()

        # 3. log: the loss alone does not tell (its noise floor depends on lambda), so held-out ranking is
        #    beside it
        row = {"loss": total / all_slots, "value/mean": value_sum / (all_slots - args.batch_size),
               "lr": learning_rate(step, steps, args), "num_tokens": all_slots - args.batch_size,
               "grad_norm": step_norm(engine),
               "timing/step_total": time.time() - started, "memory/peak_gb": peak_memory_gb(device)}
        if pairs and due(step, steps, args.eval_every):
            row.update(held_out_ranking(engine, pairs, held_out_tau, tokenizer, args, rank, world, device))
        log.write(step, row)
        run.after(step, steps, shortened=tau_source.shortened)
    shortened, = all_sum(tau_source.shortened, device=device)
    print0(f"tau: left-out pairs in {shortened:.0f} of {steps * args.batch_size} rows drawn")
    save_model(engine, tokenizer, out, extra={"gvm.json": {
        "base_model": model_place(sft), "k": args.k,
        "tau_format": "earlier turns of the same chat", "tau_question_tokens": args.tau_question_tokens,
        "tau_answer_tokens": args.tau_answer_tokens, "max_length": args.max_length, "context": context,
        "gamma": args.gamma, "lam": args.lam, "chat_template": tokenizer.chat_template,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), "split_seed": args.split_seed,
        "reward": reward_map}})
    run.finish()
    print0(f"train_gvm: saved to {out}")


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
