"""What is refused before a model is loaded, and the small files that say what a folder holds."""

import hashlib
import json
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer
from transformers.utils import cached_file, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from plumbing.errors import BadInput, loading, one_line
from plumbing.files import read_object
from plumbing.folders import base_of, model_place
from plumbing.limits import check_limits
from plumbing.ranks import gather_rows, print0
from plumbing.texts import BadText, date_of, end_ids, render, special_tokens


def pretrained(cls, path, flag="--model", **kwargs):
    """cls.from_pretrained of a config, a tokenizer or a model. Nothing of a model's own code is run, and no
    pickle is read: weights are safetensors files of the model's folder."""
    with loading(path, flag):
        check_links(path, flag)
        if cls not in (AutoConfig, AutoTokenizer):
            kwargs["use_safetensors"] = True
            check_shards(path)
        return cls.from_pretrained(path, trust_remote_code=False, **kwargs)


def check_links(folder, flag):
    """Refuse a folder of which a file is a link to nothing: transformers passes over some in silence."""
    for file in sorted(Path(folder).glob("*")):
        if file.suffix in READ and not file.exists():
            raise BadInput(f"{flag} {folder}: its {file.name} is a link to nothing, as in a cache that was "
                           f"cleared; download or copy the model again.")


READ = {".safetensors", ".json", ".jinja", ".model", ".txt"}  # kinds of files that a model is read from


def check_shards(path):
    """Refuse an index of weights that names a file of another kind or outside of the model's folder; the
    files in a snapshot of the hub's cache are links to the `blobs` beside it."""
    index = file_of(path, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return
    folder = Path(index).parent.resolve()
    homes = {folder, folder.parent.parent / "blobs"} if folder.parent.name == "snapshots" else {folder}
    for name in shards(index):
        if not name.endswith(".safetensors") or not homes & set((folder / name).resolve().parents):
            raise ValueError(f"its {SAFE_WEIGHTS_INDEX_NAME} names {name}, which is no safetensors file "
                             f"inside of this folder; links out of it are not followed")


def file_of(path, name):
    """Where a file of a model's folder or hub id is; None where it has none."""
    return cached_file(path, name, _raise_exceptions_for_gated_repo=False,
                       _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False)


def shards(index):
    """Names of the files that an index of weights names."""
    return sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))


def load_weights(cls, path, flag, new_head=False, **kwargs):
    """A model all of whose weights are in its files, with no other weights of a backbone beside them: a
    config of fewer layers would cut the model. new_head: its head may be missing, and is a random one then.
    """
    model, info = pretrained(cls, path, flag, output_loading_info=True, **kwargs)
    head = {name for name in info["missing_keys"] if re.match(r"(score|classifier)\.", name)}
    missing = sorted(set(info["missing_keys"]) - head)
    if head and not missing and not new_head:
        raise BadInput(f"{flag} {path}: not a reward model, it has no trained one-label head; train one with "
                       f"train_rm.py or name another.")
    if missing:  # transformers would draw them at random
        raise BadInput(f"{flag} {path}: weights are missing from its files ({one_line(missing)}); copy it "
                       f"again or choose another model.")
    backbone = {model.base_model_prefix, *dict(model.base_model.named_children())}
    left = sorted(name for name in info["unexpected_keys"]
                  if name.partition(".")[0] in backbone and not BUFFERS.search(name))
    if left:
        raise BadInput(f"{flag} {path}: its files hold {len(left)} weights that its config.json has no place "
                       f"for ({one_line(left)}): the two do not belong together; copy the model again.")
    check_reading(model, path, flag)
    return model


@torch.no_grad()
def check_reading(model, path, flag):
    """Refuse a model that says NaN, that is not causal (an encoder), or that left padding changes: what is
    read of a row would depend on what stands behind a token, or on the rows beside it."""
    ids = [i % model.config.get_text_config().vocab_size for i in range(3, 11)]
    with loading(path, flag):
        whole, padded, changed = (
            model.base_model(input_ids=torch.tensor([row]), attention_mask=torch.tensor([seen]),
                             position_ids=(torch.tensor([seen]).cumsum(-1) - 1).clamp(min=0),
                             use_cache=False).last_hidden_state[0, -len(ids):].float()
            for row, seen in ((ids, [1] * 8), ([0] * 5 + ids, [0] * 5 + [1] * 8),
                              (ids[:-1] + ids[:1], [1] * 8)))
    if not whole.isfinite().all():
        raise BadInput(f"{flag} {path}: the model does not say finite numbers: its weights, or some of them, "
                       f"are NaN or far too large; name another one.")
    limit = whole.std() * (1e-2 if model.dtype == torch.float32 else 0.3)
    if (whole - changed)[:-1].abs().max() > limit:
        raise BadInput(f"{flag} {path}: not a causal model ({model.config.model_type}): what it says of a "
                       f"token depends on later ones; name a decoder.")
    off = (whole - padded).square().mean(-1)
    # In bfloat16 rounding alone may turn over a token that training has never seen; padding touches them all
    if (off.mean() if model.dtype == torch.float32 else off.median()).sqrt() > limit:
        raise BadInput(f"{flag} {path}: padding on the left changes what this model "
                       f"({model.config.model_type}) says of a row; name another one.")


# What older files keep beside the weights: masks and tables that are computed today
BUFFERS = re.compile(r"(att[a-z]*\.(bias|masked_bias|causal_mask)|inv_freq|(cos|sin)_cached|position_ids)$")


def load_adapter(base, folder, flag, **how):
    """`base` with the adapter and head of a folder, all of which are there and have their place in it.
    how: of PeftModel.from_pretrained"""
    from peft import get_peft_model_state_dict, PeftModel
    with loading(folder, flag), safe_open(Path(folder) / "adapter_model.safetensors", "pt") as f:
        model = PeftModel.from_pretrained(base, folder, **how)
        differ = sorted(set(get_peft_model_state_dict(model)) ^ set(f.keys()))
    if differ:
        raise BadInput(f"{flag} {folder}: its adapter does not fit its base model ({one_line(differ)}); "
                       f"train it again.")
    return model


def check_class(auto, path, flag):
    """Refuse a model whose family has no class with the head that is to be put on it. auto: the auto class
    for values or for scores; None, in stages that put none on it, warns where there is none for values."""
    config, kind = pretrained(AutoConfig, path, flag), auto or AutoModelForTokenClassification
    if type(config) in kind._model_mapping:
        return
    why = (f"{flag} {path}: transformers has no {kind.__name__.removeprefix('AutoModelFor')} class for its "
           f"family, {config.model_type}")
    if auto:
        raise BadInput(f"{why}: no {'reward model' if 'Sequence' in kind.__name__ else 'value model'} can be "
                       f"trained on it; start from a model of another family.")
    print0(f"warning: {why}: no GVM can be trained on what comes out")


def rendered_end(tokenizer, path, flag, asks=True):
    """What the chat template puts behind an assistant's text; BadInput where it fails or leaves texts out.
    asks: whether prompts are rendered, too, which must end with what stands before an answer"""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
    check_limits(lambda: render(tokenizer, chat, prompt=False), f"{flag} {path}: its chat template")
    try:
        before, answer, tail = render(tokenizer, chat, prompt=False).rpartition("ANSWER")
        before = before.strip()
        prompt = render(tokenizer, chat[:1], prompt=True).strip() if asks else before
        ignored = prompt != before and prompt == render(tokenizer, chat[:1], prompt=False).strip()
    except BadText as e:
        raise BadInput(f"{flag} {path}: for a user and an assistant turn {e.reason}.") from None
    wrong = ("leaves out the text of a turn" if not answer or "question" not in before else
             "leaves out the text of a lone user turn" if "question" not in prompt else
             "ignores add_generation_prompt: what stands before an answer is in no prompt" if ignored else "")
    if wrong:
        raise BadInput(f"{flag} {path}: its chat template {wrong}; correct it or choose another model.")
    return tail


def check_tau(tokenizer, asked, path, flag):
    """Refuse a chat template that shows no earlier turns: tau would not be read."""
    chat = [{"role": role, "content": text}
            for role, text in (("user", "first"), ("assistant", "second"), ("user", "third"))]
    try:
        shown = render(tokenizer, chat, prompt=True)
    except BadText:
        shown = ""
    if not all(turn["content"] in shown for turn in chat):
        raise BadInput(f"{asked}: the chat template of {flag} {path} does not render earlier turns, and tau "
                       f"is such turns: use --k 0 or another model.")


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
    # Ids may have holes; a token that stands in no text may have no row, as the image's of Gemma 3 1B
    unused = special_tokens(tokenizer).keys() - {tokenizer.bos_token_id, tokenizer.pad_token_id,
                                                 *end_ids(tokenizer)}
    tokens_of = 1 + max(i for i in tokenizer.get_vocab().values() if i not in unused)
    if (getattr(config, "vocab_size", None) or tokens_of) < tokens_of:
        raise BadInput(f"{flag} {path}: the tokenizer has {len(tokenizer)} tokens, with ids up to "
                       f"{tokens_of - 1}, the model only {config.vocab_size}: they do not belong together.")
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
    check_base(folder, flag)


def base_record(base):
    """How gvm.json and rm.json record the model that their weights build on."""
    return {"base_model": model_place(base), "base_fingerprint": weights_fingerprint(base)}


def check_base(folder, flag):
    """Refuse a GVM or LoRA reward model whose base is no longer the one that it was trained on."""
    for file in ("gvm.json", "rm.json"):
        try:
            settings = json.loads((Path(folder) / file).read_text())
            base = settings["base_model"] if file == "gvm.json" else base_of(folder)  # as they are loaded
            recorded = settings.get("base_fingerprint")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # it is not there, or its reader says what is wrong with it
        if recorded is None:
            print0(f"warning: {folder}/{file} does not say which weights it was trained on (an older "
                   f"version wrote it): whether {base} still has them is not known")
        elif recorded != weights_fingerprint(base, f"base model of {flag} {folder}:"):
            raise BadInput(f"{flag} {folder}: its base model {base} has other weights than when it was "
                           f"trained; train it again, or put these weights back.")


def weights_fingerprint(model, flag="--model"):
    """Of the weights of a folder or hub id: of each file its size and 16,384 pieces of 4 KiB, which is all of
    it up to 64 MiB."""
    files, crc = sorted(Path(model).glob("*.safetensors")), 0
    if not Path(model).is_dir():
        with loading(model, flag):
            index = file_of(model, SAFE_WEIGHTS_INDEX_NAME)
            names = shards(index) if index else (SAFE_WEIGHTS_NAME, "adapter_model.safetensors")
            files = [Path(file) for file in (file_of(model, name) for name in names) if file]
    for path in files:
        size = path.stat().st_size
        with loading(model, flag), open(path, "rb") as f:
            crc = zlib.crc32(f"{path.name} {size}".encode(), crc)
            for place in range(0, size, max(1 << 12, size >> 14)):
                f.seek(place)
                crc = zlib.crc32(f.read(1 << 12), crc)
    return crc


def gvm_settings(folder, flag="--value_model", critic=False):
    """gvm.json of a folder that train_gvm.py wrote: base model, K, tau's budget, tokenizer, template.
    critic: whether one may be read that train_ppo.py kept"""
    def checked(settings):
        wrong = [name for name, kind in GVM_SETTINGS.items() if not isinstance(settings[name], kind)
                 or (kind is int and settings[name] < (name == "context"))]
        date_of(settings)
        reward = settings["reward"]
        if reward["kind"] != "preference" and not 0 < float(reward["scale"]) + 0 * float(reward["center"]):
            wrong.append("reward")
        if wrong:
            raise ValueError(f"gvm.json: wrong {', '.join(wrong)}")
        return settings
    settings = read_object(Path(folder) / "gvm.json", f"{flag} {folder}: not a folder that train_gvm.py "
                           "wrote", "train it again or name another", checked)
    settings = {"critic": False, **settings, "folder": str(folder)}
    if not settings["critic"]:
        check_head(folder, flag)
    elif not critic:
        raise BadInput(f"{flag} {folder}: a critic of train_ppo.py, which values the state before each token "
                       f"and no whole answer: `evaluate.py gvm` and --critic_model read it; name a GVM here.")
    return settings


def read_as_gvm(tokenizer, settings, flag="--value_model"):
    """Let a tokenizer render as it did while the GVM of gvm_settings was trained: its template, its date."""
    check_model(settings["base_model"], tokenizer, f"base model of {flag} {settings['folder']}:")
    tokenizer.chat_template, tokenizer.date = settings["chat_template"], settings.get("date")
    rendered_end(tokenizer, settings["folder"], flag)


GVM_SETTINGS = {  # name in gvm.json: type
    **dict.fromkeys(("k", "tau_question_tokens", "tau_answer_tokens", "max_length", "context", "split_seed"),
                    int),
    **dict.fromkeys(("base_model", "chat_template", "tokenizer_fingerprint"), str), "reward": dict}


def rm_settings(folder, flag="--reward_model"):
    """rm.json of a folder that train_rm.py wrote; {} for any other model, whose scores keep their scale."""
    if os.path.lexists(Path(folder) / "gvm.json"):
        raise BadInput(f"{flag} {folder}: a value model; a reward model is what train_rm.py writes.")
    if not os.path.lexists(Path(folder) / "rm.json"):
        return {}

    def checked(settings):
        center, scale, date = float(settings["center"]), float(settings["scale"]), date_of(settings)
        if not (math.isfinite(center) and 0 < scale < math.inf):
            raise ValueError(f"center {center}, scale {scale}")
        return {"center": center, "scale": scale, "date": date}
    return read_object(Path(folder) / "rm.json", f"{flag} {folder}: its rm.json cannot be read",
                       "train it again", checked)


def reward_scale(folder, flag="--reward_model"):
    """(center, scale) of the scores, as train_rm.py recorded them; (0, 1) for any other model."""
    settings = rm_settings(folder, flag)
    return settings.get("center", 0.0), settings.get("scale", 1.0)


def tokenizer_fingerprint(tokenizer):
    """Changes when ids change meaning; two models with unequal ones cannot read each other's token ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def fingerprint(model, part=1 << 20):
    """Of a model's folder: name, size, first and last MiB of its weights and settings; a hub id is itself."""
    crc = 0
    for path in sorted(Path(model).glob("*")):
        named = path.suffix in (".safetensors", ".json", ".jinja") and path.stem not in ("args", "finished")
        if named and not path.is_dir():
            with loading(model, "model"), open(path, "rb") as f:
                size = path.stat().st_size
                crc = zlib.crc32(f"{path.name} {size}".encode() + f.read(part), crc)
                f.seek(max(0, size - part))
                crc = zlib.crc32(f.read(part), crc)
    return crc or str(model)


def finite(numbers, model, what):
    """The numbers that a model said; BadInput where one of them is not finite."""
    if not np.isfinite(np.concatenate([np.ravel(x) for x in numbers])).all():
        raise BadInput(f"{model}: its {what} are not finite numbers: its weights, or some of them, are NaN "
                       f"or far too large; name another one.")
    return numbers


def check_finite(number, step, what, rows):
    """End the run when a number that all ranks share is not finite, before it reaches the weights.

    rows: what this rank knows about the rows that are to blame, a list of texts
    """
    if not math.isfinite(number):
        raise BadInput(f"Step {step}: {what} is not finite (rows {'; '.join(gather_rows(rows)[:8])}): it has "
                       f"not reached the weights, and nothing of this step is saved; look at these rows, or "
                       f"lower --lr. --resume True goes on from the last checkpoint.")

