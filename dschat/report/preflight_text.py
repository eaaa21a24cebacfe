"""The preflight for a person: a table, a file, pictures."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dschat.report.metrics import write_whole
from dschat.report.preflight_figures import NUCLEUS, PLAUSIBLE
from dschat.report.progress import table

# figure -> (its line in the table, how it is written)
LINES = {
    "entropy": ("entropy (nats a token)", ".3f"),
    "entropy_per_answer": ("entropy (nats an answer)", ".2f"),
    "effective_answers": ("answers to choose among (exp of that)", ".3g"),
    "top_probability": ("largest probability of the next token", ".3f"),
    "sampled_probability": ("probability of the sampled token", ".3f"),
    "plausible_tokens": (f"tokens of probability {PLAUSIBLE} or more", ".1f"),
    "nucleus_tokens": (f"tokens of together {NUCLEUS}", ".1f"),
    "score_mean": ("reward: mean", "+.3f"),
    "score_std": ("reward: spread (std)", ".3f"),
    "score_std_within": ("  of it within a prompt", ".3f"),
    "score_std_between": ("  of it between prompts", ".3f"),
    "no_spread": ("prompts without a spread of reward", ".0%"),
    "finished": ("answers that end", ".0%"),
    "length": ("tokens of an answer", ".1f"),
    "distinct_1": ("distinct-1", ".3f"),
    "distinct_2": ("distinct-2", ".3f"),
    "distinct_answers": ("different answers to a prompt", ".0%"),
}


def preflight_table(preflight: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows): a column for each policy and kind of prompt."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for candidate in preflight["candidates"]:
        columns.append((f"{candidate['name']}, PPO's prompts", candidate["prompts"]))
        if candidate["training"] is not None:
            columns.append((f"{candidate['name']}, SFT's prompts", candidate["training"]))
    first = columns[0][1]
    header = [f"{first['num_samples']} answers to each of {first['num_prompts']} prompts", *(n for n, _ in columns)]
    rows = [
        [label, *("" if found[key] is None else format(found[key], spec) for _, found in columns)]
        for key, (label, spec) in LINES.items()
    ]
    return header, rows


def preflight_text(preflight: Mapping[str, Any]) -> str:
    """The table, then the verdict on each policy and which to start from."""
    lines = [table(*preflight_table(preflight)), ""]
    for candidate in preflight["candidates"]:
        lines.append(f"{candidate['name']}: {candidate['verdict']}")
        lines += [f"  {reason}" for reason in candidate["reasons"]]
    if len(preflight["candidates"]) > 1:
        lines.append(f"start from {preflight['start_from']}: {preflight['why']}")
    lines.append(f"preflight: {preflight['verdict']}: {preflight['reason']}")
    return "\n".join(lines)


def write_preflight(preflight: Mapping[str, Any], folder: Path, pictures: bool) -> None:
    """preflight.json and, with ``pictures``, preflight.png."""
    text = json.dumps(preflight, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "preflight.json", text + "\n")
    if pictures:
        _draw(preflight, folder / "preflight.png")


def _draw(preflight: Mapping[str, Any], path: Path) -> None:
    """The entropy along the answers, and the reward's density normalised by prompt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    everything = [x for candidate in preflight["candidates"] for x in candidate["normalised_scores"]]
    for candidate in preflight["candidates"]:
        for place, (where, curve) in enumerate(candidate["entropy_by_position"].items()):
            values = [math.nan if v is None else v for v in curve]
            style = "--" if place else "-"
            left.plot(range(1, len(values) + 1), values, style, label=f"{candidate['name']}: {where}")
        if candidate["normalised_scores"]:
            label = f"{candidate['name']}: within-prompt std {candidate['prompts']['score_std_within']:.2f}"
            span = (min(everything), max(everything) + 1e-9)
            right.hist(candidate["normalised_scores"], bins=40, range=span, density=True, alpha=0.5, label=label)
    left.set_title("Entropy of the next token", loc="left", fontsize=10)
    left.set_xlabel("position in the answer (tokens)")
    left.set_ylabel("nats")
    right.set_title("Reward - mean of the prompt + mean of all", loc="left", fontsize=10)
    right.set_xlabel("score")
    right.set_ylabel("density")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
