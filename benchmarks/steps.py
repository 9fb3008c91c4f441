"""Runs a script of this project as it is and counts the tokens of each phase of its steps; in turn with
others, where bench.py holds the pipes.

    python benchmarks/steps.py COUNTS.jsonl - - train_gvm.py FLAGS ..

A row of COUNTS.jsonl: the step, the phase as in metrics.jsonl, and the tokens that models read in it without
gradients and those that they were trained on, padding included. They are counted where they are embedded.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing import lean, log


def main(counts, asks, go, script, *flags):
    """asks, go: file descriptors of pipes. Before each step a byte is written to the one and one is read from
    the other; "-": no turns.  script: its name, and behind a colon "alone" for a GVM that reads tau with each
    row"""
    file, tokens, embed = open(counts, "w"), {"step": -1, "read": 0, "trained": 0}, torch.nn.Embedding.forward

    def counted(self, ids):
        tokens["trained" if torch.is_grad_enabled() else "read"] += ids.numel()
        return embed(self, ids)
    torch.nn.Embedding.forward = counted

    class Clock(log.Clock):  # every script makes one when a step begins
        def __init__(self):
            tokens.update(step=tokens["step"] + 1, read=0, trained=0)
            if asks != "-":
                os.write(int(asks), b".")
                os.read(int(go), 1)
            super().__init__()

        def __call__(self, phase):
            super().__call__(phase)
            file.write(json.dumps({"phase": phase, **tokens}) + "\n")
            tokens.update(read=0, trained=0)
    log.Clock = Clock

    script, _, alone = script.partition(":")
    if alone:
        lean.can_share_prefix = lambda *args, **kwargs: False
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    file.close()


def tokens_of(counts):
    """{"read": tokens of each step, "trained": ..}, [steps] each, from the file of such a run."""
    rows = [json.loads(line) for line in Path(counts).read_text().splitlines()]
    steps = range(1 + rows[-1]["step"])
    return {kind: np.array([sum(row[kind] for row in rows if row["step"] == i) for i in steps])
            for kind in ("read", "trained")}


if __name__ == "__main__":
    main(*sys.argv[1:])
