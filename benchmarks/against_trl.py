"""Seconds and memory of a step of train_dvpo.py and train_ppo.py beside TRL's PPOTrainer, random weights.

    pip install --target /tmp/trl --no-deps trl==1.10.0
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/trl python benchmarks/against_trl.py

TRL is not a dependency (1.10.0 and 1.11.0 are its last releases with a PPOTrainer). Both get the same SFT
model, a reward model and a critic of the same shape, prompts of the same length, and equally many optimizer
steps: of TRL's, per_device_train_batch_size is the rollout batch, gradient_accumulation_steps 1 and
num_mini_batches rollout batch / micro batch (with accumulation above 1 it would step once an epoch, whatever
num_mini_batches says). TRL's answers all have full length; ours end at a sampled EOS, so that seconds a
sampled token are printed, too. Peaks are of whole processes. The flags are those of bench.py; the first two
steps are not counted.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench import make_models, measured, parse_args, start, take_turns
from plan import read_config
from plumbing.ranks import peak_memory_gb


def trl_steps(folder, args):
    """Seconds of each of TRL's steps, and the peak of memory [GB]; run in a process of its own."""
    from datasets import Dataset
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                              TrainerCallback)
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    folder = Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft", padding_side="left")
    texts = [json.loads(line)["instruction"] for line in (folder / "data.jsonl").open()]
    data = Dataset.from_list([{"input_ids": tokenizer(text).input_ids} for text in texts])
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "sft", dtype=torch.float32)
                         for _ in range(2))
    reward, critic = (AutoModelForSequenceClassification.from_pretrained(folder / "sft", num_labels=1,
                                                                         dtype=torch.float32)
                      for _ in range(2))
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            times.append(time.time())

        def on_step_end(self, *args, **kwargs):
            times.append(time.time())

    config = PPOConfig(output_dir=str(folder / "trl"), per_device_train_batch_size=args["rollout_batch"],
                       gradient_accumulation_steps=1,
                       num_mini_batches=args["rollout_batch"] // args["micro_batch"],
                       num_ppo_epochs=args["ppo_epochs"], response_length=args["response"],
                       total_episodes=args["rollout_batch"] * args["steps"], temperature=1.0,
                       num_sample_generations=0, gradient_checkpointing=False, bf16=False, use_cpu=True,
                       report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True)
    trainer = PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=reference,
                         reward_model=reward, value_model=critic, train_dataset=data,
                         eval_dataset=data.select(range(config.per_device_eval_batch_size)),
                         callbacks=[Clock()])
    trainer.train()
    return np.diff(times).tolist(), peak_memory_gb(torch.device("cpu"))


def main(argv=None):
    args = parse_args(argv)
    config = read_config(args.config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, config, torch.float32, args)
        ours = []
        for method in args.methods:
            take_turns([worker := start(method, folder, args)])
            ours.append(measured(worker, args))
        code = (f"import json, sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
                f"from against_trl import trl_steps\n"
                f"print('SECONDS', json.dumps(trl_steps({str(folder)!r}, {vars(args)!r})))")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: TRL failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    seconds, their_gb = json.loads(done.stdout.rpartition("SECONDS ")[2])
    theirs, their_tokens = float(np.median(seconds[2:])), args.rollout_batch * args.response
    updates = args.ppo_epochs * args.rollout_batch // args.micro_batch
    print(f"TRL   {theirs:.3f} s a step, {their_tokens} tokens, {updates} optimizer steps, {their_gb:.2f} GB")
    for row in ours:
        seconds, tokens = row["step_s"], args.rollout_batch * row["length"]
        print(f"{row['method']:5} {seconds:.3f} s a step, {tokens:.0f} tokens, {updates // args.accum_steps} "
              f"optimizer steps, {row['peak_gb']:.2f} GB; of TRL's {seconds / theirs:.2f} a step, "
              f"{seconds / tokens / (theirs / their_tokens):.2f} a token, {row['peak_gb'] / their_gb:.2f} GB")


if __name__ == "__main__":
    main()
