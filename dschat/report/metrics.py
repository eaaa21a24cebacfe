"""The records of a run: metrics.jsonl, tensorboard and run.json, written by rank 0 only."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dschat.errors import UserError

import numpy as np

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


WANDB = "wandb"
# The charts of tensorboard's first screen (its tab "custom scalars"), by stage.
LAYOUT: dict[str, list[tuple[str, list[str]]]] = {
    "ppo": [
        ("reward, held-out", ["eval/score_mean"]),
        ("independent judge", ["eval/judge_mean"]),
        ("KL, nats a sequence", ["eval/kl_per_seq", "objective/kl_per_seq"]),
        ("entropy, nats a token", ["objective/entropy_per_token"]),
        ("answer length, tokens", ["eval/response_length", "rollout/response_length"]),
        ("finished answers", ["eval/finished_fraction", "rollout/finished_fraction"]),
        ("clipped tokens", ["policy/clip_fraction"]),
        ("explained variance", ["critic/explained_variance"]),
    ],
    "reward": [
        ("loss", ["loss"]),
        ("held-out accuracy", ["eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"]),
    ],
    "dpo": [("loss", ["loss"]), ("held-out accuracy", ["eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"])],
    "sft": [("loss", ["loss"]), ("held-out perplexity", ["eval/perplexity"])],
}


class Wandb:
    """A run of Weights & Biases, started with the first line; WANDB_PROJECT and the like are the library's own."""

    def __init__(self, output_dir: Path, stage: str):
        try:
            import wandb
        except ImportError:
            raise UserError("--report_to wandb: the library is not installed; pip install wandb") from None
        self.wandb, self.output_dir, self.stage = wandb, output_dir, stage
        self.id = ""
        self.run: Any = None

    def log(self, step: int, line: Mapping[str, Any]) -> None:
        if self.run is None:
            name = f"{self.stage} {self.output_dir.name}"
            given: dict[str, Any] = {"id": self.id, "resume": "allow"} if self.id else {}
            self.run = self.wandb.init(name=name, group=self.stage, dir=str(self.output_dir), **given)
            self.id = self.run.id
        values = {name: value for name, value in line.items() if name not in ("step", "stage") and value is not None}
        self.run.log(values, step=step)

    def finish(self, config: Mapping[str, Any]) -> None:
        if self.run is not None:
            self.run.config.update(dict(config), allow_val_change=True)
            self.run.finish()


class MetricsWriter:
    """Appends a line per logged step to ``metrics.jsonl`` and the same scalars to ``tensorboard/``, and where
    ``report_to`` is "wandb" to a run of that service through its own library.

    Values are floats already equal on every rank (the programs reduce them); a name says its unit and denominator
    (DESIGN, section 6). On ranks other than 0 every call is a no-op. The files are opened when the first line comes:
    anew, or where the state that was loaded ends.
    """

    def __init__(self, output_dir: str, stage: str, enabled: bool = True, report_to: str = "none"):
        """
        Raises:
            UserError: wandb is asked for and not installed.
        """
        self.output_dir, self.stage, self.enabled, self.start = Path(output_dir), stage, enabled, time.time()
        self.last: dict[str, float] = {}
        self.last_step, self._offset = -1, 0
        self.service = Wandb(self.output_dir, stage) if report_to == WANDB and enabled else None

    @cached_property
    def file(self) -> TextIO:
        return open_at(self.output_dir / "metrics.jsonl", self._offset)

    @cached_property
    def tensorboard(self) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=self.last_step + 1)
        if self.stage in LAYOUT:
            groups = {title: ["Multiline", [f"^{name}$" for name in names]] for title, names in LAYOUT[self.stage]}
            writer.add_custom_scalars({"what matters": groups})
        return writer

    def state_dict(self) -> dict[str, Any]:
        """Everything logged so far is on the disk then."""
        if self.enabled:
            self._offset = sync(self.file)
            self.tensorboard.flush()
        return {
            "offset": self._offset,
            "last": self.last,
            "last_step": self.last_step,
            "service": self.service.id if self.service else "",
            "seconds": time.time() - self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; what the files hold beyond it is dropped."""
        self._offset, self.last, self.last_step = state["offset"], dict(state["last"]), state["last_step"]
        self.start = time.time() - state["seconds"]
        if self.service:
            self.service.id = state["service"]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.last.update({name: float(value) for name, value in metrics.items()})
        if not self.enabled:
            return
        tensorboard, self.last_step = self.tensorboard, step
        line: dict[str, Any] = {"step": step, "stage": self.stage, "time": round(time.time() - self.start, 3)}
        for name, value in metrics.items():
            value = float(value)
            line[name] = value if math.isfinite(value) else None  # JSON has no NaN
            tensorboard.add_scalar(name, value, step)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.service:
            self.service.log(step, line)

    def histogram(self, step: int, name: str, values: Any) -> None:
        """``values``: an array or a tensor on the CPU; what is not finite is left out."""
        if not self.enabled:
            return
        numbers = np.asarray(values, dtype=np.float64)
        finite = numbers[np.isfinite(numbers)]
        if len(finite):  # tensorboard raises on an empty one
            self.tensorboard.add_histogram(name, finite, step)

    def text(self, step: int, name: str, text: str) -> None:
        if self.enabled:
            self.tensorboard.add_text(name, text, step)

    def hparams(self, config: Mapping[str, Any]) -> None:
        """The flags beside the final metrics, for tensorboard's table of runs."""
        if not self.enabled:
            return
        from torch.utils.tensorboard.summary import hparams

        plain = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in config.items()
        }
        final = {name: value for name, value in self.last.items() if name.startswith("eval/") and math.isfinite(value)}
        for summary in hparams(plain, final):
            self.tensorboard._get_file_writer().add_summary(summary)
        if self.service:
            self.service.finish(config)

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


def open_at(path: Path, offset: int) -> TextIO:
    """A text file to append to, without what lies beyond ``offset`` bytes."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115
    file.truncate(min(offset, os.path.getsize(path)))
    return file


def sync(file: TextIO) -> int:
    """Bytes of the file, all of them on the disk."""
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


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
