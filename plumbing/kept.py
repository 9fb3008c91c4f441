"""Files that a script goes on with or writes anew: nothing that is not its own is cut or replaced."""

import contextlib
import json
import os
import re

from plumbing.errors import BadInput, one_line
from plumbing.files import read_object


def kept_lines(path, *names):
    """(rows of a jsonl file that is appended to, their bytes), without a line that was cut short. BadInput
    where it holds anything else. names: what each of its rows has, the one it begins with in front"""
    def row_of(line):
        row = json.loads(line)
        if not isinstance(row, dict) or not set(names) <= row.keys():
            raise ValueError(f"a row of it lacks {' or '.join(names)}")
        return row
    try:
        content = path.read_bytes() if os.path.lexists(path) else b""
        *lines, rest = content.split(b"\n")
        rows = [row_of(line) for line in lines if line.strip()]
        try:
            row_of(rest or json.dumps(dict.fromkeys(names)))
        except (json.JSONDecodeError, UnicodeDecodeError):  # cut short, if it is a row
            begins = f'{{"{names[0]}": '.encode()
            if rest[:len(begins)] != begins[:len(rest)]:
                raise ValueError("its last line is no row") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path}: not a file that this script wrote ({one_line(e)}); name another.") from None
    return rows, len(content) - len(rest)


def settings_that_differ(record, settings, beside):
    """Names of the settings that the file of an earlier run has otherwise; None where there is no file.
    beside: what is to be deleted with a file that cannot be read"""
    if not os.path.lexists(record):
        return None
    return read_object(record, f"{record}: cannot be read", f"delete it and {beside}",
                       lambda then: [key for key in {**then, **settings}
                                     if then.get(key) != settings.get(key)])


@contextlib.contextmanager
def appended(path, size=None):
    """The file, open for more text; what is behind its first `size` bytes, as kept_lines counts them, is
    taken away."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="replace") as f:  # half a surrogate pair is no UTF-8
            if size is not None:
                f.truncate(size)
            yield f
    except OSError as e:
        raise BadInput(f"{path}: cannot be written ({one_line(e)}); make room or name another.") from None


def check_ours(flag, path, begins):
    """Refuse to write over a file that is not an earlier output. begins: pattern of how one begins"""
    if os.path.isfile(path):  # not a pipe or a device
        try:
            with open(path, "rb") as f:
                head = f.read(1000)
        except OSError as e:
            raise BadInput(f"{flag} {path}: cannot be read ({e.strerror}); name another.") from None
        if head and not re.match(begins, head, re.S):
            raise BadInput(f"{flag} {path}: a file that this command did not write; name another, or take it "
                           f"away.")


RESULTS = rb'\{\n "command": "\w+",\n "args": \{'  # how a file of --json begins
