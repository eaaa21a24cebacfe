"""Records of a file, one at a time, each with its location.

A reader yields (location, record); a record that could be read past but not understood is yielded as a `RecordError`,
so that the caller decides whether to stop or to count. What makes the rest of a file unreadable is a `UserError`.
"""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dschat.data.records import RecordError
from dschat.errors import UserError

import datasets
import pyarrow
import pyarrow.parquet

Located = tuple[str, dict[str, Any] | RecordError]
CHUNK = 1 << 16  # characters; the window is copied for every element, so it is small
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: str) -> Iterator[Located]:
    """An object on each line; blank lines are skipped."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield f"{path}:{number}", _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | RecordError:
    try:
        return _as_object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return RecordError(f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RecordError(f"not JSON ({error.msg} at column {error.colno}); one whole object on each line")


def _as_object(value: Any) -> dict[str, Any] | RecordError:
    if isinstance(value, dict):
        return value
    return RecordError(f"a record must be a JSON object with keys, found {type(value).__name__}")


def read_json(path: str) -> Iterator[Located]:
    """The elements of one list, numbered from 1; a file that does not start with "[" is read as JSON lines."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # broken bytes are found by to_example
        head = file.read(1)
        while head.isspace():
            head = file.read(1)
        if head == "[":
            yield from _list_elements(file.read, path)
            return
    yield from read_jsonl(path)


def _list_elements(read: Callable[[int], str], path: str) -> Iterator[Located]:
    """Elements of a list whose "[" is already read, decoded one at a time from a window that moves over the file."""
    decoder = json.JSONDecoder()
    text, number, comma_next = "", 0, False
    while True:
        text = text.lstrip() or read(CHUNK)
        if not text:
            raise UserError(f'{path}:{number}: the list is not closed after this element; end the file with "]"')
        if text[0].isspace():
            continue
        if text[0] == "]" and (comma_next or number == 0):
            if (text[1:] + read(CHUNK)).strip():
                raise UserError(f"{path}:{number}: text after the end of the list; keep one list in a .json file")
            return
        if comma_next:
            if text[0] != ",":
                raise UserError(f'{path}:{number}: not JSON (no "," after this element); repair the file')
            text, comma_next = text[1:], False
            continue
        try:
            value, end = decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            more = read(max(CHUNK, len(text)))  # the window may end inside an element
            if not more:
                raise UserError(f"{path}:{number + 1}: not JSON ({error.msg}) in this element; repair it") from None
            text += more
            continue
        text, number, comma_next = text[end:], number + 1, True
        yield f"{path}:{number}", _as_object(value)


def read_csv(path: str) -> Iterator[Located]:
    """Rows under a header, located by the line they begin on."""
    csv.field_size_limit(1 << 30)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        while True:
            number = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise UserError(f"{path}:{number}: not CSV ({error}); mend the quotes of this row") from None
            if row is None:
                return
            if len(row) not in (0, len(header)):
                problem = f"{len(row)} fields where the header has {len(header)}; quote fields that hold commas"
                yield f"{path}:{number}", RecordError(problem)
            elif row:
                yield f"{path}:{number}", dict(zip(header, row, strict=True))


def read_parquet(path: str) -> Iterator[Located]:
    """Rows numbered from 1."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}:1: not a parquet file ({_one_line(error)}); write it again") from None
    number = 0
    for batch in file.iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", row


def read_dataset(dataset: datasets.Dataset, name: str) -> Iterator[Located]:
    """Rows of a loaded data set, numbered from 1."""
    for number, row in enumerate(dataset, 1):
        yield f"{name}:{number}", row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


READERS: dict[str, Callable[[str], Iterator[Located]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def reader_of(path: Path) -> Callable[[str], Iterator[Located]]:
    """The reader of an existing file, by its suffix."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}:1: unknown kind of file; use one of {', '.join(READERS)} or a save_to_disk folder")
    return reader
