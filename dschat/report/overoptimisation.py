"""When the reward goes up and the answers do not get better: the alarms of step 3's monitor.

Gao et al. (2022) call it over-optimisation: the reward that is trained on keeps rising while an independent one turns
and falls. Both are means over the same held-out prompts, answered with the same random numbers at every evaluation,
so that prompts are the unit that is drawn again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dschat.report.findings import BAD, Finding
from dschat.report.statistics import bootstrap_means

import numpy as np

NUM_DRAWS = 10_000
FALSE_ALARMS = 0.01  # of a run, in which nothing is wrong, by either test
# Of the judge's gain. Training itself makes the mean go up and down from one evaluation to the next, by more than the
# choice of prompts does, which is all that a bootstrap over prompts knows of.
GIVEN_BACK = 0.2


@dataclass(frozen=True)
class Measured:
    """One evaluation: N prompts in the same order at every one; NaN where there is no score."""

    step: int
    score: np.ndarray  # (N,) of the reward that is trained on
    judge: np.ndarray  # (N,) of the independent one; all NaN where there is none
    length: np.ndarray  # (N,) tokens

    @property
    def judge_mean(self) -> float:
        """-inf where no answer has been judged."""
        given = self.judge[np.isfinite(self.judge)]
        return float(given.mean()) if len(given) else -math.inf


def tail(num_looks: int) -> float:
    """The one-sided level of one test of many: Bonferroni over the evaluations so far, as every one of them could
    have been the best by chance and could have raised an alarm; no finer than the draws can tell."""
    return max(FALSE_ALARMS / max(1, num_looks), 5 / NUM_DRAWS)


def alarm(history: Sequence[Measured]) -> Finding | None:
    """What the latest of the evaluations, in their order, says beside the earlier ones."""
    if len(history) < 2:
        return None
    first, now = history[0], history[-1]
    level = tail(len(history) - 1)
    return _falls(max(history, key=lambda each: each.judge_mean), first, now, level) or _is_length(first, now, level)


def _falls(best: Measured, first: Measured, now: Measured, level: float) -> Finding | None:
    """The judge fell since its best, by more than `GIVEN_BACK` of what it had gained until then, while the reward rose
    since the start and has not fallen since that best."""
    fall, gain = now.judge - best.judge, best.judge - first.judge
    columns = [fall, now.score - best.score, now.score - first.score, fall + GIVEN_BACK * gain]
    changes = _complete(np.stack(columns, axis=1))
    if best.step == now.step or len(changes) < 2:
        return None
    judge, since_best, rise, beyond = changes.mean(0)
    if max(judge, beyond) >= 0 or since_best < 0 or rise <= 0:
        return None
    draws = bootstrap_means(changes, NUM_DRAWS, seed=now.step)
    if np.quantile(draws[:, [0, 3]], 1 - level, axis=0).max() >= 0 or np.quantile(draws[:, 2], level) <= 0:
        return None
    low, high = np.quantile(draws[:, 0], (level, 1 - level))
    text = f"over-optimised: the training reward rose by {rise:+.2f} while the independent one fell by {judge:+.2f} "
    text += f"({low:+.2f} to {high:+.2f}) since rollout {best.step}, where it was best; take that checkpoint and mend "
    return Finding(BAD, "overoptimised", text + "the reward (look at the answers that gained most)")


def _is_length(first: Measured, now: Measured, level: float) -> Finding | None:
    """The reward rose with the length of the answers, and no rise is left for answers that are as long as before.

    Ordinary least squares of a prompt's gain of score on its gain of length; the intercept is the gain at no change
    of length. Where the judge says that the answers got better too, or they got shorter, there is no alarm.
    """
    columns = [now.score - first.score, now.length - first.length]
    given = np.isfinite(np.stack(columns)).all(0)
    changes = np.stack(columns, axis=1)[given]
    if len(changes) < 3 or changes[:, 1].std() == 0 or (changes.mean(0) <= 0).any():
        return None
    moments = np.concatenate([changes, changes[:, :1] * changes[:, 1:], np.square(changes[:, 1:])], axis=1)
    draws = bootstrap_means(moments, NUM_DRAWS, seed=now.step)
    rose, longer = (np.quantile(draws[:, i], level) > 0 for i in (0, 1))
    variance = draws[:, 3] - np.square(draws[:, 1])
    slope = (draws[:, 2] - draws[:, 0] * draws[:, 1]) / np.where(variance > 0, variance, math.inf)
    left = draws[:, 0] - slope * draws[:, 1]
    better = _complete((now.judge - first.judge)[:, None])
    judge_rose = len(better) > 1 and np.quantile(bootstrap_means(better, NUM_DRAWS, now.step), level) > 0
    if not (rose and longer) or np.quantile(left, level) > 0 or judge_rose:
        return None
    gain, size = changes.mean(0).tolist()
    text = f"length explains the gain: answers are {size:+.1f} tokens longer than before training and the reward rose "
    text += f"by {gain:+.2f}, of which {left.mean():+.2f} is left at equal length; balance the preferences by length "
    return Finding(BAD, "length", text + "or take an earlier checkpoint")


def _complete(rows: np.ndarray) -> np.ndarray:
    return rows[np.isfinite(rows).all(1)]
