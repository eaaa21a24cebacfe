"""The charts of the report: the curves of all stages, reward against KL, calibration, distributions."""

import html
import math
from collections.abc import Sequence
from typing import Any

from dschat.report.guide import METRICS, Metric
from dschat.report.run_files import STAGE_NAMES, Run, evaluations, series
from dschat.report.svg import Series, chart, histogram

# The charts of a stage, and which metrics each shows.
CURVES = {
    "ppo": (
        ("eval/score_mean", "objective/score_mean"),
        ("eval/judge_mean",),
        ("eval/kl_per_seq", "objective/kl_per_seq"),
        ("eval/response_length", "rollout/response_length"),
        ("eval/finished_fraction", "rollout/finished_fraction"),
        ("objective/entropy_per_token",),
        ("eval/score_std", "objective/score_std"),
        ("eval/distinct_2",),
        ("eval/repetition",),
        ("eval/judge_agreement",),
        ("eval/preference_accuracy",),
        ("policy/clip_fraction",),
        ("policy/approx_kl",),
        ("critic/explained_variance",),
    ),
    "dpo": (("loss",), ("eval/accuracy",), ("eval/margin",)),
    "reward": (("loss",), ("eval/accuracy",), ("eval/margin",)),
    "sft": (("loss",), ("eval/perplexity",)),
}
STEP = {"ppo": "rollout", "dpo": "optimizer step", "reward": "optimizer step", "sft": "optimizer step"}


def stage_curves(runs: Sequence[Run], stage: str) -> str:
    """The curves of one stage, a line for each run and metric; "" where no run has it."""
    charts = []
    for names in CURVES[stage]:
        metric = next(METRICS[stage][name] for name in names if name in METRICS[stage])
        lines = [line for run in runs for line in _lines(run, stage, names, len(runs) > 1)]
        charts.append(
            chart(metric.title, STEP[stage], metric.unit or metric.title, lines) + _meaning(metric, bool(lines))
        )
    return _grid(charts)


def _lines(run: Run, stage: str, names: Sequence[str], many: bool) -> list[Series]:
    found = []
    for name in names:
        steps, values = series(run.stages[stage].lines, name) if stage in run.stages else ([], [])
        if not steps:
            continue
        label = ("held-out" if name.startswith("eval/") else "rollouts") if len(names) > 1 else name
        label = f"{run.name}: {label}" if many else label
        low, high = (_band(run, stage, f"{name}_{end}", steps) for end in ("low", "high"))
        kind = "dots" if name.startswith("eval/") else "line"
        found.append(Series(label, steps, values, kind, low, high))
    return found


def _band(run: Run, stage: str, name: str, steps: Sequence[float]) -> list[float] | None:
    places, values = series(run.stages[stage].lines, name)
    return [dict(zip(places, values, strict=True)).get(step, math.nan) for step in steps] if places else None


def frontier(runs: Sequence[Run]) -> str:
    """Reward and judge against the square root of the KL (Gao et al. 2022), with the best of n where it was asked."""
    charts = []
    for name, title in (("eval/score_mean", "training reward"), ("eval/judge_mean", "independent judge")):
        drawn = []
        for run in runs:
            lines = [line for line in evaluations(run) if line.get(name) is not None]
            x = [math.sqrt(max(0.0, line["eval/kl_per_seq"])) for line in lines]
            labels = [
                f"rollout {line['step']}: {line[name]:.3f} at {line['eval/kl_per_seq']:.2f} nats" for line in lines
            ]
            label = f"{run.name}: PPO" if len(runs) > 1 else "PPO"
            if lines:
                drawn.append(Series(label, x, [line[name] for line in lines], "dots", labels=labels))
            drawn += _best_of_n(run, "score" if title == "training reward" else "judge", len(runs) > 1)
        note = "held-out prompts, a point for each evaluation; the KL of the best of n is log n - (n - 1)/n"
        unit = "judge's score" if name == "eval/judge_mean" else "score"
        charts.append(chart(f"Frontier: {title}", "√KL to the reference (√nats a sequence)", unit, drawn, note))
    return _grid(charts)


def _best_of_n(run: Run, key: str, many: bool) -> list[Series]:
    found = []
    for name, rows in run.answers.items():
        n = name.removeprefix("best of ")
        values = [row[key] for row in rows.values() if row.get(key) is not None]
        if n.isdigit() and name.startswith("best of ") and values:
            kl = math.log(int(n)) - (int(n) - 1) / int(n)
            label = f"{run.name}: {name}" if many else name
            found.append(Series(label, [math.sqrt(kl)], [sum(values) / len(values)], "points"))
    return found


def calibration(run: Run) -> str:
    """Whether the reward model is as often right as it is sure, and its scores of held-out pairs."""
    quality = run.quality
    if quality is None or not quality["scores"]["chosen"]:
        return ""
    bins = quality["calibration"]["bins"]
    low, high = ([bin["ci95"][end] for bin in bins] for end in (0, 1))
    x, y = ([bin[name] for bin in bins] for name in ("confidence", "accuracy"))
    labels = [f"{bin['label']}: {bin['num_pairs']} pairs, right in {bin['accuracy']:.0%}" for bin in bins]
    fit = Series("reward model", x, y, "dots", low, high, labels=labels)
    note = f"the dotted line is perfect; expected calibration error {quality['calibration']['ece']:.3f}"
    confidence = "confidence: sigmoid(|chosen - rejected|)"
    first = chart("Calibration on held-out pairs", confidence, "accuracy (share of pairs)", [fit], note, diagonal=True)
    scores = quality["scores"]
    shares = []
    for name in ("chosen", "rejected"):
        counts = scores[name]["counts"]
        label = f"{name}: mean {scores[name]['mean']:+.3g}"
        shares.append(Series(label, scores["edges"], [c / max(1, sum(counts)) for c in counts], "step"))
    return _grid([first, chart("Scores of held-out pairs", "score (log-odds)", "share of the answers", shares)])


def distributions(run: Run) -> str:
    """Scores and lengths of the answers before and after, on the same held-out prompts."""
    charts = []
    titles = {"score": ("Training reward", "score"), "judge": ("Independent judge", "judge's score")}
    titles["length"] = ("Length", "tokens")
    for key, (title, unit) in titles.items():
        groups = [
            (name, [float(row[key]) for row in rows.values() if row.get(key) is not None])
            for name, rows in run.answers.items()
            if not name.startswith("best of ")
        ]
        charts.append(histogram(f"{title} of the answers", unit, groups))
    return _grid(charts)


def preflight_charts(preflight: dict[str, Any] | None) -> str:
    """The entropy along the answers and the spread of the reward before PPO began."""
    if not preflight:
        return ""
    entropy, spread = [], []
    for found in preflight["candidates"]:
        for where, curve in found["entropy_by_position"].items():
            places = [position + 1 for position in range(len(curve))]
            entropy.append(Series(f"{found['name']}: {where}", places, [math.nan if v is None else v for v in curve]))
        spread.append((found["name"], found["normalised_scores"]))
    note = "reward - mean of the same prompt + mean of all"
    return _grid(
        [
            chart("Entropy of the next token", "position in the answer (tokens)", "nats", entropy),
            histogram("Reward, normalised by prompt", "score", spread).replace(
                "</svg>", f"</svg><p class='quiet'>{note}</p>", 1
            ),
        ]
    )


def _grid(charts: Sequence[str]) -> str:
    shown = [f"<div class='cell'>{c}</div>" for c in charts if c]
    return f"<div class='grid'>{''.join(shown)}</div>" if shown else ""


def _meaning(metric: Metric, is_drawn: bool) -> str:
    if not is_drawn:
        return ""
    text = html.escape(f"{metric.definition}. Healthy: {metric.healthy}. When not: {metric.mend}.")
    return f"<details class='meaning'><summary>what it means</summary><p>{text}</p></details>"


def titles(stage: str) -> str:
    """As a heading."""
    name = STAGE_NAMES[stage]
    return name[0].upper() + name[1:]
