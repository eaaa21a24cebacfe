"""Log-probabilities and entropies, in nats and float32, from logits.

Logits are the largest tensors of a step (B x R x V), so they are read block by block: the float32 copies that the
sums over the vocabulary need are never larger than one block, and a slice such as `logits[:, -R - 1 : -1]` is not
copied.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block. CPU: 4 MiB in float32; from 16 MiB on, allocation alone makes `entropy` 2 to 20 times slower.
# Other devices: 128 MiB, small beside the logits and large beside the cost of a kernel launch.
_CPU_BLOCK = 2**20
_DEVICE_BLOCK = 2**25


def blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Index pairs that cut (B, R, V) logits into blocks of bounded size, the vocabulary whole."""
    batch, length, vocab = logits.shape
    positions = max(1, (_CPU_BLOCK if logits.is_cpu else _DEVICE_BLOCK) // vocab)
    columns = max(1, min(length, positions))
    rows = max(1, positions // columns)
    for i in range(0, batch, rows):
        for j in range(0, length, columns):
            yield slice(i, i + rows), slice(j, j + columns)


def distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-probabilities of a block in float32; where p is 0, log p is 0 too (not -inf)."""
    logp = logits.log_softmax(dim=-1, dtype=torch.float32)
    p = logp.exp()
    return p, logp.masked_fill_(p == 0, 0.0)


class _TokenLogprobs(torch.autograd.Function):
    """log_softmax(logits)[token], keeping for the backward pass nothing but the logits themselves.

    d/dlogits = gradient * (one_hot(token) - softmax(logits)). Where the incoming gradient is 0 the result is 0:
    non-finite logits of a token that a mask leaves out stay out of the gradient too.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, token_ids)
        result = torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device)
        for block in blocks(logits):
            logp = logits[block].log_softmax(dim=-1, dtype=torch.float32)
            result[block] = logp.gather(-1, token_ids[block][..., None]).squeeze(-1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, token_ids = ctx.saved_tensors
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for block in blocks(logits):
            upstream = gradient[block][..., None]
            softmax = logits[block].softmax(dim=-1, dtype=torch.float32)
            by_logit = softmax.mul_(-upstream).scatter_add_(-1, token_ids[block][..., None], upstream)
            result[block] = by_logit.masked_fill_(upstream == 0, 0.0)
        return result, None


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probability, in nats, of each given token under the distribution of its own logits.

    Position r of `logits` must be the one that predicts position r of `token_ids`: the caller makes the shift by one.
    Divide the logits by the sampling temperature first, if there is one. Differentiable once.

    Args:
        logits: (B, R, V), any floating dtype.
        token_ids: (B, R) int64 in [0, V); a padded position may hold any valid id (0 by convention).

    Returns:
        (B, R) float32.

    Raises:
        ValueError: the shapes do not agree.
    """
    if logits.shape[:-1] != token_ids.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for token ids of shape {tuple(token_ids.shape)}")
    if logits.dim() == 3:
        return _TokenLogprobs.apply(logits, token_ids)
    flat = _TokenLogprobs.apply(logits.reshape(1, -1, logits.shape[-1]), token_ids.reshape(1, -1))
    return flat.reshape(token_ids.shape)


class _Entropy(torch.autograd.Function):
    """-sum_v p_v log p_v, keeping for the backward pass nothing but the logits themselves.

    d/dlogits_v = -gradient * p_v * (log p_v + H). A gradient of 0 is handled as in `_TokenLogprobs`.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        result = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        for block in blocks(logits):
            p, logp = distribution(logits[block])
            result[block] = -(p * logp).sum(dim=-1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for block in blocks(logits):
            upstream = gradient[block][..., None]
            p, logp = distribution(logits[block])
            minus_entropy = (p * logp).sum(dim=-1, keepdim=True)
            by_logit = (logp - minus_entropy).mul_(p).mul_(-upstream)
            result[block] = by_logit.masked_fill_(upstream == 0, 0.0)
        return result


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each position's distribution, -sum_v p_v log p_v, in nats. Differentiable once.

    A token of probability 0 (logit -inf or the dtype's minimum) contributes 0 to the value and to the gradient.

    Args:
        logits: (B, R, V), any floating dtype.

    Returns:
        (B, R) float32, between 0 and log V. Where a mask leaves a position out (its incoming gradient is 0), the
        gradient of its logits is exactly 0, non-finite ones included.
    """
    return _Entropy.apply(logits)
