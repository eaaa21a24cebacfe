"""Rewards per token and advantages against tables typed by hand and a double sum in Python floats."""

import math

from dschat.functional import gae, shape_rewards

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False


def test_shape_rewards_by_hand():
    kl = torch.tensor([[1.0, -2.0, 4.0], [3.0, 5.0, NAN], [INF, 2.0, NAN], [NAN, INF, -INF]])
    mask = torch.tensor([[T, T, T], [T, T, F], [F, T, F], [F, F, F]])
    scores = torch.tensor([10.0, -7.0, 0.5, NAN])  # the last row has no action to carry its score
    expected = [[-0.1, 0.2, 9.6], [-0.3, -7.5, 0.0], [0.0, 0.3, 0.0], [0.0, 0.0, 0.0]]
    assert_close(shape_rewards(scores, kl, mask, 0.1), torch.tensor(expected))
    assert_close(shape_rewards(scores, kl, mask, torch.tensor(0.1)), torch.tensor(expected))


def test_shape_rewards_puts_the_score_on_the_last_action_beyond_a_hole():
    rewards = shape_rewards(torch.tensor([2.0]), torch.zeros(1, 5), torch.tensor([[F, T, F, T, F]]), 0.1)
    assert_close(rewards, torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0]]))


def test_shape_rewards_keeps_an_infinite_score_on_the_last_action():
    rewards = shape_rewards(torch.tensor([INF]), torch.ones(1, 3), torch.tensor([[T, T, F]]), 0.5)
    assert rewards.tolist() == [[-0.5, INF, 0.0]]


def test_shape_rewards_of_bfloat16_is_float32_arithmetic():
    # Neither 256 - 1.5 = 254.5 nor 0.1 * 1.5 = 0.15 is a bfloat16 number.
    kl, mask = torch.tensor([[1.5]], dtype=torch.bfloat16), torch.tensor([[T]])
    assert shape_rewards(torch.tensor([256.0], dtype=torch.bfloat16), kl, mask, 1.0).item() == 254.5
    rewards = shape_rewards(torch.tensor([0.0], dtype=torch.bfloat16), kl, mask, 0.1)
    assert rewards.dtype == torch.float32
    assert rewards.item() == pytest.approx(-0.15, rel=1e-6)


def test_shape_rewards_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"scores of shape \(2, 1\)"):
        shape_rewards(torch.zeros(2, 1), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.1)
    with pytest.raises(ValueError, match="mask of shape"):
        shape_rewards(torch.zeros(2), torch.zeros(2, 3), torch.ones(1, 3, dtype=torch.bool), 0.1)


def gae_oracle(rewards, values, gamma, lam):
    """Schulman et al. 2016, eq. 16, as the sum it is: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    after = [*values, 0.0][1:]
    deltas = [r + gamma * w - v for r, v, w in zip(rewards, values, after, strict=True)]
    return [math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def test_gae_by_hand():
    # deltas: 0.9 * 0.5 - 0.5 = -0.05 twice, then 1 - 0.5 = 0.5; factor 0.9 * 0.8 = 0.72.
    # advantages: 0.5; -0.05 + 0.72 * 0.5 = 0.31; -0.05 + 0.72 * 0.31 = 0.1732. returns: plus 0.5.
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.9, 0.8)
    assert_close(advantages, torch.tensor([[0.1732, 0.31, 0.5]]))
    assert_close(returns, torch.tensor([[0.6732, 0.81, 1.0]]))


def test_gae_limits_of_lambda():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    # lambda 1, gamma 1: the return is the sum of the rewards to come, whatever the critic says.
    assert_close(gae(rewards, values, mask, 1.0, 1.0)[1], torch.tensor([[7.0, 6.0, 4.0]]))
    # lambda 0: the one-step error, 1 + 0.5 * 20 - 10, 2 + 0.5 * 30 - 20, 4 - 30.
    assert_close(gae(rewards, values, mask, 0.5, 0.0)[0], torch.tensor([[1.0, -3.0, -26.0]]))


def test_gae_steps_over_what_is_not_an_action():
    # The row of test_gae_by_hand, spread out: padding left and right, another speaker's turn in the middle.
    mask = torch.tensor([[F, T, T, F, F, T, F]])
    rewards = torch.tensor([[NAN, 0.0, 0.0, INF, NAN, 1.0, NAN]])
    values = torch.tensor([[9.0, 0.5, 0.5, NAN, -INF, 0.5, 99.0]])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    assert_close(advantages, torch.tensor([[0.0, 0.1732, 0.31, 0.0, 0.0, 0.5, 0.0]]))
    assert_close(returns, torch.tensor([[0.0, 0.6732, 0.81, 0.0, 0.0, 1.0, 0.0]]))


def test_gae_of_no_actions():
    x = torch.full((2, 3), NAN)
    for result in gae(x, x, torch.zeros(2, 3, dtype=torch.bool), 1.0, 0.95):
        assert result.tolist() == [[0.0] * 3] * 2
    empty = torch.zeros(2, 0)
    assert gae(empty, empty, empty.bool(), 1.0, 0.95)[0].shape == (2, 0)


def test_gae_is_outside_the_graph_and_leaves_its_inputs_alone():
    rewards, values = torch.ones(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    assert rewards.tolist() == values.tolist() == [[1.0] * 3]


def test_gae_of_bfloat16_is_float32_arithmetic():
    # 256 + 1 is not a bfloat16 number.
    rewards, values = torch.tensor([[1.0, 256.0]], dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.bfloat16)
    assert gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), 1.0, 1.0)[0].tolist() == [[257.0, 256.0]]


number = st.floats(-10, 10, width=32)
batch = st.lists(st.lists(st.tuples(number, number, st.booleans()), min_size=7, max_size=7), min_size=1, max_size=4)


@settings(max_examples=50, deadline=None)
@given(batch, st.sampled_from([1.0, 0.99, 0.5]), st.sampled_from([1.0, 0.95, 0.3, 0.0]))
def test_gae_of_any_mask_is_the_double_sum_over_its_actions(rows, gamma, lam):
    def column(k):
        return torch.tensor([[cell[k] if cell[2] else NAN for cell in row] for row in rows])

    mask = torch.tensor([[cell[2] for cell in row] for row in rows])
    advantages, returns = gae(column(0), column(1), mask, gamma, lam)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for b, row in enumerate(rows):
        actions = [cell for cell in row if cell[2]]
        expected = gae_oracle([r for r, _, _ in actions], [v for _, v, _ in actions], gamma, lam)
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        expected_returns = [a + v for a, (_, v, _) in zip(expected, actions, strict=True)]
        assert returns[b][mask[b]].tolist() == pytest.approx(expected_returns, rel=1e-4, abs=1e-4)
