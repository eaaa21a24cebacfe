"""The main chart of a report as a picture, for a README: reward, judge and KL on held-out prompts over training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dschat.report.guide import METRICS
from dschat.report.run_files import Run, series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4488", "#8A6D00", "#4A5A6A")
PANELS = ("eval/score_mean", "eval/judge_mean", "eval/kl_per_seq")
SINGLE = ("loss", "eval/accuracy", "eval/perplexity")  # where there was no PPO


def write_picture(path: Path, runs: Sequence[Run], panels: Sequence[str] = PANELS) -> Path | None:
    """A panel for each metric and a line for each run. None, and no file, where no run has any of them."""
    from matplotlib.figure import Figure

    drawn = [name for name in panels if any(_points(run, name)[0] for run in runs)]
    drawn = drawn or [name for name in SINGLE if any(_points(run, name)[0] for run in runs)]
    path.unlink(missing_ok=True)
    if not drawn:
        return None
    figure = Figure(figsize=(3.4 * len(drawn), 3.1), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for place, run in enumerate(runs):
            x, y = _points(run, name)
            style = "o-" if len(x) <= 60 else "-"
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(x, y, style, color=colour, markersize=3.5, linewidth=1.5, label=run.name)
        metric = next(metrics[name] for metrics in METRICS.values() if name in metrics)
        axes.set_title(metric.title, loc="left", fontsize=10)
        axes.set_ylabel(metric.unit, fontsize=9)
        axes.set_xlabel("rollout" if any("ppo" in run.stages for run in runs) else "optimizer step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _points(run: Run, name: str) -> tuple[list[Any], list[Any]]:
    """Of step 3 where there was one, else of the first stage that has the metric."""
    stages = [run.stages["ppo"]] if "ppo" in run.stages else list(run.stages.values())
    return next((found for found in (series(stage.lines, name) for stage in stages) if found[0]), ([], []))
