"""Supervised fine-tuning: the policy that DVPO starts from, measures KL against,
and builds its value model on.

loss = -mean over response tokens, EOS included, of log pi(y_t | x, y_<t); the prompt is read and not trained.

Departures from the paper: none known. The paper gives batch 16, learning rate 2e-5 with a cosine
schedule and 2 warm-up steps, 3 epochs, no LoRA. It does not say which response of a prompt is
taken: here the best-scored one.

    python sft.py                                              the toy, on one CPU rank
    deepspeed sft.py --model meta-llama/Meta-Llama-3-8B        openbmb/UltraFeedback, ZeRO-3, bf16

reads   prompts of the SFT share of scored data or pairs (30 %, best response), or rows of prompt and answer
        as they are
writes  runs/<model name>/sft: the model, its tokenizer with a chat template, args.json, metrics.jsonl

Legend: B rows, P prompt columns (left padded), R response columns (right padded), T = P + R, V vocabulary.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from common import (answer_ids, chat_ids, collate, epoch_rows, load_policy, lora_config, row_seed,
                    train_only)
from plumbing.args import RunArgs, parse_args
from plumbing.checkpoint import Checkpoints
from plumbing.checks import check_finite
from plumbing.data import best_response, prompt_text, read_data, split_of
from plumbing.deepspeed_config import adamw, dtype_of, set_lr, step_norm
from plumbing.folders import output_folder
from plumbing.inputs import stage_inputs, steps_of
from plumbing.log import Clock, MetricLog, due
from plumbing.ranks import all_sum, init_distributed, peak_memory_gb, print0, seed_everything
from plumbing.rows import report_kept
from plumbing.saving import save_model
from plumbing.texts import BadText


@dataclass
class Args(RunArgs):
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    base_model: str = ""  # weights to start from, when they are not --model
    lora_r: int = 0  # LoRA rank, merged at the end; 0 trains every weight
    lora_alpha: int = 32  # LoRA scale is alpha / r
    lora_dropout: float = 0.1  # dropout on the LoRA input while training
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the responses had to be dropped
    max_length: int = 1024  # prompt + response; longer rows are dropped and counted [tokens]
    # optimisation
    lr: float = 2e-5  # peak learning rate of the cosine schedule
    warmup_steps: int = 2  # linear warm-up [optimizer steps]
    epochs: int = 3  # passes over the data
    max_steps: int = -1  # stop after this many, whatever epochs says; below 1: no limit [optimizer steps]
    batch_size: int = 16  # rows of one optimizer step, over all ranks
    micro_batch: int = 1  # rows of one forward pass on one rank
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    # run: also --ds_config, --output_dir, --resume, --save_every, --keep, --track, see plumbing/args.py
    eval_every: int = 100  # held-out loss [optimizer steps]
    seed: int = 1  # initial LoRA weights, dropout and data order


# ---- the algorithm -----------------------------------------------------------------------------------------

def sft_loss(logits, ids, mask, P):
    """Sum of -log pi(y_t | x, y_<t) over response tokens, and their number.

    # ids            p1  p2 | y1  y2  y3  EOS pad      P = 2 prompt columns (padded left), R = 5 of response
    # log pi(y_t)    read at P + t - 2                 slice [:, P-1 : T-1]   (the state before the token)
    # mask                    1   1   1   1   0        EOS is trained, nothing after it is
    logits: [B, 1 + R, V], of the positions P-1 .. T-1;  ids: [B, T];  mask: [B, R]
    """
    logp = torch.log_softmax(logits[:, :-1].float(), dim=-1)                       # [B, R, V]
    chosen = logp.gather(-1, ids[:, P:, None]).squeeze(-1)                         # [B, R]
    return -(chosen * mask).sum(), mask.sum()


def learning_rate(step, steps, args):
    """Linear warm-up, then half a cosine down to 0 after the last of `steps` optimizer steps."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


# ---- data --------------------------------------------------------------------------------------------------

def sft_rows(tokenizer, args):
    """(train, held-out) lists of (prompt ids, response ids): the best-scored response of each prompt of the
    SFT share, of a pair the chosen one; where the data has one answer and no scores, every row that is not
    held out."""
    train, test, dropped = [], [], Counter()
    for record in read_data(args.data, args.allow_dropped, log=print0):
        share = split_of(prompt_text(record["prompt"]), args.split_seed)
        if share not in ("sft", "test") and record["shape"] not in ("instruction", "chat"):
            continue
        best = best_response(record)
        try:
            row = chat_ids(tokenizer, record["prompt"]), answer_ids(tokenizer, best["text"])
        except BadText as e:
            dropped[e.reason] += 1
            continue
        if len(row[0]) + len(row[1]) > args.max_length:
            dropped[f"prompt + response over --max_length {args.max_length}"] += 1
        else:
            (test if share == "test" else train).append(row)
    report_kept(train, len(train) + len(test), dropped, args, "row", "SFT")
    return train, test


def batch_loss(model, rows, tokenizer, device):
    batch = collate(*zip(*rows), tokenizer.pad_token_id, device)
    logits = model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                   logits_to_keep=batch.mask.shape[1] + 1, use_cache=False).logits
    return sft_loss(logits, batch.ids, batch.mask, batch.P)


@torch.no_grad()
def held_out_loss(engine, rows, tokenizer, args, rank, world, device):
    """Mean loss per response token. Every rank runs the same number of batches:
    ZeRO-3 would hang otherwise."""
    engine.eval()
    total = count = 0
    for i in range(0, len(rows) // world * world, args.micro_batch * world):
        share = rows[i:i + args.micro_batch * world][rank::world]
        if share:
            loss, n = batch_loss(engine, share, tokenizer, device)
            total, count = total + loss.item(), count + n.item()
    engine.train()
    total, count = all_sum(total, count, device=device)
    return total / max(count, 1)


def load_model(base, flag, tokenizer, config, args):
    """The model as a DeepSpeed engine: all of it learns, or with --lora_r an adapter."""
    import deepspeed
    from peft import get_peft_model
    model = load_policy(base, tokenizer, dtype_of(config), flag)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    # One label in the config: stock transformers then puts one-label value and reward heads on this model
    model.config.num_labels = 1
    if args.lora_r:
        lora = lora_config(model, "CAUSAL_LM", args, lora_dropout=args.lora_dropout)
        model = get_peft_model(model, lora, "policy", autocast_adapter_dtype=False)
    parameters, = train_only(model, ".policy." if args.lora_r else "")
    optimizer = adamw([(parameters, args.lr)], config, args.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def main(args):
    rank, world, device = init_distributed()
    seed_everything(args.seed)
    base = (args.base_model, "--base_model") if args.base_model else (args.model, "--model")
    base, tokenizer, config, _ = stage_inputs(args, world, base)
    out = output_folder(args)
    train, test = sft_rows(tokenizer, args)
    checkpoints = Checkpoints(out, args, (train, test), models=[base])

    engine = load_model(base, "--base_model" if args.base_model else "--model", tokenizer, config, args)
    seed_everything(row_seed(args.seed, "dropout", rank))  # alike on all ranks so far; dropout must not be
    steps = steps_of(args, train, test, "rows", world)
    start, _ = checkpoints.resume({"model": engine})
    log = MetricLog(out, args, ["loss", "eval/loss", "lr", "timing/step_total"], steps, start)
    for step in range(start, steps):
        clock = Clock()
        # 1. batch: rows of this optimizer step, those of like length beside each other, dealt to the ranks
        rows = [train[i] for i in epoch_rows(len(train), step * args.batch_size, args.batch_size, args.seed)]
        rows = sorted(rows, key=lambda row: sum(map(len, row)))[rank::world]
        tokens = sum(len(response) for _, response in rows)
        all_tokens, = all_sum(tokens, device=device)

        # 2. update: DeepSpeed averages gradients over ranks, so a token mean is sum * ranks / tokens of
        #    all ranks
        engine.train()
        total, bad = 0.0, []
        for i in range(0, len(rows), args.micro_batch):
            micro = rows[i:i + args.micro_batch]
            loss, _ = batch_loss(engine, micro, tokenizer, device)
            engine.backward(loss * world / all_tokens)
            total += loss.item()
            if not loss.isfinite():
                bad += [repr(tokenizer.decode(prompt)[-80:]) for prompt, _ in micro]
        total, = all_sum(total, device=device)
        check_finite(total, step, "the loss", bad)
        set_lr(engine, learning_rate(step, steps, args))
        engine.step()
        clock("step_total")

        # 3. log
        row = {"loss": total / all_tokens, "lr": learning_rate(step, steps, args), "num_tokens": all_tokens,
               "grad_norm": step_norm(engine), **clock.seconds, "memory/peak_gb": peak_memory_gb(device)}
        if test and due(step, steps, args.eval_every):
            row["eval/loss"] = held_out_loss(engine, test, tokenizer, args, rank, world, device)
        log.write(step, row)
        checkpoints.after(step, steps)
    save_model(engine, tokenizer, out, base=base if args.lora_r else None)
    checkpoints.finish()


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
