"""Losses from preferences and judged answers: numbers by hand, limits, extremes, garbage, denominators."""

import math

from dschat.functional import dpo_loss, kto_loss, orpo_loss, sequence_logprobs, simpo_loss
from tests.functional_parts import assert_stats

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False
LN2, LN3 = math.log(2), math.log(3)


# ---- sequence_logprobs ----------------------------------------------------------------------------------------------


def test_sequence_logprobs_by_hand():
    logprobs = torch.tensor([[NAN, -1.0, -2.0], [-4.0, INF, -0.5], [NAN, -INF, NAN]], requires_grad=True)
    mask = torch.tensor([[F, T, T], [T, F, F], [F, F, F]])
    sums = sequence_logprobs(logprobs, mask)
    assert sums.tolist() == [-3.0, -4.0, 0.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert logprobs.grad.tolist() == [[0, 1, 1], [10, 0, 0], [0, 0, 0]]
    # 256 + 1 is not a bfloat16 number.
    sums = sequence_logprobs(torch.tensor([[-256.0, -1.0]]).bfloat16(), torch.tensor([[T, T]]))
    assert sums.dtype == torch.float32
    assert sums.tolist() == [-257.0]


def test_sequence_logprobs_refuses():
    with pytest.raises(TypeError, match="bool"):
        sequence_logprobs(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="mask of shape"):
        sequence_logprobs(torch.zeros(2, 2), torch.ones(2, 1, dtype=torch.bool))


# ---- dpo_loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("sigmoid", LN2), ("hinge", 1.0), ("ipo", 25.0)],  # ipo: (1 / (2 * 0.1))^2
)
def test_dpo_loss_where_the_policy_is_the_reference(loss_type, expected):
    chosen, rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-4.0, -8.0])
    loss, stats = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1, loss_type=loss_type)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert_stats(stats, chosen_reward=0, rejected_reward=0, margin=0, accuracy=0.5, num_pairs=2)


def dpo_example():
    """h = (-10 + 12) - (-9 + 8) = 3 and (-6 + 5) - (-7 + 7) = -1; with beta 0.5, margins 1.5 and -0.5."""
    policy = torch.tensor([-10.0, -6.0], requires_grad=True), torch.tensor([-9.0, -7.0], requires_grad=True)
    return policy, (torch.tensor([-12.0, -5.0]), torch.tensor([-8.0, -7.0]))


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "losses", "slopes"),
    [  # per pair, and d loss / d h
        # -ln sigmoid(1.5) = 0.2014133, -ln sigmoid(-0.5) = 0.9740770; slopes -0.5 * sigmoid(-1.5), -0.5 * sigmoid(0.5)
        ("sigmoid", 0.0, [0.2014133, 0.9740770], [-0.0912128, -0.3112297]),
        # 0.9 of that, 0.1 of -ln sigmoid(-1.5) = 1.7014133 and -ln sigmoid(0.5) = 0.4740770, slopes +0.5 * sigmoid(..)
        ("sigmoid", 0.1, [0.3514133, 0.9240770], [-0.0412128, -0.2612297]),
        # (3 - 1)^2, (-1 - 1)^2; slopes 2 (h - 1)
        ("ipo", 0.0, [4.0, 4.0], [4.0, -4.0]),
        # 0.75 of that and 0.25 of (-3 - 1)^2 = 16, (1 - 1)^2 = 0, with slopes 2 (h + 1) = 8 and 0
        ("ipo", 0.25, [7.0, 3.0], [5.0, -3.0]),
        # max(0, 1 - 1.5), max(0, 1 + 0.5)
        ("hinge", 0.0, [0.0, 1.5], [0.0, -0.5]),
        # and 0.25 of max(0, 1 + 1.5), max(0, 1 - 0.5)
        ("hinge", 0.25, [0.625, 1.25], [0.125, -0.25]),
    ],
)
def test_dpo_loss_by_hand(loss_type, smoothing, losses, slopes):
    (chosen, rejected), reference = dpo_example()
    loss, stats = dpo_loss(chosen, rejected, *reference, 0.5, smoothing, loss_type)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert_close(chosen.grad, torch.tensor(slopes) / 2, rtol=1e-5, atol=1e-6)
    assert_close(rejected.grad, -torch.tensor(slopes) / 2, rtol=1e-5, atol=1e-6)
    # Rewards 0.5 * (2, -1) and 0.5 * (-1, 0).
    assert_stats(stats, chosen_reward=0.25, rejected_reward=-0.25, margin=0.5, accuracy=0.5, num_pairs=2)


def test_dpo_loss_takes_sigmoid_and_no_smoothing_by_default():
    (chosen, rejected), reference = dpo_example()
    assert dpo_loss(chosen, rejected, *reference, 0.5)[0].item() == pytest.approx(1.1754903 / 2, rel=1e-6)


def test_dpo_loss_of_bfloat16_is_float32_arithmetic():
    # Rewards -255.5 and 0: the difference needs nine bits; and no accuracy.
    inputs = [torch.tensor([x], dtype=torch.bfloat16) for x in (-256.0, 0.0, -0.5, 0.0)]
    loss, stats = dpo_loss(*inputs, 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == 255.5
    assert_stats(stats, chosen_reward=-255.5, rejected_reward=0, margin=-255.5, accuracy=0, num_pairs=1)


def test_dpo_loss_of_no_pairs():
    empty = torch.zeros(0, requires_grad=True)
    loss, stats = dpo_loss(empty, empty, empty, empty, 0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert_stats(stats, chosen_reward=0, rejected_reward=0, margin=0, accuracy=0, num_pairs=0)


def test_dpo_loss_without_smoothing_takes_an_infinite_margin():
    chosen = torch.zeros(1, requires_grad=True)
    for loss_type in ("sigmoid", "hinge"):
        loss, _ = dpo_loss(chosen, torch.tensor([-INF]), torch.zeros(1), torch.zeros(1), 0.1, loss_type=loss_type)
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, chosen)[0].tolist() == [0.0]


def test_dpo_loss_refuses():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="unknown DPO loss 'kto': choose sigmoid, ipo or hinge"):
        dpo_loss(x, x, x, x, 0.1, loss_type="kto")
    with pytest.raises(ValueError, match=r"ref_rejected_logps \(2, 1\)"):
        dpo_loss(x, x, x, torch.zeros(2, 1), 0.1)


# ---- kto_loss -------------------------------------------------------------------------------------------------------


def kto_example():
    """With z0 = ln 2 and beta 0.5: beta (r - z0) is ln 3, -ln 3 (good answers), ln 3 and 0 (bad ones)."""
    ref = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    log_ratios = torch.tensor([LN2 + 2 * LN3, LN2 - 2 * LN3, LN2 + 2 * LN3, LN2])
    return (ref + log_ratios).requires_grad_(), ref, torch.tensor([T, T, F, F])


def test_kto_loss_by_hand():
    policy, ref, good = kto_example()
    kl = torch.tensor(LN2, requires_grad=True)
    loss, stats = kto_loss(policy, ref, good, kl, 0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss.backward()
    # 1 - sigmoid of ln 3, -ln 3, and for the bad ones of -ln 3 and 0.
    assert loss.item() == pytest.approx((2 * (1 / 4 + 3 / 4) + 3 * (3 / 4 + 1 / 2)) / 4, rel=1e-5)
    # Slopes -+ weight * beta * sigmoid (1 - sigmoid): 3/16 at +-ln 3, 1/4 at 0.
    expected = torch.tensor([-2 * 3 / 16, -2 * 3 / 16, 3 * 3 / 16, 3 / 4]) * 0.5 / 4
    assert_close(policy.grad, expected, rtol=1e-5, atol=1e-6)
    assert kl.grad is None
    assert_stats(stats, good_reward=LN2 / 2, bad_reward=(LN2 + LN3) / 2, num_good=2, num_bad=2, kl=LN2)


def test_kto_loss_weighs_good_and_bad_alike_by_default():
    policy, ref, good = kto_example()
    assert kto_loss(policy, ref, good, torch.tensor(LN2), 0.5)[0].item() == pytest.approx(9 / 16, rel=1e-5)


@pytest.mark.parametrize("kl", [-5.0, 0.0, 0.7])
def test_kto_loss_is_a_half_at_the_reference_point(kl):
    point = max(kl, 0.0)  # a negative estimate counts as 0
    policy = torch.full((3,), point - 2)
    loss, stats = kto_loss(policy, torch.full((3,), -2.0), torch.tensor([T, F, T]), torch.tensor(kl), 0.1)
    assert loss.item() == pytest.approx(0.5, rel=1e-6)
    assert_stats(stats, good_reward=0.1 * point, bad_reward=0.1 * point, num_good=2, num_bad=1, kl=point)


def test_kto_loss_of_far_answers():
    policy = torch.tensor([1e30, -1e30, 1e30, -1e30, 20.0, -20.0], requires_grad=True)
    good = torch.tensor([T, T, F, F, T, F])
    loss, _ = kto_loss(policy, torch.zeros(6), good, torch.tensor(0.0), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 / 6)
    assert policy.grad[:4].tolist() == [0.0] * 4
    # Alone, 1 - sigmoid(20) is not lost beside the 1.
    for row in (4, 5):
        rows = slice(row, row + 1)
        loss, _ = kto_loss(policy[rows], torch.zeros(1), good[rows], torch.tensor(0.0), 1.0)
        assert loss.item() == pytest.approx(math.exp(-20), rel=1e-4)


def test_kto_loss_of_one_kind_only():
    policy = torch.tensor([1.0, 3.0])
    for good, rewards in ((T, {"good_reward": 0.2, "bad_reward": 0}), (F, {"good_reward": 0, "bad_reward": 0.2})):
        _, stats = kto_loss(policy, torch.zeros(2), torch.tensor([good, good]), torch.tensor(0.0), 0.1)
        assert_stats(stats, **rewards, num_good=2 * good, num_bad=2 - 2 * good, kl=0)


def test_kto_loss_of_bfloat16_is_float32_arithmetic():
    policy, ref, kl = (torch.tensor(x, dtype=torch.bfloat16) for x in ([-256.0], [-0.5], 0.5))
    loss, stats = kto_loss(policy, ref, torch.tensor([F]), kl, 2**-8)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1 / (1 + math.exp(1)), rel=1e-6)  # -255.5 - 0.5 is -256
    assert_stats(stats, good_reward=0, bad_reward=-255.5 / 256, num_good=0, num_bad=1, kl=0.5)


def test_kto_loss_refuses():
    x, good = torch.zeros(2), torch.tensor([T, F])
    with pytest.raises(TypeError, match="bool"):
        kto_loss(x, x, good.long(), torch.tensor(0.0), 0.1)
    with pytest.raises(ValueError, match=r"kl of shape \(2,\); expected a scalar"):
        kto_loss(x, x, good, x, 0.1)
    for shapes in [((2, 1), 2, 2), (2, (2, 1), 2), (2, 2, (2, 1))]:
        policy, ref, kind = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=r"\(2, 1\)"):
            kto_loss(policy, ref, kind.bool(), torch.tensor(0.0), 0.1)


# ---- what they share ------------------------------------------------------------------------------------------------


def preference_parts():
    generator = torch.Generator().manual_seed(0)
    leaf = -5 * torch.rand(4, 5, generator=generator)
    leaf.requires_grad_()
    lengths = torch.randint(1, 6, (2, 5), generator=generator)
    good = torch.tensor([T, F, F, T, F])

    def dpo(rows, **kwargs):
        return dpo_loss(*leaf[:, rows], 0.3, 0.1, **kwargs)

    def ipo(rows, **kwargs):
        return dpo_loss(*leaf[:, rows], 0.3, loss_type="ipo", **kwargs)

    def kto(rows, **kwargs):
        return kto_loss(*leaf[:2, rows], good[rows], torch.tensor(0.2), 0.3, 1.0, 1.5, **kwargs)

    def simpo(rows, **kwargs):
        return simpo_loss(*leaf[:2, rows], *lengths[:, rows], 2.0, 0.5, 0.1, **kwargs)

    def orpo(rows, **kwargs):
        return orpo_loss(*leaf[:2, rows], *lengths[:, rows], 0.2, **kwargs)

    return leaf, {"dpo": dpo, "ipo": ipo, "kto": kto, "simpo": simpo, "orpo": orpo}


LEAF, LOSSES = preference_parts()


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_with_a_common_denominator_are_the_big_batch(name):
    loss_of = LOSSES[name]
    whole = loss_of(slice(0, 5))[0]
    (expected,) = torch.autograd.grad(whole, LEAF)
    for denominator in (5, 5.0, torch.tensor(5), torch.tensor(5.0).double()):
        total = sum(loss_of(rows, denominator=denominator)[0] for rows in (slice(0, 1), slice(1, 3), slice(3, 5)))
        assert total.dtype == torch.float32
        assert_close(total, whole)
        assert_close(torch.autograd.grad(total, LEAF)[0], expected)
    # Statistics are means over the batch, whatever the denominator.
    assert_close(loss_of(slice(0, 5), denominator=100)[1], loss_of(slice(0, 5))[1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kwargs", [{}, {"denominator": 8.0}, {"denominator": 0.0}])
def test_no_rows_cost_nothing_on_a_connected_graph(name, kwargs):
    loss, stats = LOSSES[name](slice(0, 0), **kwargs)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, LEAF)[0].any()
    expected = {key: 0.2 if key == "kl" else 0.0 for key in stats}
    assert_stats(stats, **expected)


def test_losses_of_float64_are_float32_arithmetic():
    x, one = -torch.ones(2).double(), torch.ones(2)
    losses = [
        dpo_loss(x, x, x, x, 0.1),
        kto_loss(x, x, torch.tensor([T, F]), x[0], 0.1),
        simpo_loss(x, x, one, one, 2.0, 0.5),
        orpo_loss(x, x, one, one, 0.1),
    ]
    assert [loss.dtype for loss, _ in losses] == [torch.float32] * 4
