"""Log-probabilities, entropies and divergences, in nats and float32, from logits.

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


def _blocks(logits: Tensor) -> Iterator[tuple[slice, slice]]:
    """Index pairs that cut (B, R, V) logits into blocks of bounded size, the vocabulary whole."""
    batch, length, vocab = logits.shape
    positions = max(1, (_CPU_BLOCK if logits.is_cpu else _DEVICE_BLOCK) // vocab)
    columns = max(1, min(length, positions))
    rows = max(1, positions // columns)
    for i in range(0, batch, rows):
        for j in range(0, length, columns):
            yield slice(i, i + rows), slice(j, j + columns)


class _TokenLogprobs(torch.autograd.Function):
    """log_softmax(logits)[token], keeping for the backward pass nothing but the logits themselves.

    d/dlogits = gradient * (one_hot(token) - softmax(logits)). Where the incoming gradient is 0 the result is 0:
    non-finite logits of a token that a mask leaves out stay out of the gradient too.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_ids: Tensor) -> Tensor:
        ctx.save_for_backward(logits, token_ids)
        result = torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device)
        for block in _blocks(logits):
            logp = logits[block].log_softmax(dim=-1, dtype=torch.float32)
            result[block] = logp.gather(-1, token_ids[block][..., None]).squeeze(-1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, token_ids = ctx.saved_tensors
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for block in _blocks(logits):
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


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each position's distribution, -sum_v p_v log p_v, in nats.

    A token of probability 0 (logit -inf or the dtype's minimum) contributes 0.

    Args:
        logits: (B, R, V), any floating dtype.

    Returns:
        (B, R) float32, between 0 and log V.
    """
    result = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    for block in _blocks(logits):
        logp = logits[block].log_softmax(dim=-1, dtype=torch.float32)
        p = logp.exp()
        result[block] = -(p * torch.where(p > 0, logp, 0.0)).sum(dim=-1)
    return result


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) of each position, sum_v p_v (log p_v - log q_v) over the whole vocabulary, in nats.

    A token of probability 0 under the policy (banned in both, say) contributes 0; one that only the reference bans
    makes the divergence infinite.

    Args:
        logits: (B, R, V) of the policy.
        ref_logits: (B, R, V) of the reference.

    Returns:
        (B, R) float32, at least 0 up to rounding.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, reference {tuple(ref_logits.shape)}")
    result = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    for block in _blocks(logits):
        logp = logits[block].log_softmax(dim=-1, dtype=torch.float32)
        logq = ref_logits[block].log_softmax(dim=-1, dtype=torch.float32)
        p = logp.exp()
        result[block] = (p * (torch.where(p > 0, logp, 0.0) - torch.where(p > 0, logq, 0.0))).sum(dim=-1)
    return result


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled tokens alone, in nats; not clamped.

    With d = logprobs - ref_logprobs: "kl" d (k1: unbiased, either sign), "abs" |d|, "mse" d^2 / 2 (k2),
    "k3" exp(-d) - 1 + d (unbiased, never negative). Source: http://joschu.net/blog/kl-approx.html, whose r is exp(-d).

    Args:
        logprobs: (B, R) of the policy that sampled the tokens.
        ref_logprobs: (B, R) of the reference.
        kind: "kl", "abs", "mse" or "k3".

    Returns:
        (B, R) float32.

    Raises:
        ValueError: unknown `kind`, or the shapes differ.
    """
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"logprobs of shape {tuple(logprobs.shape)}, reference {tuple(ref_logprobs.shape)}")
    d = logprobs.float() - ref_logprobs.float()
    if kind == "kl":
        return d
    if kind == "abs":
        return d.abs()
    if kind == "mse":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"unknown KL penalty {kind!r}: choose kl, abs, mse or k3")
