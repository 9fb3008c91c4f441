"""2,000 steps of DVPO on the toy: memory stays flat, no file handle or thread is left behind.

    python tests/soak.py                     about 20 minutes on one core
    python tests/soak.py --steps 200

Prints, of each quarter of the steps, the largest resident memory, file handles and threads of the process.
Exits with 1 when the last quarter has over 2 % more memory than the second, or more handles or threads.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from kill_runs import make_toy, start, steps_done


def sample(process):
    """(resident memory [GB], file handles, threads) of a process."""
    proc = Path(f"/proc/{process.pid}")
    resident = next(line for line in (proc / "status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(resident.split()[1]) * 1024 / 1e9, len(list((proc / "fd").iterdir())), len(
        list((proc / "task").iterdir()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = make_toy(folder)
        process = start(["train_dvpo.py", *data, "--value_model", folder / "gvm", "--max_steps", args.steps,
                         "--rollout_batch", 8, "--micro_batch", 8, "--eval_every", 200, "--output_dir",
                         folder / "out"], 1, folder / "log")
        quarters = [[], [], [], []]
        while process.poll() is None:
            done = steps_done(folder / "out")
            if 0 < done < args.steps:
                try:
                    quarters[4 * done // args.steps].append(sample(process))
                except (OSError, StopIteration):  # it has just ended
                    pass
            time.sleep(0.2)
        if process.returncode:
            sys.exit(f"error: {(folder / 'log').read_text()[-3000:]}")
    peaks = [[max(column) for column in zip(*quarter)] for quarter in quarters]
    for number, (memory, handles, threads) in enumerate(peaks, start=1):
        print(f"quarter {number}: {memory:.4f} GB, {handles} file handles, {threads} threads")
    (memory, *rest), (last, *last_rest) = peaks[1], peaks[3]
    flat = last <= 1.02 * memory and all(a <= b for a, b in zip(last_rest, rest))
    print(f"last quarter against the second: memory x {last / memory:.4f}: {'flat' if flat else 'NOT flat'}")
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
