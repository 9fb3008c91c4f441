"""Kill runs at random points, resume them, and compare with straight ones: metrics byte for byte, weights bit
for bit. The long form of tests/test_resume.py, with real SIGKILLs, one rank and two under ZeRO-3.

Every third kill waits until a checkpoint is being written; every fourth of a run on two ranks hits the
launcher alone.

    python tests/kill_runs.py                        the RL stages, 10 kills each; the others, 3 each
    python tests/kill_runs.py --kills 2 --only dvpo

Prints one line a kill and one a run; exits with 1 when a resumed run is not the straight one.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import start
from test_resume import numbers, weights


def whole(words, ranks):
    process = start(words, ranks)
    text, _ = process.communicate()
    if process.returncode:
        sys.exit(f"error: {' '.join(map(str, words))} failed:\n{text[-3000:]}")


SMALL = ["--batch_size", 16, "--micro_batch", 8]


def make_toy(folder):
    """The toy, a short sft and gvm on it. Returns the flags --data and --sft_model of what builds on them."""
    toy = folder / "toy"
    subprocess.run([sys.executable, "-m", "toy.make", "--out", toy], cwd=ROOT, check=True,
                   capture_output=True)
    data = ["--data", toy / "preferences.jsonl", "--sft_model", folder / "sft"]
    whole(["sft.py", "--base_model", toy / "model", "--data", toy / "sft.jsonl", "--max_steps", 60, *SMALL,
           "--output_dir", folder / "sft"], 1)
    whole(["train_gvm.py", *data, "--max_steps", 20, *SMALL, "--output_dir", folder / "gvm"], 1)
    return data


def steps_done(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def half_written(folder):
    return any((folder / "checkpoints").glob(".*"))


def kill_and_resume(name, words, ranks, kills, folder, rng):
    """True when the run that was killed `kills` times ends as the straight one."""
    straight, killed = folder / f"{name}-{ranks}-straight", folder / f"{name}-{ranks}-killed"
    whole([*words, "--output_dir", straight], ranks)
    total, in_save = steps_done(straight), 0
    for kill in range(kills):
        process = start([*words, "--output_dir", killed, "--resume", True], ranks)
        before, first = steps_done(killed), time.time()
        # One step further at least, then at any point of about two steps. Not while it starts: a kill while
        # DeepSpeed loads its library leaves a `lock` behind in the torch_extensions folder
        while process.poll() is None and steps_done(killed) <= before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.6))
        while kill % 3 == 2 and process.poll() is None and not half_written(killed):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        launcher_alone = ranks > 1 and kill % 4 == 3
        if process.poll() is None:
            (os.kill if launcher_alone else os.killpg)(process.pid, signal.SIGKILL)
        process.communicate()  # whose end is that of the ranks, too: they hold its output open
        half = half_written(killed)
        in_save += half
        print(f"  {name} on {ranks}: kill {kill + 1}{' of the launcher alone' * launcher_alone} after "
              f"{time.time() - first:.1f} s, {steps_done(killed)} of {total} rows{', while saving' * half}",
              flush=True)
    whole([*words, "--output_dir", killed, "--resume", True], ranks)
    same = numbers(killed) == numbers(straight) and weights(killed) == weights(straight) != {}
    print(f"{name} on {ranks} rank(s): {kills} kills, {in_save} while saving: "
          f"{'the same' if same else 'NOT the same'}", flush=True)
    return same


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of the stages that sample")
    parser.add_argument("--other_kills", type=int, default=3, help="of the other stages")
    parser.add_argument("--only", nargs="*", help="stages",
                        default=["sft", "gvm", "rm", "dpo", "dvpo", "ppo", "remax", "grpo"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="of those that have --kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng, same = random.Random(args.seed), True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = make_toy(folder)
        whole(["train_rm.py", *data, "--max_steps", 20, *SMALL, "--output_dir", folder / "rm"], 1)
        sft = ["sft.py", "--base_model", folder / "toy/model", "--data", folder / "toy/sft.jsonl"]
        rl = [*data, "--save_every", 1, "--max_steps", 60, "--rollout_batch", 8, "--micro_batch", 4,
              "--eval_every", 0]
        short = ["--save_every", 1, "--max_steps", 30, *SMALL]
        plain = [*short, "--lora_dropout", 0.1]
        commands = {"sft": [*sft, *plain, "--lora_r", 4], "gvm": ["train_gvm.py", *data, *plain],
                    "rm": ["train_rm.py", *data, *plain], "dpo": ["train_dpo.py", *data, *short],
                    "remax": ["train_remax.py", *rl, "--reward_model", folder / "rm"],
                    "grpo": ["train_grpo.py", *rl, "--reward_model", folder / "rm"],
                    "dvpo": ["train_dvpo.py", *rl, "--value_model", folder / "gvm"],
                    "ppo": ["train_ppo.py", *rl, "--reward_model", folder / "rm"]}
        for name in args.only:
            trainer = name in ("dvpo", "ppo", "remax", "grpo")
            for ranks in args.ranks if trainer else [1]:
                zero = ["--ds_config", "ds_configs/zero3.json"] if ranks > 1 else []
                same &= kill_and_resume(name, [*commands[name], *zero], ranks,
                                        args.kills if trainer else args.other_kills, folder, rng)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
