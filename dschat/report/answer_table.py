"""Answers of several models to the same prompts: the texts side by side, and what they come to."""

import json
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from dschat.report.metrics import write_whole
from dschat.report.progress import table
from dschat.report.summary import win_rate

NARROWEST = 34  # columns of text side by side
GAP = "  "
FILLER = "\0"  # the second cell of a wide character, while lines are made


@dataclass(frozen=True)
class Answered:
    """One model's answers by one decoding, in the order of the prompts; None: not asked for."""

    model: str
    decoding: str
    responses: list[str]
    num_tokens: list[int]  # end token included
    finished: list[bool]
    scores: list[float | None] | None  # the reward's
    judged: list[float | None] | None
    correct: list[bool] | None

    def row(self, index: int) -> dict[str, Any]:
        """All about one answer."""
        given = {"score": self.scores, "judge": self.judged, "correct": self.correct}
        return {
            "response": self.responses[index],
            "finished": self.finished[index],
            "num_tokens": self.num_tokens[index],
        } | {name: values[index] if values is not None else None for name, values in given.items()}


def summarize_answers(groups: Sequence[Answered]) -> list[dict[str, Any]]:
    """A row for each group: means over its answers, and how often it beats the first model's by the same decoding.

    ``score`` and ``judge`` are means over the answers that have one, None where none has. ``win_rate`` goes by the
    judge, else by the reward; None for the first model and where there is neither.
    """
    return [
        {
            "model": group.model,
            "decoding": group.decoding,
            "num_tokens": round(fmean(group.num_tokens), 4),
            "finished": round(fmean(group.finished), 4),
            "score": _mean(group.scores),
            "judge": _mean(group.judged),
            "correct": _mean(group.correct),
            "win_rate": _win_rate(group, groups),
        }
        for group in groups
    ]


def answers_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `summarize_answers` for a person; columns that nobody asked for are left out."""
    columns: dict[str, list[str]] = {
        "answers by": [f"{row['model']} {row['decoding']}" for row in rows],
        "tokens": [f"{row['num_tokens']:.1f}" for row in rows],
        "finished": [f"{row['finished']:.0%}" for row in rows],
        "reward": [_shown(row["score"], "+.2f") for row in rows],
        "judge": [_shown(row["judge"], "+.2f") for row in rows],
        "correct": [_shown(row["correct"], ".0%") for row in rows],
        f"better than {rows[0]['model']} (95 %)": [_interval(row["win_rate"]) for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    return table(list(shown), [list(row) for row in zip(*shown.values(), strict=True)])


def side_by_side(prompt: str, groups: Sequence[Answered], index: int, width: int) -> str:
    """The prompt, and below it the answers to it in columns, as many beside each other as ``width`` has room for."""
    most = max(1, (width + len(GAP)) // (NARROWEST + len(GAP)))
    num_bands = math.ceil(len(groups) / most)
    num_columns = math.ceil(len(groups) / num_bands)  # four answers are two and two rather than three and one
    size = (width - (num_columns - 1) * len(GAP)) // num_columns
    blocks = []
    for group in groups:
        texts = (f"{group.model} {group.decoding}", f"[{_facts(group, index)}]", group.responses[index])
        blocks.append([line for text in texts for line in _wrapped(text, size)])
    lines = _wrapped(prompt, width)
    for start in range(0, len(blocks), num_columns):
        lines.append("")
        for cells in zip_longest(*blocks[start : start + num_columns], fillvalue=""):
            lines.append(GAP.join(cell + " " * (size - _num_cells(cell)) for cell in cells).rstrip())
    return "\n".join(lines)


def save_answers(
    directory: str,
    groups: Sequence[Answered],
    prompts: Sequence[str],
    dialogues: Sequence[Any],
    summary: dict[str, Any],
) -> None:
    """``answers.jsonl``, a line for each answer, group by group in the order of the prompts, and ``summary.json``."""
    lines = [
        {"model": group.model, "decoding": group.decoding, "prompt": prompt, "messages": messages} | group.row(i)
        for group in groups
        for i, (prompt, messages) in enumerate(zip(prompts, dialogues, strict=True))
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(Path(directory) / "answers.jsonl", text)
    write_whole(Path(directory) / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _facts(group: Answered, index: int) -> str:
    """As "judge +1.50, reward +0.23, 12 tokens, cut off"."""
    facts = []
    for name, values in (("judge", group.judged), ("reward", group.scores)):
        if values is not None:
            facts.append(f"{name} {_shown(values[index], '+.2f') or 'none'}")
    facts.append(f"{group.num_tokens[index]} tokens" + ("" if group.finished[index] else ", cut off"))
    return ", ".join(facts)


def _win_rate(group: Answered, groups: Sequence[Answered]) -> dict[str, Any] | None:
    baseline = next(other for other in groups if other.decoding == group.decoding)
    for by, mine, theirs in (
        ("judge", group.judged, baseline.judged),
        ("reward", group.scores, baseline.scores),
    ):
        if group is not baseline and mine is not None and theirs is not None:
            wins = win_rate(mine, theirs)
            return wins | {"by": by} if wins["num_prompts"] else None
    return None


def _mean(values: Sequence[float | None] | None) -> float | None:
    given = [value for value in values or [] if value is not None]
    return round(fmean(given), 4) if given else None


def _shown(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _interval(share: dict[str, Any] | None) -> str:
    return f"{share['value']:.2f} ({share['ci95'][0]:.2f} to {share['ci95'][1]:.2f})" if share else ""


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` cells of a terminal, of which a Chinese character takes two. A control character,
    which a terminal would obey, becomes a question mark in a box."""
    lines = []
    for paragraph in text.expandtabs(4).splitlines():
        safe = "".join("\ufffd" if unicodedata.category(c) == "Cc" else c for c in paragraph)
        filled = "".join(c + FILLER * (_num_cells(c) - 1) for c in safe)
        lines += textwrap.wrap(filled, width, break_on_hyphens=False) or [""]
    return [line.replace(FILLER, "") for line in lines]


def _num_cells(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
