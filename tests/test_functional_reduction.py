"""The mean over tokens as a term of a loss: by hand, garbage, empty masks, denominators."""

import math

from dschat.functional import token_mean

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False


def test_token_mean_and_its_gradient_by_hand():
    x = torch.tensor([[1.0, 2.0, NAN], [INF, 6.0, -INF]], requires_grad=True)
    mask = torch.tensor([[T, T, F], [F, T, F]])
    mean = token_mean(x, mask)
    mean.backward()
    assert mean.item() == 3.0
    assert_close(x.grad, torch.tensor([[1 / 3, 1 / 3, 0.0], [0.0, 1 / 3, 0.0]]))
    assert token_mean(x, mask, denominator=4.5).item() == 2.0
    assert token_mean(x, mask, denominator=torch.tensor(18)).item() == 0.5


@pytest.mark.parametrize("denominator", [None, 7.0, 0.0, torch.tensor(0)])
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_token_mean_of_nothing_costs_nothing_on_a_connected_graph(denominator, shape):
    x = torch.full(shape, NAN, requires_grad=True)
    mean = token_mean(x, torch.zeros(shape, dtype=torch.bool), denominator=denominator)
    mean.backward()
    assert mean.item() == 0.0
    assert x.grad.tolist() == torch.zeros(shape).tolist()


def test_micro_batches_with_a_common_denominator_are_the_big_batch():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    count = mask.sum()
    parts = [token_mean(x[rows], mask[rows], denominator=count) for rows in (slice(0, 1), slice(1, 4), slice(4, 5))]
    assert_close(sum(parts), token_mean(x, mask))
    assert token_mean(x, mask).item() == pytest.approx(math.fsum(x[mask].tolist()) / int(count), rel=1e-5)


def test_token_mean_of_bfloat16_is_summed_in_float32():
    # 256 + 1 is not a bfloat16 number.
    mean = token_mean(torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16), torch.tensor([[T, T]]))
    assert mean.dtype == torch.float32
    assert mean.item() == 128.5


def test_token_mean_refuses():
    with pytest.raises(TypeError, match="bool"):
        token_mean(torch.zeros(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="mask of shape"):
        token_mean(torch.zeros(2, 2), torch.ones(2, 1, dtype=torch.bool))
