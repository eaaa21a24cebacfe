"""What the benchmarks share: flags, ratios of sides that took turns, a table and JSON."""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dschat.config import DTYPES
from dschat.engine.distributed import quiet_libraries
from dschat.errors import UserError
from dschat.models.load import resolve_dtype
from dschat.report.progress import table

import torch
from machine import Limits, commit, hardware, versions
from shapes import SIZES, Work
from turns import Facts


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the flags that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write everything that was measured here")
    return made


def add_turn_flags(made: argparse.ArgumentParser, repeats: int) -> None:
    """Those of a model whose steps are measured."""
    made.add_argument("--size", default="tiny", choices=tuple(SIZES), help="of the model, with random weights")
    made.add_argument("--dtype", default="bf16", choices=DTYPES, help="of weights and activations, on every side")
    made.add_argument("--repeats", type=int, default=repeats, help="measured turns of each side")
    made.add_argument("--warmup", type=int, default=2, help="turns before these")


def start(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and the data type of a run.

    Raises:
        UserError: no turn to measure; a data type that the device does not have.
    """
    if args.repeats < 1 or args.warmup < 1:
        raise UserError("--repeats and --warmup: at least 1 each, the first turn of a side holds its start")
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, resolve_dtype(args.dtype, device)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one side was as another: the median over the rounds, and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rates: Sequence[float], other_rates: Sequence[float]) -> "Ratio":
        """Of two sides' rates, round by round: what slows a whole round down does not touch its ratio."""
        each = sorted(rate / other for rate, other in zip(rates, other_rates, strict=True))
        if len(each) == 1:
            return cls(each[0], each[0], each[0])
        low, median, high = statistics.quantiles(each, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} x ({self.low:.2f} to {self.high:.2f})"


def ratios(rates: dict[str, list[float]]) -> dict[str, Ratio]:
    """Of the first side to each of the others, by "first / other"."""
    first, *others = rates
    return {f"{first} / {other}": Ratio.of(rates[first], rates[other]) for other in others}


def median(turns: Sequence[Facts], name: str) -> float:
    return statistics.median(facts[name] for facts in turns)


def phase_row(side: str, phase: str, seconds: float, work: Work, limits: Limits, rates: Sequence[str]) -> list[str]:
    """A row of the table below PHASE_HEADER and the names of ``rates``."""
    share = limits.least_seconds(work) / seconds
    return [side, phase, f"{1000 * seconds:.1f}", *rates, f"{work.flops / 1e9:.2f}", f"{work.bytes / 1e9:.3f}"] + [
        f"{work.flops / seconds / 1e9:.1f}",
        f"{work.bytes / seconds / 1e9:.1f}",
        f"{share:.0%}",
    ]


def phase_header(*rates: str) -> list[str]:
    return ["side", "phase", "ms", *rates, "GFLOP", "GB", "GFLOP/s", "GB/s", "of the limit"]


def require_same(round_facts: dict[str, Facts], names: Sequence[str]) -> None:
    """Raises AssertionError where two sides have not done the same work."""
    for name in names:
        found = {side: facts[name] for side, facts in round_facts.items()}
        assert len({json.dumps(value) for value in found.values()}) == 1, f"the sides differ in {name}: {found}"


def report(
    args: argparse.Namespace, limits: Limits | None, header: list[str], rows: list[list[str]], **measured: Any
) -> None:
    """Print the table, the ratios and the hardware; write all of it to ``--json``."""
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    place = hardware()
    print(table(header, rows))
    for name, ratio in measured.get("ratios", {}).items():
        print(f"{name}: {ratio}")
    if limits is not None:
        print(f"limits, measured now: {limits.flops / 1e9:.1f} GFLOP/s, {limits.bytes / 1e9:.1f} GB/s")
    print(", ".join(f"{name} {value}" for name, value in place.items()))
    if args.json:
        kept = {
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "hardware": place,
            "versions": versions(),
            "settings": settings,
            "limits": asdict(limits) if limits else None,
            "table": [dict(zip(header, row, strict=True)) for row in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(kept | measured, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Ratio | Work) else str(value)
