"""Pictures of a reward model's quality, drawn from the numbers of quality.json.

Matplotlib through its objects only: no state of pyplot, no display.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dschat.report.reward_bins import GROUPS, short_label

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # of Okabe and Ito's palette: told apart by any eye
DPI = 150


def write_plots(quality: Mapping[str, Any], folder: Path) -> None:
    """``scores.png``, ``reliability.png``, ``accuracy_by.png`` and, where it was measured, ``best_of_n.png``.

    Pictures of an earlier report go; without pairs there is nothing to draw of them.

    Raises:
        OSError: the folder cannot be written.
    """
    figures: dict[str, Any] = {"scores": None, "reliability": None, "accuracy_by": None, "best_of_n": None}
    if quality["scores"]["chosen"]:
        figures |= {"scores": _scores(quality["scores"]), "reliability": _reliability(quality["calibration"])}
    if quality["num_pairs"]:
        figures["accuracy_by"] = _accuracy_by(quality)
    if any(row["num_prompts"] for row in quality["best_of_n"] or []):
        figures["best_of_n"] = _best_of_n(quality["best_of_n"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a source may be named in a script that the font lacks
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            path.unlink(missing_ok=True)
            if figure is not None:
                figure.savefig(path, dpi=DPI)


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches; its parts keep out of each other's way."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plot(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def _scores(scores: Mapping[str, Any]) -> Any:
    from matplotlib.colors import to_rgba

    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for name, colour, hatch in (("rejected", ORANGE, "//"), ("chosen", BLUE, None)):
        part = scores[name]
        label = f"{name}: mean {part['mean']:+.3g}, std {part['std']:.3g} (n = {sum(part['counts'])})"
        fill = {"facecolor": to_rgba(colour, 0.25), "edgecolor": colour, "linewidth": 1.5, "hatch": hatch}
        axes.stairs(part["counts"], scores["edges"], fill=True, label=label, **fill)
        axes.axvline(part["mean"], color=colour, linestyle="--", linewidth=1.2)
    _plot(axes, "Scores of held-out pairs (dashed: means)", "score (log-odds)", "answers in the bin")
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def _reliability(fit: Mapping[str, Any]) -> Any:
    figure = _figure(6, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = fit["bins"]
    x = [bin["confidence"] for bin in bins]
    top.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="perfectly calibrated")
    accuracy = [bin["accuracy"] for bin in bins]
    top.errorbar(x, accuracy, yerr=_errors(bins), fmt="o-", color=BLUE, capsize=3, label="the reward model")
    title = f"Is it as often right as it is sure? Expected error {fit['ece']:.3f}\n"
    title += f"Loss {fit['log_loss']:.3f} nats (a coin: {fit['log_loss_of_chance']:.3f})"
    _plot(top, title, "", "accuracy (95 % interval)")
    top.set_ylim(-0.02, 1.02)
    top.legend(loc="lower right", frameon=False)
    counts = [bin["num_pairs"] for bin in bins]
    left = [float(bin["label"].split()[0]) for bin in bins]
    bars = bottom.bar(left, counts, width=0.05, align="edge", color=BLUE, alpha=0.6, edgecolor="white")
    bottom.bar_label(bars, fontsize=8)
    bottom.margins(y=0.2)
    _plot(bottom, "", "confidence: sigmoid(|chosen − rejected|)", f"pairs (n = {sum(counts)})")
    return figure


def _errors(bins: list[Any]) -> list[list[float]]:
    """How far the intervals reach below and above the accuracies, as matplotlib takes them (rounding left out)."""
    below = [max(0.0, bin["accuracy"] - bin["ci95"][0]) for bin in bins]
    return [below, [max(0.0, bin["ci95"][1] - bin["accuracy"]) for bin in bins]]


def _accuracy_by(quality: Mapping[str, Any]) -> Any:
    """Bars under each other: all pairs, then the bins of each grouping that has more than one."""
    groups = {"": [{"label": "all pairs", **quality}]}
    groups |= {f"by {GROUPS[name]}": bins for name, bins in quality["accuracy_by"].items() if len(bins) > 1}
    sizes = [len(bins) for bins in groups.values()]
    figure = _figure(8, 1.4 + 0.32 * sum(sizes) + 0.35 * len(groups))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    length = quality["baselines"]["length"]
    for axes, (title, bins) in zip(panels, groups.items(), strict=True):
        y = range(len(bins))
        values = [bin["accuracy"] for bin in bins]
        error = {"ecolor": "black", "capsize": 3, "linewidth": 1}
        axes.barh(y, values, xerr=_errors(bins), color=BLUE, alpha=0.6, height=0.7, error_kw=error)
        axes.axvline(0.5, color="black", linestyle=":", label="chance")
        label = f"length alone (the {length['rule']} answer): {length['accuracy']:.2f}"
        axes.axvline(length["accuracy"], color=ORANGE, linestyle="--", label=label)
        axes.set_yticks(y, [_bin_label(bin) for bin in bins])
        axes.set_ylim(len(bins) - 0.5, -0.5)
        _plot(axes, title, "", "")
    panels[-1].set_xlim(0, 1)
    panels[-1].set_xlabel("accuracy (share of pairs, 95 % interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _bin_label(bin: Mapping[str, Any]) -> str:
    label = short_label(bin["label"]).replace("$", r"\$")  # a dollar would start a formula
    return f"{label} (n = {bin['num_pairs']})"


def _best_of_n(curve: list[Mapping[str, Any]]) -> Any:
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    rows = [row for row in curve if row["num_prompts"]]
    n = [row["n"] for row in rows]
    axes.plot(n, [row["ceiling"] for row in rows], "s--", color=GREY, label="chosen by the judge itself (the ceiling)")
    axes.plot(n, [row["judge"] for row in rows], "o-", color=BLUE, label="chosen by the reward model (95 % interval)")
    band = [row for row in rows if row["low"] is not None]
    ends = [row["low"] for row in band], [row["high"] for row in band]
    axes.fill_between([row["n"] for row in band], *ends, color=BLUE, alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(n, [f"{row['n']}\n({row['num_prompts']})" for row in rows])
    axes.minorticks_off()
    _plot(axes, "Best of n answers", "n: answers to choose from (prompts)", "judge's score, mean over prompts")
    figure.legend(loc="outside lower center", frameon=False)
    return figure
