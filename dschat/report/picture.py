"""The main chart of a report as a picture, for a README: reward, judge and KL on held-out prompts over training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dschat.report.run_files import Run, evaluations

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4488", "#8A6D00", "#4A5A6A")
PANELS = (
    ("eval/score_mean", "training reward (score)"),
    ("eval/judge_mean", "independent judge (its score)"),
    ("eval/kl_per_seq", "KL to the reference (nats a sequence)"),
)
SINGLE = ("loss", "eval/accuracy", "eval/perplexity")  # where there was no PPO


def write_picture(path: Path, runs: Sequence[Run]) -> Path | None:
    """Draw it; None, and no file, where no run has any curve."""
    from matplotlib.figure import Figure

    drawn = [panel for panel in PANELS if any(_points(run, panel[0])[0] for run in runs)]
    if not drawn:
        drawn = [(name, name) for name in SINGLE if any(_points(run, name)[0] for run in runs)]
    path.unlink(missing_ok=True)
    if not drawn:
        return None
    figure = Figure(figsize=(3.4 * len(drawn), 3.1), layout="constrained")
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (name, label) in zip(panels, drawn, strict=True):
        for run, colour in zip(runs, _repeat(COLOURS, len(runs)), strict=True):
            x, y = _points(run, name)
            axes.plot(x, y, "o-" if len(x) <= 60 else "-", color=colour, markersize=3.5, linewidth=1.5, label=run.name)
        axes.set_title(label, loc="left", fontsize=9)
        axes.set_xlabel("rollout" if name.startswith("eval/") and evaluations(runs[0]) else "step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _points(run: Run, name: str) -> tuple[list[Any], list[Any]]:
    lines = evaluations(run) or [line for stage in run.stages.values() for line in stage.lines]
    kept = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def _repeat(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]
