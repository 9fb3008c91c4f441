"""Runs a script of this project as it is, and counts the tokens of each of its steps; in turn with others,
where bench.py holds the pipes.

    python benchmarks/steps.py COUNTS.jsonl - - train_gvm.py FLAGS ..

A row of COUNTS.jsonl is a step, the first what came before the first step: tokens that a model read without
gradients, and tokens that it was trained on, padding included. They are counted where they are embedded.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing import lean, log


def main(counts, asks, go, script, *flags):
    """asks, go: file descriptors of pipes. Before each step a byte is written to the one and one is read from
    the other; "-": no turns.  script: its name, and behind a colon "alone" for a GVM that reads tau with each
    row"""
    file, tokens, embed = open(counts, "w"), {"read": 0, "trained": 0}, torch.nn.Embedding.forward

    def counted(self, ids):
        tokens["trained" if torch.is_grad_enabled() else "read"] += ids.numel()
        return embed(self, ids)
    torch.nn.Embedding.forward = counted

    def end_of_step():
        file.write(json.dumps(tokens) + "\n")
        tokens.update(read=0, trained=0)

    class Clock(log.Clock):  # every script makes one when a step begins
        def __init__(self):
            end_of_step()
            if asks != "-":
                os.write(int(asks), b".")
                os.read(int(go), 1)
            super().__init__()
    log.Clock = Clock

    script, _, alone = script.partition(":")
    if alone:
        lean.can_share_prefix = lambda *args, **kwargs: False
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    end_of_step()
    file.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
