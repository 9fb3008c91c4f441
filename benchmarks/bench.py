"""The stages of DVPO and PPO on one random-weight model of a given shape: memory and seconds of a step.

    python benchmarks/bench.py                                                          a CPU, minutes
    python benchmarks/bench.py --config benchmarks/configs/llama-3-8b.json \\
        --ds_config ds_configs/zero1.json --lora_r 16 --prompt 256 --response 1024 --rollout_batch 8 \\
        --micro_batch 2 --k 1 --gradient_checkpointing True
    python benchmarks/bench.py --methods gvm gvm_alone gvm_0 rm                         what is trained before
    python benchmarks/bench.py --pipeline                                               all stages, and in all

Weights are random, so the answers say nothing; memory and time depend on shapes alone. Every row of the table
is a run of a script as it is, in a process of its own. They take turns, a step at a time, so that what else a
machine does slows all of them; one after the other, DVPO / PPO differed by a fifth from run to run. The
numbers are medians over the steps but the first two; those of a ratio are its median and quartiles. read and
trained are the tokens of a step, without and with gradients, padding included; models_gb is the peak beyond
that of a process that has imported everything and loaded no model.

    dvpo, ppo      a step of train_dvpo.py, train_ppo.py; ppo_shared: with --share_base
    gvm            a step of train_gvm.py with K pairs in tau; gvm_alone: where each row reads tau for itself;
                   gvm_0: K = 0
    rm             a step of train_rm.py with as many answers

Bounds (GPU only; --gb_s and --tflops, those of an H200 by default):
    decoding   one step reads every weight once and the keys and values so far: bytes / (--gb_s)
    update     2 FLOP a weight and token forward, 4 backward, 2 where only LoRA is trained; 2 more with
               gradient checkpointing
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from plumbing.files import check_place, write_whole
from plan import FRAMEWORK_GB, count, kv_bytes, plan, read_config
from steps import tokens_of

TEMPLATE = ("{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}"
            "{% endif %} {% endfor %}")
PROMPT_WORDS = 200  # so many different words prompts and answers are made of
POLICIES = 8  # wrote the answers that GVM and reward model are trained on
STAGES = {"DVPO": ("gvm", "dvpo"), "PPO": ("rm", "ppo")}


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
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # drawing billions takes a CPU minutes
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
    settings = {"base_model": model_place(folder / "sft"), "k": args.k, "tau_question_tokens": args.tau[0],
                "tau_answer_tokens": args.tau[1], "context": config.max_position_embeddings,
                "chat_template": TEMPLATE, "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
                "max_length": args.prompt + args.response, "split_seed": 0,
                "reward": {"kind": "preference"}}
    (folder / "gvm/gvm.json").write_text(json.dumps(settings))
    (folder / "rm/rm.json").write_text(json.dumps({"center": 0.0, "scale": 1.0}))
    for name in ("sft", "gvm", "rm"):
        tokenizer.save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    words = lambda n: " ".join(f"w{i}" for i in rng.integers(PROMPT_WORDS, size=n))
    with open(folder / "data.jsonl", "w") as f:
        for _ in range(max(60 * args.rollout_batch, 4 * args.batch_size)):
            answers = [{"model": f"policy {i}", "response": words(args.response), "overall_score": score}
                       for i, score in zip(rng.permutation(POLICIES), (1, 10))]
            f.write(json.dumps({"instruction": words(args.prompt), "completions": answers}) + "\n")


def empty_process_gb():
    """Peak of a process that has imported everything and loaded nothing [GB]."""
    code = ("import train_dvpo, deepspeed, peft, torch;"
            "from plumbing.ranks import init_distributed, peak_memory_gb;"
            "print(peak_memory_gb(init_distributed()[2]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def command(method, folder, args):
    """The words behind `python`, without the folder that it writes."""
    common = ["--model", "bench", "--sft_model", folder / "sft", "--data", folder / "data.jsonl",
              "--ds_config", args.ds_config, "--max_steps", args.steps, "--eval_every", 0,
              "--gradient_checkpointing", args.gradient_checkpointing]
    offline = [*common, "--epochs", 10**6, "--max_length", args.prompt + args.response + 2]
    if method == "rm":
        return ["train_rm.py", *offline, "--batch_size", args.batch_size // 2, "--micro_batch",
                max(1, args.gvm_micro_batch // 2)]
    if method in ("gvm", "gvm_alone", "gvm_0"):
        return ["train_gvm.py" + ":alone" * (method == "gvm_alone"), *offline, "--reward", "score",
                "--batch_size", args.batch_size, "--micro_batch", args.gvm_micro_batch,
                "--k", 0 if method == "gvm_0" else args.k, "--tau_warmup", 0,
                "--tau_question_tokens", args.tau[0], "--tau_answer_tokens", args.tau[1]]
    ppo = ["--reward_model", folder / "rm", "--share_base", method == "ppo_shared"]
    models = ["--value_model", folder / "gvm"] if method == "dvpo" else ppo
    return ["train_dvpo.py" if method == "dvpo" else "train_ppo.py", *common, *models,
            "--static_cache", args.static_cache, "--rollout_batch", args.rollout_batch,
            "--micro_batch", args.micro_batch, "--accum_steps", args.accum_steps,
            "--ppo_epochs", args.ppo_epochs, "--lora_r", args.lora_r, "--max_prompt_length", args.prompt,
            "--response_length", args.response, "--sample_every", 10**6, "--early_stop_kl", 0]


Worker = namedtuple("Worker", "method out process asks go")  # asks, go: ends of pipes, see steps.py


def start(method, folder, args):
    """A script that waits for its turn to do its first step."""
    out = folder / f"{method}_out"
    out.mkdir()
    (asks, its_asks), (its_go, go) = os.pipe(), os.pipe()
    words = [sys.executable, ROOT / "benchmarks/steps.py", out / "counts.jsonl", its_asks, its_go,
             *command(method, folder, args), "--output_dir", out]
    with open(out / "log.txt", "w") as log:
        process = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                   pass_fds=(its_asks, its_go))
    os.close(its_asks)
    os.close(its_go)
    os.read(asks, 1)
    return Worker(method, out, process, asks, go)


def take_turns(workers):
    """A step of each, until all have ended."""
    running = list(workers)
    while running:
        for worker in list(running):
            if worker.process.poll() is None:
                os.write(worker.go, b".")
            if os.read(worker.asks, 1):
                continue
            running.remove(worker)
            if worker.process.wait():
                for other in running:
                    other.process.kill()
                sys.exit(f"error: {worker.method} failed:\n{(worker.out / 'log.txt').read_text()[-3000:]}")


def measured(worker, args):
    """{number: median} over the steps but the first two, "each": the seconds of each."""
    rows = [json.loads(line) for line in (worker.out / "metrics.jsonl").read_text().splitlines()][2:]
    tokens = {kind: float(np.median(n[2:])) for kind, n in tokens_of(worker.out / "counts.jsonl").items()}
    median = lambda name: float(np.median([row[name] for row in rows]))
    found = {"method": worker.method, "step_s": median("timing/step_total"), **tokens,
             "peak_gb": rows[-1]["memory/peak_gb"], "each": [row["timing/step_total"] for row in rows]}
    if "timing/generation" in rows[0]:
        found.update(rollout_s=median("timing/generation"), scoring_s=median("timing/score"),
                     update_s=median("timing/train"), length=median("completions/mean_length"),
                     longest=median("completions/max_length"))
        found["sampled_tokens_s"] = args.rollout_batch * found["length"] / found["rollout_s"]
        found["each score + update"] = [row["timing/score"] + row["timing/train"] for row in rows]
    return found


def ratio(a, b):
    """Of two lists of numbers taken in turn: median and quartiles."""
    low, middle, high = np.percentile(np.array(a) / np.array(b), [25, 50, 75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def print_pipeline(results, args):
    """What all stages cost for the numbers of rows that were given; each step's seconds are in the spread."""
    rows = {"gvm": (args.gvm_rows, args.batch_size), "dvpo": (args.rollouts, args.rollout_batch),
            "rm": (args.rm_pairs, args.batch_size // 2), "ppo": (args.rollouts, args.rollout_batch)}
    print("\n| | rows | steps | million tokens read | trained | seconds | peak [GB] |\n|" + "---|" * 7)
    seconds = {}
    for name, stages in STAGES.items():
        total = []
        for row in (row for row in results if row["method"] in stages):
            n, batch = rows[row["method"]]
            steps = n / batch
            numbers = [steps, steps * row["read"] / 1e6, steps * row["trained"] / 1e6, steps * row["step_s"]]
            total.append([*numbers, row["peak_gb"]])
            seconds[name] = seconds.get(name, 0) + steps * np.array(row["each"])
            print(f"| {row['method'].upper()} | {n} | {steps:.0f} | " +
                  " | ".join(f"{x:.1f}" for x in total[-1][1:]) + " |")
        _, read, trained, second, _ = np.sum(total, 0)
        print(f"| all of {name} | | | {read:.1f} | {trained:.1f} | {second:.1f} | "
              f"{max(row[-1] for row in total):.1f} |")
    print(f"\nDVPO / PPO, all stages: {ratio(seconds['DVPO'], seconds['PPO'])}")


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
    add("--methods", nargs="+", default=["dvpo", "ppo"], help="what to measure, see above",
        choices=["dvpo", "ppo", "ppo_shared", "gvm", "gvm_alone", "gvm_0", "rm"])
    add("--pipeline", action="store_true", help="gvm, dvpo, rm and ppo, and what all of their steps cost")
    add("--one_by_one", action="store_true", help="no turns: for models that do not fit side by side")
    add("--k", type=int, default=4, help="pairs of tau")
    add("--tau", type=int, nargs=2, metavar=("QUESTION", "ANSWER"), help="a pair of tau [tokens]; default: "
        "--prompt and --response")
    add("--lora_r", type=int, default=0, help="LoRA rank of the policy and the critic; 0 trains all weights")
    add("--prompt", type=int, default=32, help="prompt [tokens]")
    add("--response", type=int, default=64, help="answer [tokens]")
    add("--rollout_batch", type=int, default=16, help="prompts per step")
    add("--micro_batch", type=int, default=4, help="rows of one forward pass")
    add("--accum_steps", type=int, default=1, help="micro batches of one optimizer step")
    add("--batch_size", type=int, default=32, help="rows of an optimizer step of the GVM; half as many pairs")
    add("--gvm_micro_batch", type=int, default=8, help="rows of one forward pass of GVM and reward model")
    add("--gvm_rows", type=int, default=120_000, help="--pipeline: rows that the GVM is trained on")
    add("--rm_pairs", type=int, default=60_000, help="--pipeline: pairs that the reward model is trained on")
    add("--rollouts", type=int, default=12_000, help="--pipeline: answers that the policy samples")
    add("--ppo_epochs", type=int, default=4, help="passes over each rollout batch")
    add("--steps", type=int, default=12, help="steps; the first two are not counted")
    add("--gradient_checkpointing", choices=["True", "False"], default="False", help="as the scripts' flag")
    add("--static_cache", action="store_true", help="as the scripts' flag")
    add("--gb_s", type=float, default=4800, help="memory bandwidth of the GPU [GB/s]")
    add("--tflops", type=float, default=989, help="bf16 matrix rate of the GPU [TFLOP/s]")
    add("--json", default="", help="write the numbers there")
    args = parser.parse_args(argv)
    args.gradient_checkpointing = args.gradient_checkpointing == "True"
    args.tau = args.tau or [args.prompt, args.response]
    if args.pipeline:
        args.methods = [stage for stages in STAGES.values() for stage in stages]
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
    if len(set(args.methods)) < len(args.methods):
        sys.exit("error: --methods: each once.")
    needed = args.k * (sum(args.tau) + 1) + args.prompt + args.response + 1
    if needed > config.max_position_embeddings:
        sys.exit(f"error: --k {args.k}: {needed} tokens of tau, prompt and answer exceed the context of "
                 f"{config.max_position_embeddings}: lower one.")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_models(folder, config, torch.bfloat16 if bytes_per_weight == 2 else torch.float32, args)
        empty = empty_process_gb()
        groups = [[method] for method in args.methods] if args.one_by_one else [args.methods]
        for methods in groups:
            workers = [start(method, folder, args) for method in methods]
            take_turns(workers)
            results += [measured(worker, args) for worker in workers]
    for row in results:
        planned = plan(config, ds, 1, row["method"], args.lora_r, args.gradient_checkpointing,
                       args.rollout_batch, args.micro_batch, args.prompt, args.response,
                       args.k * (sum(args.tau) + 1), args.gvm_micro_batch)
        row.update(models_gb=row["peak_gb"] - empty, planned_gb=planned["peak"] - FRAMEWORK_GB)
        if torch.cuda.is_available() and "rollout_s" in row:
            row.update(bounds(row, config, args, bytes_per_weight))
    columns = [name for name in max(results, key=len) if name != "method" and not name.startswith("each")]
    print(f"\n{count(config)[0] / 1e6:.1f} million parameters, {args.ds_config}, lora_r {args.lora_r}, "
          f"k {args.k}, batch {args.rollout_batch}, prompt {args.prompt}, answer {args.response}, "
          f"{args.steps} steps\n")
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for row in results:
        print(f"| {row['method'].upper()} | "
              + " | ".join(f"{row[c]:.3f}" if c in row else "-" for c in columns) + " |")
    if not args.pipeline:
        first, *others = results
        for row in others:
            words = f"step {ratio(first['each'], row['each'])}"
            if "rollout_s" in first and "rollout_s" in row:
                update = ratio(first["each score + update"], row["each score + update"])
                words += f", scoring + update {update}"
            print(f"{first['method'].upper()} / {row['method'].upper()}: {words}, memory beyond an empty "
                  f"process {first['models_gb'] / row['models_gb']:.2f}")
    else:
        print_pipeline(results, args)
    if args.json:
        write_whole(args.json, json.dumps({"flags": vars(args), "results": results}, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
