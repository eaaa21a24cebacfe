"""Rewards per token and advantages against tables typed by hand and a double sum in Python floats."""

import math

from dschat.functional import gae, rewards_to_go, score_unfinished, shape_rewards

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


def gae_oracle(rewards, values, gamma, lam, final_value=0.0):
    """Schulman et al. 2016, eq. 16, as the sum it is: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    after = [*values, final_value][1:]
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


def test_gae_bootstraps_from_the_state_after_the_last_action():
    # As by hand, with a state worth 2 after the last action: its delta 1 + 0.9 * 2 - 0.5 = 2.3; before it
    # -0.05 + 0.72 * 2.3 = 1.606 and -0.05 + 0.72 * 1.606 = 1.10632. Its place does not depend on padding or holes.
    mask = torch.tensor([[F, T, T, F, F, T, F], [F, F, F, F, T, T, T], [F] * 7, [T, T, T, F, F, F, F]])
    rewards, values = torch.full((4, 7), NAN), torch.full((4, 7), INF)
    for row in (0, 1, 3):
        rewards[row, mask[row]], values[row, mask[row]] = torch.tensor([0.0, 0.0, 1.0]), torch.tensor(0.5)
    final_values = torch.tensor([2.0, 0.0, NAN, 2.0])
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8, final_values=final_values)
    assert_close(advantages[mask], torch.tensor([1.10632, 1.606, 2.3, 0.1732, 0.31, 0.5, 1.10632, 1.606, 2.3]))
    assert_close(returns[mask], advantages[mask] + 0.5)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_gae_final_values_are_float32_and_one_per_row():
    x, mask = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    # 257 = 256 + 1 needs nine bits.
    final_values = torch.tensor([256.0, 0.0], dtype=torch.bfloat16)
    assert gae(x + 1, x, mask, 1.0, 1.0, final_values=final_values)[1].tolist() == [[257.0], [1.0]]
    for wrong in (torch.zeros(2, 1), torch.zeros(1), torch.zeros(())):
        with pytest.raises(ValueError, match=r"for 2 rows; expected \(B,\)"):
            gae(x, x, mask, 1.0, 1.0, final_values=wrong)


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

finals = st.lists(number, min_size=4, max_size=4)


@settings(max_examples=50, deadline=None)
@given(batch, st.sampled_from([1.0, 0.99, 0.5]), st.sampled_from([1.0, 0.95, 0.3, 0.0]), finals)
def test_gae_of_any_mask_is_the_double_sum_over_its_actions(rows, gamma, lam, last):
    def column(k):
        return torch.tensor([[cell[k] if cell[2] else NAN for cell in row] for row in rows])

    mask = torch.tensor([[cell[2] for cell in row] for row in rows])
    final_values = torch.tensor(
        [x if any(cell[2] for cell in row) else NAN for x, row in zip(last, rows, strict=False)]
    )
    advantages, returns = gae(column(0), column(1), mask, gamma, lam, final_values=final_values)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()
    for b, row in enumerate(rows):
        actions = [cell for cell in row if cell[2]]
        expected = gae_oracle([r for r, _, _ in actions], [v for _, v, _ in actions], gamma, lam, last[b])
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        expected_returns = [a + v for a, (_, v, _) in zip(expected, actions, strict=True)]
        assert returns[b][mask[b]].tolist() == pytest.approx(expected_returns, rel=1e-4, abs=1e-4)


# ---- rewards_to_go --------------------------------------------------------------------------------------------------


def test_rewards_to_go_by_hand():
    # 4; 2 + 0.5 * 4 = 4; 1 + 0.5 * 4 = 3. Spread out, a hole costs no discount.
    rewards = torch.tensor([[NAN, 1.0, INF, 2.0, -INF, 4.0, NAN], [1.0, 2.0, 4.0, NAN, NAN, NAN, NAN]])
    mask = torch.tensor([[F, T, F, T, F, T, F], [T, T, T, F, F, F, F]])
    expected = [[0.0, 3.0, 0.0, 4.0, 0.0, 4.0, 0.0], [3.0, 4.0, 4.0, 0.0, 0.0, 0.0, 0.0]]
    assert_close(rewards_to_go(rewards, mask, 0.5), torch.tensor(expected))
    assert rewards_to_go(rewards, mask, 1.0)[1, :3].tolist() == [7.0, 6.0, 4.0]
    assert rewards_to_go(rewards, mask, 0.0)[1, :3].tolist() == [1.0, 2.0, 4.0]


def test_rewards_to_go_of_shaped_rewards_is_the_score_less_the_kl_to_come():
    kl, mask = torch.tensor([[1.0, -2.0, 4.0]]), torch.ones(1, 3, dtype=torch.bool)
    shaped = shape_rewards(torch.tensor([10.0]), kl, mask, 0.1)
    assert_close(rewards_to_go(shaped, mask, 1.0), torch.tensor([[9.7, 9.8, 9.6]]))


@settings(max_examples=50, deadline=None)
@given(batch, st.sampled_from([1.0, 0.99, 0.5]))
def test_rewards_to_go_of_any_mask_against_a_loop(rows, gamma):
    rewards = torch.tensor([[cell[0] if cell[2] else NAN for cell in row] for row in rows])
    mask = torch.tensor([[cell[2] for cell in row] for row in rows])
    returns = rewards_to_go(rewards, mask, gamma)
    assert not returns[~mask].any()
    for b, row in enumerate(rows):
        expected, total = [], 0.0
        for reward, _, action in reversed(row):
            if action:
                total = reward + gamma * total
                expected.insert(0, total)
        assert returns[b][mask[b]].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_rewards_to_go_is_float32_outside_the_graph_and_checks_its_mask():
    # 256 + 1 is not a bfloat16 number.
    rewards = torch.tensor([[1.0, 256.0]], dtype=torch.bfloat16, requires_grad=True)
    returns = rewards_to_go(rewards, torch.ones(1, 2, dtype=torch.bool), 1.0)
    assert returns.tolist() == [[257.0, 256.0]]
    assert not returns.requires_grad
    with pytest.raises(TypeError, match="bool"):
        rewards_to_go(rewards, torch.ones(1, 2), 1.0)
    with pytest.raises(ValueError, match="mask of shape"):
        rewards_to_go(rewards, torch.ones(2, 2, dtype=torch.bool), 1.0)


# ---- score_unfinished -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("subtract", [3.0, -1.0, 3.5, -2.5]),
        ("replace", [3.0, -1.0, -1.5, -1.5]),
        ("bootstrap", [3.0, -1.0, 0.0, 0.0]),
    ],
)
def test_score_unfinished_by_hand(kind, expected):
    scores, finished = torch.tensor([3.0, -1.0, 5.0, -1.0]), torch.tensor([T, T, F, F])
    assert score_unfinished(scores, finished, 1.5, kind).tolist() == expected
    assert scores.tolist() == [3.0, -1.0, 5.0, -1.0]
    assert score_unfinished(scores, ~finished, 0.0, kind)[2:].tolist() == [5.0, -1.0]


@pytest.mark.parametrize("kind", ["replace", "bootstrap"])
@pytest.mark.parametrize("garbage", [NAN, INF])
def test_what_replaces_a_score_does_not_depend_on_it(kind, garbage):
    result = score_unfinished(torch.tensor([garbage, 1.0]), torch.tensor([F, T]), 2.0, kind)
    assert result.tolist() == [-2.0 if kind == "replace" else 0.0, 1.0]


@pytest.mark.parametrize("kind", ["subtract", "replace", "bootstrap"])
def test_score_unfinished_of_bfloat16_is_float32_arithmetic(kind):
    # 256.5 and 0.1 are not bfloat16 numbers.
    scores = torch.tensor([256.0, 1.0], dtype=torch.bfloat16)
    result = score_unfinished(scores, torch.tensor([F, T]), 0.1, kind)
    assert result.dtype == torch.float32
    assert_close(result, torch.tensor([{"subtract": 255.9, "replace": -0.1, "bootstrap": 0.0}[kind], 1.0]))


def test_score_unfinished_refuses():
    scores, finished = torch.zeros(2), torch.tensor([T, F])
    with pytest.raises(ValueError, match="'penalise': choose subtract, replace or bootstrap"):
        score_unfinished(scores, finished, 1.0, "penalise")
    with pytest.raises(ValueError, match="mask of shape"):
        score_unfinished(scores, finished[:1], 1.0, "subtract")
    with pytest.raises(TypeError, match="bool"):
        score_unfinished(scores, finished.float(), 1.0, "replace")


def test_a_bootstrapped_response_returns_what_its_end_is_worth():
    finished = torch.tensor([T, F])
    scores = score_unfinished(torch.tensor([5.0, 5.0]), finished, 1.0, "bootstrap")
    mask = torch.ones(2, 2, dtype=torch.bool)
    rewards = shape_rewards(scores, torch.ones(2, 2), mask, 0.25)
    _, returns = gae(rewards, torch.full((2, 2), 9.0), mask, 1.0, 1.0, final_values=torch.where(finished, 0.0, 3.0))
    # 5 - 2 * 0.25 where it ended, 3 - 2 * 0.25 where it was cut.
    assert_close(returns, torch.tensor([[4.5, 4.75], [2.5, 2.75]]))
