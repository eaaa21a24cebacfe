"""The answers of several policies to the same prompts, as data for the page's browser of answers."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dschat.report.run_files import Run

MAX_PROMPTS = 500
MAX_CHARS = 2000  # of an answer or a prompt
MAX_TOKENS = 400  # of an answer that is shown token by token


def browser_data(runs: Sequence[Run]) -> dict[str, Any]:
    """``{"policies": [name, …], "by": "judge" or "reward", "prompts": [{"prompt", "answers": [row or null, …]}, …]}``.

    Of several runs each policy carries its run's name. A row holds ``text``, ``score`` and ``judge`` (or null),
    ``length``, ``finished`` and, where they were kept, ``tokens`` with ``kl``, ``value``, ``advantage``. Prompts come
    in the order of the policy that was asked most.
    """
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for name, rows in run.answers.items():
            groups[f"{run.name}: {name}" if len(runs) > 1 else name] = rows
    if not groups:
        return {"policies": [], "by": "", "prompts": []}
    prompts: list[str] = max(map(list, groups.values()), key=len)
    asked = [sum(prompt in rows for rows in groups.values()) for prompt in prompts]
    kept = [prompt for prompt, number in zip(prompts, asked, strict=True) if number > 1 or len(groups) == 1]
    judged = any(row.get("judge") is not None for rows in groups.values() for row in rows.values())
    return {
        "policies": list(groups),
        "by": "judge" if judged else "reward",
        "num_prompts": len(prompts),
        "prompts": [
            {"prompt": _cut(prompt), "answers": [_answer(rows.get(prompt)) for rows in groups.values()]}
            for prompt in kept[:MAX_PROMPTS]
        ],
    }


def as_script(data: Any) -> str:
    """JSON that may stand inside a script element: no text in it can end the element or start a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _answer(row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    found: dict[str, Any] = {"text": _cut(row["response"]), "score": _number(row.get("score"))}
    found |= {"judge": _number(row.get("judge")), "length": row.get("length"), "finished": row.get("finished")}
    kept = row.get("tokens")
    if kept and len(kept["tokens"]) <= MAX_TOKENS:
        found["tokens"] = kept["tokens"]
        found |= {name: [_number(x) for x in kept[name]] for name in ("kl", "value", "advantage") if name in kept}
    return found


def _number(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
