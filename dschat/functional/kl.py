"""KL(policy || reference), in nats: exact from logits, or estimated from sampled tokens; and its coefficient."""

import math
from typing import Any

from dschat.functional.logprobs import blocks, distribution, log_softmax

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _log_ratio(
    logits: Tensor, ref_logits: Tensor, temperature: float, banned_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """p and log p - log q of a block; the latter finite where p is 0 (banned in both, say)."""
    p, logp = distribution(logits, temperature, banned_ids)
    logq = log_softmax(ref_logits, temperature, banned_ids)
    return p, logp.sub_(logq.masked_fill_(p == 0, 0.0))


class _FullKL(torch.autograd.Function):
    """sum_v p_v (log p_v - log q_v), keeping for the backward pass nothing but the two tensors of logits.

    d/dlogits_v = gradient * p_v * (log p_v - log q_v - KL) / temperature; exactly 0 where the incoming gradient is 0.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, temperature: float, banned_ids: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(logits, ref_logits)
        ctx.distribution = temperature, banned_ids
        result = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        for block in blocks(logits):
            p, log_ratio = _log_ratio(logits[block], ref_logits[block], temperature, banned_ids)
            result[block] = (p * log_ratio).sum(dim=-1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, ref_logits = ctx.saved_tensors
        result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for block in blocks(logits):
            upstream = gradient[block][..., None] / ctx.distribution[0]
            p, log_ratio = _log_ratio(logits[block], ref_logits[block], *ctx.distribution)
            kl = (p * log_ratio).sum(dim=-1, keepdim=True)
            by_logit = log_ratio.sub_(kl).mul_(p).mul_(upstream)
            result[block] = by_logit.masked_fill_(upstream == 0, 0.0)
        return result, None, None, None


def full_kl(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0, banned_ids: tuple[int, ...] = ()) -> Tensor:
    """KL(policy || reference) of each position, sum_v p_v (log p_v - log q_v) over the whole vocabulary, in nats.

    Differentiable once, in `logits` only. A token of probability 0 under the policy (banned in both, say) contributes
    0 to the value and to the gradient; one that only the reference bans makes the divergence infinite and its gradient
    NaN. Read block by block: no float32 copy of the logits is made.

    Args:
        logits: (B, R, V) of the policy, any floating dtype.
        ref_logits: (B, R, V) of the reference; it receives no gradient.
        temperature, banned_ids: of both distributions, as in `token_logprobs`.

    Returns:
        (B, R) float32, at least 0 up to rounding. Where the incoming gradient is 0, that of the logits is exactly 0.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)}, reference {tuple(ref_logits.shape)}")
    return _FullKL.apply(logits, ref_logits.detach(), temperature, banned_ids)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled tokens alone, in nats; not clamped.

    With d = logprobs - ref_logprobs: "kl" d (k1: unbiased, either sign), "abs" |d|, "mse" d^2 / 2 (k2),
    "k3" exp(-d) - 1 + d (unbiased, never negative). Source: http://joschu.net/blog/kl-approx.html, whose r is exp(-d).

    That is of the value, as a penalty in the reward. As a LOSS, differentiated through `logprobs` on tokens that the
    policy itself sampled, its expected gradient at each position (p the policy's distribution, q the reference's) is:

    - "kl": 0 (the mean of the score function): it only adds noise;
    - "mse": that of KL(p || q), unbiased: the one to choose;
    - "k3": that of KL(q || p), the other direction: biased, close to the right one only while p is close to q;
    - "abs": that of sum_v |p_v - q_v| (twice the total variation): no KL at all, and it jumps at p = q.

    Liu et al. 2025 (arXiv 2510.01555) show the first three. Tokens of an older policy bias all four.

    Args:
        logprobs: (B, R) of the policy that sampled the tokens.
        ref_logprobs: (B, R) of the reference.
        kind: "kl", "abs", "mse" or "k3".

    Returns:
        (B, R) float32, differentiable.

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


def adaptive_kl_coef(kl_coef: float, kl_per_seq: float, target: float, num_sequences: float, horizon: float) -> float:
    """The KL coefficient for the next rollout: larger where the policy strayed beyond the target, smaller within it.

    kl_coef * (1 + e * num_sequences / horizon) with e = clip(kl_per_seq / target - 1, -0.2, 0.2): Ziegler et al. 2019,
    section 2.2, whose K_beta is num_sequences / horizon in their code (`AdaptiveKLController` in
    openai/lm-human-preferences, train_policy.py).

    Args:
        kl_coef: the coefficient of this rollout, in score units per nat.
        kl_per_seq: the mean over the responses of the KL summed over a response: nats per SEQUENCE, prompts left out.
        target: the KL to keep to, nats per SEQUENCE as well. A target per sequence (6, say) beside a KL per token lets
            the coefficient decay to nothing.
        num_sequences: responses that the KL is the mean of: the rollout's on all ranks.
        horizon: responses over which an error of 1 would change the coefficient by its own size.

    Raises:
        ValueError: target or horizon is not above 0, num_sequences is not below 5 * horizon (one step could turn the
            coefficient negative and reward divergence), or the KL is not finite.
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target and horizon of an adaptive KL coefficient must be above 0, not {target}, {horizon}")
    if num_sequences >= 5 * horizon:
        raise ValueError(f"horizon {horizon} must be above a fifth of the {num_sequences} sequences of a rollout")
    if not math.isfinite(kl_per_seq):
        raise ValueError(f"a KL of {kl_per_seq} says nothing about how to change its coefficient")
    error = min(max(kl_per_seq / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_sequences / horizon)
