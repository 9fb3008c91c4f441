"""Write the toy world to disk: model, tokenizer and data files, in the formats that real ones have.

    python -m toy.make [--out toy/build] [--seed 0]

<out>/model/              a tiny random LlamaForCausalLM and a word-level tokenizer with a chat template
<out>/preferences.jsonl   UltraFeedback columns, 4 of the 8 training policies per row, 12 rows per prompt
<out>/unseen.jsonl        the same columns, the three policies that are not for training; for evaluation only
<out>/sft.jsonl           instruction, output: answers of skill 0.7, prompts of the SFT share only
Each row also has `group`, the fact that it is about: rows of one group ask the same thing.

The same seed writes the same files. They are written to a temporary folder that is renamed at the end; an
existing build is replaced, and a folder that is no build is left alone.
"""
import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plumbing.data import split_of
from plumbing.errors import writing
from plumbing.ranks import quiet
from toy.defaults import SPLIT_SEED
from toy.world import (FACT_OF, FACTS, PROMPTS, SFT, TRAINING, UNSEEN, group_of, sample_answer, score,
                       vocabulary)

SHARES = ("sft", "value", "rl", "test")
SPLIT_CANDIDATES = 200
POLICIES_PER_ROW = 4
ROWS_PER_PROMPT = 12                    # so each training policy answers every prompt about 6 times
UNSEEN_ROWS_PER_PROMPT = 2
SFT_ANSWERS_PER_PROMPT = 32

# "<bos> <turn> question <turn> answer <eos> <turn> next question <turn>". A rendered chat ends where the
# answer is due, with or without add_generation_prompt: a prompt is always the beginning of the chat with its
# answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' <turn> ' + message['content'] + ' <turn>' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('the toy chat knows only user and assistant') }}{% endif %}{% endfor %}")


# ---- model ----

def make_tokenizer():
    """One word, one token. Decoding joins the tokens by single spaces, so texts survive the round trip."""
    words = {word: i for i, word in enumerate(vocabulary())}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=["<turn>"], clean_up_tokenization_spaces=False, model_max_length=512,
        model_input_names=["input_ids", "attention_mask"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, seed):
    """A random Llama of 160 thousand parameters that knows nothing yet."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlamaForCausalLM(config)


# ---- data ----

def missing_facts(seed):
    """Number of (share, fact) pairs without a prompt when the prompts are split by this seed."""
    return len(SHARES) * len(FACTS) - len({(split_of(prompt, seed), FACT_OF[prompt]) for prompt in PROMPTS})


def choose_split_seed():
    """The smallest seed under which every fact occurs in every share, else the one missing fewest."""
    return min(range(SPLIT_CANDIDATES), key=missing_facts)


def preference_row(prompt, policies, rng):
    """One UltraFeedback row: each policy answers the prompt once."""
    completions = []
    for policy in policies:
        response = sample_answer(policy, prompt, rng)
        completions.append(
            {"model": policy.name, "response": response, "overall_score": score(prompt, response, rng)})
    return {"source": "toy", "instruction": prompt, "models": [policy.name for policy in policies],
            "completions": completions, "group": group_of(prompt)}


def preference_rows(policies, rows_per_prompt, rng):
    """Rows of all prompts; each row draws its policies, without replacement and in random order."""
    size = min(POLICIES_PER_ROW, len(policies))
    rows = []
    for prompt in PROMPTS:
        for _ in range(rows_per_prompt):
            drawn = [policies[i] for i in rng.choice(len(policies), size=size, replace=False)]
            rows.append(preference_row(prompt, drawn, rng))
    return rows


def sft_rows(split_seed, rng):
    """Answers of one skill, the two styles in turn, to the prompts of the SFT share."""
    rows = []
    for prompt in PROMPTS:
        if split_of(prompt, split_seed) == "sft":
            for i in range(SFT_ANSWERS_PER_PROMPT):
                output = sample_answer(SFT[i % len(SFT)], prompt, rng)
                rows.append({"instruction": prompt, "output": output, "group": group_of(prompt)})
    return rows


# ---- disk ----

def write_jsonl(path, rows):
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_all(folder, seed):
    """Write model and data into an empty folder; returns the number of rows of each file."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    make_model(tokenizer, seed).save_pretrained(folder / "model")
    files = {
        "preferences.jsonl": preference_rows(TRAINING, ROWS_PER_PROMPT, np.random.default_rng([seed, 0])),
        "unseen.jsonl": preference_rows(UNSEEN, UNSEEN_ROWS_PER_PROMPT, np.random.default_rng([seed, 1])),
        "sft.jsonl": sft_rows(SPLIT_SEED, np.random.default_rng([seed, 2])),
    }
    for name, rows in files.items():
        write_jsonl(folder / name, rows)
    return {name: len(rows) for name, rows in files.items()}


def main(out, seed):
    """Build next to the target, then rename, so that a build is either whole or absent."""
    out = Path(out)
    quiet()
    if out.exists() and not (out / "preferences.jsonl").exists():
        raise SystemExit(f"--out {out} exists and is not a toy build: name another folder")
    split_seed = choose_split_seed()
    if split_seed != SPLIT_SEED:
        raise SystemExit(f"SPLIT_SEED in toy/defaults.py is {SPLIT_SEED}, the best is {split_seed}")
    with writing(out, "what was there is kept"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".toy-") as scratch:
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            fresh.mkdir()
            counts = write_all(fresh, seed)
            if out.exists():
                out.rename(old)
            fresh.rename(out)
    for name, count in counts.items():
        print(f"{out / name}: {count} rows, {(out / name).stat().st_size / 1e6:.1f} MB")
    shares = Counter(split_of(prompt, split_seed) for prompt in PROMPTS)
    print(f"{out / 'model'}: tokenizer of {len(vocabulary())} words, random Llama")
    sizes = ", ".join(f"{share} {shares[share]}" for share in SHARES)
    print(f"split seed {split_seed}, prompts per share: {sizes}; "
          f"{missing_facts(split_seed)} of {len(SHARES) * len(FACTS)} (share, fact) pairs are empty")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m toy.make", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="toy/build", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the answers and of the model's weights")
    args = parser.parse_args()
    main(args.out, args.seed)
