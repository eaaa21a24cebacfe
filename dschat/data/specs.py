"""What the flags say of data. Plain values: flags are read before any library is loaded."""

from dataclasses import dataclass

from dschat.errors import UserError


@dataclass(frozen=True)
class DataSpec:
    """Which data, how it is split, where its cache lies; see the flags of the same names."""

    data_path: tuple[str, ...]
    eval_data_path: tuple[str, ...]
    data_split: str
    eval_fraction: float
    seed: int
    cache_dir: str
    skip_bad_records: bool
    num_workers: int
    max_eval_samples: int  # 0: all


def parse_source(text: str) -> tuple[str, float]:
    """ "path:0.5" -> ("path", 0.5); without a number the weight is 1."""
    path, separator, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not separator:
        return text, 1.0
    if not path or not 0 < weight < float("inf"):
        raise UserError(f"--data_path {text}: the weight after the colon must be above 0, as in data.jsonl:0.5")
    return path, weight
