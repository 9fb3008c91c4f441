"""From a source (file or hub id) to rows. Small files, read with one sentence and written whole."""

import errno
import io
import json
import os
import re
from pathlib import Path

from plumbing.errors import BadInput, made_by, one_line, writing


EXTENSIONS = (".json", ".jsonl", ".parquet")


def read_rows(source, uses=None):
    """Yields (where, row) for each row of a source: str, dict. Reads, and so raises, while being iterated.

    uses: the columns that are read, {name: None, or the same of what is in it}; "*" is any name. The others
          are None where the file has columns: what nobody reads can break nothing. None: all are read
    """
    source = str(source)
    extension = os.path.splitext(source)[1].lower()
    if os.path.isdir(source):
        raise BadInput(f"{source} is a folder; give one {', '.join(EXTENSIONS)} file in it")
    if not os.path.exists(source):
        rows = hub_rows(source, uses)
    elif extension == ".parquet":
        rows = parquet_rows(source, uses)
    elif extension in EXTENSIONS:
        rows = {".json": json_rows, ".jsonl": jsonl_rows}[extension](source)
    else:
        raise BadInput(f"{source}: unknown extension {extension!r}; convert it to {', '.join(EXTENSIONS)}")
    where = None
    for where, row in rows:
        if not isinstance(row, dict):
            raise wrong_type(where, "the row", row, "an object")
        yield where, row
    if where is None:
        raise BadInput(f"{source} is empty; give a file with at least one row")


def json_rows(path):
    raw = b"".join(line for _, line in binary_lines(path))
    rows = parse_json(raw, path, first_line=1) if raw.strip() else []
    rows = rows.get("data") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise BadInput(f'{path}: no list of rows and no {{"data": rows}}; one object a line is called .jsonl')
    for i, row in enumerate(rows):
        yield f"{path}[{i}]", row


def jsonl_rows(path):
    for number, line in binary_lines(path):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, path, first_line=number)


def parquet_rows(path, uses):
    import pyarrow.parquet  # comes with datasets; imported here, as reading .jsonl needs neither

    i = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            used = names if uses is None else [name for name in names if name in uses]
            twice = {name for name in used if used.count(name) > 1}
            if twice:
                raise BadInput(f"{path}: two columns are called {', '.join(sorted(twice))}; rename one")
            for batch in file.iter_batches(batch_size=1000, columns=used):
                table = only_used(pyarrow.Table.from_batches([batch]), uses)
                if "arrow.json" in str(table.schema.types):  # it would be read as its source text
                    raise ValueError("a column of mixed types, which holds JSON; write it as .jsonl")
                for row in table.to_pylist() or [{}] * len(batch):
                    yield f"{path}[{i}]", {**dict.fromkeys(names), **row}
                    i += 1
    except Exception as error:  # a dozen classes: a damaged file, a date that Python does not have
        raise BadInput(f"{path}: unreadable as parquet ({one_line(error)}); write or copy it again") from None


def only_used(table, uses):
    """An Arrow table without the columns, and the parts of columns, that nobody reads."""
    import pyarrow

    table = table.select([name for name in table.column_names if uses is None or name in uses])
    return table.cast(pyarrow.schema([field.with_type(without_unused(field.type, uses and uses[field.name]))
                                      for field in table.schema]))


def without_unused(kind, uses):
    """An Arrow type without the fields that nobody reads; as it is where none of them is known."""
    import pyarrow

    if uses and pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(without_unused(kind.value_type, uses)))
    if uses and pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(without_unused(kind.value_type, uses)))
    if uses and pyarrow.types.is_struct(kind):
        fields = [field.with_type(without_unused(field.type, uses.get(field.name, uses.get("*"))))
                  for field in kind if field.name in uses or "*" in uses]
        return pyarrow.struct(fields) if fields else kind
    return kind


def hub_rows(source, uses):
    name, _, split = source.partition(":")
    split = split or "train"
    looks_like_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    if not looks_like_id or os.path.splitext(name)[1].lower() in EXTENSIONS:
        raise BadInput(f"{source or repr(source)}: no such file{made_by(source)}; give "
                       f"{', '.join(EXTENSIONS)} or a hub id owner/name[:split]")
    try:
        import datasets

        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # a dozen classes of four libraries, which all mean: the data did not arrive
        raise BadInput(
            f"{source}: no such file, and no split {split!r} from the hub ({one_line(error)}); check the "
            "name, log in if it is gated, or without network copy its .parquet file here and give that"
        ) from None
    i = 0
    try:
        for row in type(dataset)(only_used(dataset.data.table, uses)) or [{}] * len(dataset):
            yield f"{name}:{split}[{i}]", {**dict.fromkeys(dataset.column_names), **row}
            i += 1
    except Exception as error:  # as of a parquet file
        raise BadInput(f"{name}:{split}[{i}]: unreadable ({one_line(error)}); copy its .parquet file here, "
                       f"mend it and give that") from None


def binary_lines(path):
    """Yields (number from 1, bytes). Cuts at LF only, where str.splitlines would cut texts at U+2028."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # byte order mark
    except OSError as error:
        raise BadInput(f"{path}: {one_line(error)}; check the path and its permissions") from None


def parse_json(raw, path, first_line):
    """bytes -> value; first_line is the number in the file of the line on which raw begins."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        byte = f"byte {raw[error.start]:#04x}"
        raise BadInput(f"{path}:{line}: {byte} is not UTF-8; convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        line = first_line + getattr(error, "lineno", 1) - 1
        hint = "complete it; one object a line is called .jsonl, a list .json"
        raise BadInput(f"{path}:{line}: not valid JSON ({one_line(error)}); {hint}") from None


def wrong_type(where, name, value, wanted):
    return BadInput(f"{where}: {name} must be {wanted}, not {type(value).__name__}; correct the row")


# ---- small files ----

def read_object(path, wrong, otherwise, part=lambda value: value):
    """The object in a small JSON file, or what part(object) makes of it. Where either fails, BadInput:
    what is wrong, the cause in brackets, what to do otherwise."""
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read().decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return part(value)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, ArithmeticError) as e:
        why = one_line(repr(e) if isinstance(e, KeyError) else e)
        raise BadInput(f"{wrong} ({why}); {otherwise}.") from None


def places(path):
    """(where a file lies, its name while it is written): behind a link; a pipe or a device is written as it
    is."""
    path = Path(path)
    if path.parent == Path("/dev") or (path.exists() and not path.is_file()):
        return path, path
    path = Path(os.path.realpath(path))
    return path, path.with_name(f".{path.name}.part")


def check_place(path, flag):
    """An unwritable place shows before the expensive work."""
    target, part = places(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        for place in (target, part) if part != target else ():
            made = not place.exists()
            open(place, "ab").close()
            if made:  # a run that ends early leaves no empty file
                place.unlink()
    except OSError as e:
        raise BadInput(f"{flag} {path}: cannot write there ({e.strerror}); name another file.") from None


def write_whole(path, content, then="then run this again"):
    """The file has its old content or all of the new, text or bytes, on the disk; BadInput where it has no
    room. then: what to do when there is room"""
    target, part = places(path)
    content = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
    with writing(path, then):
        target.parent.mkdir(parents=True, exist_ok=True)
        if part == target:
            target.write_bytes(content)
            return
        try:
            part.write_bytes(content)
            sync(part)
            os.replace(part, target)
            sync(target.parent)
        finally:
            part.unlink(missing_ok=True)  # where it did not fit


def write_picture(path, picture):
    """A matplotlib figure as a PNG file, whole or not at all."""
    picture.savefig(drawn := io.BytesIO(), dpi=100, format="png")
    write_whole(path, drawn.getvalue())


def sync(*paths):
    """These files, or the names in these folders, are on the disk, not only in the system's memory."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError as e:
            if e.errno != errno.EINVAL or not os.path.isdir(path):  # of a folder some networks' disks cannot
                raise
        finally:
            os.close(file)
