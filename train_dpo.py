"""Direct Preference Optimization (DPO, Rafailov et al. 2023): the policy is its own reward model, trained on
the pairs alone; nothing is sampled, and there is neither a reward model nor a value model.

Up to a term of the prompt alone, a policy implies the reward beta log pi(y | x) / pi_ref(y | x). DPO puts it
into the loss of the reward model and so trains the policy: `diff train_rm.py train_dpo.py` is the method.
    h = beta ( log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x) )
    L = -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)      eps: label smoothing
log pi(y | x) is the sum over the response tokens, EOS included.

Departures:
D1  The paper compares with DPO without its settings. These are of DPO's own paper, but for AdamW in place of
    RMSprop and a linear decay without warm-up.
D2  The reference never is a second model: its log-probs are those of the policy before the first step. They
    are computed once, for the pairs that the run will see, and kept in reference.npz.

    python train_dpo.py                                               the toy, on one CPU rank
    deepspeed train_dpo.py --model meta-llama/Meta-Llama-3-8B         openbmb/UltraFeedback, ZeRO-3, bf16

reads   the value share (50 % of the prompts) of scored responses or pairs, and the SFT model
writes  runs/<model name>/dpo: the policy, tokenizer, reference.npz, args.json, metrics.jsonl

Legend: B pairs, P prompt columns (left padded), R response columns (right padded), T = P + R.
"""

import hashlib
import math
import os
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from common import collate, epoch_rows, load_policy, lora_config, train_only
from plumbing.args import RunArgs, parse_args
from plumbing.checkpoint import Checkpoints
from plumbing.checks import check_finite, fingerprint
from plumbing.deepspeed_config import adamw, dtype_of, set_lr, step_norm
from plumbing.errors import BadInput, one_line, writing
from plumbing.folders import output_folder
from plumbing.inputs import stage_inputs, steps_of
from plumbing.lean import LogProbs, OneBase
from plumbing.log import Clock, MetricLog, due
from plumbing.ranks import all_sum, gather_rows, init_distributed, peak_memory_gb, print0, seed_everything
from plumbing.rows import preference_rows
from plumbing.saving import save_model


@dataclass
class Args(RunArgs):
    # model
    model: str = "toy"  # Hugging Face id or folder; names the run folder
    sft_model: str = ""  # policy and reference, default runs/<model name>/sft
    lora_r: int = 0  # LoRA rank, merged at the end; 0 trains every weight
    lora_alpha: int = 32  # LoRA scale is alpha / r
    # data
    data: str = "openbmb/UltraFeedback"  # hub id[:split] or a local json, jsonl or parquet file
    split_seed: int = 0  # seed of the 30/50/20 split by prompt; keep it the same in every stage
    allow_dropped: bool = False  # continue when more than 10 % of the pairs had to be dropped
    pairs: Literal["one", "all"] = "one"  # of several scored answers the best and a lower one, or every pair
    max_length: int = 1024  # prompt + response; longer ones are not paired, lost pairs are counted [tokens]
    # algorithm
    beta: float = 0.1  # weight of the KL to the reference [reward per nat]
    label_smoothing: float = 0.0  # epsilon, the probability that a pair is labelled the wrong way round
    # optimisation
    lr: float = 1e-6  # peak learning rate, linear decay to 0
    epochs: int = 1  # passes over the pairs
    max_steps: int = -1  # stop after this many, whatever epochs says; below 1: no limit [optimizer steps]
    batch_size: int = 64  # pairs of one optimizer step, over all ranks
    micro_batch: int = 1  # pairs of one forward pass on one rank
    max_grad_norm: float = 1.0  # gradient clipping
    gradient_checkpointing: bool = False  # recompute activations in the backward pass to save memory
    # run: also --ds_config, --output_dir, --resume, --save_every, --keep, --track, see plumbing/args.py
    eval_every: int = 200  # loss and accuracy on held-out pairs [optimizer steps]
    eval_pairs: int = 200  # held-out pairs they are measured on
    seed: int = 1  # initial LoRA weights and data order


# ---- the algorithm -----------------------------------------------------------------------------------------

def implied_rewards(logp, ref_logp, beta):
    """beta log pi(y | x) / pi_ref(y | x).  logp, ref_logp: [B] float32, sums over response tokens [nats]"""
    return beta * (logp - ref_logp)


def dpo_loss(chosen, rejected, label_smoothing):
    """-(1 - eps) log sigmoid(h) - eps log sigmoid(-h), h = r_chosen - r_rejected, summed over pairs.

    chosen, rejected: [B] float32, implied rewards;  label_smoothing: eps (conservative DPO, Mitchell 2023)
    """
    logsigmoid = torch.nn.functional.logsigmoid
    h = chosen - rejected
    return -((1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)).sum()


def wins(margins):
    """Pairs ranked right, ties counted half. margins: scores of the chosen less those of the rejected."""
    return float(sum((m > 0) + 0.5 * (m == 0) for m in margins))


def learning_rate(step, steps, args):
    """Linear decay from --lr to 0 after the last of `steps` optimizer steps."""
    return args.lr * (1 - step / steps)


# ---- data --------------------------------------------------------------------------------------------------

def answer_logprobs(model, rows, tokenizer, args, device):
    """(log pi of the chosen, of the rejected answers), [B] each, in one forward pass of 2 B rows.

    # ids            p1  p2 | y1  y2  y3  EOS pad      P = 2 prompt columns (padded left), R = 5 of response
    # log pi(y_t)    read at P + t - 2                 slice [:, P-1 : T-1], see lean.response_logprobs
    # mask                    1   1   1   1   0        EOS counts, nothing after it does
    """
    prompts, chosen, rejected = zip(*rows)
    batch = collate(prompts + prompts, chosen + rejected, tokenizer.pad_token_id, device)
    logp, _ = model(input_ids=batch.ids, attention_mask=batch.attention, position_ids=batch.positions,
                    states=slice(batch.P - 1, -1), actions=batch.ids[:, batch.P:], mask=batch.mask,
                    temperature=1.0, use_cache=False,
                    chunks=-(-2 * args.micro_batch * args.max_length // 1024))  # of about 1,024 tokens
    return logp.sum(1).chunk(2)


@torch.no_grad()
def logprobs_of(engine, rows, tokenizer, args, rank, world, device):
    """log pi of the chosen and the rejected answer of every row, [N, 2] float32, the same on all ranks. Every
    rank runs the same number of batches: ZeRO-3 would hang otherwise."""
    engine.eval()
    found = []
    for i in range(0, len(rows), args.micro_batch * world):
        share = range(i, min(i + args.micro_batch * world, len(rows)))[rank::world]
        pair = answer_logprobs(engine, [rows[j] for j in share] or rows[:1], tokenizer, args, device)
        found += zip(share, zip(*(side.tolist() for side in pair)))
    engine.train()
    return np.array([pair for _, pair in sorted(gather_rows(found))], dtype=np.float32).reshape(-1, 2)


def reference_logprobs(engine, rows, path, key, tokenizer, args, rank, world, device):
    """logprobs_of the policy before its first step, from the file where it has them for these rows.

    key: text that changes with the reference model and the rows
    returns ([N, 2] float32, seconds that it took)
    """
    started, kept = time.time(), []
    if rank == 0 and path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["key"]) == key:
                    kept = [file["logprobs"]]
        except Exception as e:  # a damaged zip file fails in a dozen ways
            print0(f"warning: {path} cannot be read ({one_line(e)}): its log-probs are computed again")
    kept = gather_rows(kept)
    if kept:
        print0(f"reference: log-probs of {len(rows)} pairs from {path}")
        return kept[0], time.time() - started
    logprobs = logprobs_of(engine, rows, tokenizer, args, rank, world, device)
    for row, found in zip(rows, logprobs):
        if not np.isfinite(found).all():
            raise BadInput(f"--sft_model: its log-prob of an answer to {tokenizer.decode(row[0])[-80:]!r} is "
                           f"not finite; look at its weights, or take a --ds_config in float32.")
    if rank == 0:
        with writing(path):
            saving = path.with_name(f".{path.name}")
            np.savez(saving, key=key, logprobs=logprobs)
            os.replace(saving, path)
    seconds = time.time() - started
    print0(f"reference: log-probs of {len(rows)} pairs in {seconds:.0f} s, kept in {path}")
    return logprobs, seconds


def held_out(engine, rows, reference, tokenizer, args, rank, world, device):
    """Loss, accuracy and margin of the implied rewards on held-out pairs."""
    logp = torch.tensor(logprobs_of(engine, rows, tokenizer, args, rank, world, device))
    chosen, rejected = implied_rewards(logp, torch.tensor(reference), args.beta).unbind(1)
    margins = (chosen - rejected).tolist()
    return {"eval/loss": dpo_loss(chosen, rejected, args.label_smoothing).item() / len(rows),
            "eval/accuracy": wins(margins) / len(rows), "eval/margin": float(np.mean(margins))}


def load_model(sft, tokenizer, config, args):
    """The policy as a DeepSpeed engine; nothing else learns."""
    import deepspeed
    lm = load_policy(sft, tokenizer, dtype_of(config), "--sft_model")
    if args.gradient_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    model = OneBase(lm, lora=lora_config(lm, "CAUSAL_LM", args)) if args.lora_r else LogProbs(lm)
    parameters, = train_only(model, ".policy." if args.lora_r else "")
    optimizer = adamw([(parameters, args.lr)], config, args.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def main(args):
    rank, world, device = init_distributed()
    seed_everything(args.seed)
    sft, tokenizer, config, _ = stage_inputs(args, world)
    out = output_folder(args)
    train, test = preference_rows(tokenizer, args)
    checkpoints = Checkpoints(out, args, (train, test), models=[sft])
    engine = load_model(sft, tokenizer, config, args)
    steps = steps_of(args, train, test, "pairs", world)

    # The reference: the policy as it is now, before a checkpoint or a step changes it
    used = sorted(set(epoch_rows(len(train), 0, steps * args.batch_size, args.seed)))
    rows = [train[i] for i in used] + test
    key = repr((fingerprint(sft), dtype_of(config), world, args.micro_batch, rows))
    key = hashlib.sha256(key.encode()).hexdigest()
    logprobs, seconds = reference_logprobs(engine, rows, out / "reference.npz", key, tokenizer, args, rank,
                                           world, device)
    reference, test_reference = dict(zip(used, logprobs)), logprobs[len(used):]

    start, _ = checkpoints.resume({"policy": engine})
    log = MetricLog(out, args, ["loss", "rewards/accuracies", "rewards/margins", "eval/accuracy", "lr",
                                "timing/step_total"], steps, start)
    for step in range(start, steps):
        clock = Clock()
        # 1. batch: pairs of this optimizer step, those of like length beside each other, dealt to the ranks
        picks = epoch_rows(len(train), step * args.batch_size, args.batch_size, args.seed)
        picks = sorted(picks, key=lambda i: sum(map(len, train[i])))[rank::world]

        # 2. update: DeepSpeed averages gradients over ranks, so a mean over pairs is sum * ranks / pairs
        engine.train()
        sums, bad = torch.zeros(6), []
        for i in range(0, len(picks), args.micro_batch):
            micro = picks[i:i + args.micro_batch]
            logp = torch.stack(answer_logprobs(engine, [train[j] for j in micro], tokenizer, args, device))
            ref_logp = torch.tensor(np.array([reference[j] for j in micro]), device=device).T     # [2, B]
            chosen, rejected = implied_rewards(logp, ref_logp, args.beta)
            loss = dpo_loss(chosen, rejected, args.label_smoothing)
            engine.backward(loss * world / args.batch_size)
            sums += torch.stack([loss, chosen.sum(), rejected.sum(), *logp.sum(1),
                                 loss.new_tensor(wins((chosen - rejected).tolist()))]).detach().cpu()
            if not loss.isfinite():
                bad += [repr(tokenizer.decode(train[j][0])[-80:]) for j in micro]
        loss, chosen, rejected, logp_chosen, logp_rejected, right = (
            x / args.batch_size for x in all_sum(*sums.tolist(), device=device))
        check_finite(loss, step, "the loss", bad)
        set_lr(engine, learning_rate(step, steps, args))
        engine.step()
        clock("step_total")

        # 3. log
        row = {"loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected,
               "rewards/margins": chosen - rejected, "rewards/accuracies": right, "logps/chosen": logp_chosen,
               "logps/rejected": logp_rejected, "lr": learning_rate(step, steps, args),
               "grad_norm": step_norm(engine), **clock.seconds, "memory/peak_gb": peak_memory_gb(device)}
        if step == 0:
            row["timing/reference"] = seconds
            print0(f"self-check: loss {loss:.4f} ({math.log(2):.4f}: policy and reference are the same)")
        if test and due(step, steps, args.eval_every):
            row.update(held_out(engine, test, test_reference, tokenizer, args, rank, world, device))
        log.write(step, row)
        checkpoints.after(step, steps)
    save_model(engine, tokenizer, out, base=sft if args.lora_r else None)
    checkpoints.finish()


if __name__ == "__main__":
    main(parse_args(Args))
    torch.distributed.destroy_process_group()  # else NCCL warns of a group left behind
