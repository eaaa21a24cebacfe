"""What a policy answered, kept in samples.jsonl and shown as a table."""

import json
from pathlib import Path

from dschat.report.metrics import MetricsWriter
from dschat.report.progress import Console

NUM_SHOWN = 4


class SampleWriter:
    """Appends rows to ``samples.jsonl`` and prints the first few beside what the same prompts gave before training."""

    def __init__(self, output_dir: str, console: Console, metrics: MetricsWriter):
        self.console, self.metrics = console, metrics
        self.first: dict[str, list[dict]] = {}
        if console.enabled:
            self.file = open(Path(output_dir) / "samples.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def add(self, step: int, kind: str, rows: list[dict]) -> None:
        """Rows hold prompt, response, score (or None) and more; the same prompts in the same order at every step."""
        if not self.console.enabled:
            return
        for row in rows:
            self.file.write(json.dumps({"step": step, "kind": kind} | row, ensure_ascii=False) + "\n")
        self.file.flush()
        before = self.first.setdefault(kind, rows)
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
