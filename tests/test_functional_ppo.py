"""The two PPO losses: value and gradient at every corner of the clip, garbage, empty batches, denominators."""

import math

from dschat.functional import ppo_policy_loss, ppo_value_loss

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False


def policy_case(ratio, advantage, cliprange=0.2, **kwargs):
    """Loss and slope of one token whose new probability is `ratio` times the old."""
    logprobs = torch.tensor([[math.log(ratio) - 3.0]], requires_grad=True)
    loss, stats = ppo_policy_loss(
        logprobs, torch.tensor([[-3.0]]), torch.tensor([[advantage]]), torch.tensor([[T]]), cliprange, **kwargs
    )
    loss.backward()
    return loss.item(), logprobs.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # d(-A ratio) / d logprob = -A ratio where the unclipped branch is the larger, else 0
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        (1.199, 2.0, -2.398, -2.398),  # just inside the upper edge
        (1.201, 2.0, -2.4, 0.0),  # just outside: already better than asked, no more push
        (1.201, -2.0, 2.402, 2.402),  # outside on the wrong side: pulled back
        (0.801, -2.0, 1.602, 1.602),
        (0.799, -2.0, 1.6, 0.0),
        (0.799, 2.0, -1.598, -1.598),
        (3.0, 2.0, -2.4, 0.0),
        (3.0, -2.0, 6.0, 6.0),
        (0.2, 2.0, -0.4, -0.4),
        (0.2, -2.0, 1.6, 0.0),
        (1.7, 0.0, 0.0, 0.0),
    ],
)
def test_policy_loss_at_the_corners(ratio, advantage, loss, slope):
    value, gradient, stats = policy_case(ratio, advantage)
    assert value == pytest.approx(loss, rel=1e-5)
    assert gradient == pytest.approx(slope, rel=1e-5)
    assert stats["clip_fraction"].item() == (1.0 if advantage and slope == 0 else 0.0)


def test_policy_loss_respects_its_cliprange():
    assert policy_case(1.3, 1.0, cliprange=0.25)[0] == pytest.approx(-1.25)
    assert policy_case(0.5, -1.0, cliprange=0.4)[0] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "slope", "dual"),
    [
        (2.9, -2.0, 3.0, 5.8, 5.8, 0.0),  # just inside
        (3.1, -2.0, 3.0, 6.0, 0.0, 1.0),  # just outside: no more pull
        (50.0, -2.0, 3.0, 6.0, 0.0, 1.0),
        (1.0, -2.0, 3.0, 2.0, 2.0, 0.0),
        (0.5, -2.0, 3.0, 1.6, 0.0, 0.0),  # the first clip alone
        (50.0, 2.0, 3.0, -2.4, 0.0, 0.0),  # not for A > 0, which the first clip bounds
        (1.0, 2.0, 3.0, -2.0, -2.0, 0.0),
        (1.15, -2.0, 1.1, 2.2, 0.0, 1.0),  # tighter than the first clip
        (1.7, 0.0, 3.0, 0.0, 0.0, 0.0),
    ],
)
def test_dual_clip_at_the_corners(ratio, advantage, dual_clip, loss, slope, dual):
    value, gradient, stats = policy_case(ratio, advantage, dual_clip=dual_clip)
    assert value == pytest.approx(loss, rel=1e-5)
    assert gradient == pytest.approx(slope, rel=1e-5)
    assert stats["dual_clip_fraction"].item() == dual
    assert stats["clip_fraction"].item() == (1.0 if advantage and slope == 0 else 0.0)


def test_dual_clip_on_its_edge_is_still_followed():
    edge = torch.tensor(1.0).exp().item()
    logprobs = torch.tensor([[1.0]], requires_grad=True)
    loss, stats = ppo_policy_loss(
        logprobs, torch.zeros(1, 1), -torch.ones(1, 1), torch.tensor([[T]]), 0.2, dual_clip=edge
    )
    loss.backward()
    assert loss.item() == logprobs.grad.item() == edge
    assert stats["clip_fraction"].item() == stats["dual_clip_fraction"].item() == 0.0


def test_dual_clip_of_a_ragged_batch_is_the_objective_of_the_paper():
    generator = torch.Generator().manual_seed(4)
    logprobs, old, advantages = (torch.randn(6, 5, generator=generator) * 1.5 for _ in range(3))
    mask = torch.rand(6, 5, generator=generator) < 0.7
    logprobs[~mask], old[~mask], advantages[~mask] = NAN, INF, NAN
    logprobs.requires_grad_()
    loss, stats = ppo_policy_loss(logprobs, old, advantages, mask, 0.2, dual_clip=2.0, denominator=10)
    loss.backward()
    objectives, dual, removed = [], 0, 0
    for new, before, a in zip(*(x[mask].tolist() for x in (logprobs, old, advantages)), strict=True):
        r = math.exp(new - before)
        clipped = min(max(r, 0.8), 1.2) * a
        objective = max(min(r * a, clipped), 2.0 * a) if a < 0 else min(r * a, clipped)  # eq. 3
        objectives.append(objective)
        dual += a < 0 and r > 2.0
        removed += objective != r * a
    assert 0 < dual < removed < len(objectives)
    assert loss.item() == pytest.approx(-math.fsum(objectives) / 10, rel=1e-5)
    assert stats["dual_clip_fraction"].item() == pytest.approx(dual / len(objectives))
    assert stats["clip_fraction"].item() == pytest.approx(removed / len(objectives))
    assert (logprobs.grad == 0).sum().item() == removed + (~mask).sum().item()
    plain_loss, plain_stats = ppo_policy_loss(logprobs, old, advantages, mask, 0.2, denominator=10)
    assert plain_loss > loss
    assert set(stats) - set(plain_stats) == {"dual_clip_fraction"}


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, 0.0, -3.0, NAN])
def test_dual_clip_refuses_what_would_clip_the_first_step(dual_clip):
    with pytest.raises(ValueError, match="above 1"):
        policy_case(1.0, 1.0, dual_clip=dual_clip)


def test_policy_loss_and_stats_of_a_ragged_batch():
    log_ratios = torch.tensor([[math.log(1.5), math.log(0.5)], [0.0, NAN]])
    old_logprobs = torch.tensor([[-1.0, -2.0], [-0.5, INF]])
    advantages = torch.tensor([[1.0, 4.0], [-3.0, NAN]])
    mask = torch.tensor([[T, T], [T, F]])
    logprobs = (old_logprobs + log_ratios).requires_grad_()
    loss, stats = ppo_policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    loss.backward()
    # Losses -1.2 (clipped), -2 and 3; slopes 0, -2 and 3; over 3 tokens.
    assert loss.item() == pytest.approx(-0.2 / 3, rel=1e-5)
    assert_close(logprobs.grad, torch.tensor([[0.0, -2 / 3], [1.0, 0.0]]))
    assert set(stats) == {"approx_kl", "clip_fraction", "ratio_mean", "ratio_max", "num_tokens"}
    # k3 from old to new: (1.5 - 1 - ln 1.5) = 0.0945349, (0.5 - 1 - ln 0.5) = 0.1931472, 0.
    assert stats["approx_kl"].item() == pytest.approx((0.0945349 + 0.1931472) / 3, rel=1e-5)
    assert stats["clip_fraction"].item() == pytest.approx(1 / 3)
    assert stats["ratio_mean"].item() == pytest.approx(1.0)
    assert stats["ratio_max"].item() == pytest.approx(1.5)
    assert stats["num_tokens"].item() == 3.0
    assert all(s.dtype == torch.float32 and s.dim() == 0 and not s.requires_grad for s in stats.values())


def test_ratio_max_ignores_padding_and_small_divergences_are_exact():
    # Padding counts as ratio 1 nowhere: the largest real ratio here is 0.5.
    mask = torch.tensor([[T, F]])
    logprobs, zeros = torch.tensor([[math.log(0.5), 0.0]]), torch.zeros(1, 2)
    assert ppo_policy_loss(logprobs, zeros, zeros, mask, 0.2)[1]["ratio_max"].item() == pytest.approx(0.5)
    # approx_kl is log_ratio^2 / 2 = 5e-9 at 1e-4, below the rounding of ratio - 1 in float32.
    stats = ppo_policy_loss(torch.tensor([[1e-4]]), torch.zeros(1, 1), torch.ones(1, 1), mask[:, :1], 0.2)[1]
    assert stats["approx_kl"].item() == pytest.approx(5e-9, rel=1e-2)


@pytest.mark.parametrize(("advantage", "loss"), [(1.0, -1.2), (-1.0, math.exp(20)), (0.0, 0.0)])
def test_an_overflowing_ratio_gives_no_nan(advantage, loss):
    logprobs = torch.tensor([[0.0]], requires_grad=True)
    value, stats = ppo_policy_loss(
        logprobs, torch.tensor([[-200.0]]), torch.tensor([[advantage]]), torch.tensor([[T]]), 0.2
    )
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad.item() == 0.0
    assert stats["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-5)


def test_a_vanishing_ratio_is_exact():
    # ratio - 1 - log ratio at log ratio -30: e^-30 - 1 + 30.
    stats = ppo_policy_loss(torch.tensor([[-30.0]]), torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([[T]]), 0.2)[1]
    assert stats["approx_kl"].item() == pytest.approx(29.0)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"),
    [  # old value 0, range 0.25; the slope is V - R, or 0 where the clipped square is the larger
        (0.1, 1.0, 0.405, -0.9),
        (0.25, 1.0, 0.28125, -0.75),  # on the edge, still followed
        (-0.25, 1.0, 0.78125, -1.25),
        (0.5, 1.0, 0.28125, 0.0),  # (0.25 - 1)^2 / 2: moved far enough towards R
        (0.5, 0.0, 0.125, 0.5),  # overshot: pulled back
        (-0.5, 0.0, 0.125, -0.5),
        (-0.5, -1.0, 0.28125, 0.0),
        (-0.5, 1.0, 1.125, -1.5),  # moved the wrong way
        (0.1, 0.1, 0.0, 0.0),
    ],
)
def test_value_loss_at_the_corners(value, target, loss, slope):
    values = torch.tensor([[value + 5.0]], requires_grad=True)  # shifted by 5: only differences count
    result, stats = ppo_value_loss(
        values, torch.tensor([[5.0]]), torch.tensor([[target + 5.0]]), torch.tensor([[T]]), 0.25
    )
    result.backward()
    assert result.item() == pytest.approx(loss, rel=1e-5, abs=1e-9)
    assert values.grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
    assert stats["value_clip_fraction"].item() == (1.0 if loss and slope == 0 else 0.0)


def test_value_loss_and_stats_of_a_ragged_batch():
    mask = torch.tensor([[T, T], [F, T]])
    values = torch.tensor([[0.0, 1.0], [NAN, 3.0]], requires_grad=True)
    old_values = torch.tensor([[0.0, 1.0], [INF, 1.0]])
    returns = torch.tensor([[0.0, 2.0], [NAN, 4.0]])
    loss, stats = ppo_value_loss(values, old_values, returns, mask, 0.5)
    loss.backward()
    # Squares 0, 1 and, clipped to 1.5, (1.5 - 4)^2 = 6.25: halves over 3 tokens.
    assert loss.item() == pytest.approx(7.25 / 6, rel=1e-5)
    assert_close(values.grad, torch.tensor([[0.0, -1 / 3], [0.0, 0.0]]))
    assert set(stats) == {"value_clip_fraction", "explained_variance", "num_tokens"}
    assert stats["value_clip_fraction"].item() == pytest.approx(1 / 3)
    # R = 0, 2, 4: variance 8/3. R - V = 0, 1, 1: variance 2/9. 1 - 2/9 * 3/8 = 11/12.
    assert stats["explained_variance"].item() == pytest.approx(11 / 12, rel=1e-5)
    assert stats["num_tokens"].item() == 3.0
    assert all(s.dtype == torch.float32 and s.dim() == 0 and not s.requires_grad for s in stats.values())


@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([0.0, 2.0], [0.0, 2.0], 1.0),
        ([7.0, 7.0], [0.0, 2.0], 0.0),  # a constant explains nothing, nor does its bias count
        ([2.0, 0.0], [0.0, 2.0], -3.0),  # residuals -2 and 2: variance 4 over 1
        ([0.0] * 12 + [1.0], [1234.567] * 13, 0.0),  # equal returns (their float32 mean differs from them)
        ([0.0, 5.0], [0.0, 0.0], 0.0),
    ],
)
def test_explained_variance(values, returns, expected):
    values, returns = torch.tensor([values]), torch.tensor([returns])
    stats = ppo_value_loss(values, values, returns, torch.ones_like(values, dtype=torch.bool), 0.2)[1]
    assert stats["explained_variance"].item() == pytest.approx(expected, abs=1e-6)


def test_value_clip_fraction_is_exactly_zero_within_the_range():
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = (torch.randn(8, 50, generator=generator) for _ in range(3))
    # old + (V - old) would not be V to the last bit, and half of these would count as clipped.
    stats = ppo_value_loss(values, old_values, returns, torch.ones(8, 50, dtype=torch.bool), 20.0)[1]
    assert stats["value_clip_fraction"].item() == 0.0


def random_batch(loss_fn, generator):
    first, old, target = (torch.randn(5, 4, generator=generator) for _ in range(3))
    mask = torch.rand(5, 4, generator=generator) < 0.6
    return first.requires_grad_(), old, target, mask


BOTH = pytest.mark.parametrize("loss_fn", [ppo_policy_loss, ppo_value_loss])


@BOTH
def test_micro_batches_with_a_common_denominator_are_the_big_batch(loss_fn):
    first, old, target, mask = random_batch(loss_fn, torch.Generator().manual_seed(1))
    whole = loss_fn(first, old, target, mask, 0.2)[0]
    (expected,) = torch.autograd.grad(whole, first)
    for denominator in (mask.sum(), float(mask.sum())):
        parts = [
            loss_fn(first[rows], old[rows], target[rows], mask[rows], 0.2, denominator=denominator)[0]
            for rows in (slice(0, 1), slice(1, 4), slice(4, 5))
        ]
        assert_close(sum(parts), whole)
        assert sum(parts).dtype == torch.float32
        assert_close(torch.autograd.grad(sum(parts), first)[0], expected)


@BOTH
@pytest.mark.parametrize("denominator", [None, 7.0, 0.0, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_an_empty_batch_costs_nothing_on_a_connected_graph(loss_fn, denominator, shape):
    first = torch.full(shape, NAN, requires_grad=True)
    garbage = torch.full(shape, INF)
    loss, stats = loss_fn(first, garbage, garbage, torch.zeros(shape, dtype=torch.bool), 0.2, denominator=denominator)
    loss.backward()
    assert loss.item() == 0.0
    assert first.grad.tolist() == torch.zeros(shape).tolist()
    assert all(s.item() == 0.0 for s in stats.values())


@BOTH
def test_only_the_first_argument_receives_a_gradient(loss_fn):
    first, old, target, mask = random_batch(loss_fn, torch.Generator().manual_seed(2))
    loss_fn(first, old.requires_grad_(), target.requires_grad_(), mask, 0.2)[0].backward()
    assert first.grad.any()
    assert old.grad is None
    assert target.grad is None


@BOTH
def test_bfloat16_inputs_are_computed_in_float32(loss_fn):
    first, old, target, mask = random_batch(loss_fn, torch.Generator().manual_seed(3))
    rounded = [t.detach().bfloat16() for t in (first, old, target)]
    loss = loss_fn(*rounded, mask, 0.2)[0]
    assert loss.dtype == torch.float32
    assert_close(loss, loss_fn(*(t.float() for t in rounded), mask, 0.2)[0], rtol=1e-6, atol=0)


@BOTH
def test_masks_and_shapes_are_checked(loss_fn):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="bool"):
        loss_fn(x, x, x, torch.ones(2, 3), 0.2)
    with pytest.raises(ValueError, match="shape"):
        loss_fn(x, x, torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), 0.2)
