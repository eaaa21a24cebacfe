"""Intervals for the shares and means that the reports print, and what they are computed from."""

import math

import numpy as np

Z_95 = 1.959964  # of a two-sided 95 % interval


def wilson_interval(successes: float, num_trials: float, z: float = Z_95) -> tuple[float, float]:
    """95 % score interval for a share (Wilson 1927). ``successes`` may hold halves, for ties; both may be effective
    numbers. No trials: (0, 1).

    With halves the true variance is smaller than the binomial one, so the interval errs on the wide side.
    """
    if num_trials == 0:
        return 0.0, 1.0
    share = successes / num_trials
    centre = share + z * z / (2 * num_trials)
    spread = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def design_effect(values: np.ndarray, clusters: np.ndarray) -> float:
    """By how much the variance of the mean of ``values`` (N,) exceeds that of N independent ones; at least 1.

    Kish 1965, with the linearised variance of a mean of clusters: the sum over clusters of the squared sum of
    deviations, over the sum of squared deviations. ``clusters`` (N,) are labels: equal, and the values may depend on
    each other. Where nothing can be estimated (one cluster, or no deviation at all) full dependence is assumed:
    sum of squared cluster sizes / N. With clusters of one it is 1.
    """
    if len(values) == 0:
        return 1.0
    _, index, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    deviations = values - values.mean()
    total = np.square(deviations).sum()
    if len(sizes) == 1 or total == 0:
        return float(np.square(sizes).sum() / len(values))
    return max(1.0, float(np.square(np.bincount(index, weights=deviations)).sum() / total))


def clustered_interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """95 % interval for the share that ``values`` (N,) of 0, 1/2 and 1 estimate, where those of one cluster depend on
    each other: Wilson's at the effective sample size N / `design_effect` (Korn & Graubard 1998)."""
    effective = len(values) / design_effect(values, clusters)
    return wilson_interval(float(values.mean()) * effective if len(values) else 0.0, effective)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % normal interval for the mean of independent ``values`` (N,); NaN of fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    spread = Z_95 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - spread, float(values.mean()) + spread


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of ``x`` and ``y`` (N,), equal values sharing their mean rank; NaN where either is constant."""
    a, b = (_mean_ranks(values) - (len(values) - 1) / 2 for values in (x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values have the mean of their places."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[index]


def expected_best_of_n(rewards: np.ndarray, judged: np.ndarray, n: int) -> float:
    """The mean of ``judged`` (M,) at the largest of ``rewards`` (M,), over all subsets of n of the M >= n samples.

    The sample of ascending rank r is the best in C(r - 1, n - 1) of the C(M, n) subsets; equal rewards share their
    weight equally (as if one of them were drawn). Unbiased for n fresh samples.
    """
    size = len(rewards)
    whole = math.comb(size, n)
    weights = np.array([math.comb(rank, n - 1) / whole for rank in range(size)])
    _, index, counts = np.unique(rewards, return_inverse=True, return_counts=True)
    shared = np.add.reduceat(weights, np.cumsum(counts) - counts) / counts
    return float(shared[index] @ judged)
