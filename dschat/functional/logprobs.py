"""Log-probabilities and entropies, in nats and float32, from logits.

Logits are the largest tensors of a step (B x R x V), so they are read block by block: the float32 copies that the
sums over the vocabulary need are never larger than one block, a slice such as `logits[:, -R - 1 : -1]` is not copied,
and neither a temperature nor banned tokens need changed logits.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block. CPU: 4 MiB in float32; from 16 MiB on, allocation alone makes `entropy` 2 to 20 times slower.
# Other devices: 128 MiB, small beside the logits and large beside the cost of a kernel launch.
_CPU_BLOCK = 2**20
DEVICE_BLOCK = 2**25


def blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Index pairs that cut (B, R, V) logits into blocks of bounded size, the vocabulary whole."""
    batch, length, vocab = logits.shape
    positions = max(1, (_CPU_BLOCK if logits.is_cpu or logits.is_meta else DEVICE_BLOCK) // vocab)
    columns = max(1, min(length, positions))
    rows = max(1, positions // columns)
    for i in range(0, batch, rows):
        for j in range(0, length, columns):
            yield slice(i, i + rows), slice(j, j + columns)
            if logits.is_meta:  # nothing is computed there, only memory counted: a block stands for all
                return


def log_softmax(logits: Tensor, temperature: float, banned_ids: tuple[int, ...]) -> Tensor:
    """Log-probabilities of a block in float32, of a temperature and without the banned tokens."""
    if temperature == 1.0 and not banned_ids:
        return logits.log_softmax(dim=-1, dtype=torch.float32)
    adjusted = logits.float() if temperature == 1.0 else logits.float() / temperature
    if banned_ids:
        adjusted = adjusted.index_fill(-1, _on(logits.device, banned_ids), torch.finfo(adjusted.dtype).min)
    return adjusted.log_softmax(dim=-1)


@lru_cache(maxsize=16)
def _on(device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """The ids there; copied once, because a copy from the host makes it wait for a GPU, and cannot be recorded."""
    return torch.tensor(ids, device=device)


def distribution(logits: Tensor, temperature: float, banned_ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Probabilities and log-probabilities of a block in float32; the latter finite where the former are 0."""
    logp = log_softmax(logits, temperature, banned_ids)
    p = logp.exp()
    return p, logp.clamp_(min=torch.finfo(logp.dtype).min)


class _TokenLogprobs(torch.autograd.Function):
    """log_softmax(logits / temperature)[token], keeping for the backward pass nothing but the logits themselves.

    d/dlogits = gradient * (one_hot(token) - softmax(logits / temperature)) / temperature. Where the incoming gradient
    is 0 the result is 0: non-finite logits of a token that a mask leaves out stay out of the gradient too.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, token_ids: Tensor, temperature: float, banned_ids: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(logits, token_ids)
        ctx.distribution = temperature, banned_ids
        result = torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device)
        for block in blocks(logits):
            logp = log_softmax(logits[block], temperature, banned_ids)
            result[block] = logp.gather(-1, token_ids[block][..., None]).squeeze(-1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, token_ids = ctx.saved_tensors
        temperature, banned_ids = ctx.distribution
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for block in blocks(logits):
            upstream = gradient[block][..., None] / temperature
            p = log_softmax(logits[block], temperature, banned_ids).exp_()
            by_logit = p.mul_(-upstream).scatter_add_(-1, token_ids[block][..., None], upstream)
            result[block] = by_logit.masked_fill_(upstream == 0, 0.0)
        return result, None, None, None


def token_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: float = 1.0, banned_ids: tuple[int, ...] = ()
) -> Tensor:
    """Log-probability, in nats, of each given token under softmax(logits / temperature) of its own position.

    Position r of `logits` must be the one that predicts position r of `token_ids`: the caller makes the shift by one.
    Differentiable once.

    Args:
        logits: (B, R, V), any floating dtype.
        token_ids: (B, R) int64 in [0, V); a padded position may hold any valid id (0 by convention).
        temperature: that the tokens were sampled at, above 0.
        banned_ids: tokens of probability 0, whatever their logits.

    Returns:
        (B, R) float32.

    Raises:
        ValueError: the shapes do not agree.
    """
    if logits.shape[:-1] != token_ids.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)} for token ids of shape {tuple(token_ids.shape)}")
    if logits.dim() == 3:
        return _TokenLogprobs.apply(logits, token_ids, temperature, banned_ids)
    flat = logits.reshape(1, -1, logits.shape[-1]), token_ids.reshape(1, -1)
    return _TokenLogprobs.apply(*flat, temperature, banned_ids).reshape(token_ids.shape)


class _Entropy(torch.autograd.Function):
    """-sum_v p_v log p_v, keeping for the backward pass nothing but the logits themselves.

    d/dlogits_v = -gradient * p_v * (log p_v + H) / temperature. A gradient of 0 is handled as in `_TokenLogprobs`.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, banned_ids: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.distribution = temperature, banned_ids
        result = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        for block in blocks(logits):
            p, logp = distribution(logits[block], temperature, banned_ids)
            result[block] = -torch.linalg.vecdot(p, logp)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for block in blocks(logits):
            upstream = gradient[block][..., None] / ctx.distribution[0]
            p, logp = distribution(logits[block], *ctx.distribution)
            minus_entropy = torch.linalg.vecdot(p, logp)[..., None]
            by_logit = (logp - minus_entropy).mul_(p).mul_(-upstream)
            result[block] = by_logit.masked_fill_(upstream == 0, 0.0)
        return result, None, None


def entropy(logits: Tensor, temperature: float = 1.0, banned_ids: tuple[int, ...] = ()) -> Tensor:
    """Entropy of each position's distribution, -sum_v p_v log p_v, in nats. Differentiable once.

    A token of probability 0 (banned, or logit -inf or the dtype's minimum) contributes 0 to the value and to the
    gradient.

    Args:
        logits: (B, R, V), any floating dtype.
        temperature, banned_ids: as in `token_logprobs`.

    Returns:
        (B, R) float32, between 0 and log V. Where a mask leaves a position out (its incoming gradient is 0), the
        gradient of its logits is exactly 0, non-finite ones included.
    """
    return _Entropy.apply(logits, temperature, banned_ids)
