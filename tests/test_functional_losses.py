"""Losses of the reward model and of DPO: numbers by hand, limits, garbage, denominators."""

import math

from dschat.functional import dpo_loss, listwise_ranking_loss, pairwise_ranking_loss

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False
LN2, LN3 = math.log(2), math.log(3)
SOFTPLUS = {d: math.log1p(math.exp(-d)) for d in (-2, -1, 0, 1, 2)}  # -log sigmoid(d)


def assert_stats(stats, **expected):
    assert set(stats) == set(expected)
    for name, value in expected.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert stats[name].dtype == torch.float32
        assert stats[name].dim() == 0
        assert not stats[name].requires_grad


# ---- pairwise_ranking_loss ------------------------------------------------------------------------------------------


def test_pairwise_ranking_loss_by_hand():
    chosen = torch.tensor([LN3, 0.0, 1.0, 5.0], requires_grad=True)
    rejected = torch.tensor([0.0, LN3, 1.0, 3.0], requires_grad=True)
    loss, stats = pairwise_ranking_loss(chosen, rejected)
    loss.backward()
    # sigmoid of ln 3, -ln 3, 0 and 2 is 3/4, 1/4, 1/2 and 0.8807971; slopes -(1 - sigmoid) / 4.
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4) + LN2 + SOFTPLUS[2]) / 4, rel=1e-6)
    expected = torch.tensor([-0.25, -0.75, -0.5, -0.1192029]) / 4
    assert_close(chosen.grad, expected)
    assert_close(rejected.grad, -expected)
    # Right, wrong, a tie (half) and right.
    assert_stats(stats, accuracy=2.5 / 4, margin=0.5, num_pairs=4)


def test_pairwise_ranking_loss_with_a_margin():
    chosen = torch.tensor([LN3, 2.0], requires_grad=True)
    loss, stats = pairwise_ranking_loss(chosen, torch.zeros(2), torch.tensor([LN3, 1.0]))
    loss.backward()
    # What is left after the margin: 0 and 1.
    assert loss.item() == pytest.approx((LN2 + SOFTPLUS[1]) / 2, rel=1e-6)
    assert_close(chosen.grad, torch.tensor([-0.25, -0.2689414 / 2]))
    assert_stats(stats, accuracy=1, margin=(LN3 + 2) / 2, num_pairs=2)  # of the scores themselves


def test_pairwise_ranking_loss_is_finite_for_far_scores_and_float32_for_bfloat16():
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss, _ = pairwise_ranking_loss(chosen, -chosen.detach())
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert chosen.grad.tolist() == [-0.5, 0.0]
    # 257 - 0.5 needs ten bits.
    _, stats = pairwise_ranking_loss(torch.tensor([256.0]).bfloat16(), torch.tensor([0.5]).bfloat16())
    assert stats["margin"].item() == 255.5


def test_pairwise_ranking_loss_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"chosen_scores \(2,\), rejected_scores \(2, 1\)"):
        pairwise_ranking_loss(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"margin \(1,\)"):
        pairwise_ranking_loss(torch.zeros(2), torch.zeros(2), torch.zeros(1))


# ---- listwise_ranking_loss ------------------------------------------------------------------------------------------


def test_listwise_ranking_loss_by_hand():
    scores = torch.tensor(
        [
            [0.0, 2.0, 1.0],  # ranks 3, 1, 2: margins 2 - 1, 2 - 0 and 1 - 0
            [1.0, 0.0, 0.0],  # a tie between the last two; 0 - 1 twice, both wrong
            [NAN, 5.0, 5.0],  # one absent; a tie in score
            [1.0, 2.0, 3.0],  # all tied: no pair
            [NAN, INF, 1.0],  # one response: no pair
        ],
        requires_grad=True,
    )
    ranks = torch.tensor([[3, 1, 2], [2, 1, 1], [0, 1, 4], [2, 2, 2], [0, 0, 1]])
    loss, stats = listwise_ranking_loss(scores, ranks)
    loss.backward()
    first = (2 * SOFTPLUS[1] + SOFTPLUS[2]) / 3
    assert loss.item() == pytest.approx((first + SOFTPLUS[-1] + LN2) / 3, rel=1e-6)
    # Slope of a pair: -(1 - sigmoid(margin)) on the better one, + on the worse: 0.2689414 at 1, 0.1192029 at 2,
    # 0.7310586 at -1, 0.5 at 0; over the prompt's pairs and three prompts.
    expected = [
        [(0.1192029 + 0.2689414) / 9, -(0.2689414 + 0.1192029) / 9, 0.0],
        [2 * 0.7310586 / 6, -0.7310586 / 6, -0.7310586 / 6],
        [0.0, -0.5 / 3, 0.5 / 3],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
    assert_close(scores.grad, torch.tensor(expected))
    # 3 right, 2 wrong and a tie of 6 pairs; margins 1 + 2 + 1 - 1 - 1 + 0.
    assert_stats(stats, accuracy=3.5 / 6, margin=2 / 6, num_pairs=6, num_prompts=3)


def test_listwise_ranking_loss_of_two_is_the_pairwise_one():
    scores = torch.tensor([[0.3, -0.2], [1.5, 2.5], [0.0, 4.0]])
    loss, stats = listwise_ranking_loss(scores, torch.tensor([[1, 2], [2, 1], [1, 2]]))
    expected, expected_stats = pairwise_ranking_loss(torch.tensor([0.3, 2.5, 0.0]), torch.tensor([-0.2, 1.5, 4.0]))
    assert_close(loss, expected)
    assert_stats(stats, num_prompts=3, **{name: value.item() for name, value in expected_stats.items()})


def test_listwise_ranking_loss_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="ranks"):
        listwise_ranking_loss(torch.zeros(2, 3), torch.zeros(2, 1).long())


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


def test_dpo_loss_refuses():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="unknown DPO loss 'kto': choose sigmoid, ipo or hinge"):
        dpo_loss(x, x, x, x, 0.1, loss_type="kto")
    with pytest.raises(ValueError, match=r"ref_rejected_logps \(2, 1\)"):
        dpo_loss(x, x, x, torch.zeros(2, 1), 0.1)


# ---- denominators ---------------------------------------------------------------------------------------------------


def ranking_parts():
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ranks = torch.tensor([[1, 2, 3], [1, 1, 1], [2, 0, 1], [2, 1, 2], [3, 1, 0]])

    def pairwise(rows, **kwargs):
        return pairwise_ranking_loss(scores[rows, 0], scores[rows, 1], **kwargs)[0]

    def listwise(rows, **kwargs):
        return listwise_ranking_loss(scores[rows], ranks[rows], **kwargs)[0]

    return {"pairwise": (scores, pairwise, torch.tensor(5)), "listwise": (scores, listwise, torch.tensor(4))}


CASES = ranking_parts()


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_with_a_common_denominator_are_the_big_batch(name):
    leaf, loss_of, count = CASES[name]
    whole = loss_of(slice(0, 5))
    (expected,) = torch.autograd.grad(whole, leaf)
    for denominator in (count, count.item(), count.double()):
        total = sum(loss_of(rows, denominator=denominator) for rows in (slice(0, 1), slice(1, 2), slice(2, 5)))
        assert total.dtype == torch.float32
        assert_close(total, whole)
        assert_close(torch.autograd.grad(total, leaf)[0], expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kwargs", [{}, {"denominator": 8.0}, {"denominator": 0.0}])
def test_no_rows_cost_nothing_on_a_connected_graph(name, kwargs):
    leaf, loss_of, _ = CASES[name]
    loss = loss_of(slice(0, 0), **kwargs)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, leaf)[0].any()
