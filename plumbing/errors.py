"""Errors are for people: one sentence that names the file, row or flag, and what to do."""

import contextlib
import re
from pathlib import Path

from safetensors import SafetensorError


class BadInput(SystemExit):
    """One sentence for the person at the terminal: Python prints it to stderr and exits with status 1."""


MADE_BY = {}  # folder of files that a command makes: the command


def made_by(path):
    """What to run first, where a path that is not there lies in a folder that a command makes; else ""."""
    return "".join(f"; run `{command}` first" for folder, command in MADE_BY.items()
                   if Path(folder) in Path(path).parents and not Path(path).exists())


def one_line(error):
    """The beginning of a foreign text, without what a terminal would take for a command or cannot show."""
    text = " ".join(str(error).split())[:200]
    return "".join(c if c.isprintable() else "?" for c in text) or type(error).__name__


@contextlib.contextmanager
def loading(path, flag):
    """What fails while a foreign folder or hub id is loaded ends in one sentence."""
    try:
        yield
    except Exception as e:  # any of a dozen classes of four libraries
        text = str(e).lower()
        if Path(path).exists():
            why = one_line(e)
        elif "gated" in text or "401" in text or "403" in text:
            why = "the repository is gated: accept its licence on huggingface.co and run `hf auth login`"
        else:
            why = f"no such folder here, and of the hub: {one_line(e)}"
        raise BadInput(f"{flag} {path}: cannot load it ({why}){made_by(path)}.") from None


KEPT = "the last complete checkpoint and model are kept, --resume True goes on"


@contextlib.contextmanager
def writing(path, then=KEPT):
    """What cannot be written (a full disk, a lost mount) ends in one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have classes of their own
        if LOST_RANK.search(str(e)):
            raise
        raise BadInput(f"{path}: could not be written ({one_line(e)}): make room there; {then}.") from None


LOST_RANK = re.compile(r"Connection (closed|reset) by peer")  # what a collective says that lost its partner
