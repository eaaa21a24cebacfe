"""How good a reward model is, on held-out pairs: more than one accuracy.

The accuracy comes with an interval that knows that pairs of one prompt depend on each other, beside what chance and
the length of the answers alone would reach; broken down by what may explain it; with the calibration of the scores
(as log-odds, which is what the Bradley-Terry loss trains) and their distribution. `weakness` says in one line why a
reward model should not be used.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.report.metrics import write_whole
from dschat.report.progress import table
from dschat.report.reward_bins import GROUPS, ScoredPairs, calibration, distribution, groups, share, short_label
from dschat.report.reward_plots import write_plots
from dschat.report.statistics import Z_95, design_effect, expected_best_of_n, mean_interval, spearman

import numpy as np

QUALITY_FOLDER = "quality"  # of a reward model's directory: what `write_quality` leaves
Quality = dict[str, Any]


def pairs_of_rankings(rows: Sequence[Mapping[str, Any]], scores: np.ndarray) -> ScoredPairs:
    """All pairs of answers of different rank.

    Args:
        rows: records with ``ranks`` (K,) (1 is best, equal: a tie, no pair), ``lengths`` (K,) in tokens, ``source``,
            ``num_turns``, ``margin`` (0: none given) and ``prompt``, a number that records of the same prompt share.
        scores: (N, K) of the N rows, filled up beyond a row's own K with anything.
    """
    assert len(rows) == len(scores), f"{len(rows)} rows and {len(scores)} rows of scores"
    pairs = [
        (number, better, worse)
        for number, row in enumerate(rows)
        for better, high in enumerate(row["ranks"])
        for worse, low in enumerate(row["ranks"])
        if high < low
    ]
    record, better, worse = np.array(pairs, dtype=np.int64).reshape(-1, 3).T
    scores = np.asarray(scores, dtype=np.float64)
    margin = np.array([row["margin"] for row in rows], dtype=np.float64)
    turns = np.array([row["num_turns"] for row in rows], dtype=np.int64)
    return ScoredPairs(
        chosen=scores[record, better],
        rejected=scores[record, worse],
        chosen_len=np.array([rows[n]["lengths"][i] for n, i, _ in pairs], dtype=np.int64),
        rejected_len=np.array([rows[n]["lengths"][i] for n, _, i in pairs], dtype=np.int64),
        source=[rows[n]["source"] for n, _, _ in pairs],
        num_turns=turns[record],
        prompt=np.array([row["prompt"] for row in rows], dtype=np.int64)[record],
        margin=np.where(margin == 0, math.nan, margin)[record],
    )


def reward_quality(
    pairs: ScoredPairs, *, padding_gap: float | None = None, best_of_n: list[dict] | None = None
) -> Quality:
    """What is known of a reward model, as plain JSON values; what cannot be said is None.

    Args:
        pairs: a pair whose scores are not finite in float32 counts as wrong and is left out of everything that is
            computed from the values of the scores (``num_bad``).
        padding_gap: the largest change of a score by padding, in the unit of the scores.
        best_of_n: of `best_of_n_curve`.

    Returns:
        ``accuracy`` (chosen scored higher; a tie counts half) with ``ci95``, ``margin`` (mean of chosen - rejected),
        counts, ``accuracy_by`` (grouping -> bins of ``label``, ``num_pairs``, ``accuracy``, ``ci95``),
        ``calibration``, ``baselines`` (length and chance), ``length_correlation``, ``scores``, and what was given.
    """
    limit = np.finfo(np.float32).max  # NaN is not below it
    good = (np.abs(pairs.chosen) <= limit) & (np.abs(pairs.rejected) <= limit)
    difference = np.where(good, pairs.chosen, 0.0) - np.where(good, pairs.rejected, 0.0)
    correct = np.where(good, np.heaviside(difference, 0.5), 0.0)
    longer = np.heaviside(pairs.chosen_len - pairs.rejected_len, 0.5)
    rule, by_length = ("longer", longer) if longer.sum() >= len(longer) / 2 else ("shorter", 1 - longer)
    effective = len(correct) / design_effect(correct, pairs.prompt)
    chance = Z_95 * math.sqrt(0.25 / effective) if effective else 0.5
    scores = np.concatenate([pairs.chosen[good], pairs.rejected[good]])
    lengths = np.concatenate([pairs.chosen_len[good], pairs.rejected_len[good]])
    quality = share(correct, pairs.prompt) | {
        "num_prompts": len(np.unique(pairs.prompt)),
        "num_effective_pairs": effective,
        "num_bad": int((~good).sum()),
        "ties": int((good & (difference == 0)).sum()),
        "margin": difference[good].mean() if good.any() else None,
        "accuracy_by": {
            name: [{"label": label} | share(correct[mask], pairs.prompt[mask]) for label, mask in bins]
            for name, bins in groups(pairs, difference, good).items()
        },
        "calibration": calibration(difference[good], pairs.prompt[good]),
        "baselines": {
            "length": {"rule": rule} | share(by_length, pairs.prompt),
            # Where 95 % of coins end; accuracy lies outside exactly when its own interval leaves 0.5 out.
            "chance": {"accuracy": 0.5, "ci95": [max(0.0, 0.5 - chance), min(1.0, 0.5 + chance)]},
        },
        "length_correlation": spearman(scores, lengths),
        "scores": distribution(pairs.chosen[good], pairs.rejected[good]),
        "padding_gap": padding_gap,
        "best_of_n": best_of_n,
    }
    return _plain(quality)


def _plain(value: Any) -> Any:
    """JSON: lists and numbers of Python, None for what is not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def best_of_n_curve(rewards: np.ndarray, judged: np.ndarray, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What choosing the best of n answers by the reward is worth to an independent judge.

    Args:
        rewards: (P, N) of N samples for each of P prompts; a sample without a finite reward or judgement is left out.
        judged: (P, N) the judge's scores of the same.
        sizes: the n, at least 1. A prompt with fewer than n samples left is left out for that n.

    Returns:
        For each n: ``judge``, the expected judge's score (`expected_best_of_n`, mean over ``num_prompts`` prompts),
        its 95 % interval over prompts ``low`` and ``high``, and ``ceiling``, the best of n by the judge itself. None:
        no prompt (or for the interval, one).
    """
    assert np.shape(rewards) == np.shape(judged), f"{np.shape(rewards)} rewards, {np.shape(judged)} judgements"
    given = np.isfinite(rewards) & np.isfinite(judged)
    prompts = [(r[mask], j[mask]) for r, j, mask in zip(rewards, judged, given, strict=True)]
    curve = []
    for n in sizes:
        enough = [(r, j) for r, j in prompts if len(r) >= n]
        best = np.array([expected_best_of_n(r, j, n) for r, j in enough])
        ceiling = np.array([expected_best_of_n(j, j, n) for _, j in enough])
        low, high = mean_interval(best)
        row = {"n": n, "judge": best.mean() if enough else None, "low": low, "high": high}
        curve.append(row | {"ceiling": ceiling.mean() if enough else None, "num_prompts": len(enough)})
    return _plain(curve)


def weakness(quality: Quality) -> str | None:
    """None for a reward model that may be used; else one line: why not, with the figures."""
    num_pairs, accuracy, length = quality["num_pairs"], quality["accuracy"], quality["baselines"]["length"]
    if not num_pairs:
        return "no held-out pairs to judge it by"
    if quality["num_bad"]:
        return f"{quality['num_bad']} of {num_pairs} held-out pairs have a score that is no finite number"
    low, high = quality["ci95"]
    found = f"accuracy {accuracy:.2f} (95 %: {low:.2f} to {high:.2f}) on {num_pairs} held-out pairs"
    if high < 0.5:
        return f"{found} is below chance; chosen and rejected may be swapped"
    if low <= 0.5:
        return f"{found} cannot be told from chance"
    if accuracy <= length["accuracy"]:
        return f"{found} is no better than taking the {length['rule']} answer, {length['accuracy']:.2f}"
    return None


def quality_tables(quality: Quality) -> str:
    """What a person reads in the terminal; a grouping into one bin is left out. The last line is the verdict."""
    length, coin = quality["baselines"]["length"], quality["baselines"]["chance"]
    rows = [
        ["reward model", f"{quality['num_pairs']}", _shown(quality)],
        [f"the {length['rule']} answer", f"{length['num_pairs']}", _shown(length)],
        ["chance", "", _shown(coin)],
    ]
    for name, bins in quality["accuracy_by"].items():
        if len(bins) > 1:
            rows.append([f"by {GROUPS[name]}", "", ""])
            rows += [[f"  {short_label(bin['label'])}", f"{bin['num_pairs']}", _shown(bin)] for bin in bins]
    parts = [table(["held-out pairs", "pairs", "accuracy (95 %)"], rows), "\n".join(_facts(quality))]
    if quality["best_of_n"]:
        curve = [
            [f"best of {row['n']}", _mean(row["judge"], row["low"], row["high"]), _number(row["ceiling"])]
            for row in quality["best_of_n"]
        ]
        parts.append(table(["samples, chosen by the reward", "judge (95 %)", "chosen by the judge"], curve))
    reason = weakness(quality)
    parts.append(f"verdict: {f'weak; {reason}' if reason else 'better than chance and than length alone'}")
    return "\n\n".join(parts)


def _facts(quality: Quality) -> list[str]:
    """Lines below the table."""
    fit, scores = quality["calibration"], quality["scores"]
    lines = [
        f"{quality['num_pairs']} pairs of {quality['num_prompts']} prompts are worth "
        f"{quality['num_effective_pairs']:.0f} independent ones; ties {quality['ties']}"
    ]
    if scores["chosen"]:
        chosen, rejected = (
            f"{name} {scores[name]['mean']:+.3g} (std {scores[name]['std']:.3g})" for name in ("chosen", "rejected")
        )
        lines += [
            f"scores: {chosen}, {rejected}, margin {quality['margin']:+.3g}, "
            f"rank correlation with length {_number(quality['length_correlation'])}",
            f"calibration: expected error {fit['ece']:.3f}, loss {fit['log_loss']:.3f} nats "
            f"(a coin: {fit['log_loss_of_chance']:.3f})",
        ]
    if quality["padding_gap"] is not None:
        lines.append(f"padding moves a score by at most {quality['padding_gap']:.2g}")
    return lines


def _shown(part: Mapping[str, Any]) -> str:
    return _mean(part["accuracy"], *part["ci95"])


def _mean(value: float | None, low: float | None, high: float | None) -> str:
    return _number(value) if low is None or value is None else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_quality(quality: Quality, directory: str | Path) -> None:
    """``quality.json`` (atomic) and the pictures of it (`write_plots`) into ``directory``, which is made.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(quality, indent=2, ensure_ascii=False, allow_nan=False)
        write_whole(folder / "quality.json", text + "\n")
        write_plots(quality, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); make room there or choose another") from None


def read_quality(directory: str | Path) -> Quality | None:
    """What `write_quality` left in ``directory``; None where it left nothing.

    Raises:
        UserError: ``quality.json`` is damaged: it cannot be read, or its numbers cannot be shown.
    """
    path = Path(directory) / "quality.json"
    try:
        quality = json.loads(path.read_text(encoding="utf-8"))
        quality_tables(quality)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: not a report on a reward model; remove it and evaluate again") from None
    return quality
