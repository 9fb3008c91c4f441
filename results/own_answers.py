"""Preference data of the SFT policy's own answers on the toy, as InstructGPT collects it: the same prompts as
in --data, four samples of the policy each, scored by the world's noisy annotator.

    python results/own_answers.py --sft_model runs/toy/sft --data toy/build/preferences.jsonl --out x.jsonl

The scripted policies of toy/build/preferences.jsonl never write a malformed answer, the SFT policy in 9 %.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import chat_ids, generate, load_policy, load_tokenizer
from plumbing.files import check_place, write_whole
from toy.world import score

ANSWERS, TOKENS, ROWS = 4, 24, 256  # per prompt; of an answer; prompts sampled at a time


def main(sft_model, data, out, seed):
    tokenizer = load_tokenizer(sft_model)
    policy, rng = load_policy(sft_model, tokenizer, torch.float32), np.random.default_rng(seed)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    check_place(out, "--out")
    lines = []
    for start in range(0, len(rows), ROWS):
        part = rows[start:start + ROWS]
        ids = [chat_ids(tokenizer, [{"role": "user", "content": row["instruction"]}]) for row in part]
        answers = generate(policy, [p for p in ids for _ in range(ANSWERS)],
                           rng.integers(2**62, size=ANSWERS * len(part)), TOKENS, 1.0, tokenizer, "cpu")
        for i, row in enumerate(part):
            completions = []
            for answer in answers[ANSWERS * i:ANSWERS * (i + 1)]:
                text = tokenizer.decode(answer, skip_special_tokens=True)
                completions.append({"model": "sft", "response": text,
                                    "overall_score": score(row["instruction"], text, rng)})
            lines.append(json.dumps({**row, "completions": completions}) + "\n")
    write_whole(out, "".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sft_model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
