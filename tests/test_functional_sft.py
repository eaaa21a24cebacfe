"""Loss of supervised fine-tuning: the shift by one, weights, garbage, limits, denominators."""

import math

from dschat.functional import sft_loss
from tests.functional_parts import assert_stats

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False
LN3 = math.log(3)


@pytest.mark.parametrize("vocab", [2, 7, 1000])
def test_sft_loss_of_uniform_logits_is_log_v(vocab):
    ids = torch.arange(8).view(2, 4) % vocab
    loss, stats = sft_loss(torch.zeros(2, 4, vocab), ids, torch.ones(2, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(vocab), rel=1e-5)
    assert_stats(stats, loss_sum=6 * math.log(vocab), num_tokens=6)  # nothing predicts the first column


def sft_example():
    """Two scored predictions of (1/4, 3/4) and garbage, ids included, wherever nothing is scored."""
    row = [0.0, LN3]
    garbage = [NAN, INF]
    logits = torch.tensor([[row, garbage, row], [garbage, row, garbage]], requires_grad=True)
    ids = torch.tensor([[-100, 1, 0], [0, 999, 0]])
    mask = torch.tensor([[T, T, F], [T, F, T]])
    return logits, ids, mask


def test_sft_loss_scores_token_t_by_the_logits_before_it():
    logits, ids, mask = sft_example()
    loss, stats = sft_loss(logits, ids, mask)
    loss.backward()
    # Row 0, t = 1: token 1 by the logits at 0, probability 3/4. Row 1, t = 2: token 0 by the logits at 1, 1/4.
    total = -math.log(0.75) - math.log(0.25)
    assert loss.item() == pytest.approx(total / 2, rel=1e-6)
    assert_stats(stats, loss_sum=total, num_tokens=2)
    # (p - one_hot) / 2
    expected = torch.zeros(2, 3, 2)
    expected[0, 0] = torch.tensor([0.125, -0.125])
    expected[1, 1] = torch.tensor([-0.375, 0.375])
    assert_close(logits.grad, expected)


def test_sft_loss_weights_tokens_and_divides_by_their_weights():
    logits, ids, mask = sft_example()
    weights = torch.tensor([[NAN, 0.25, NAN], [5.0, NAN, 0.125]])
    loss, stats = sft_loss(logits, ids, mask, weights=weights)
    loss.backward()
    total = -0.25 * math.log(0.75) - 0.125 * math.log(0.25)
    assert loss.item() == pytest.approx(total / 0.375, rel=1e-6)
    assert_stats(stats, loss_sum=total, num_tokens=2)
    expected = torch.zeros(2, 3, 2)
    expected[0, 0] = torch.tensor([0.25, -0.25]) * 0.25 / 0.375
    expected[1, 1] = torch.tensor([-0.75, 0.75]) * 0.125 / 0.375
    assert_close(logits.grad, expected)
    assert sft_loss(logits, ids, mask, weights=weights, denominator=4)[0].item() == pytest.approx(total / 4, rel=1e-6)


def test_sft_loss_of_bfloat16_logits_is_float32_arithmetic():
    logits = torch.tensor([[[1.0, 2.0, 10.0], [0.0] * 3]], dtype=torch.bfloat16, requires_grad=True)
    loss, _ = sft_loss(logits, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(8 + math.log1p(math.exp(-8) + math.exp(-9)), rel=1e-6)
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("denominator", [None, 5.0, 0.0, torch.tensor(0)])
@pytest.mark.parametrize("weights", [None, torch.ones(2, 3)])
def test_sft_loss_of_an_empty_mask(denominator, weights):
    logits = torch.full((2, 3, 4), NAN, requires_grad=True)
    mask = torch.tensor([[T, F, F], [F, F, F]])
    loss, stats = sft_loss(logits, torch.zeros(2, 3).long(), mask, weights=weights, denominator=denominator)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.tolist() == torch.zeros(2, 3, 4).tolist()
    assert_stats(stats, loss_sum=0, num_tokens=0)


def test_sft_loss_of_zero_weights_is_zero():
    logits, ids, mask = sft_example()
    loss, _ = sft_loss(logits, ids, mask, weights=torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_sft_loss_refuses():
    logits, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3).long()
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="bool"):
        sft_loss(logits, ids, mask.long())  # as an index it would pick rows 0 and 1 instead
    with pytest.raises(ValueError, match="input_ids"):
        sft_loss(logits, ids[:, 1:], mask)
    with pytest.raises(ValueError, match=r"weights \(2, 1\)"):
        sft_loss(logits, ids, mask, weights=torch.ones(2, 1))


@pytest.mark.parametrize("weighted", [False, True])
def test_sft_micro_batches_with_a_common_denominator_are_the_big_batch(weighted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 6, generator=generator, requires_grad=True)
    ids = torch.randint(6, (5, 4), generator=generator)
    mask = torch.rand(5, 4, generator=generator) < 0.5
    weights = torch.rand(5, 4, generator=generator) if weighted else None

    def loss_of(rows, denominator=None):
        part = None if weights is None else weights[rows]
        return sft_loss(logits[rows], ids[rows], mask[rows], weights=part, denominator=denominator)[0]

    whole = loss_of(slice(0, 5))
    (expected,) = torch.autograd.grad(whole, logits)
    count = (torch.ones(5, 4) if weights is None else weights)[:, 1:][mask[:, 1:]].sum()
    for denominator in (count, count.item(), count.double()):
        total = sum(loss_of(rows, denominator) for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 5)))
        assert total.dtype == torch.float32
        assert_close(total, whole)
        assert_close(torch.autograd.grad(total, logits)[0], expected)
