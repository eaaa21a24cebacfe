"""Losses of the reward model: numbers by hand, a loop over pairs in Python floats, garbage, denominators."""

import itertools
import math

from dschat.functional import listwise_ranking_loss, pairwise_ranking_loss
from tests.functional_parts import assert_stats

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
LN2, LN3 = math.log(2), math.log(3)
SOFTPLUS = {d: math.log1p(math.exp(-d)) for d in (-2, -1, 0, 1, 2)}  # -log sigmoid(d)


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


@pytest.mark.parametrize(
    ("margin", "losses", "slopes"),
    [  # d is ln 3 and -ln 2. A slope is 0 where the pair is believed as much as its label is.
        (None, [0.75 * math.log(4 / 3) + 0.25 * math.log(4), 0.75 * LN3 + 0.25 * math.log(1.5)], [0.0, -5 / 12]),
        # The margin is missed in either direction: d - m is 0 and -2 ln 2, -d - m is -2 ln 3 and 0.
        ([LN3, LN2], [0.75 * LN2 + 0.25 * math.log(10), 0.75 * math.log(5) + 0.25 * LN2], [-0.15, -0.475]),
    ],
)
def test_pairwise_ranking_loss_with_label_smoothing(margin, losses, slopes):
    chosen, rejected = torch.tensor([LN3, 0.0], requires_grad=True), torch.tensor([0.0, LN2], requires_grad=True)
    margin = None if margin is None else torch.tensor(margin)
    loss, stats = pairwise_ranking_loss(chosen, rejected, margin, label_smoothing=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert_close(chosen.grad, torch.tensor(slopes) / 2, rtol=1e-5, atol=1e-7)
    assert_close(rejected.grad, -chosen.grad)
    assert_stats(stats, accuracy=0.5, margin=(LN3 - LN2) / 2, num_pairs=2)


def test_pairwise_ranking_loss_with_centred_scores():
    chosen, rejected = torch.tensor([LN3, -1.0], requires_grad=True), torch.tensor([0.0, -1.0], requires_grad=True)
    loss, stats = pairwise_ranking_loss(chosen, rejected, center_coef=0.1)
    loss.backward()
    # Sums ln 3 and -2; slopes 2 * 0.1 * sum on both scores.
    assert loss.item() == pytest.approx((math.log(4 / 3) + LN2 + 0.1 * (LN3**2 + 4)) / 2, rel=1e-6)
    centring = torch.tensor([0.2 * LN3, -0.4]) / 2
    assert_close(chosen.grad, torch.tensor([-0.25, -0.5]) / 2 + centring)
    assert_close(rejected.grad, torch.tensor([0.25, 0.5]) / 2 + centring)
    assert_stats(stats, accuracy=0.75, margin=LN3 / 2, num_pairs=2)


def test_pairwise_ranking_loss_options_that_are_off_cost_nothing():
    # 0 * infinity would be NaN: the label's other side of an infinite margin, the square of a far score.
    chosen = torch.tensor([INF, 1e30], requires_grad=True)
    loss, _ = pairwise_ranking_loss(chosen, torch.tensor([0.0, 1e30]))
    loss.backward()
    assert loss.item() == pytest.approx(LN2 / 2, rel=1e-6)
    assert chosen.grad.tolist() == [0.0, -0.25]


def test_pairwise_ranking_loss_is_finite_for_far_scores_and_float32_for_bfloat16():
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss, _ = pairwise_ranking_loss(chosen, -chosen.detach())
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert chosen.grad.tolist() == [-0.5, 0.0]
    smoothed, _ = pairwise_ranking_loss(chosen, -chosen.detach(), label_smoothing=0.25)
    assert torch.autograd.grad(smoothed, chosen)[0].tolist() == [-0.75 / 2, 0.25 / 2]
    # 256 - 0.5 needs nine bits, 256 + 0.5 ten.
    sixteen = torch.tensor([256.0]).bfloat16(), torch.tensor([0.5]).bfloat16()
    _, stats = pairwise_ranking_loss(*sixteen)
    assert stats["margin"].item() == 255.5
    for inputs in ((*sixteen, sixteen[1]), [x.double() for x in (*sixteen, sixteen[1])]):
        loss, _ = pairwise_ranking_loss(*inputs, center_coef=1.0)
        assert loss.dtype == torch.float32
        assert loss.item() == 256.5**2  # the margin is reached, by far


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


OPTIONS = {"label_smoothing": 0.25, "center_coef": 0.5}


def test_listwise_ranking_loss_with_every_option_by_hand():
    scores = torch.tensor([[0.0, LN3, -LN3], [NAN, 0.0, LN2], [7.0, 7.0, NAN]], requires_grad=True)
    ranks = torch.tensor([[2, 1, 3], [0, 1, 2], [1, 1, 0]])
    loss, stats = listwise_ranking_loss(scores, ranks, torch.tensor([LN3, 0.0, NAN]), **OPTIONS)
    loss.backward()
    # First prompt: d - m is 0, ln 3, 0 and -d - m is -2 ln 3, -3 ln 3, -2 ln 3; sums ln 3, 0, -ln 3.
    first = 0.75 * (2 * LN2 + math.log(4 / 3)) + 0.25 * (2 * math.log(10) + math.log(28)) + 0.5 * 2 * LN3**2
    # Second: d is -ln 2, the sum ln 2. Third: a tie, whose margin says nothing.
    second = 0.75 * LN3 + 0.25 * math.log(1.5) + 0.5 * LN2**2
    assert loss.item() == pytest.approx((first / 3 + second) / 2, rel=1e-6)
    # Slopes in d: -0.75 / 2 + 0.25 * 0.9 = -0.15 (twice), -0.75 / 4 + 0.25 * 27 / 28 = 3 / 56, and -5 / 12.
    expected = [
        [0.0, (-0.15 + 3 / 56 + LN3) / 6, (0.15 - 3 / 56 - LN3) / 6],
        [0.0, (-5 / 12 + LN2) / 2, (5 / 12 + LN2) / 2],
        [0.0, 0.0, 0.0],
    ]
    assert_close(scores.grad, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert_stats(stats, accuracy=0.75, margin=(4 * LN3 - LN2) / 4, num_pairs=4, num_prompts=2)


def listwise_in_python(scores, ranks, margin, label_smoothing, center_coef):
    """The definition, one pair after the other in Python floats."""

    def softplus(x):
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    prompts = []
    for row_scores, row_ranks, m in zip(scores, ranks, margin, strict=True):
        costs = []
        for i, j in itertools.permutations(range(len(row_ranks)), 2):
            if 0 < row_ranks[i] < row_ranks[j]:
                right, wrong = row_scores[i] - row_scores[j] - m, row_scores[j] - row_scores[i] - m
                cost = (1 - label_smoothing) * softplus(-right) + label_smoothing * softplus(-wrong)
                costs.append(cost + center_coef * (row_scores[i] + row_scores[j]) ** 2)
        if costs:
            prompts.append(math.fsum(costs) / len(costs))
    return math.fsum(prompts) / len(prompts)


@pytest.mark.parametrize("seed", range(5))
def test_listwise_ranking_loss_is_a_loop_over_the_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(6, 5, generator=generator)
    ranks = torch.randint(0, 5, (6, 5), generator=generator)
    margin = torch.rand(6, generator=generator)
    loss, _ = listwise_ranking_loss(scores, ranks, margin, **OPTIONS)
    expected = listwise_in_python(scores.tolist(), ranks.tolist(), margin.tolist(), 0.25, 0.5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # Neither the order of the responses nor the size of the ranks means anything, nor what stands where none is.
    order = torch.randperm(5, generator=generator)
    garbage = torch.where(ranks > 0, scores, INF)
    assert_close(listwise_ranking_loss(garbage[:, order], 3 * ranks[:, order], margin, **OPTIONS)[0], loss)


@pytest.mark.parametrize(
    "options",
    [{}, {"margin": torch.tensor([0.5, 0.0, 2.0])}, {"label_smoothing": 0.1}, {"center_coef": 0.3}]
    + [{"margin": torch.tensor([0.5, 0.0, 2.0]), "denominator": 7.0, **OPTIONS}],
)
def test_listwise_ranking_loss_of_two_is_the_pairwise_one(options):
    scores = torch.tensor([[0.3, -0.2], [1.5, 2.5], [0.0, 4.0]], requires_grad=True)
    loss, stats = listwise_ranking_loss(scores, torch.tensor([[1, 2], [2, 1], [1, 2]]), **options)
    chosen, rejected = scores[[0, 1, 2], [0, 1, 0]], scores[[0, 1, 2], [1, 0, 1]]
    expected, expected_stats = pairwise_ranking_loss(chosen, rejected, **options)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores))
    assert_stats(stats, num_prompts=3, **{name: value.item() for name, value in expected_stats.items()})


def test_listwise_ranking_loss_of_bfloat16_is_float32_arithmetic():
    scores = torch.tensor([[256.0, 0.5]]).bfloat16()
    loss, stats = listwise_ranking_loss(scores, torch.tensor([[2, 1]]), scores[:, 1].double())
    assert loss.dtype == torch.float32
    assert loss.item() == 256.0
    assert stats["margin"].item() == -255.5


def test_listwise_ranking_loss_ignores_what_is_in_no_pair():
    # Present, and infinite, but tied with all others.
    scores = torch.tensor([[INF, -INF, 0.0], [1.0, NAN, 1.0]], requires_grad=True)
    loss, _ = listwise_ranking_loss(scores, torch.tensor([[1, 1, 0], [1, 0, 2]]), **OPTIONS)
    loss.backward()
    assert loss.item() == pytest.approx(LN2 + 2, rel=1e-6)
    assert scores.grad[0].tolist() == [0.0, 0.0, 0.0]
    assert scores.grad[1, 1] == 0.0


def test_listwise_ranking_loss_refuses_shapes_that_disagree():
    ranks = torch.tensor([[1, 2], [1, 2]])
    with pytest.raises(ValueError, match="ranks"):
        listwise_ranking_loss(torch.zeros(2, 3), torch.zeros(2, 1).long())
    for shape in [(1,), (2, 1), (2, 2), ()]:
        with pytest.raises(ValueError, match=r"margin of shape .* for 2 prompts; expected \(N,\)"):
            listwise_ranking_loss(torch.zeros(2, 2), ranks, torch.zeros(shape))


# ---- denominators ---------------------------------------------------------------------------------------------------


def ranking_parts():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 3, generator=generator, requires_grad=True)
    margin = torch.rand(5, generator=generator)
    ranks = torch.tensor([[1, 2, 3], [1, 1, 1], [2, 0, 1], [2, 1, 2], [3, 1, 0]])

    def pairwise(rows, **kwargs):
        return pairwise_ranking_loss(scores[rows, 0], scores[rows, 1], margin[rows], **OPTIONS, **kwargs)[0]

    def listwise(rows, **kwargs):
        return listwise_ranking_loss(scores[rows], ranks[rows], margin[rows], **OPTIONS, **kwargs)[0]

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


@pytest.mark.parametrize("kwargs", [{}, {"denominator": 8.0}, {"denominator": 0.0}])
def test_rows_without_a_pair_cost_nothing_on_a_connected_graph(kwargs):
    scores = torch.tensor([[NAN, 1.0], [2.0, 3.0]], requires_grad=True)
    loss, stats = listwise_ranking_loss(scores, torch.tensor([[0, 1], [2, 2]]), **OPTIONS, **kwargs)
    loss.backward()
    assert loss.item() == 0.0
    assert not scores.grad.any()
    assert_stats(stats, accuracy=0, margin=0, num_pairs=0, num_prompts=0)
