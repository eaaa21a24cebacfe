"""Checkpoints on disk: a folder is whole and has the sum of each of its files, or it does not count.

`SHA256SUMS` in a checkpoint is what ``sha256sum *`` would print, and is the last file written before the folder gets
its name. What a checkpoint holds is not known here: see run_state.py.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from dschat.engine.distributed import Runtime, gather_objects
from dschat.engine.run_identity import file_sum

SUMS = "SHA256SUMS"
TEMPORARY = ".writing"
NAME = re.compile(r"step_\d{8}(_\d{5})?")

Result = TypeVar("Result")


class CheckpointError(Exception):
    """A checkpoint could not be written; the ones before it are as they were. The same on every rank."""


def checkpoint_name(step: int, minibatch: int = 0) -> str:
    """Of the state after ``step`` steps and, in step 3, so many minibatches of the next; names sort by progress."""
    return f"step_{step:08d}" + (f"_{minibatch:05d}" if minibatch else "")


def list_checkpoints(folder: Path) -> list[Path]:
    """Newest first; whether they are sound is not looked at."""
    found = (path for path in folder.iterdir() if NAME.fullmatch(path.name)) if folder.is_dir() else ()
    return sorted(found, reverse=True)


def attempt(runtime: Runtime, action: Callable[[], Result]) -> Result:
    """``action`` on every rank; none goes on before it has succeeded on all.

    Raises:
        CheckpointError: an OSError or RuntimeError on any rank; torch turns the one into the other.
    """
    result, problem = None, ""
    try:
        result = action()
    except (OSError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300] or type(error).__name__
    if problems := [found for found in gather_objects([problem], runtime) if found]:
        raise CheckpointError(problems[0])
    return result  # type: ignore[return-value]  # no problem, hence a result


def write_checkpoint(
    folder: Path,
    name: str,
    keep: int,
    num_bytes: int,
    writers: Sequence[Callable[[Path], None]],
    runtime: Runtime,
) -> None:
    """Have each of ``writers`` put its files into a temporary folder, all ranks one writer after the other; add the
    sums and only then give it its name. A collective.

    Keeps the ``keep`` newest up to ``name``; what is newer than ``name`` was found damaged by whoever went on from an
    older one, and goes. A folder that is already called ``name`` is such a one, too.

    Args:
        num_bytes: what will be written at most, by all ranks together.

    Raises:
        CheckpointError: no room, or a file that could not be written. Nothing that was there has changed.
    """
    temporary, target = folder / TEMPORARY, folder / name

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise OSError(f"it needs up to {_size(num_bytes)} in {folder}, of which {_size(free)} are free")

    def publish() -> None:
        text = "".join(sorted(line for part in parts for line in part))
        with open(temporary / SUMS, "w", encoding="utf-8") as file:
            file.write(text)
        for path in (temporary / SUMS, *(p for p in temporary.rglob("*") if p.is_dir()), temporary):
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _sync(folder)
        past = [path for path in list_checkpoints(folder) if path.name <= name]
        for path in set(list_checkpoints(folder)) - set(past[:keep]):
            remove_checkpoint(path)

    try:
        attempt(runtime, lambda: prepare() if runtime.is_main else None)
        for write in writers:
            attempt(runtime, partial(write, temporary))
        parts = gather_objects([attempt(runtime, lambda: _sums(temporary, runtime, sync=True))], runtime)
        attempt(runtime, lambda: publish() if runtime.is_main else None)
    except CheckpointError:
        if runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def damage(path: Path, runtime: Runtime) -> str | None:
    """What is wrong with a checkpoint: the name of a file that is not the one that was written; None: nothing. A
    collective."""
    try:
        expected = (path / SUMS).read_text(encoding="utf-8").splitlines(keepends=True)
        found: list[str] | str = _sums(path, runtime)
    except (OSError, UnicodeDecodeError) as error:
        found = f"{path / SUMS}: {error}"
    parts = gather_objects([found], runtime)
    if unreadable := [part for part in parts if isinstance(part, str)]:
        return unreadable[0]
    lines = sorted(line for part in parts for line in part)
    if lines == expected:
        return None
    differing = sorted(line.split(maxsplit=1)[-1].strip() for line in set(lines) ^ set(expected))
    return differing[0] if differing else SUMS


def remove_checkpoint(path: Path) -> None:
    """It stops being a checkpoint before its first file goes."""
    (path / SUMS).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sums(folder: Path, runtime: Runtime, sync: bool = False) -> list[str]:
    """The lines of this rank's share of the files. With ``sync`` each file is on the disk before it is read."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)
    mine = paths[runtime.rank :: runtime.world_size]
    if sync:
        for path in mine:
            _sync(path)
    return [f"{file_sum(path)}  {path.relative_to(folder).as_posix()}\n" for path in mine]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
