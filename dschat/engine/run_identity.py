"""What makes two runs the same run."""

from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

# What models, adapters, tokenizers, templates and functions consist of; not the records of their making.
CONTENT = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
RECORDS = ("run.json", "stage.json", "started.json")  # the latter two are those of e2e_rlhf.py


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
