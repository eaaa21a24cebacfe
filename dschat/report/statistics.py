"""Intervals for the shares that the reports print."""

import math


def wilson_interval(successes: float, num_trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % score interval for a share (Wilson 1927). ``successes`` may hold halves, for ties.

    With halves the true variance is smaller than the binomial one, so the interval errs on the wide side.
    """
    if num_trials == 0:
        return 0.0, 1.0
    share = successes / num_trials
    centre = share + z * z / (2 * num_trials)
    spread = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
