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

Legend: B rows, P prompt columns (left padded, tau included), R response columns (right padded), T = P + R.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from common import (Run, chat_ids, cut_pair, epoch_rows, keyed_rng, load_value_base, lora_config,
                    row_seed, td_loss, train_only)
from plumbing.args import RunArgs, parse_args
from plumbing.checkpoint import Checkpoints
from plumbing.checks import base_record, check_finite, load_adapter, tokenizer_fingerprint
from plumbing.deepspeed_config import adamw, dtype_of, set_lr, step_norm
from plumbing.folders import output_folder
from plumbing.inputs import gvm_stage_inputs, steps_of
from plumbing.lean import can_share_prefix, in_one_sequence, pack
from plumbing.log import Clock, MetricLog, due
from plumbing.ranks import all_sum, gather_rows, init_distributed, peak_memory_gb, print0, seed_everything
from plumbing.rows import reward_map, trajectories
from plumbing.saving import save_model
from plumbing.texts import run_date


@dataclass
class Args(RunArgs):
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # what the GVM grows from, default runs/<model name>/sft
    value_model: str = ""  # folder of a GVM to go on training; default: a new one is begun
    lora_r: int = 8  # LoRA rank
    lora_alpha: int = 32  # LoRA scale is alpha / r
    lora_dropout: float = 0.1  # dropout on the LoRA input while training
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the responses had to be dropped
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
    batch_policies: int = 8  # about so many policies in an optimizer batch; the rows of each share one tau
    # algorithm
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of TD(lambda); 0 is Eq. 1, 1 the Monte-Carlo return
    # optimisation
    lr: float = 2e-6  # peak learning rate, linear decay to 0
    epochs: int = 1  # passes over the data
    max_steps: int = -1  # stop after this many, whatever epochs says; below 1: no limit [optimizer steps]
    batch_size: int = 32  # rows of one optimizer step, over all ranks
    micro_batch: int = 2  # rows of one forward pass on one rank; those of one policy need tau only once
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    # run: also --ds_config, --output_dir, --resume, --save_every, --keep, --track, see plumbing/args.py
    eval_every: int = 200  # ranking accuracy on held-out pairs [optimizer steps]
    eval_pairs: int = 200  # held-out pairs it is measured on
    seed: int = 1  # initial weights, dropout, data order and the draws of tau


# ---- the algorithm -----------------------------------------------------------------------------------------

def learning_rate(step, steps, args):
    """Linear decay from --lr to 0 after the last of `steps` optimizer steps."""
    return args.lr * (1 - step / steps)


def tau_pairs(step, steps, args):
    """Mean number of pairs in tau: 0 in the first half of the warm-up, growing to k in the second, then k."""
    progress = (step + 1) / (args.tau_warmup * steps + 1e-9)
    return min(args.k, max(0.0, 2 * args.k * (progress - 0.5)))


def rows_of_step(policies, step, args):
    """Which trajectories an optimizer batch holds, from an endless stream of shuffled epochs. policies: of
    all trajectories, who wrote each.

    With --reward preference they are pairs, rows 2 i and 2 i + 1, and the two share a batch: where both
    answers are equally good, +1 and -1 then cancel instead of being noise. Dealt apart, the toy's GVM learned
    nothing in 700 steps; together, it did in 100.
    """
    unit = 2 if args.reward == "preference" else 1

    def shuffle(rng, n):
        order = rng.permutation(n)
        if not args.k or (unit == 2 and len(set(policies)) <= args.batch_policies):
            return order
        # Few policies in a batch have many rows each, which share one tau: blocks of one policy, and each
        # policy's blocks in equal distances over the epoch
        size, by_policy, blocks = max(1, args.batch_size // args.batch_policies), defaultdict(list), []
        for i in order:
            by_policy[tuple(sorted(policies[unit * i:unit * (i + 1)]))].append(i)
        for own in by_policy.values():
            first = rng.random() * size
            blocks += [((first + j) / len(own), own[j:j + size]) for j in range(0, len(own), size)]
        return [i for _, block in sorted(blocks, key=lambda placed: placed[0]) for i in block]
    count = args.batch_size // unit
    units = epoch_rows(len(policies) // unit, step * count, count, args.seed, shuffle)
    return [unit * i + j for i in units for j in range(unit)]


def ranking_accuracy(good, bad):
    """Share of pairs in which the good response has the higher number, ties counted half."""
    good, bad = np.asarray(good), np.asarray(bad)
    return float(((good > bad) + 0.5 * (good == bad)).mean())


# ---- tau ---------------------------------------------------------------------------------------------------

class TauSource:
    """Draws tau: answers of one policy to prompts of other groups, texts cut to their budget."""

    def __init__(self, rows, tokenizer, context, settings, shared=True):
        """shared: whether the model can read tau once for several rows"""
        self.tokenizer, self.context, self.settings = tokenizer, context, settings
        self.shared, self.key = shared, 0
        self.by_policy = defaultdict(list)
        for row in rows:
            self.by_policy[row["policy"]].append(row)
        self.shortened = 0  # rows whose tau lost pairs because tau + prompt + response exceeded the context

    def draw(self, policy, groups, rng, k):
        """k (question, answer) text pairs of `policy`, or all it has, none of them about one of `groups`."""
        if k == 0:
            return []
        rows, pairs = self.by_policy[policy], []
        for i in rng.permutation(len(rows)):
            if rows[i]["group"] not in groups:
                if "cut" not in rows[i]:
                    rows[i]["cut"] = cut_pair(self.tokenizer, rows[i]["prompt"], rows[i]["text"],
                                              self.settings)
                pairs.append(rows[i]["cut"])
            if len(pairs) == k:
                break
        return pairs

    def behind(self, tau, rows):
        """(token ids of tau + prompt, response ids, key) of rows that have one tau, and with it their key.
        Where tau + prompt + response exceed the context of any of them, whole pairs of tau are left out for
        all, the first one first."""
        for first in range(len(tau) + 1):
            prompts = [chat_ids(self.tokenizer, row["prompt"], tau[first:]) for row in rows]
            longest = max(len(prompt) + len(row["response_ids"]) for prompt, row in zip(prompts, rows))
            if longest <= self.context or first == len(tau):
                break
        self.shortened += len(rows) * (first > 0)
        keys = [self.key] * len(rows) if tau and self.shared else range(self.key, self.key + len(rows))
        self.key += len(rows)
        return list(zip(prompts, [row["response_ids"] for row in rows], keys))


# ---- evaluation --------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_ranking(engine, pairs, tau_source, run):
    """Ranking accuracy on held-out pairs by the mean token value, BOTH answers of a pair under ONE tau.

    The chosen one's and the rejected one's policy lend tau in turn. With each answer under its own tau the
    model could rank by recognizing the policy, which is worth nothing in RL, where all rows share one policy.
    """
    engine.eval()
    args, world, jobs = run.args, run.world, []
    for i, (good, bad) in enumerate(pairs):
        for lender in (good, bad) if args.k else (good,):
            tau = tau_source.draw(lender["policy"], {good["group"]},
                                  keyed_rng("held-out tau", args.split_seed, i), args.k)
            jobs.append(tau_source.behind(tau, (good, bad)))
    # Every rank runs the same number of batches: ZeRO-3 would hang otherwise
    jobs = jobs[:len(jobs) // world * world]
    means = []
    for i in range(run.rank, len(jobs), world * args.micro_batch):
        rows = [row for job in jobs[i:i + world * args.micro_batch:world] for row in job]
        q, mask = values(engine, rows, run)
        means += ((q[:, 1:] * mask).sum(1) / mask.sum(1)).tolist()
    engine.train()
    means = gather_rows(list(zip(means[::2], means[1::2])))
    if not means:
        return {}
    good, bad = zip(*means)
    return {"eval/accuracy": ranking_accuracy(good, bad), "eval/margin": float(np.mean(good) - np.mean(bad))}


def values(model, rows, run):
    """Q_0 .. Q_R of rows (prompt ids with tau in front, response ids, key), [B, 1 + R] float32, and their
    mask [B, R] bool. Rows with one key have one tau, and stand behind it in one sequence.

    # ids       tau.. p1  p2 | y1  y2  y3  EOS       of each row; see lean.pack for rows that share a tau
    # action a_t              1   2   3   4          a_t = y_t
    # Q_0 = V(s_1)            read at p2             the last prompt token, before anything is said
    # Q_t                     read at y_t            after the action
    # mask                    1   1   1   1          EOS is an action and is valued; nothing after it is
    """
    dtype = next(model.parameters()).dtype
    inputs, places, mask = pack(rows, run.tokenizer.pad_token_id, run.device, dtype)
    return model(**inputs, use_cache=False).logits[..., 0][places].float(), mask


def batch_of_step(train, tau_source, step, k, run):
    """This rank's rows of an optimizer batch: (prompt ids with tau in front, response ids, key, reward).

    All rows of a policy have one tau, which is about other things than any of them (`group`). tau is longer
    than they are, and read once for those in one forward pass: so a policy's rows stand together, on one rank
    where they can, and beside policies with about as many tokens. Without tau, rows of like length do.
    k is a mean: where it is no integer, some policies get a pair more than others. When all got their first
    one at the same step, what had been learned without tau was forgotten on one seed of four.
    """
    args, by_policy, packs = run.args, defaultdict(list), []
    for i in rows_of_step([row["policy"] for row in train], step, args):
        by_policy[train[i]["policy"]].append(train[i])
    for policy, rows in by_policy.items():
        rng = keyed_rng("tau", args.seed, step, str(policy))  # data without names has one policy, None
        tau = tau_source.draw(policy, {row["group"] for row in rows}, rng, int(k + rng.random()))
        packs.append([(*ids, row["reward"]) for ids, row in zip(tau_source.behind(tau, rows), rows)])
    alone = k == 0 or not tau_source.shared  # every row is a pack of its own
    packs = [[row] for pack in packs for row in pack] if alone else packs
    batch = sum(sorted(packs, key=lambda pack: sum(len(row[0]) + len(row[1]) for row in pack)), [])
    if alone:
        return batch[run.rank::run.world]
    share = len(batch) // run.world
    return batch[run.rank * share:(run.rank + 1) * share]


def load_model(sft, config, args):
    """The SFT model's backbone with a LoRA adapter and a value head, which learn, as a DeepSpeed engine."""
    import deepspeed
    from peft import get_peft_model
    model = load_value_base(sft, dtype_of(config))
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_in_parts")  # cheaper behind a tau
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    head = "score" if hasattr(model, "score") else "classifier"
    lora = lora_config(model, "TOKEN_CLS", args, lora_dropout=args.lora_dropout, modules_to_save=[head])
    if args.value_model:
        model = load_adapter(model, args.value_model, "--value_model", is_trainable=True,
                             autocast_adapter_dtype=False)
    else:
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    parameters, = train_only(model, ".default.")
    optimizer = adamw([(parameters, args.lr)], config, args.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def main(args):
    rank, world, device = init_distributed()
    seed_everything(args.seed)
    sft, tokenizer, config, context = gvm_stage_inputs(args, world)
    out = output_folder(args)
    train, pairs = trajectories(tokenizer, args)
    run = Run(args, tokenizer, device, rank, world)
    checkpoints = Checkpoints(out, args, (train, pairs), [sft, args.reward_model, args.value_model])
    record = base_record(sft)  # of the weights that it starts from
    reward = reward_map(train, args, dtype_of(config), device)

    engine = load_model(sft, config, args)
    seed_everything(row_seed(args.seed, "dropout", rank))  # alike on all ranks so far; dropout must not be
    longest = args.max_length + args.k * (args.tau_question_tokens + args.tau_answer_tokens)
    engine.eval()  # without LoRA's dropout
    shared = args.k > 0 and can_share_prefix(engine, min(longest, context), device, in_one_sequence)
    tau_source = TauSource(train, tokenizer, context, vars(args), shared)
    held_out_tau = TauSource([row for pair in pairs for row in pair], tokenizer, context, vars(args), shared)
    steps = steps_of(args, train, pairs, f"trajectories of {len(tau_source.by_policy)} policies", world)
    print0(f"tau: {args.k} pairs, questions cut to {args.tau_question_tokens} and answers to "
           f"{args.tau_answer_tokens} tokens; where tau + prompt + response exceed {context}, whole pairs "
           f"are left out, the first one first")
    start, state = checkpoints.resume({"model": engine})
    tau_source.shortened = state.get("shortened", 0)
    log = MetricLog(out, args, ["loss", "value/mean", "eval/accuracy", "lr"], steps, start)
    for step in range(start, steps):
        clock = Clock()
        # 1. batch: rows of this optimizer step, behind a fresh tau of the policy that wrote them. tau is
        #    empty at first: the model learns to value answers, then whose they are. Both at once took longer
        k = tau_pairs(step, steps, args)
        rows = batch_of_step(train, tau_source, step, k, run)
        count, = all_sum(sum(1 + len(response) for _, response, *_ in rows), device=device)  # Q_0 .. Q_n each

        # 2. update: DeepSpeed averages gradients over ranks, so a mean over values is sum * ranks / number
        engine.train()
        total, value_sum, bad = 0.0, 0.0, []
        for i in range(0, len(rows), args.micro_batch):
            micro = rows[i:i + args.micro_batch]
            q, mask = values(engine, [row[:3] for row in micro], run)
            rewards = torch.tensor([reward for *_, reward in micro], device=device)
            loss, _ = td_loss(q, rewards, mask, args.gamma, args.lam)
            engine.backward(loss * world / count)
            total, value_sum = total + loss.item(), value_sum + (q[:, 1:] * mask).sum().item()
            if not loss.isfinite():
                bad += [repr(tokenizer.decode(prompt)[-80:]) for prompt, *_ in micro]
        total, value_sum = all_sum(total, value_sum, device=device)
        check_finite(total, step, "the loss", bad)
        set_lr(engine, learning_rate(step, steps, args))
        engine.step()
        clock("step_total")

        # 3. log: the loss alone does not tell (its noise floor depends on lambda): held-out ranking beside it
        row = {"loss": total / count, "value/mean": value_sum / (count - args.batch_size),
               "lr": learning_rate(step, steps, args), "num_tokens": count - args.batch_size,
               "grad_norm": step_norm(engine), **clock.seconds, "memory/peak_gb": peak_memory_gb(device)}
        if pairs and due(step, steps, args.eval_every):
            row.update(held_out_ranking(engine, pairs, held_out_tau, run))
        log.write(step, row)
        checkpoints.after(step, steps, shortened=tau_source.shortened)
    print0(f"tau: left-out pairs in {tau_source.shortened} of {steps * args.batch_size} rows drawn")
    save_model(engine, tokenizer, out, extra={"gvm.json": {
        **record, "k": args.k,
        "tau_format": "earlier turns of the same chat", "tau_question_tokens": args.tau_question_tokens,
        "tau_answer_tokens": args.tau_answer_tokens, "max_length": args.max_length, "context": context,
        "gamma": args.gamma, "lam": args.lam, "chat_template": tokenizer.chat_template,
        "date": run_date(), "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "split_seed": args.split_seed, "reward": reward}})
    checkpoints.finish()


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
