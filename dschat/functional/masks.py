"""Masks: made from lengths, carried as bool tensors (True = counts), never rebuilt from token ids."""

import torch
from torch import Tensor


def select(x: Tensor, mask: Tensor) -> Tensor:
    """Returns `x` in float32 where `mask` is True and exactly 0 elsewhere, whatever stood there (NaN and inf too).

    The gradient at a False position is 0 as well, because nothing was computed from it. Every masked function of this
    package reads its inputs through here, before any arithmetic.

    Raises:
        TypeError: `mask` is not bool (an integer mask would index instead of select).
        ValueError: the shapes differ (broadcasting would count tokens wrongly).
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask must be a bool tensor (True = counts), not {mask.dtype}")
    if mask.shape != x.shape:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for values of shape {tuple(x.shape)}")
    return torch.where(mask, x.float(), 0.0)


def lengths_to_mask(lengths: Tensor, size: int, padding_side: str) -> Tensor:
    """Builds a (B, size) bool mask, True on real tokens, from the (B,) number of real tokens of each row.

    Args:
        lengths: (B,) integers in [0, size].
        size: width of the mask, padding included.
        padding_side: where the padding lies: "left" (prompts) or "right" (responses, training examples).

    Raises:
        ValueError: the padding side is neither, or a length lies outside [0, size].
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= size:
        raise ValueError(f"lengths must lie in [0, {size}]; got {int(lengths.min())} to {int(lengths.max())}")
    columns = torch.arange(size, device=lengths.device)
    if padding_side == "left":
        columns = size - 1 - columns
    return columns[None, :] < lengths[:, None]


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """Position ids for either padding side: each real token's rank among the real tokens of its row, from 0.

    Args:
        attention_mask: (B, T), True (or 1) on real tokens.

    Returns:
        (B, T) int64; 0 on padding.
    """
    real = attention_mask.bool()
    return torch.where(real, real.cumsum(dim=-1) - 1, 0)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` over the True positions of `mask` (same shape), in float32; 0 where there are none.

    Args:
        x: any shape.
        mask: same shape, True = counts.
        dim: reduce this dimension only; all of them by default.
    """
    kept = select(x, mask)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_centre(x: Tensor, mask: Tensor) -> Tensor:
    """`x` minus its mean over the True positions of `mask`; 0 where `mask` is False.

    The second subtraction removes the rounding error of the first mean, which whitening would magnify by up to 1e4
    when all values are equal.
    """
    centred = select(x, mask) - masked_mean(x, mask)
    return select(centred - masked_mean(centred, mask), mask)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by n, not n - 1) of `x` over the True positions of `mask`; 0 if there are none."""
    return masked_mean(masked_centre(x, mask).square(), mask)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales `x` to variance 1 over the True positions: (x - mean) / sqrt(var + 1e-8), population statistics.

    With `shift_mean` the result has mean 0 (advantages); without, the mean is added back and only the scale changes
    (rewards). Definition and argument: `whiten` in openai/lm-human-preferences, lm_human_preferences/utils/core.py.

    Args:
        x: (B, R). For statistics over all ranks, pass what was gathered from all of them.
        mask: (B, R), True = counts.
        shift_mean: whether the result is centred on 0.

    Returns:
        (B, R) float32, 0 where `mask` is False. Equal values (a single one, say) give 0, never NaN.
    """
    whitened = masked_centre(x, mask) * torch.rsqrt(masked_variance(x, mask) + 1e-8)
    return whitened if shift_mean else select(whitened + masked_mean(x, mask), mask)
