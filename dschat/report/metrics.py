"""The records of a run: metrics.jsonl, tensorboard and run.json, written by rank 0 only."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dschat.errors import UserError


class MetricsWriter:
    """Appends a line per logged step to ``metrics.jsonl`` and the same scalars to ``tensorboard/``.

    Values are floats already equal on every rank (the programs reduce them); a name says its unit and denominator
    (DESIGN, section 6). On ranks other than 0 every call is a no-op.
    """

    def __init__(self, output_dir: str, stage: str, enabled: bool = True):
        self.stage, self.enabled, self.start = stage, enabled, time.time()
        self.last: dict[str, float] = {}
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.file = open(Path(output_dir) / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self.tensorboard = SummaryWriter(str(Path(output_dir) / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.last.update({name: float(value) for name, value in metrics.items()})
        if not self.enabled:
            return
        line: dict[str, Any] = {"step": step, "stage": self.stage, "time": round(time.time() - self.start, 3)}
        for name, value in metrics.items():
            value = float(value)
            line[name] = value if math.isfinite(value) else None  # JSON has no NaN
            self.tensorboard.add_scalar(name, value, step)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def histogram(self, step: int, name: str, values: Any) -> None:
        if self.enabled and len(values):
            self.tensorboard.add_histogram(name, values, step)

    def text(self, step: int, name: str, text: str) -> None:
        if self.enabled:
            self.tensorboard.add_text(name, text, step)

    def close(self) -> None:
        if self.enabled:
            self.file.close()
            self.tensorboard.close()


def prepare_output_dir(path: str) -> None:
    """Create the output directory and prove that it can be written, before any work is done.

    Raises:
        UserError: it is a file, or cannot be created or written.
    """
    try:
        os.makedirs(path, exist_ok=True)
        probe = Path(path) / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be written: {error.strerror}; choose another folder") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that, whatever happens meanwhile, it is the new one as a whole or what was there before."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def peak_rss_gb() -> float:
    """The largest resident memory of this process so far, in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def write_run_json(
    output_dir: str, *, role: str, config: dict, data: dict, metrics: dict, seconds: float, extra: dict | None = None
) -> None:
    """Write ``run.json``: what was run, on what, with which versions, and what came out. Atomic (rename)."""
    import deepspeed
    import torch
    import transformers

    record = {
        "role": role,
        "config": config,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
        "seed": config.get("seed"),
        "data": data,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "seconds": round(seconds, 3),
        "peak_rss_gb": round(peak_rss_gb(), 3),
    } | (extra or {})
    write_whole(Path(output_dir) / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
