"""What label.py and continuations.py share: named policies, the settings of work on them, scores."""

import gc
import hashlib
import inspect
import json
import sys
from collections import namedtuple

import numpy as np
import torch
import torch.distributed as dist

from common import chat_ids, load_reward_model, load_tokenizer, reward_scores
from plumbing.args import load_numbers, load_plug, split_words
from plumbing.checks import check_model, fingerprint, tokenizer_fingerprint, weights_fingerprint
from plumbing.errors import BadInput
from plumbing.files import read_rows, write_whole
from plumbing.folders import take_lock
from plumbing.inputs import room
from plumbing.kept import settings_that_differ
from plumbing.rows import reward_chat
from plumbing.texts import readable

Policy = namedtuple("Policy", "folder system temperature")
SCORING = {"reward", "answers", "range"}  # settings that change no sampled answer


# ---- policies ----------------------------------------------------------------------------------------------

def policies_of(words, temperatures):
    """{name: Policy} of --policies. One without a temperature of its own is one at each of --temperatures."""
    found = []
    for word in words:
        if word.endswith(".json"):
            found += [entry_of(*row) for row in read_rows(word)]
        else:
            found += [(name, Policy(folder, "", None)) for name, folder in split_words("--policies", [word])]
    crossed = [(name if policy.temperature is not None else f"{name}@{t:g}", policy._replace(temperature=t))
               for name, policy in found
               for t in ([policy.temperature] if policy.temperature is not None else temperatures)]
    if len(dict(crossed)) < len(crossed):
        raise BadInput("--policies: two of them have one name; give each its own.")
    return dict(crossed)


def entry_of(where, row):
    """(name, Policy) of a row of a file of policies."""
    name, folder, system, t = (row.get(key) for key in ("name", "model", "system", "temperature"))
    number = isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t < float("inf")
    if not (isinstance(name, str) and name and isinstance(folder, str) and folder
            and isinstance(system, str | None) and (t is None or number)
            and row.keys() <= {"name", "model", "system", "temperature"}):
        raise BadInput(f'{where}: expected {{"name": "..", "model": "..", "system": "..", "temperature": '
                       f"1.0}}, the last two where wanted.")
    return name, Policy(folder, system or "", t)


def turns_for(prompt, system):
    """What a policy reads: the prompt's turns behind its own system prompt."""
    return [{"role": "system", "content": system}, *prompt] if system else prompt


def tokenizers_of(policies, args):
    """{folder: tokenizer} of the policies, checked from their small files. A template that leaves out system
    turns is refused: it would make several policies one."""
    tokenizers = {policy.folder: load_tokenizer(policy.folder, "--policies") for policy in policies.values()}
    for folder, tokenizer in tokenizers.items():
        check_model(folder, tokenizer, "--policies", *room(args))
    for name, policy in policies.items():
        asked = [{"role": "user", "content": "a"}]
        if policy.system and (readable(chat_ids, tokenizers[policy.folder], turns_for(asked, policy.system))
                              in (None, chat_ids(tokenizers[policy.folder], asked))):
            raise BadInput(f"--policies: {name} has a system prompt, which the chat template of "
                           f"{policy.folder} leaves out; take another model or no system prompt.")
    return tokenizers


# ---- settings ----------------------------------------------------------------------------------------------

def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


def sampled_by(policies, tokenizers, reward_model, args):
    """Settings {name: value} of what samples from policies and scores what they say. Policies are known by
    their weights and vocabulary, not by their files: these have the version of the library in them."""
    models = {folder: [weights_fingerprint(folder), tokenizer_fingerprint(tokenizer)]
              for folder, tokenizer in tokenizers.items()}
    return {"reward": [reward_model, fingerprint(reward_model)] if reward_model else
                      [args.reward_fn, source_of(load_plug(args.reward_fn, "--reward_fn"))],
            "policies": {name: [*policy, *models[policy.folder]] for name, policy in policies.items()},
            "response_length": args.response_length, "dtype": args.dtype, "seed": args.seed}


def source_of(function):
    """The file that a function is in: a changed rule is another one."""
    try:
        return inspect.getsource(sys.modules[function.__module__])
    except (AttributeError, KeyError, OSError, TypeError):
        return ""


def lock_file(out):
    """--out, a file to write, is this run's alone."""
    if out.is_dir() or not out.name:
        raise BadInput(f"--out {out} is a folder: name a file in it.")
    take_lock(out.with_name(f".{out.name}.lock"), f"--out {out}")


def check_settings(out, settings):
    """Whether the file is finished already; BadInput where it was begun with other settings.

    settings: {name: digest}. Of a file that is not finished only the sampling ones must be the same: another
              reward model may score what is sampled
    """
    record = out.with_name(f"{out.name}.settings")
    differ = settings_that_differ(record, settings, out)
    finished = out.exists()
    if differ is None and finished:
        raise BadInput(f"--out {out}: exists, and was not written by this script; name another file.")
    binding = [key for key in differ or () if finished or key not in SCORING]
    if binding:
        raise BadInput(f"--out {out}: begun with other settings ({', '.join(differ)}); delete {record} and "
                       f"{out}, or name another file.")
    dist.barrier()  # all have looked, before the first one writes
    if dist.get_rank() == 0 and differ != []:
        write_whole(record, json.dumps(settings, indent=1))
    return finished


# ---- scores ------------------------------------------------------------------------------------------------

def let_go():
    """Free the memory of the last model at once: the next one needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def score(answers, prompts, kept, args, reward_model, device):
    """Append the score of each answer to `kept`; answers: {key: (text of the prompt, policy, answer,
    truncated)}. Our reward models read them as complete answers, EOS behind them, as every stage will."""
    todo = [key for key in answers if key not in kept.rows]
    if not todo:
        return
    if reward_model is None:
        plug = load_numbers(args.reward_fn, "--reward_fn")

        def by_function(part):
            rows = [{"prompt": prompts[text]["prompt"], "group": prompts[text]["group"], "response": answer,
                     "truncated": cut} for text, _, answer, cut in map(answers.get, part)]
            return [{"key": key, "score": x} for key, x in zip(part, plug(rows, None, None))]
        return kept.work(todo, args.micro_batch, by_function, "scores", device)
    model, tokenizer, *_ = load_reward_model(reward_model, getattr(torch, args.dtype))
    model = model.to(device)

    def scores(part):
        chats = [reward_chat(tokenizer, prompts[a[0]]["prompt"], *a[2:]) for a in map(answers.get, part)]
        found = reward_scores(model, tokenizer, chats, device, args.micro_batch)
        if not np.isfinite(found).all():
            bad = next(chat for chat, x in zip(chats, found) if not np.isfinite(x))
            raise BadInput(f"--reward_model {reward_model}: its score of an answer to "
                           f"{bad[0][-1]['content'][:80]!r} is not finite; take another, or --dtype float32 "
                           f"(which samples anew).")
        return [{"key": key, "score": x} for key, x in zip(part, found)]
    kept.work(todo, args.micro_batch, scores, "scores", device)
