"""The reward model (RM): one score for a whole answer, trained on preference pairs; what PPO asks and DVPO
does without.

Pair-wise (Bradley-Terry) loss:   -log sigmoid( r(x, y_chosen) - r(x, y_rejected) )
The score is read at the answer's last token (EOS). It sees the same share of the prompts as train_gvm.py:
with --pairs one, of several scored answers the same pair as `--reward preference` there; with --pairs all
every pair of unequal scores, which is what `--reward score` sees of them but for the distances.

Departures:
D1  The paper's batch of 4 pairs cannot be dealt to 8 ranks; the default is 8 pairs.
D2  Beside the model the folder records center and scale, the mean and two standard deviations of its scores
    on held-out answers. PPO rewards with (score - center) / scale, about [-1, 1].

    python train_rm.py                                               the toy, on one CPU rank
    deepspeed train_rm.py --model meta-llama/Meta-Llama-3-8B         openbmb/UltraFeedback, ZeRO-3, bf16

reads   the value share (50 % of the prompts) of scored responses or pairs, and the SFT model
writes  runs/<model name>/rm: LoRA adapter + head, tokenizer, rm.json (base model, center, scale), args.json,
        metrics.jsonl

Legend: B pairs, T tokens of prompt and answer (left padded).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from common import disable_dropout, epoch_rows, last_token_scores, lora_config, row_seed, train_only
from plumbing.args import RunArgs, parse_args
from plumbing.checkpoint import Checkpoints
from plumbing.checks import base_record, check_finite, load_weights, tokenizer_fingerprint
from plumbing.deepspeed_config import adamw, dtype_of, set_lr, step_norm
from plumbing.errors import BadInput
from plumbing.folders import output_folder
from plumbing.inputs import stage_inputs, steps_of
from plumbing.log import Clock, MetricLog, due
from plumbing.ranks import all_sum, gather_rows, init_distributed, peak_memory_gb, print0, seed_everything
from plumbing.rows import preference_rows
from plumbing.saving import save_model
from plumbing.texts import run_date


@dataclass
class Args(RunArgs):
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # what the reward model grows from, default runs/<model name>/sft
    lora_r: int = 8  # LoRA rank
    lora_alpha: int = 32  # LoRA scale is alpha / r
    lora_dropout: float = 0.1  # dropout on the LoRA input while training
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the pairs had to be dropped
    pairs: Literal["one", "all"] = "one"  # of several scored answers the best and a lower one, or every pair
    max_length: int = 1024  # prompt + response; longer ones are not paired, lost pairs are counted [tokens]
    # optimisation
    lr: float = 2e-5  # peak learning rate, linear decay to 0
    epochs: int = 2  # passes over the pairs
    max_steps: int = -1  # stop after this many, whatever epochs says; below 1: no limit [optimizer steps]
    batch_size: int = 8  # pairs of one optimizer step, over all ranks
    micro_batch: int = 1  # pairs of one forward pass on one rank
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    # run: also --ds_config, --output_dir, --resume, --save_every, --keep, --track, see plumbing/args.py
    eval_every: int = 200  # accuracy on held-out pairs [optimizer steps]
    eval_pairs: int = 200  # held-out pairs it is measured on
    seed: int = 1  # initial weights, dropout and data order


# ---- the algorithm -----------------------------------------------------------------------------------------

def pair_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected), summed over pairs.  chosen, rejected: [B] float32"""
    return -torch.nn.functional.logsigmoid(chosen - rejected).sum()


def wins(margins):
    """Pairs ranked right, ties counted half. margins: scores of the chosen less those of the rejected."""
    return float(sum((m > 0) + 0.5 * (m == 0) for m in margins))


def learning_rate(step, steps, args):
    """Linear decay from --lr to 0 after the last of `steps` optimizer steps."""
    return args.lr * (1 - step / steps)


# ---- data --------------------------------------------------------------------------------------------------

def pair_scores(model, rows, tokenizer, device):
    """(scores of the chosen, scores of the rejected answers), [B] each, in one forward pass of 2 B rows."""
    prompts, chosen, rejected = zip(*rows)
    return last_token_scores(model, prompts + prompts, chosen + rejected, tokenizer.pad_token_id,
                             device).chunk(2)


@torch.no_grad()
def held_out(engine, rows, tokenizer, args, rank, world, device):
    """Accuracy and margin on held-out pairs, and all their scores. Every rank runs the same number of
    batches: ZeRO-3 would hang otherwise."""
    engine.eval()
    scores = []
    rows = rows[:len(rows) // world * world]
    for i in range(0, len(rows), args.micro_batch * world):
        share = rows[i:i + args.micro_batch * world][rank::world]
        scores += zip(*(side.tolist() for side in pair_scores(engine, share, tokenizer, device)))
    engine.train()
    scores = np.array(gather_rows(scores)).reshape(-1, 2)
    if not len(scores):
        return {}, scores
    margins = (scores[:, 0] - scores[:, 1]).tolist()
    return {"eval/accuracy": wins(margins) / len(margins), "eval/margin": float(np.mean(margins))}, scores


def load_model(sft, config, args):
    """The SFT model's backbone with a LoRA adapter and a score head, which learn, as a DeepSpeed engine."""
    import deepspeed
    from peft import get_peft_model
    model = disable_dropout(load_weights(AutoModelForSequenceClassification, sft, "--sft_model",
                                         new_head=True, num_labels=1, dtype=dtype_of(config)))
    model.config.pad_token_id = -1  # the score is read at the last position, see last_token_scores
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    lora = lora_config(model, "SEQ_CLS", args, lora_dropout=args.lora_dropout, modules_to_save=["score"])
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    parameters, = train_only(model, ".default.")
    optimizer = adamw([(parameters, args.lr)], config, args.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def main(args):
    rank, world, device = init_distributed()
    if args.lora_r < 1:
        raise BadInput(f"--lora_r {args.lora_r} must be at least 1.")
    seed_everything(args.seed)
    sft, tokenizer, config, _ = stage_inputs(args, world, head=AutoModelForSequenceClassification)
    out = output_folder(args)
    train, test = preference_rows(tokenizer, args)
    checkpoints, record = Checkpoints(out, args, (train, test), models=[sft]), base_record(sft)

    engine = load_model(sft, config, args)
    seed_everything(row_seed(args.seed, "dropout", rank))  # alike on all ranks so far; dropout must not be
    steps = steps_of(args, train, test, "pairs", world)
    start, _ = checkpoints.resume({"model": engine})
    log = MetricLog(out, args, ["loss", "accuracy", "eval/accuracy", "lr", "timing/step_total"], steps, start)
    scores = None
    for step in range(start, steps):
        clock = Clock()
        # 1. batch: pairs of this optimizer step, those of like length beside each other, dealt to the ranks
        rows = [train[i] for i in epoch_rows(len(train), step * args.batch_size, args.batch_size, args.seed)]
        rows = sorted(rows, key=lambda row: sum(map(len, row)))[rank::world]

        # 2. update: DeepSpeed averages gradients over ranks, so a mean over pairs is sum * ranks / pairs
        engine.train()
        total, right, margin, bad = 0.0, 0.0, 0.0, []
        for i in range(0, len(rows), args.micro_batch):
            micro = rows[i:i + args.micro_batch]
            chosen, rejected = pair_scores(engine, micro, tokenizer, device)
            loss, margins = pair_loss(chosen, rejected), (chosen - rejected).tolist()
            engine.backward(loss * world / args.batch_size)
            total, right, margin = total + loss.item(), right + wins(margins), margin + sum(margins)
            if not loss.isfinite():
                bad += [repr(tokenizer.decode(prompt)[-80:]) for prompt, _, _ in micro]
        total, right, margin = all_sum(total, right, margin, device=device)
        check_finite(total, step, "the loss", bad)
        set_lr(engine, learning_rate(step, steps, args))
        engine.step()
        clock("step_total")

        # 3. log
        row = {"loss": total / args.batch_size, "accuracy": right / args.batch_size,
               "margin": margin / args.batch_size, "lr": learning_rate(step, steps, args),
               "grad_norm": step_norm(engine), **clock.seconds, "memory/peak_gb": peak_memory_gb(device)}
        if test and due(step, steps, args.eval_every):
            ranking, scores = held_out(engine, test, tokenizer, args, rank, world, device)
            row.update(ranking)
        log.write(step, row)
        checkpoints.after(step, steps)

    # The scale is that of the held-out scores of the last step, unless they are too few or were not asked for
    if len(test) < 16 or scores is None:
        rows = train[:max(200, world)] if len(test) < 16 else test
        _, scores = held_out(engine, rows, tokenizer, args, rank, world, device)
    center, scale = float(scores.mean()), float(2 * scores.std() + 1e-8)
    save_model(engine, tokenizer, out, extra={"rm.json": {
        **record, "center": center, "scale": scale, "max_length": args.max_length,
        "chat_template": tokenizer.chat_template, "date": run_date(),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer), "split_seed": args.split_seed}})
    checkpoints.finish()
    print0(f"scores: mean {center:.3f}, two standard deviations {scale:.3f}")


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
