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


def bootstrap_means(values: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """(num_draws, K): the means of ``values`` (N, K) over N rows drawn with replacement, the K columns of a row
    together (a paired bootstrap over rows, Efron 1979)."""
    rows = np.random.default_rng(seed).integers(len(values), size=(num_draws, len(values)))
    return np.stack([column[rows].mean(1) for column in values.T], axis=1)


def length_controlled_share(wins: np.ndarray, length_gain: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The share of prompts won if the answers were equally long, and its 95 % bootstrap interval over prompts.

    The model is P(win) = sigmoid(a + b tanh(g / std(g))) with the gain in length g, as in the length-controlled
    AlpacaEval (Dubois et al. 2024, eq. 2, without its terms of models and of instructions); the share is sigmoid(a).
    A normal prior of variance 10 on both keeps them finite where every prompt is won.

    Args:
        wins: (N,) of 0, 1/2 (a tie) and 1.
        length_gain: (N,) tokens of the answer less those of the baseline's.
    """
    spread = float(length_gain.std())
    x = np.tanh(length_gain / spread) if spread else np.zeros(len(wins))
    weights = np.random.default_rng(seed).multinomial(len(wins), np.full(len(wins), 1 / len(wins)), 1000)
    weights = np.concatenate([np.ones((1, len(wins))), weights])
    a, b = np.zeros((2, len(weights)))
    for _ in range(50):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        slack, curve = weights * (wins - p), weights * p * (1 - p)
        gradient = slack.sum(1) - a / 10, (slack * x).sum(1) - b / 10
        aa, ab, bb = curve.sum(1) + 0.1, (curve * x).sum(1), (curve * x * x).sum(1) + 0.1
        scale = aa * bb - ab * ab
        step = (bb * gradient[0] - ab * gradient[1]) / scale, (aa * gradient[1] - ab * gradient[0]) / scale
        a, b = a + np.clip(step[0], -2, 2), b + np.clip(step[1], -2, 2)
        if max(np.abs(step[0]).max(), np.abs(step[1]).max()) < 1e-9:
            break
    shares = 1 / (1 + np.exp(-a))
    low, high = np.quantile(shares[1:], (0.025, 0.975))
    return float(shares[0]), float(low), float(high)


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
