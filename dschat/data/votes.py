"""Votes between answers, kept as preference records: the file is what `--data_path` reads.

A line is written whole, flushed to the disk and only then reported as stored, so a crash loses no vote that anybody
was told of; what a crash left of a half line is cut off by the next vote. Several processes may write to one file.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dschat.data.records import Message, RecordError, to_example
from dschat.errors import UserError

TIE = -1


@dataclass(frozen=True)
class Candidate:
    """An answer that somebody chose from, and the model that gave it."""

    model: str
    content: str


def vote_record(
    prompt: Sequence[Message], candidates: Sequence[Candidate], best: int, sampling: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """The preference record of one vote: ``best`` is better than the others, which are equals; TIE: all are equals.

    Two answers are chosen and rejected; a tie, and the choice among more than two, are responses with ranks. Who
    answered, how it was sampled, the time, and ``more`` stand in its metadata.

    Raises:
        UserError: nothing can be learned from the vote: fewer than two answers, all of them the same, an empty one
            that is best, or a prompt that no stage could read.
    """
    texts = [candidate.content.strip() for candidate in candidates]
    if len(texts) < 2 or not (best == TIE or 0 <= best < len(texts)):
        raise UserError(
            f"a vote is between two answers or more; found {len(texts)}, and number {best + 1} as the best"
        )
    if best != TIE and texts.count(texts[best]) > 1:
        raise UserError("the best answer and another one are the same text: there is nothing to prefer")
    models = [candidate.model for candidate in candidates]
    metadata = {"sampling": sampling, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **more}
    record: dict[str, Any] = {"prompt": [dict(message) for message in prompt]}
    if len(texts) == 2 and best != TIE:
        record |= {"chosen": texts[best], "rejected": texts[1 - best]}
        metadata["models"] = {"chosen": models[best], "rejected": models[1 - best]}
    else:
        record |= {"responses": texts, "ranks": [1 if best in (TIE, n) else 2 for n in range(len(texts))]}
        metadata["models"] = models
    record["metadata"] = metadata
    try:
        to_example(record)
    except RecordError as error:
        raise UserError(f"the vote cannot be learned from: {error}") from None
    return record


def append_vote(path: Path, record: dict[str, Any]) -> int:
    """Store ``record``; the number of votes in the file now.

    Raises:
        UserError: the file cannot be written.
    """
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            is_new = file.seek(0, os.SEEK_END) == 0
            _mend(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            if is_new:
                _flush_directory(path.parent)
            file.seek(0)
            return sum(1 for _ in file)
    except OSError as error:
        raise UserError(f"--votes {path}: {error.strerror}; the vote is not stored") from None


def _mend(file: Any) -> None:
    """A last line without its end is whole or torn: it gets the end, or goes."""
    size = file.seek(0, os.SEEK_END)
    start, tail = size, b""
    while start and b"\n" not in tail:
        start = max(0, start - 65536)
        file.seek(start)
        tail = file.read(size - start)
    whole, newline, last = tail.rpartition(b"\n")
    if not last:
        return
    try:
        json.loads(last)
        file.write(b"\n")
    except ValueError:
        file.truncate(start + len(whole) + len(newline))


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
