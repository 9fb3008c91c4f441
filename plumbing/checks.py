"""What is refused before a model is loaded, and the small files that say what a folder holds."""

import hashlib
import json
import math
import re
import zlib
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from plumbing.errors import BadInput, loading, one_line
from plumbing.folders import base_of
from plumbing.limits import check_limits
from plumbing.ranks import gather_rows


def pretrained(cls, path, flag="--model", **kwargs):
    """cls.from_pretrained of a config, a tokenizer or a model. Nothing of a model's own code is run, and no
    pickle is read: weights are safetensors."""
    if cls not in (AutoConfig, AutoTokenizer):
        kwargs["use_safetensors"] = True
    with loading(path, flag):
        return cls.from_pretrained(path, trust_remote_code=False, **kwargs)


def load_weights(cls, path, flag, new_head=False, **kwargs):
    """A model all of whose weights are in its files; with new_head its head may be missing: a random one."""
    model, info = pretrained(cls, path, flag, output_loading_info=True, **kwargs)
    missing = [name for name in info["missing_keys"]
               if not (new_head and re.match(r"(score|classifier)\.", name))]
    if missing:  # transformers would draw them at random
        raise BadInput(f"{flag} {path}: weights are missing from its files ({one_line(missing)}); copy it "
                       f"again or choose another model.")
    return model


def rendered_end(tokenizer, path, flag):
    """What the chat template puts behind an assistant's text; BadInput where it fails or leaves that out."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
    check_limits(lambda: tokenizer.apply_chat_template(chat, tokenize=False),
                 f"{flag} {path}: its chat template")
    try:
        before, answer, tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("ANSWER")
        if not answer:
            raise ValueError("the assistant's text is not in what it renders")
    except Exception as e:  # a template is a program of its author's, and can fail in any way
        raise BadInput(f"{flag} {path}: its chat template fails on a user and an assistant turn "
                       f"({one_line(e)}).") from None
    return tail


def check_model(path, tokenizer, flag, tokens=0, asked="", head=False):
    """Refuse, from its config alone, a model that lacks some of the tokenizer's tokens, or whose context is
    shorter than `tokens`, the sum of the flags `asked`. Returns the context, 10**9 where it has no limit.

    head: the model is to have a head for scores or values, and may be an adapter's folder
    """
    if base_of(path) != path and not head:
        raise BadInput(f"{flag} {path}: an adapter, and a policy is a whole model here: merge it into its "
                       f"base (peft's merge_and_unload) and name the result.")
    if base_of(path) != path:
        check_head(path, flag)
    config = pretrained(AutoConfig, base_of(path), flag).get_text_config()
    if (getattr(config, "vocab_size", None) or len(tokenizer)) < len(tokenizer):
        raise BadInput(f"{flag} {path}: the tokenizer has {len(tokenizer)} tokens, the model only "
                       f"{config.vocab_size}: they do not belong together.")
    context = getattr(config, "max_position_embeddings", None) or 10**9
    if tokens > context:
        raise BadInput(f"{asked}: {tokens} tokens are more than the {context} of {flag} {path}'s context: "
                       f"lower it.")
    return context


def check_head(folder, flag):
    """Refuse an adapter folder whose one-label head was not saved: it would silently be a random one."""
    with loading(folder, flag), safe_open(Path(folder) / "adapter_model.safetensors", "pt") as f:
        if not any(re.search(r"\.(score|classifier)\.weight$", key) for key in f.keys()):
            raise BadInput(f"{flag} {folder}: the head is missing from adapter_model.safetensors; train it "
                           f"again.")


def gvm_settings(folder, flag="--value_model"):
    """gvm.json of a folder that train_gvm.py wrote: base model, K, tau's budget, tokenizer, template."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / "gvm.json").read_text())
        wrong = [name for name, kind in GVM_SETTINGS.items() if not isinstance(settings[name], kind)
                 or (kind is int and settings[name] < (name == "context"))]
        if wrong:
            raise ValueError(f"gvm.json: wrong {', '.join(wrong)}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise BadInput(f"{flag} {folder}: not a folder that train_gvm.py wrote ({one_line(e)}).") from None
    check_head(folder, flag)
    return settings


GVM_SETTINGS = {  # name in gvm.json: type
    **dict.fromkeys(("k", "tau_question_tokens", "tau_answer_tokens", "max_length", "context", "split_seed"),
                    int),
    **dict.fromkeys(("base_model", "chat_template", "tokenizer_fingerprint"), str), "reward": dict}


def reward_scale(folder, flag="--reward_model"):
    """(center, scale) of the scores, as train_rm.py recorded them; (0, 1) for any other model."""
    if not (Path(folder) / "rm.json").exists():
        return 0.0, 1.0
    try:
        settings = json.loads((Path(folder) / "rm.json").read_text())
        center, scale = float(settings["center"]), float(settings["scale"])
        if not (math.isfinite(center) and 0 < scale < math.inf):
            raise ValueError(f"center {center}, scale {scale}")
        return center, scale
    except (ValueError, KeyError, TypeError, OverflowError) as e:
        raise BadInput(f"{flag} {folder}: its rm.json cannot be read ({one_line(repr(e))}); train it "
                       f"again.") from None


def tokenizer_fingerprint(tokenizer):
    """Changes when ids change meaning; two models with unequal ones cannot read each other's token ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def fingerprint(model, part=1 << 20):
    """Of a model's folder: name, size, first and last MiB of its weights and settings; a hub id is itself."""
    crc = 0
    for path in sorted(Path(model).glob("*")):
        if path.suffix in (".safetensors", ".json", ".jinja") and path.stem not in ("args", "finished"):
            size = path.stat().st_size
            with open(path, "rb") as f:
                crc = zlib.crc32(f"{path.name} {size}".encode() + f.read(part), crc)
                f.seek(max(0, size - part))
                crc = zlib.crc32(f.read(part), crc)
    return crc or str(model)


def check_finite(number, step, what, rows):
    """End the run when a number that all ranks share is not finite, before it reaches the weights.

    rows: what this rank knows about the rows that are to blame, a list of texts
    """
    if not math.isfinite(number):
        raise BadInput(f"Step {step}: {what} is not finite (rows {'; '.join(gather_rows(rows)[:8])}): the "
                       f"weights were not touched and the last checkpoint is good; look at these rows, or "
                       f"lower --lr.")

