"""Loss of supervised fine-tuning: weights, limits, denominators. The shift by one is in tests/test_packed.py."""

import math

from dschat.functional import sft_loss
from tests.functional_parts import assert_stats

import pytest
import torch
from torch.testing import assert_close

NAN = math.nan
LN3 = math.log(3)


@pytest.mark.parametrize("vocab", [2, 7, 1000])
def test_sft_loss_of_uniform_logits_is_log_v(vocab):
    ids = torch.arange(6).view(2, 3) % vocab
    loss, stats = sft_loss(torch.zeros(2, 3, vocab), ids)
    assert loss.item() == pytest.approx(math.log(vocab), rel=1e-5)
    assert_stats(stats, loss_sum=6 * math.log(vocab), num_tokens=6)


def sft_example():
    """Two predictions of (1/4, 3/4)."""
    return torch.tensor([[[0.0, LN3], [0.0, LN3]]], requires_grad=True), torch.tensor([[1, 0]])


def test_sft_loss_is_the_mean_of_minus_log_p():
    logits, ids = sft_example()
    loss, stats = sft_loss(logits, ids)
    loss.backward()
    total = -math.log(0.75) - math.log(0.25)
    assert loss.item() == pytest.approx(total / 2, rel=1e-6)
    assert_stats(stats, loss_sum=total, num_tokens=2)
    assert_close(logits.grad, torch.tensor([[[0.125, -0.125], [-0.375, 0.375]]]))  # (p - one_hot) / 2


def test_sft_loss_weights_tokens_and_divides_by_their_weights():
    logits, ids = sft_example()
    weights = torch.tensor([[0.25, 0.125]])
    loss, stats = sft_loss(logits, ids, weights=weights)
    loss.backward()
    total = -0.25 * math.log(0.75) - 0.125 * math.log(0.25)
    assert loss.item() == pytest.approx(total / 0.375, rel=1e-6)
    assert_stats(stats, loss_sum=total, num_tokens=2)
    expected = torch.tensor([[[0.25, -0.25], [-0.75, 0.75]]]) * weights[..., None] / 0.375
    assert_close(logits.grad, expected)
    assert sft_loss(logits, ids, weights=weights, denominator=4)[0].item() == pytest.approx(total / 4, rel=1e-6)


def test_sft_loss_of_bfloat16_logits_is_float32_arithmetic():
    logits = torch.tensor([[1.0, 2.0, 10.0]], dtype=torch.bfloat16, requires_grad=True)
    loss, _ = sft_loss(logits, torch.tensor([1]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(8 + math.log1p(math.exp(-8) + math.exp(-9)), rel=1e-6)
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("denominator", [None, 5.0, 0.0, torch.tensor(0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sft_loss_of_no_tokens(denominator, weighted):
    logits = torch.full((2, 3, 4), NAN, requires_grad=True)
    weights = torch.ones(1, 0) if weighted else None
    loss, stats = sft_loss(logits[:1, :0], torch.zeros(1, 0).long(), weights=weights, denominator=denominator)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.tolist() == torch.zeros(2, 3, 4).tolist()
    assert_stats(stats, loss_sum=0, num_tokens=0)


def test_sft_loss_of_zero_weights_is_zero():
    logits, ids = sft_example()
    loss, _ = sft_loss(logits, ids, weights=torch.zeros(1, 2))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_sft_loss_refuses():
    logits, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match="token_ids"):
        sft_loss(logits, ids[:, 1:])
    with pytest.raises(ValueError, match=r"weights \(2, 1\)"):
        sft_loss(logits, ids, weights=torch.ones(2, 1))


@pytest.mark.parametrize("weighted", [False, True])
def test_sft_micro_batches_with_a_common_denominator_are_the_big_batch(weighted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 6, generator=generator, requires_grad=True)
    ids = torch.randint(6, (5, 4), generator=generator)
    weights = torch.rand(5, 4, generator=generator) if weighted else None

    def loss_of(rows, denominator=None):
        part = None if weights is None else weights[rows]
        return sft_loss(logits[rows], ids[rows], weights=part, denominator=denominator)[0]

    whole = loss_of(slice(0, 5))
    (expected,) = torch.autograd.grad(whole, logits)
    count = torch.tensor(20.0) if weights is None else weights.sum()
    for denominator in (count, count.item(), count.double()):
        total = sum(loss_of(rows, denominator) for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 5)))
        assert total.dtype == torch.float32
        assert_close(total, whole)
        assert_close(torch.autograd.grad(total, logits)[0], expected)
