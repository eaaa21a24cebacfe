"""What a policy answered, kept in samples.jsonl and shown as a table."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

from dschat.report.metrics import MetricsWriter, open_at, sync
from dschat.report.progress import Console

NUM_SHOWN = 4


class SampleWriter:
    """Appends rows to ``samples.jsonl`` and prints the first few beside what the same prompts gave before training."""

    def __init__(self, output_dir: str, console: Console, metrics: MetricsWriter):
        self.output_dir, self.console, self.metrics = Path(output_dir), console, metrics
        self.first: dict[str, list[dict]] = {}
        self._offset = 0

    @cached_property
    def file(self) -> TextIO:
        return open_at(self.output_dir / "samples.jsonl", self._offset)

    def state_dict(self) -> dict[str, Any]:
        """As that of `MetricsWriter`."""
        if self.console.enabled:
            self._offset = sync(self.file)
        return {"offset": self._offset, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._offset, self.first = state["offset"], dict(state["first"])

    def add(self, step: int, kind: str, rows: list[dict]) -> None:
        """Rows hold prompt, response, score (or None) and more; the same prompts in the same order at every step."""
        if not self.console.enabled:
            return
        for row in rows:
            self.file.write(json.dumps({"step": step, "kind": kind} | row, ensure_ascii=False) + "\n")
        self.file.flush()
        before = self.first.setdefault(kind, rows[:NUM_SHOWN])
        text = "\n".join(self._shown(step, old, new) for old, new in zip(before, rows[:NUM_SHOWN], strict=False))
        self.console.print(text)
        self.metrics.text(step, f"samples/{kind}", text.replace("\n", "\n\n"))

    def close(self) -> None:
        if self.console.enabled:
            self.file.close()

    @staticmethod
    def _shown(step: int, old: dict, new: dict) -> str:
        def answer(name: str, row: dict) -> str:
            return f"      {name} [{shown_score(row['score'])}] {short(row['response'])}"

        lines = [f"    {short(new['prompt'])}", answer("step 0" if step else "answer", old)]
        return "\n".join(lines + ([answer(f"step {step}", new)] if step else []))


def shown_score(score: float | None) -> str:
    return "no score" if score is None else f"{score:+.2f}"


def short(text: str, size: int = 160) -> str:
    """One line of at most ``size`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= size else text[: size - 1] + "…"
