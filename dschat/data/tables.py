"""One source -> an Arrow table of examples: what a path means, its cache, and what it drops.

A source is read once into `cache_dir`, memory-mapped from then on. Its cache entry is named by the content (sha256 of
the bytes and of the version of this code), so that a changed file is never taken for the old one.
"""

import hashlib
import inspect
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dschat.data import readers, registry
from dschat.data.cache import open_cache
from dschat.data.readers import Located
from dschat.data.records import RecordError, to_example
from dschat.errors import UserError

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

READING_VERSION = "3"  # change it with anything in records, readers, registry or here that changes an example
EVAL_SPLITS = ("test", "validation", "eval", "dev")
FEATURES = datasets.Features(
    {
        "prompt": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        "responses": datasets.List(datasets.Value("string")),
        "ranks": datasets.List(datasets.Value("int32")),
        "margin": datasets.Value("float64"),
        "metadata": datasets.Value("string"),
        "source": datasets.Value("string"),
        "num_ranks": datasets.Value("int32"),  # different ranks; 0 prompt only, 1 demonstrations
        "best_rank": datasets.Value("int32"),  # 0 prompt only, 2 a lone bad answer, else 1
        "dropped": datasets.Value("string"),  # "" or the reason, in plain words
    }
)
STAGE_NEEDS = {
    "sft": ("no response", "a response to each prompt"),
    "preference": ("no preference between responses", "a chosen and a rejected response to each prompt"),
    "feedback": ("no response", "a response to each prompt, with a label or a rank"),
    "prompt": ("", "a prompt in each record"),
}
OWN_STAGE = {"feedback": "preference"}  # whose share of the data it takes, where that is not its own


class Source(NamedTuple):
    """`content`: a hash of everything `read` will yield."""

    name: str
    content: str
    read: Callable[[], Iterator[Located]]
    to_record: registry.ToRecord


def concatenated(tables: list[datasets.Dataset], stage: str, counter: Counter[str], where: str) -> datasets.Dataset:
    """The tables as one, without the columns that only selected rows; a `UserError` when there is no row."""
    tables = [table for table in tables if len(table)]
    if not tables:
        reasons = "".join(f", {number} with {reason}" for reason, number in counter.items())
        raise UserError(f"{where}: nothing left for the {stage} stage{reasons}; it needs {STAGE_NEEDS[stage][1]}")
    table = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    return table.remove_columns(["num_ranks", "best_rank", "dropped"])


def read_source(
    path: str, part: str, stage: str, cache_dir: str, skip_bad_records: bool
) -> tuple[datasets.Dataset | None, Counter[str]]:
    """Every good example of one source, whatever the stage (only `toy` depends on it). None: it has no such part."""
    open_cache(cache_dir)
    source = _open_source(path, part, OWN_STAGE.get(stage, stage))
    if source is None:
        return None, Counter()
    key = json.dumps([READING_VERSION, source.name, source.content, skip_bad_records])
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        table = _cached_table(source, skip_bad_records, cache_dir, fingerprint)
    except OSError:  # a cached file was cut short: build it again
        shutil.rmtree(Path(cache_dir, "generator", f"default-fingerprint={fingerprint}"), ignore_errors=True)
        table = _cached_table(source, skip_bad_records, cache_dir, fingerprint)
    dropped = table.data.column("dropped")
    counter = count_values(dropped)
    num_good = counter.pop("", 0)
    if not num_good:
        told = ", ".join(f"{number} x {reason}" for reason, number in counter.items())
        raise UserError(f"{source.name}:1: none of its records can be used ({told}); mend them or leave it out")
    good = np.flatnonzero(pyarrow.compute.equal(dropped, "").to_numpy())
    return (table.select(good) if counter else table), counter


def count_values(texts: pyarrow.ChunkedArray) -> Counter[str]:
    """How often each text occurs, in the order of their first rows. The column is read where it lies, row by row."""
    return Counter({item["values"]: item["counts"] for item in pyarrow.compute.value_counts(texts).to_pylist()})


def _cached_table(source: Source, skip_bad_records: bool, cache_dir: str, fingerprint: str) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_generator(
            partial(_rows, source, skip_bad_records), features=FEATURES, cache_dir=cache_dir, fingerprint=fingerprint
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def for_stage(table: datasets.Dataset, stage: str) -> tuple[datasets.Dataset, Counter[str]]:
    """The rows that a stage can use; the others are counted."""
    names = ["num_ranks", "best_rank"]
    batches = table.select_columns(names).with_format("arrow").iter(1000)  # all at once takes 600 bytes a row
    parts = [np.stack([batch[name].to_numpy() for name in names]) for batch in batches]
    num_ranks, best_rank = np.concatenate([np.empty((2, 0), np.int32), *parts], axis=1)
    usable = {"sft": best_rank == 1, "preference": num_ranks >= 2, "feedback": num_ranks >= 1}
    keep = usable.get(stage, num_ranks >= 0)
    if keep.all():
        return table, Counter()
    return table.select(np.flatnonzero(keep)), Counter({STAGE_NEEDS[stage][0]: int((~keep).sum())})


def weighted(table: datasets.Dataset, weight: float, seed: int) -> datasets.Dataset:
    """weight 0.25: a seeded quarter of the rows; 2.25: every row twice and a quarter once more."""
    if weight == 1 or not len(table):
        return table
    whole, part = divmod(weight, 1)
    extra = np.random.default_rng(seed).permutation(len(table))[: round(part * len(table))]
    rows = np.concatenate([np.tile(np.arange(len(table)), int(whole)), extra])
    return table.select(rows if len(rows) else [0])


def _rows(source: Source, skip_bad_records: bool) -> Iterator[dict]:
    empty = True
    for location, item in source.read():
        empty = False
        try:
            if isinstance(item, RecordError):
                raise item
            record = source.to_record(item)
            if record is None:
                yield _row(source.name, dropped="nothing to train on in the row")
                continue
            example = to_example(record)
        except RecordError as error:
            if not skip_bad_records:
                raise UserError(f"{location}: {error} (or drop such records: --skip_bad_records)") from None
            yield _row(source.name, dropped="bad record")
            continue
        ranks = {"num_ranks": len(set(example["ranks"])), "best_rank": min(example["ranks"], default=0)}
        yield _row(source.name) | dict(example) | ranks
    if empty:
        raise UserError(f"{source.name}:1: no records, the file is empty; fill it or leave it out")


def _row(name: str, dropped: str = "") -> dict:
    empty: dict = {"prompt": [], "responses": [], "ranks": [], "margin": None, "metadata": ""}
    return {**empty, "source": name, "num_ranks": 0, "best_rank": 0, "dropped": dropped}


def _open_source(path: str, part: str, stage: str) -> Source | None:
    entry = registry.find(path)
    to_record = entry.to_record if entry else dict
    eval_splits = (entry.eval_split,) if entry and entry.eval_split else EVAL_SPLITS
    splits = eval_splits if part == "eval" else (entry.train_split if entry else "train",)
    if path == "toy":
        return _toy(stage, part)
    local = Path(path).expanduser()
    if local.is_dir():
        return _saved_to_disk(local, splits, part, to_record)
    if local.exists():
        if part == "eval":
            return None
        return Source(path, _sha256([local]), partial(readers.reader_of(local), str(local)), to_record)
    if local.suffix.lower() in readers.READERS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path}:1: no such file; check the path (relative paths start at {os.getcwd()})")
    if entry and part == "eval" and not entry.eval_split:
        return None
    return _from_hub(path, entry, splits, to_record)


def _toy(stage: str, part: str) -> Source:
    from dschat.data import toy, toy_facts  # only those who ask for the embedded task pay for making it

    code = _sha256([Path(inspect.getfile(module)) for module in (toy, toy_facts)])  # the records are a function of it

    def read() -> Iterator[Located]:
        for number, record in enumerate(toy.records(stage, part), 1):
            yield f"toy:{number}", record

    return Source("toy", f"{code} {stage} {part}", read, dict)


def _saved_to_disk(folder: Path, splits: tuple[str, ...], part: str, to_record: registry.ToRecord) -> Source | None:
    if not ({"dataset_info.json", "dataset_dict.json"} & set(os.listdir(folder))):
        raise UserError(f"{folder}:1: not a save_to_disk folder (no dataset_info.json); pass the files in it")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever the library meets in a damaged folder, the mend is the same
        raise UserError(f"{folder}:1: cannot be loaded ({_one_line(error)}); save it again") from error
    if isinstance(loaded, datasets.Dataset):
        if part == "eval":
            return None
        dataset = loaded
    else:
        dataset = next((loaded[name] for name in splits if name in loaded), None)
        if dataset is None and part == "eval":
            return None
        if dataset is None:
            raise UserError(f"{folder}:1: no split named {splits[0]}, only {', '.join(loaded)}; rename one")
    content = f"{_sha256(sorted(folder.rglob('*')))} {part}"
    return Source(str(folder), content, partial(readers.read_dataset, dataset, str(folder)), to_record)


def _from_hub(
    path: str, entry: registry.HubDataset | None, splits: tuple[str, ...], to_record: registry.ToRecord
) -> Source | None:
    name, config = (entry.hub_name, entry.config_name) if entry else (path, None)
    try:
        loaded = datasets.load_dataset(name, config)
    except Exception as error:  # offline, unknown, private, gated, a loading script: one line is enough for each
        raise UserError(
            f"--data_path {path}: neither a file nor a data set that can be loaded from the hub ({_one_line(error)}); "
            "check the name and the network, or pass a local file"
        ) from error
    dataset = next((loaded[split] for split in splits if split in loaded), None)
    if dataset is None:
        if splits == ("train",) or entry:
            raise UserError(f"--data_path {path}: has no split {' or '.join(splits)}, only {', '.join(loaded)}")
        return None
    return Source(path, dataset._fingerprint, partial(readers.read_dataset, dataset, path), to_record)


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
