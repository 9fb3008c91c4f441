"""What a chat template and a tokenizer make of people's texts: renderings, ids, the ends of answers."""

import functools
import json
from datetime import datetime
from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from plumbing.errors import BadInput, loading, one_line
from plumbing.ranks import gather_rows


class BadText(BadInput):
    """A text or a chat that cannot become token ids. `reason` is for those who count what they leave out."""

    def __init__(self, text, reason):
        super().__init__(f"{one_line(text)[:80]!r}: {reason}; take it out or change it.")
        self.reason = reason


def readable(function, *args):
    """function(*args), or None where a text among them cannot become token ids."""
    try:
        return function(*args)
    except BadText:
        return None


# ---- the date in a template --------------------------------------------------------------------------------

RUN = {}  # "date": what templates are told, one for all of a run


def start_date(folder, resume):
    """The date of a run's first start, for all its renderings: a resumed run has it from its args.json."""
    date = datetime.now().isoformat(timespec="seconds")
    try:
        date = date_of(json.loads((folder / "args.json").read_text())) or date if resume else date
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        pass  # no run is there, or it has rendered no date
    RUN["date"], *_ = gather_rows([date])  # ranks may start on both sides of midnight


def run_date():
    return RUN.setdefault("date", datetime.now().isoformat(timespec="seconds"))


def date_of(settings):
    """The date in a gvm.json, rm.json or args.json, None in an older one; ValueError where it is none."""
    date = settings.get("date")
    return date and datetime.fromisoformat(date).isoformat()


def dated(template, date):
    """The template with its strftime_now, a function of the clock, replaced by a macro of one date."""
    when, formats = datetime.fromisoformat(date), [*"aAbBcdfHIjmMpSUwWxXyYZ", *"-d -m -H -I -j %".split()]
    swaps = "".join(f"|replace({'%' + f!r},{when.strftime('%' + f)!r})" for f in formats)
    return "{%- macro strftime_now(format) -%}{{ format" + swaps + " }}{%- endmacro -%}" + template


# ---- text to ids -------------------------------------------------------------------------------------------

def render(tokenizer, chat, prompt, **how):
    """A chat as text; prompt: up to where the next answer starts."""
    template = tokenizer.chat_template
    if "strftime_now" in template:
        template = dated(template, getattr(tokenizer, "date", None) or run_date())
    try:
        return tokenizer.apply_chat_template(chat, chat_template=template, add_generation_prompt=prompt,
                                             **{"tokenize": False, **how})
    except MemoryError:  # what check_limits looks for
        raise
    except Exception as e:  # a template is a program of its author's, and can fail in any way
        raise BadText(chat[-1]["content"], f"the chat template fails on it ({one_line(e)})") from None


def rendered_ids(tokenizer, chat, prompt, **how):
    """Token ids of a chat. The template writes its control tokens itself; one that is spelt out in a message
    is read as text."""
    text, spelt = render(tokenizer, chat, prompt, **how), " ".join(message["content"] for message in chat)
    if not any(token in spelt for token in control_tokens(tokenizer).values()):
        return tokenizer(text, add_special_tokens=False).input_ids
    own, tokenizer.chat_control_tokens = tokenizer.chat_control_tokens, [*control_tokens(tokenizer).values()]
    try:
        return render(tokenizer, chat, prompt, tokenize=True, return_dict=False,
                      sanitize_control_tokens=True, **how)
    except BadText:
        raise BadText(chat[-1]["content"], SPELT) from None
    finally:
        tokenizer.chat_control_tokens = own


def text_ids(tokenizer, text):
    """Token ids of a text in which no control token is one, even where it is spelt out."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if control_tokens(tokenizer).keys() & ids:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if control_tokens(tokenizer).keys() & ids:
            raise BadText(text, SPELT)
    return ids


def whole_chat_ids(tokenizer, prompt, ids, text):
    """Token ids of prompt and answer as the template renders a whole chat; without what closes a turn where
    the answer was cut.

    ids: the answer's own, with an end where it was not cut. They stay in the place of the same text where
         prompt and text are tokenized there as they are apart;  text: what they say, None: it is decoded
    """
    text = answer_text(tokenizer, ids) if text is None else text
    chat, cut = [*prompt, {"role": "assistant", "content": text}], not (ids and ended(tokenizer, ids))
    whole = readable(functools.partial(rendered_ids, continue_final_message=True), tokenizer, chat,
                     False) if cut else None
    whole = whole or rendered_ids(tokenizer, chat, prompt=False)
    before, plain = readable(rendered_ids, tokenizer, prompt, True) or [], text_ids(tokenizer, text)
    behind = len(before) + len(plain)
    if whole[:behind] == before + plain:
        return before + (ids if cut else ids[:-1]) + whole[behind:]
    return whole


def legible(tokenizer, text):
    """A sampled text, which must be read: without the control tokens that are spelt out in it where the
    tokenizer cannot read them as text."""
    while readable(text_ids, tokenizer, text) is None:
        before = text
        for token in control_tokens(tokenizer).values():
            text = text.replace(token, "")
        if text == before:
            raise BadText(text, SPELT)
    return text


SPELT = "a control token is spelt out in it, which the tokenizer cannot read as text"


def control_tokens(tokenizer):
    """{id: text} of what only templates and ends of answers may be."""
    ends = end_ids(tokenizer)
    return {**special_tokens(tokenizer), **dict(zip(ends, tokenizer.convert_ids_to_tokens(ends)))}


@functools.lru_cache(maxsize=16)
def special_tokens(tokenizer):
    """Without the one for unknown words, where it has no other use."""
    unknown = {tokenizer.unk_token} - {tokenizer.eos_token, tokenizer.bos_token}
    named = set(tokenizer.all_special_tokens)
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items()
            if (token.special or token.content in named) and token.content not in unknown}


# ---- the ends of answers -----------------------------------------------------------------------------------

def end_ids(tokenizer):
    """All ids that end an answer: the one that is trained, first, and the model's others, see read_ends."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *getattr(tokenizer, "other_ends", ())]))


def end_answers(tokenizer, tail, path, flag):
    """Set eos_token, the end that is trained: the special token that the template writes behind an answer
    (`tail`). Where it shows none: the tokenizer's own, or the model's where that does not know this one."""
    with loading(path, flag):
        ids = tokenizer(tail.strip(), add_special_tokens=False).input_ids[:1]
        tokenizer.other_ends = model_ends(path, len(tokenizer))
    special = special_tokens(tokenizer)
    if not special.keys() & ids and tokenizer.eos_token_id not in tokenizer.other_ends:
        ids = tokenizer.other_ends
    tokenizer.eos_token = next((special[i] for i in ids if i in special), tokenizer.eos_token)


def model_ends(path, vocabulary):
    """The ids at which the model of a folder or hub id stops by itself, a list; [] where there is no model.
    As in transformers, config.json counts where there is no generation_config.json."""
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        if (Path(path) / "generation_config.json").exists():
            raise
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError):  # an adapter, or a tokenizer alone
            return []
        ends = GenerationConfig.from_model_config(config).eos_token_id
    return [i for i in (ends if isinstance(ends, list) else [ends])
            if isinstance(i, int) and 0 <= i < vocabulary]


def ended(tokenizer, ids):
    """Whether a sampled answer was not cut."""
    return ids[-1] in end_ids(tokenizer)


def as_sampled(tokenizer):
    """The tokenizer, which no longer tidies the spaces of what it decodes: a text is what was sampled."""
    tokenizer.clean_up_tokenization_spaces = False
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if hasattr(decoder, "cleanup"):  # WordPiece has a switch of its own
        decoder.cleanup = False
    return tokenizer


def answer_text(tokenizer, ids):
    """What a sampled answer says, without its end."""
    ids = ids[:-1] if ids and ended(tokenizer, ids) else ids
    return tokenizer.decode(ids, skip_special_tokens=True)
