"""What a person sees while a program runs: lines from rank 0 and a bar with the time left."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


class Console:
    """Prints and progress bars of rank 0; silent on every other rank."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    def print(self, text: str = "") -> None:
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def bar(self, total: int, name: str, done: int = 0) -> tqdm:
        """A bar, ``done`` of it already; on a terminal it moves twice a second, in a log file it leaves a line every
        half minute."""
        return tqdm(
            total=total,
            initial=done,
            desc=name,
            disable=not self.enabled,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def track(self, items: Iterable[Item], total: int, name: str) -> Iterator[Item]:
        with self.bar(total, name) as bar:
            for item in items:
                yield item
                bar.update()


def table(header: list[str], rows: list[list[str]]) -> str:
    """A plain text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])
