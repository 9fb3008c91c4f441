"""Token values for people: colours on a terminal and a page of their own."""

import html

import numpy as np


def token_texts(tokenizer, ids):
    """What each token adds to the text. A character that takes several tokens appears at the last."""
    starts = [tokenizer.decode(ids[:t], clean_up_tokenization_spaces=False) for t in range(len(ids) + 1)]
    starts = [text.rstrip("\ufffd") for text in starts]  # the mark of half a character
    return [after[len(before):] for before, after in zip(starts, starts[1:])]


def colour(value, low, high):
    """[red, green, blue], light enough for dark text: from red at low over pale yellow to green at high."""
    x = 0.5 if high == low else (value - low) / (high - low)
    ends = (244, 255, 140), (150, 247, 210), (140, 205, 150)
    return [round(np.interp(x, (0, 0.5, 1), channel)) for channel in ends]


def terminal_text(answer, low, high, coloured):
    """Each token in black on the colour of its value, by ANSI escape codes, or with its value in brackets."""
    parts = []
    for text, value in zip(["(question) ", *answer["tokens"]], answer["values"]):
        text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)  # no codes of its own
        paint = "\033[48;2;{};{};{}m\033[38;2;0;0;0m".format(*colour(value, low, high))
        parts.append(f"{paint}{text}\033[0m" if coloured else f"{text}[{value:+.2f}]")
    return "".join(parts)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What each token is worth</title>
<style>
body { font: 17px/1.3 system-ui, sans-serif; color: #111; background: #fff; max-width: 60rem; padding: 1rem }
p, span { overflow-wrap: anywhere; white-space: pre-wrap }
span { display: inline-block; margin: .1rem; padding: .1rem; text-align: center; vertical-align: top }
small { display: block; font-size: .68rem; color: #333 }
</style>
<p>The number under a token is the value after it, that on the question the value before anything is said.</p>
"""


def limit_of(result, limit):
    """The smallest (min) or largest (max) value of any token of a result's responses."""
    return limit(v for answer in result["responses"] for v in answer["values"])


def token_spans(answer, low, high):
    """HTML: every token on the colour of its value, with the number under it. Texts are escaped."""
    parts = []
    for text, value in zip(["question", *answer["tokens"]], answer["values"]):
        shown = html.escape(text.strip(" ").replace("\n", "\u23ce")) or "\u00a0"
        rgb = "rgb({},{},{})".format(*colour(value, low, high))
        parts.append(f'<span style="background:{rgb}">{shown}<small>{value:+.2f}</small></span>')
    return "\n".join(parts)


def page(result, low, high):
    """A page that needs no network: every token with its value under it. All texts are escaped."""
    parts = [PAGE, f"<p>tau: {result['k']} answers of {html.escape(str(result['tau_policy']))}</p>",
             f"<p>{html.escape(result['question'])}</p>"]
    for answer in result["responses"]:
        parts.append(f"<h2>{html.escape(answer['label'])}: mean {answer['mean']:+.2f}</h2>")
        parts.append(token_spans(answer, low, high))
    return "\n".join(parts)
