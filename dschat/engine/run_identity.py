"""What makes two runs the same run, and two directories the same model."""

import os
import re
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

# What models, adapters, tokenizers, templates and functions consist of; not the records of their making.
CONTENT = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
RECORDS = ("run.json", "stage.json", "started.json")  # the latter two are those of e2e_rlhf.py
# What holds weights, under the names that transformers and PEFT give it; of two forms the first is what they load.
WEIGHTS = [
    re.compile(name + r"(-\d+-of-\d+)?" + ending)
    for name, ending in ((r"(adapter_)?model", r"\.safetensors"), (r"(adapter|pytorch)_model", r"\.bin"))
]


@dataclass(frozen=True)
class RunIdentity:
    """JSON values by name. A run may be continued where ``result`` is equal; ``rounding`` changes the last bits."""

    result: dict[str, Any]
    rounding: dict[str, Any]


def content_key(path: str) -> str:
    """Of a file or of the files of a model directory, wherever it is; of anything else, as a hub name, the text."""
    where = Path(path).expanduser()
    if where.is_file():
        return file_sum(where)
    if not where.is_dir():
        return path
    files = sorted(p for p in where.iterdir() if p.suffix in CONTENT and p.name not in RECORDS and p.is_file())
    return sha256("".join(f"{p.name} {file_sum(p)}\n" for p in files).encode()).hexdigest()


def weights_key(path: str) -> str | None:
    """Of the files of weights of a model directory, or of a hub name's in the local cache: what else is there, as a
    tokenizer or a record, may change. The same weights in other files have another.

    None: nothing is there, as of a hub name whose files the cache lacks. It is not asked for over the network, which a
    fingerprint is not worth; nor would its files be what a run here was made from.
    """
    where = Path(path).expanduser()
    if not where.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            config = try_to_load_from_cache(path, "config.json")
        except HFValidationError:  # a path of more than two parts is no hub name
            return None
        if not isinstance(config, str):
            return None
        where = Path(config).parent
    forms = [sorted(p for p in where.iterdir() if form.fullmatch(p.name)) for form in WEIGHTS]
    files = next((form for form in forms if form), [])
    return sha256("".join(f"{p.name} {_known_sum(p)}\n" for p in files).encode()).hexdigest() if files else None


def _known_sum(path: Path) -> str:
    """`file_sum`, which takes a second for a GB or two, once for all who ask while the file stays as it is."""
    found = os.stat(path)
    return _sum_of(path, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _sum_of(path: Path, *state: int) -> str:
    return file_sum(path)


def file_sum(path: Path) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """As '--learning_rate was 0.001 and is 0.01'."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    return [f"{name} was {_short(saved.get(name))} and is {_short(now.get(name))}" for name in names]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
