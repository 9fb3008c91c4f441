"""The log of a run: metrics.jsonl, TensorBoard, and a bar or a few lines for the person who watches."""

import json
import sys
import time
from collections import deque
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from plumbing.errors import KEPT, BadInput, writing
from plumbing.files import write_whole

LINE_EVERY = 15.0  # seconds between two lines in a log file


class MetricLog:
    """metrics.jsonl with one row a step; TensorBoard where it is installed; with --track Weights & Biases.
    On a terminal a progress bar with the metrics named in `show`; in a file a line of them now and then."""

    def __init__(self, out, args, show, steps, start=0):
        """start: the first step of a run that is resumed; rows of later steps are taken out of the file."""
        self.show, self.steps, self.first = show, steps, start
        self.started, self.said = time.time(), 0.0
        self.last_rows = deque(maxlen=5)  # on every rank
        self.rank0 = not dist.is_initialized() or dist.get_rank() == 0
        if not self.rank0:
            return
        self.path = Path(out) / "metrics.jsonl"
        with writing(self.path):
            for path in (self.path, self.path.with_name("samples.jsonl")):
                keep_steps(path, start)
            self.file = open(self.path, "a")
        self.bar = tqdm(total=steps, initial=start, file=sys.stdout, disable=not sys.stdout.isatty(),
                        dynamic_ncols=True)
        self.board = tensorboard(out, args, start)

    def write(self, step, row):
        """row: {metric name: number}. Printed values are rounded, the file keeps them as they are."""
        self.last_rows.append(row)
        if not self.rank0:
            return
        with writing(self.path):
            self.file.write(json.dumps({"step": step, **row}) + "\n")
            self.file.flush()
        for name, value in row.items():
            if self.board is not None and value is not None:
                self.board.add_scalar(name, value, step)
        shown = "  ".join(f"{short(name)} {row[name]:.4g}" for name in self.show if row.get(name) is not None)
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        last, now = step + 1 == self.steps, time.time()
        if self.bar.disable and (last or now - self.said > LINE_EVERY):
            left = (now - self.started) / (step + 1 - self.first) * (self.steps - step - 1)
            print(f"step {step + 1}/{self.steps}  {shown}  {left:.0f} s left", flush=True)
            self.said = now
        if last:
            self.bar.close()


def short(name):
    """A metric's name on the terminal: gvm/mean, eval/accuracy; but kl for objective/kl."""
    group, _, rest = name.rpartition("/")
    return rest if group in ("objective", "policy", "completions", "timing") else name


def tensorboard(out, args, start):
    """A writer of TensorBoard files, or None where it is not installed; --track sends them to wandb."""
    if args.track:
        try:
            import wandb
        except ImportError:
            raise BadInput("--track needs Weights & Biases: `pip install wandb tensorboard`, or leave it "
                           "out.") from None
        wandb.init(project="dvpo", name=str(out), config=vars(args), sync_tensorboard=True, dir=str(out))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        if args.track:
            raise BadInput("--track sends TensorBoard's files: `pip install tensorboard`, or leave it "
                           "out.") from None
        return None
    return SummaryWriter(out, purge_step=start)


class Clock:
    """Seconds of the phases of a step: clock("score") behind each phase."""

    def __init__(self):
        self.start = self.last = time.time()
        self.seconds = {}

    def __call__(self, phase):
        now = time.time()
        self.seconds[f"timing/{phase}"], self.last = now - self.last, now

    def row(self, episodes):
        """The metrics of them: the phases, the whole step, and episodes per second."""
        total = self.last - self.start
        return {**self.seconds, "timing/step_total": total, "eps": episodes / total}


def keep_steps(path, start):
    """Take the rows of step `start` and later, and a last line that was cut short, out of a jsonl file."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # without what is cut short
        try:
            if json.loads(line)["step"] >= start:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            if start > 0:
                raise BadInput(f"{path}:{number}: not a row of this run; take the line out, or choose "
                               f"another --output_dir.") from None
            break  # the whole file is replaced
        kept.append(line + b"\n")
    write_whole(path, b"".join(kept), KEPT)


def due(step, steps, every):
    """Whether what is done every so many steps is due behind this one, also the last; 0 means never."""
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)
