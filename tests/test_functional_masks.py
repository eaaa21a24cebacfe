"""Masks and masked statistics against tables typed by hand and sums in Python floats."""

import math

from dschat.functional import lengths_to_mask, masked_mean, masked_whiten, positions_from_mask

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
T, F = True, False
ragged = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


def test_lengths_to_mask_puts_padding_where_it_is_told():
    lengths = torch.tensor([0, 2, 3])
    assert lengths_to_mask(lengths, 3, "right").tolist() == [[F, F, F], [T, T, F], [T, T, T]]
    assert lengths_to_mask(lengths, 3, "left").tolist() == [[F, F, F], [F, T, T], [T, T, T]]
    assert lengths_to_mask(lengths, 3, "left").dtype == torch.bool
    assert lengths_to_mask(torch.zeros(0, dtype=torch.long), 3, "left").shape == (0, 3)


@pytest.mark.parametrize(
    ("lengths", "side", "message"),
    [([1], "both", "padding_side"), ([4], "left", r"\[0, 3\]; got 4"), ([-1, 2], "right", "got -1 to 2")],
)
def test_lengths_to_mask_refuses(lengths, side, message):
    with pytest.raises(ValueError, match=message):
        lengths_to_mask(torch.tensor(lengths), 3, side)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(9, 12))
def test_lengths_to_mask_sides_mirror_each_other(lengths, size):
    left, right = (lengths_to_mask(torch.tensor(lengths), size, side) for side in ("left", "right"))
    for row, length in enumerate(lengths):
        assert right[row].tolist() == [T] * length + [F] * (size - length)
        assert left[row].tolist() == [F] * (size - length) + [T] * length


def test_positions_count_real_tokens_from_zero():
    mask = [[F, F, T, T, T], [T, T, F, F, F], [T, F, T, F, T], [F, F, F, F, F]]
    expected = [[0, 0, 0, 1, 2], [0, 1, 0, 0, 0], [0, 0, 1, 0, 2], [0, 0, 0, 0, 0]]
    for dtype in (torch.bool, torch.int64, torch.float32):
        positions = positions_from_mask(torch.tensor(mask).to(dtype))
        assert positions.dtype == torch.int64
        assert positions.tolist() == expected


@settings(max_examples=50, deadline=None)
@given(ragged)
def test_positions_of_any_mask(rows):
    for row, positions in zip(rows, positions_from_mask(torch.tensor(rows)).tolist(), strict=True):
        assert [p for p, real in zip(positions, row, strict=True) if real] == list(range(sum(row)))
        assert all(p == 0 for p, real in zip(positions, row, strict=True) if not real)


def test_masked_mean_by_hand():
    x = torch.tensor([[1.0, 2.0, 6.0], [5.0, NAN, INF], [NAN, INF, -INF]])
    mask = torch.tensor([[T, T, T], [T, F, F], [F, F, F]])
    assert_close(masked_mean(x, mask), torch.tensor(3.5))  # (1 + 2 + 6 + 5) / 4
    assert_close(masked_mean(x, mask, dim=1), torch.tensor([3.0, 5.0, 0.0]))
    assert_close(masked_mean(x, mask, dim=0), torch.tensor([3.0, 2.0, 6.0]))
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


def test_masked_mean_gradient_is_one_over_n_and_zero_under_garbage():
    x = torch.tensor([1.0, NAN, 3.0, INF], requires_grad=True)
    masked_mean(x, torch.tensor([T, F, T, F])).backward()
    assert x.grad.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_masked_mean_of_bfloat16_is_summed_in_float32():
    # 256 + 1 is not a bfloat16 number: a sum in that type would be 256 and the mean 128.
    mean = masked_mean(torch.tensor([256.0, 1.0], dtype=torch.bfloat16), torch.tensor([T, T]))
    assert mean.dtype == torch.float32
    assert mean.item() == 128.5


def test_a_mask_must_be_bool_and_of_the_same_shape():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"bool tensor .* not torch.int64"):
        masked_mean(x, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) for values of shape \(2, 3\)"):
        masked_mean(x, torch.ones(3, dtype=torch.bool))


def test_masked_whiten_by_hand():
    # Mean 2 and population variance ((-2)^2 + 2^2) / 2 = 4, so (0, 4) becomes (-1, 1); plus the mean, (1, 3).
    x = torch.tensor([[0.0, 4.0, NAN], [INF, 0.0, 4.0]])
    mask = torch.tensor([[T, T, F], [F, T, T]])
    assert_close(masked_whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0], [0.0, -1.0, 1.0]]))
    assert_close(masked_whiten(x, mask, shift_mean=False), torch.tensor([[1.0, 3.0, 0.0], [0.0, 1.0, 3.0]]))


def test_masked_whiten_adds_1e_8_to_the_variance():
    # Variance 1e-8: 1e-4 / sqrt(2e-8) = 0.70711.
    whitened = masked_whiten(torch.tensor([1e-4, -1e-4]), torch.tensor([T, T]))
    assert_close(whitened, torch.tensor([0.70711, -0.70711]), rtol=1e-4, atol=0)


def test_masked_whiten_of_equal_values_is_zero():
    x = torch.full((13,), 1234.567)
    mask = torch.ones(13, dtype=torch.bool)
    # The float32 mean of these is off by 1.2e-4, which a division by sqrt(var + 1e-8) would turn into 0.77.
    assert masked_whiten(x, mask).abs().max() < 1e-3
    assert_close(masked_whiten(x, mask, shift_mean=False), x)
    single = torch.arange(13) == 1
    assert masked_whiten(x, single).tolist() == [0.0] * 13
    assert_close(masked_whiten(x, single, shift_mean=False), torch.where(single, x, 0.0))
    assert masked_whiten(x, torch.zeros_like(mask)).tolist() == [0.0] * 13


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50, width=32), st.booleans()), min_size=1, max_size=20), st.booleans())
def test_masked_whiten_against_python_floats(pairs, shift_mean):
    kept = [x for x, real in pairs if real]
    mean = math.fsum(kept) / max(len(kept), 1)
    scale = math.sqrt(math.fsum((x - mean) ** 2 for x in kept) / max(len(kept), 1) + 1e-8)
    expected = [((x - mean) / scale + (0 if shift_mean else mean)) if real else 0.0 for x, real in pairs]
    x = torch.tensor([x if real else NAN for x, real in pairs])
    whitened = masked_whiten(x, torch.tensor([real for _, real in pairs]), shift_mean)
    assert_close(whitened, torch.tensor(expected), rtol=1e-3, atol=1e-3)
