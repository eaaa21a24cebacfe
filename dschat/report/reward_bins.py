"""Scored pairs, put into bins: by what may explain the accuracy, by confidence, by score."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dschat.report.statistics import clustered_interval

import numpy as np

NUM_BINS = 5  # of score differences and margins: equal numbers of pairs
NUM_CONFIDENCE_BINS = 10  # of equal width, from 0.5 to 1
NUM_HISTOGRAM_BINS = 30
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MANY_TURNS = 5
LABEL_SIZE = 34  # characters of a bin's name where it is shown
GROUPS = {
    "score_difference": "|score difference| in log-odds",
    "label_margin": "margin of the label",
    "length_difference": "difference in length, in tokens",
    "source": "source",
    "num_turns": "user turns",
}


@dataclass(frozen=True)
class ScoredPairs:
    """Held-out pairs and their scores: arrays (N,), an entry per pair."""

    chosen: np.ndarray  # float64 scores of the better answers
    rejected: np.ndarray
    chosen_len: np.ndarray  # int: tokens of the answer, the end token included
    rejected_len: np.ndarray
    source: Sequence[str]  # the name of the data set
    num_turns: np.ndarray  # int: user turns of the dialogue
    prompt: np.ndarray  # int: the record; pairs of one record depend on each other
    margin: np.ndarray  # float64: by how much the label says that it is better; NaN: not given


def share(correct: np.ndarray, prompt: np.ndarray) -> dict[str, Any]:
    """The accuracy of ``correct`` (N,), 0, 1/2 or 1, with its interval; ``prompt`` (N,): the clusters."""
    accuracy = correct.mean() if len(correct) else None
    return {"num_pairs": len(correct), "accuracy": accuracy, "ci95": clustered_interval(correct, prompt)}


def short_label(label: str) -> str:
    """The end of a long name: what tells two files apart."""
    return label if len(label) <= LABEL_SIZE else "…" + label[1 - LABEL_SIZE :]


def groups(pairs: ScoredPairs, difference: np.ndarray, good: np.ndarray) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Grouping -> (label, mask (N,)) of its bins that are not empty."""
    by_source = np.asarray(pairs.source, dtype=object)
    turns = np.minimum(pairs.num_turns, MANY_TURNS)
    bins_by = {
        "score_difference": _quantile_bins(np.abs(difference), good),
        "label_margin": _quantile_bins(pairs.margin, np.isfinite(pairs.margin)),
        "length_difference": _length_bins(pairs.rejected_len - pairs.chosen_len),
        "source": [(name, by_source == name) for name in sorted(set(pairs.source))],
        "num_turns": [(f"{n} or more" if n == MANY_TURNS else f"{n}", turns == n) for n in np.unique(turns)],
    }
    return {name: [(label, mask) for label, mask in bins if mask.any()] for name, bins in bins_by.items()}


def _quantile_bins(values: np.ndarray, given: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Bins of about equal numbers of the given ``values``, or a bin per value where these are few."""
    distinct = np.unique(values[given])
    if len(distinct) <= NUM_BINS:
        return [(f"{value:.3g}", given & (values == value)) for value in distinct]
    edges = np.unique(np.quantile(values[given], np.linspace(0, 1, NUM_BINS + 1)))
    place = np.clip(np.searchsorted(edges, values, side="right"), 1, len(edges) - 1)
    bins = enumerate(zip(edges[:-1], edges[1:], strict=True), 1)
    return [(f"{low:.3g} to {high:.3g}", given & (place == number)) for number, (low, high) in bins]


def _length_bins(excess: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Which of the two is longer, and whether by more than is usual here. ``excess``: rejected - chosen, in tokens."""
    size = np.abs(excess)
    usual = int(np.median(size[size > 0])) if size.any() else 0
    little, much = f"by 1 to {usual}" if usual > 1 else "by 1", f"by over {usual}"
    return [
        (f"chosen longer {much}", excess < -usual),
        (f"chosen longer {little}", (excess < 0) & (size <= usual)),
        ("equal", excess == 0),
        (f"rejected longer {little}", (excess > 0) & (size <= usual)),
        (f"rejected longer {much}", excess > usual),
    ]


def calibration(difference: np.ndarray, prompt: np.ndarray) -> dict[str, Any]:
    """Reliability of sigmoid(|difference|) as the probability that the higher score is right, its expected error
    (Guo et al. 2017, eq. 3) and the loss in nats (that of a coin: log 2)."""
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    correct = np.heaviside(difference, 0.5)
    edges = np.linspace(0.5, 1, NUM_CONFIDENCE_BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right"), 1, NUM_CONFIDENCE_BINS)
    bins = []
    for number in np.unique(place):
        mask = place == number
        label = f"{edges[number - 1]:.2f} to {edges[number]:.2f}"
        bins.append({"label": label, "confidence": confidence[mask].mean()} | share(correct[mask], prompt[mask]))
    gaps = [abs(bin["accuracy"] - bin["confidence"]) * bin["num_pairs"] for bin in bins]
    return {
        "bins": bins,
        "ece": sum(gaps) / len(difference) if bins else None,
        "log_loss": np.logaddexp(0, -difference).mean() if bins else None,
        "log_loss_of_chance": math.log(2),
    }


def distribution(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """Mean, population standard deviation, quantiles and counts on common edges of the two sides' scores."""
    if not len(chosen):
        return {"edges": [], "chosen": None, "rejected": None}
    low, high = min(chosen.min(), rejected.min()), max(chosen.max(), rejected.max())
    reach = max((high - low) / 2, 1e-3 * max(1.0, abs(low), abs(high)))  # edges differ, whatever the scores
    edges = (low + high) / 2 + np.linspace(-reach, reach, NUM_HISTOGRAM_BINS + 1)

    def of(scores: np.ndarray) -> dict[str, Any]:
        quantiles = {f"{q:g}": value for q, value in zip(QUANTILES, np.quantile(scores, QUANTILES), strict=True)}
        counts = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0]  # rounding leaves no score outside
        return {"mean": scores.mean(), "std": scores.std(), "quantiles": quantiles, "counts": counts}

    return {"edges": edges, "chosen": of(chosen), "rejected": of(rejected)}
