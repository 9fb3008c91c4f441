"""How the cost of a step grows: seconds and memory of DVPO and PPO against the length of answers, the pairs
of tau, the batch and the number of ranks, one at a time, on random weights.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py                 a CPU, half an hour, nothing else running
    python benchmarks/scaling.py --config benchmarks/configs/llama-3.2-1b.json --grows response k

Every cell is a run of the script as it is, one after the other; a number is the median of its steps but
the first two. An exponent is the slope of log seconds against log of what grows: 1 is proportional. The
vocabulary has 4,096 words, so that few answers of random weights end early; `length` is what they have.
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

import bench
from plan import read_config
from plumbing.files import check_place, write_whole

WORDS = 4096
BASE = {"response": 128, "k": 4, "batch": 8, "ranks": 1}  # batch: of one rank
GROWS = {"response": (64, 128, 256, 512, 1024), "k": (0, 1, 2, 4, 8), "batch": (4, 8, 16, 32),
         "ranks": (1, 2)}


def flags_of(cell, args):
    """bench.py's flags for a cell."""
    words = ["--config", args.config, "--ds_config", args.ds_config, "--steps", args.steps, "--tau", 32, 64,
             "--k", cell["k"], "--response", cell["response"], "--rollout_batch", cell["batch"]]
    return bench.parse_args(list(map(str, words)))


def run(method, cell, folder, args, empty):
    """{what was measured: number} of one cell."""
    with tempfile.TemporaryDirectory() as out:
        gvm = folder / "gvm/gvm.json"  # as many pairs of tau as this cell has
        gvm.write_text(json.dumps({**json.loads(gvm.read_text()), "k": cell["k"]}))
        launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", cell["ranks"]]
        words = [*(launcher if cell["ranks"] > 1 else [sys.executable]),
                 *bench.command(method, folder, args), "--output_dir", out]
        done = subprocess.run(list(map(str, words)), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"error: {method} {cell} failed:\n{done.stdout[-3000:]}")
        rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    median = lambda name: float(np.median([row[name] for row in rows[2:]]))
    return {"seconds": median("timing/step_total"), "rollout": median("timing/generation"),
            "scoring": median("timing/score"), "update": median("timing/train"),
            "gb": rows[-1]["memory/peak_gb"] - empty, "length": median("completions/mean_length")}


def exponent(x, y):
    """Slope of log y against log x, without the places where x is 0."""
    x, y = (np.array(z, dtype=float) for z in (x, y))
    return float(np.polyfit(np.log(x[x > 0]), np.log(y[x > 0]), 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default=str(ROOT / "benchmarks/configs/tiny.json"), help="of the shape")
    parser.add_argument("--ds_config", default="ds_configs/fp32.json", help="DeepSpeed config")
    parser.add_argument("--grows", nargs="+", choices=GROWS, default=list(GROWS), help="what to vary")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run; the first two are not counted")
    parser.add_argument("--json", default="", help="write the numbers there")
    args = parser.parse_args()
    if args.steps < 3:
        sys.exit(f"error: --steps {args.steps}: the first two are not counted, take at least 3.")
    if args.json:
        check_place(args.json, "--json")
    config, ds = copy.deepcopy(read_config(args.config)), json.loads((ROOT / args.ds_config).read_text())
    needed = max(GROWS["k"]) * 97 + 32 + max(GROWS["response"]) + 1
    if config.max_position_embeddings < needed:
        sys.exit(f"error: --config {args.config}: a context of {config.max_position_embeddings} tokens, and "
                 f"{needed} are read: take another.")
    config.vocab_size, results = WORDS, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dtype = torch.bfloat16 if ds.get("bf16", {}).get("enabled") else torch.float32
        bench.make_models(folder, config, dtype, flags_of({"k": 0, "response": 8, "batch": 32}, args))
        empty = bench.empty_process_gb()
        for name in args.grows:
            for method in ("dvpo", "ppo"):
                for value in GROWS[name] if (name, method) != ("k", "ppo") else ():
                    cell = {**BASE, name: value}
                    results.append({"grows": name, "method": method, **cell,
                                    **run(method, cell, folder, flags_of(cell, args), empty)})
                    print(json.dumps(results[-1]), flush=True)
    print("\n| grows | | " + " | ".join(columns := ["seconds", "rollout", "scoring", "update", "gb"])
          + " |\n" + "|---" * 7 + "|")
    for name in args.grows:
        for method in ("dvpo", "ppo"):
            rows = [row for row in results if (row["grows"], row["method"]) == (name, method)]
            for row in rows:
                print(f"| {name} {row[name]} | {method.upper()} | "
                      + " | ".join(f"{row[c]:.2f}" for c in columns) + " |")
            if rows:
                slopes = [exponent([row[name] for row in rows], [row[c] for row in rows]) for c in columns]
                print(f"| exponent | {method.upper()} | " + " | ".join(f"{x:.2f}" for x in slopes) + " |")
    if args.json:
        write_whole(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
