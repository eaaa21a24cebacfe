"""The statistics that the report and the monitor rest on: against brute force, and where the answer is known."""

import math

from dschat.report.statistics import bootstrap_means, length_controlled_share

import numpy as np
import pytest


def test_the_bootstrap_has_the_spread_of_a_mean_and_keeps_rows_together():
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, 400)
    draws = bootstrap_means(np.stack([x, -x], axis=1), 4000, seed=1)
    assert draws.shape == (4000, 2) and np.allclose(draws[:, 0], -draws[:, 1])
    assert draws[:, 0].mean() == pytest.approx(x.mean(), abs=0.02)
    assert draws[:, 0].std() == pytest.approx(x.std() / math.sqrt(400), rel=0.05)
    assert (bootstrap_means(x[:, None], 10, seed=1) == bootstrap_means(x[:, None], 10, seed=1)).all()


def test_without_a_difference_of_length_the_controlled_share_is_the_raw_one():
    wins = np.array([1.0] * 70 + [0.0] * 20 + [0.5] * 10)
    share, low, high = length_controlled_share(wins, np.zeros(100))
    assert share == pytest.approx(0.75, abs=0.01) and low < 0.75 < high


def test_wins_that_length_explains_are_none_at_equal_length():
    """A judge that takes the longer answer: won where longer, half of those of equal length."""
    rng = np.random.default_rng(0)
    gain = rng.normal(6, 5, 600).round()
    wins = np.heaviside(gain, 0.5)
    assert wins.mean() > 0.85
    share, low, _ = length_controlled_share(wins, gain)
    assert share < 0.6 and low < 0.52
    # One that does not look at length: as many wins as before.
    blind = (rng.random(600) < 0.8).astype(float)
    share, low, high = length_controlled_share(blind, gain)
    assert low < 0.8 < high and share == pytest.approx(0.8, abs=0.07)


def test_the_fit_is_at_its_maximum_and_finite_where_every_prompt_is_won():
    rng = np.random.default_rng(3)
    gain = rng.normal(0, 4, 200)
    wins = (rng.random(200) < 1 / (1 + np.exp(-0.7 - 0.1 * gain))).astype(float)
    share = length_controlled_share(wins, gain)[0]
    x, best = np.tanh(gain / gain.std()), (-math.inf, 0.0)
    for a in np.linspace(-2, 3, 501):
        for b in np.linspace(-2, 3, 126):
            p = 1 / (1 + np.exp(-(a + b * x)))
            value = (wins * np.log(p) + (1 - wins) * np.log(1 - p)).sum() - (a * a + b * b) / 20
            best = max(best, (value, a))
    assert share == pytest.approx(1 / (1 + math.exp(-best[1])), abs=0.005)
    share, low, high = length_controlled_share(np.ones(50), rng.normal(0, 1, 50))
    assert 0.95 < low <= share <= high < 1
