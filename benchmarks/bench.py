"""DVPO and PPO on one random-weight model of a given shape: memory, seconds a step and where they go.

    python benchmarks/bench.py                                                          a CPU, minutes
    python benchmarks/bench.py --config benchmarks/configs/llama-3-8b.json \\
        --ds_config ds_configs/zero1.json --lora_r 16 --prompt 256 --response 1024 --rollout_batch 8 \\
        --micro_batch 2 --k 1 --gradient_checkpointing True

Weights are random, so the answers say nothing; memory and time depend on shapes alone. Every row of the table
is a run of train_dvpo.py or train_ppo.py as they are, in a process of its own; the numbers are medians over
its steps but the first two, from its metrics.jsonl.
models_gb is the peak beyond that of a process that has imported everything and loaded no model.

Bounds (GPU only; --gb_s and --tflops, those of an H200 by default):
    decoding   one step reads every weight once and the keys and values so far: bytes / (--gb_s)
    update     2 FLOP a weight and token forward, 4 backward, 2 where only LoRA is trained; 2 more with
               gradient checkpointing
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from plumbing.files import check_place, write_whole
from plan import FRAMEWORK_GB, count, kv_bytes, plan, read_config

TEMPLATE = ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}"
            "{% endif %} {% endfor %}")
PROMPT_WORDS = 200  # so many different words the prompts are made of


def make_tokenizer(vocabulary):
    """A word a token, so that a prompt of n words has n tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "<eos>"] + [f"w{i}" for i in range(vocabulary - 2)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, eos_token="<eos>",
                                   unk_token="<unk>", pad_token="<unk>")


def make_models(folder, config, dtype, args):
    """Folders sft, gvm and rm, with random weights and fresh adapters, and data.jsonl with prompts."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from common import load_value_base, lora_config, value_head
    from plumbing.checks import tokenizer_fingerprint
    from plumbing.folders import model_place
    tokenizer = make_tokenizer(config.vocab_size)
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.eos_token_id, config.pad_token_id, config.num_labels = 1, None, 1
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "sft")
    del model
    for name, kind in (("gvm", "TOKEN_CLS"), ("rm", "SEQ_CLS")):
        model = (load_value_base(folder / "sft", dtype) if name == "gvm" else
                 AutoModelForSequenceClassification.from_pretrained(folder / "sft", dtype=dtype,
                                                                    num_labels=1))
        adapter = lora_config(model, kind, argparse.Namespace(lora_r=8, lora_alpha=32))
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
        torch.nn.init.normal_(value_head(model.get_base_model()).modules_to_save["default"].weight)
        model.save_pretrained(folder / name)
        del model
    settings = {"base_model": model_place(folder / "sft"), "k": args.k, "tau_question_tokens": args.prompt,
                "tau_answer_tokens": args.response, "context": config.max_position_embeddings,
                "chat_template": TEMPLATE, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
                "max_length": args.prompt + args.response, "split_seed": 0,
                "reward": {"kind": "preference"}}
    (folder / "gvm/gvm.json").write_text(json.dumps(settings))
    (folder / "rm/rm.json").write_text(json.dumps({"center": 0.0, "scale": 1.0}))
    for name in ("sft", "gvm", "rm"):
        tokenizer.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    with open(folder / "data.jsonl", "w") as f:
        for _ in range(60 * args.rollout_batch):
            words = " ".join(f"w{i}" for i in rng.integers(PROMPT_WORDS, size=args.prompt))
            f.write(json.dumps({"prompt": words, "chosen": "w1", "rejected": "w2"}) + "\n")


def empty_process_gb():
    """Peak of a process that has imported everything and loaded nothing [GB]."""
    code = ("import train_dvpo, deepspeed, peft, torch;"
            "from plumbing.ranks import init_distributed, peak_memory_gb;"
            "print(peak_memory_gb(init_distributed()[2]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(method, folder, args):
    """Run a trainer; {number: median} of its steps but the first two."""
    out = folder / f"{method}_out"
    ppo = ["--reward_model", folder / "rm", "--share_base", method == "ppo_shared"]
    models = ["--value_model", folder / "gvm"] if method == "dvpo" else ppo
    command = [sys.executable, "train_dvpo.py" if method == "dvpo" else "train_ppo.py", "--model", "bench",
               "--sft_model", folder / "sft", *models, "--data", folder / "data.jsonl", "--output_dir", out,
               "--static_cache", args.static_cache, "--ds_config", args.ds_config,
               "--rollout_batch", args.rollout_batch, "--micro_batch", args.micro_batch,
               "--accum_steps", args.accum_steps, "--ppo_epochs", args.ppo_epochs, "--lora_r", args.lora_r,
               "--max_prompt_length", args.prompt, "--response_length", args.response,
               "--max_steps", args.steps, "--eval_every", 0, "--sample_every", 10**6, "--early_stop_kl", 0,
               "--gradient_checkpointing", args.gradient_checkpointing]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {method} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    median = lambda name: float(np.median([row[name] for row in rows[2:]]))
    result = {"rollout_s": median("timing/generation"), "scoring_s": median("timing/score"),
              "update_s": median("timing/train"), "step_s": median("timing/step_total"),
              "length": median("completions/mean_length"), "longest": median("completions/max_length"),
              "peak_gb": rows[-1]["memory/peak_gb"]}
    result["method"] = method
    result["sampled_tokens_s"] = args.rollout_batch * result["length"] / result["rollout_s"]
    return result


def bounds(row, config, args, bytes_per_weight):
    """Shares of what the GPU could do: {decoding_share, update_share}."""
    weights, head, _ = count(config)
    weights -= head  # as large as the embedding, of which a token reads one row; nothing where they are tied
    cached = args.rollout_batch * kv_bytes(config, bytes_per_weight) * (args.prompt + row["longest"] / 2)
    batches = -(-args.rollout_batch // 64)  # generate() takes 64 rows at a time
    read = row["longest"] * (batches * weights * bytes_per_weight + cached)
    flop = (4 if args.lora_r else 6) + (2 if args.gradient_checkpointing else 0)
    models = 1 if row["method"] == "dvpo" else 2  # policy and critic
    tokens = models * args.ppo_epochs * args.rollout_batch * (args.prompt + row["length"])
    return {"decoding_share": read / (args.gb_s * 1e9) / row["rollout_s"],
            "update_share": flop * weights * tokens / (args.tflops * 1e12) / row["update_s"]}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--config", default=str(ROOT / "benchmarks/configs/tiny.json"), help="config.json of the shape")
    add("--ds_config", default="ds_configs/fp32.json", help="DeepSpeed config")
    add("--methods", nargs="+", default=["dvpo", "ppo"], choices=["dvpo", "ppo", "ppo_shared"],
        help="what to measure; ppo_shared is --share_base")
    add("--k", type=int, default=4, help="pairs of tau")
    add("--lora_r", type=int, default=0, help="LoRA rank of the policy and the critic; 0 trains all weights")
    add("--prompt", type=int, default=32, help="prompt [tokens]")
    add("--response", type=int, default=64, help="answer [tokens]")
    add("--rollout_batch", type=int, default=16, help="prompts per step")
    add("--micro_batch", type=int, default=4, help="rows of one forward pass")
    add("--accum_steps", type=int, default=1, help="micro batches of one optimizer step")
    add("--ppo_epochs", type=int, default=4, help="passes over each rollout batch")
    add("--steps", type=int, default=12, help="steps; the first two are not counted")
    add("--gradient_checkpointing", choices=["True", "False"], default="False", help="as the scripts' flag")
    add("--static_cache", action="store_true", help="as the scripts' flag")
    add("--gb_s", type=float, default=4800, help="memory bandwidth of the GPU [GB/s]")
    add("--tflops", type=float, default=989, help="bf16 matrix rate of the GPU [TFLOP/s]")
    add("--json", default="", help="write the numbers there")
    args = parser.parse_args(argv)
    args.gradient_checkpointing = args.gradient_checkpointing == "True"
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        config, ds = read_config(args.config), json.loads((ROOT / args.ds_config).read_text())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        sys.exit(f"error: {args.config}, {args.ds_config}: cannot be read as JSON configs ({e}).")
    bytes_per_weight = 2 if ds.get("bf16", {}).get("enabled") else 4
    if args.steps < 3:
        sys.exit(f"error: --steps {args.steps}: the first two are not counted, take at least 3.")
    if "ppo_shared" in args.methods and not args.lora_r:
        sys.exit("error: --methods ppo_shared needs --lora_r: its models are LoRA on one base.")
    if args.json:
        check_place(args.json, "--json")
    needed = (1 + args.k) * (args.prompt + args.response + 1)
    if needed > config.max_position_embeddings:
        sys.exit(f"error: --k {args.k}: {needed} tokens of tau, prompt and answer exceed the context of "
                 f"{config.max_position_embeddings}: lower one.")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, config, torch.bfloat16 if bytes_per_weight == 2 else torch.float32, args)
        empty = empty_process_gb()
        for method in args.methods:
            row = measure(method, folder, args)
            planned = plan(config, ds, 1, method, args.lora_r, args.gradient_checkpointing,
                           args.rollout_batch, args.micro_batch, args.prompt, args.response,
                           args.k * (args.prompt + args.response + 1))
            row.update(models_gb=row["peak_gb"] - empty, planned_gb=planned["peak"] - FRAMEWORK_GB)
            if torch.cuda.is_available():
                row.update(bounds(row, config, args, bytes_per_weight))
            results.append(row)
    columns = [name for name in results[0] if name != "method"]
    print(f"\n{count(config)[0] / 1e6:.1f} million parameters, {args.ds_config}, lora_r {args.lora_r}, "
          f"k {args.k}, batch {args.rollout_batch}, prompt {args.prompt}, answer {args.response}, "
          f"{args.steps} steps\n")
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for row in results:
        print(f"| {row['method'].upper()} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |")
    if len(results) == 2 and args.methods == ["dvpo", "ppo"]:
        d, p = results
        score_update = [row["scoring_s"] + row["update_s"] for row in results]
        print(f"\nDVPO / PPO: step {d['step_s'] / p['step_s']:.2f}, scoring + update "
              f"{score_update[0] / score_update[1]:.2f}, memory beyond an empty process "
              f"{d['models_gb'] / p['models_gb']:.2f}")
    if args.json:
        write_whole(args.json, json.dumps({"flags": vars(args), "results": results}, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
