"""Advantages within groups against Python's own means and standard deviations."""

import math
import statistics

from dschat.functional import grpo_advantages, rloo_advantages

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False
BOTH = pytest.mark.parametrize("advantages_of", [rloo_advantages, grpo_advantages])

# Two prompts of three samples, then one where two count, one counts and none counts.
TOTALS = torch.tensor([1.0, 2.0, 6.0, -1.0, -1.0, 5.0, 3.0, NAN, 7.0, INF, 4.0, NAN, INF, -INF, NAN])
COUNTS = torch.tensor([T, T, T, T, T, T, T, F, T, F, T, F, F, F, F])


def test_rloo_by_hand():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; -1 - 2 twice, 5 + 1; 3 - 7, 7 - 3; alone; none.
    expected = [-3.0, -1.5, 4.5, -3.0, -3.0, 6.0, -4.0, 0.0, 4.0] + [0.0] * 6
    assert_close(rloo_advantages(TOTALS, 3, COUNTS), torch.tensor(expected))


def test_grpo_by_hand():
    # Mean 3 and sum of squares 4 + 1 + 9 = 14, over 2: std sqrt(7). Mean 1, squares 4 + 4 + 16, over 2: sqrt(12).
    # Mean 5, squares 4 + 4, over 1: sqrt(8). Alone; none.
    first, second, third = math.sqrt(7), math.sqrt(12), math.sqrt(8)
    expected = [-2 / first, -1 / first, 3 / first, -2 / second, -2 / second, 4 / second, -2 / third, 0.0, 2 / third]
    assert_close(grpo_advantages(TOTALS, 3, COUNTS), torch.tensor(expected + [0.0] * 6))


def test_grpo_adds_1e_6_to_the_deviation():
    # Offsets of half of 2^-20: std 2^-20 / sqrt(2) = 6.7435e-7, so 4.7684e-7 / 1.67435e-6.
    totals = torch.tensor([0.0, 2.0**-20])
    assert_close(grpo_advantages(totals, 2, totals >= 0), torch.tensor([-0.284790, 0.284790]), rtol=1e-5, atol=0)


@BOTH
@pytest.mark.parametrize("total", [0.0, 1234.567, -0.1, 1e30])
def test_equal_totals_give_exactly_zero(advantages_of, total):
    # The float32 mean of thirteen equal numbers differs from them.
    totals = torch.full((26,), total)
    counts = torch.ones(26, dtype=torch.bool)
    assert advantages_of(totals, 13, counts).tolist() == [0.0] * 26
    totals[3], counts[3] = NAN, False
    assert advantages_of(totals, 13, counts).tolist() == [0.0] * 26


def rloo_oracle(counted):
    return [x - statistics.fmean(counted[:i] + counted[i + 1 :]) for i, x in enumerate(counted)]


def grpo_oracle(counted):
    mean, deviation = statistics.fmean(counted), statistics.stdev(counted)
    return [(x - mean) / (deviation + 1e-6) for x in counted]


@BOTH
@settings(max_examples=50, deadline=None)
@given(data=st.data(), group_size=st.integers(2, 5), num_groups=st.integers(0, 3))
def test_any_group_against_python(advantages_of, data, group_size, num_groups):
    # Hundredths: totals that differ do so by more than the rounding of float32.
    row = st.tuples(st.integers(-500, 500).map(lambda x: x / 100), st.booleans())
    size = num_groups * group_size
    rows = data.draw(st.lists(row, min_size=size, max_size=size))
    garbage = data.draw(st.sampled_from([NAN, INF, -INF, 1e30]))
    totals = torch.tensor([x if counted else garbage for x, counted in rows])
    counts = torch.tensor([counted for _, counted in rows], dtype=torch.bool)
    advantages = advantages_of(totals, group_size, counts)
    assert advantages.shape == (size,)
    assert not advantages[~counts].any()
    oracle = rloo_oracle if advantages_of is rloo_advantages else grpo_oracle
    for start in range(0, size, group_size):
        group = slice(start, start + group_size)
        counted = [x for x, kept in rows[group] if kept]
        expected = oracle(counted) if len(counted) > 1 else [0.0] * len(counted)
        assert advantages[group][counts[group]].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@BOTH
def test_a_score_that_is_not_finite_stays_in_its_group(advantages_of):
    counts = torch.ones(4, dtype=torch.bool)
    with_garbage = advantages_of(torch.tensor([NAN, 1.0, 2.0, 5.0]), 2, counts)
    assert_close(with_garbage[2:], advantages_of(torch.tensor([2.0, 5.0]), 2, counts[:2]))


@BOTH
def test_groups_are_outside_the_graph_and_float32(advantages_of):
    counts = torch.ones(2, dtype=torch.bool)
    assert not advantages_of(torch.ones(2, requires_grad=True), 2, counts).requires_grad
    # 256 - 1 is not what bfloat16 makes of 255.5: 256 - 0.5 = 255.5 needs nine bits.
    totals = torch.tensor([256.0, 0.5], dtype=torch.bfloat16)
    advantages = advantages_of(totals, 2, counts)
    assert advantages.dtype == torch.float32
    expected = 255.5 if advantages_of is rloo_advantages else 127.75 / (255.5 / math.sqrt(2) + 1e-6)
    assert advantages.tolist() == pytest.approx([expected, -expected], rel=1e-6)


@BOTH
def test_groups_refuse(advantages_of):
    totals, counts = torch.zeros(6), torch.ones(6, dtype=torch.bool)
    for group_size in (4, 1, 0, -2):
        with pytest.raises(ValueError, match=rf"whole groups \(of 2 or more\): {group_size}"):
            advantages_of(totals, group_size, counts)
    with pytest.raises(ValueError, match=r"totals of shape \(3, 2\)"):
        advantages_of(totals.view(3, 2), 3, counts.view(3, 2))
    with pytest.raises(ValueError, match="mask of shape"):
        advantages_of(totals, 2, counts[:1])
    with pytest.raises(TypeError, match="bool"):
        advantages_of(totals, 2, counts.long())
