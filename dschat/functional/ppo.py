"""The two losses of PPO. Results, denominators and empty batches as in `dschat.functional.losses`."""

from dschat.functional.masks import masked_mean, masked_variance, select
from dschat.functional.reduction import Stats, detached, divide

import torch
from torch import Tensor

# Ratios are exp of at most this. Beyond e^88 float32 is infinite, and an infinite ratio in the branch that the clip
# discards would still make the gradient NaN (0 * inf). A policy that far from the sampler shows in `ratio_max`.
_MAX_LOG_RATIO = 20.0


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    cliprange: float,
    *,
    dual_clip: float | None = None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped surrogate objective, negated: mean of max(-A * ratio, -A * clip(ratio, 1 - c, 1 + c)) over the actions.

    ratio = exp(logprobs - old_logprobs); Schulman et al. 2017, eq. 7. With `dual_clip` d, the loss of an action with
    A < 0 is at most -A * d, so that one action made far likelier since it was sampled cannot rule the batch: Ye et
    al. 2020 (arXiv 1912.09729), eq. 3. Only `logprobs` receives a gradient.

    Args:
        logprobs: (B, R) nats, of the policy being trained.
        old_logprobs: (B, R) nats, of the policy that sampled.
        advantages: (B, R), whitened or not.
        action_mask: (B, R), True on response tokens up to and including EOS.
        cliprange: c.
        dual_clip: d, a ratio above 1 (3 in the paper); none by default.
        denominator: default the number of actions.

    Returns:
        The loss; stats `approx_kl` (KL(old || new) in nats per action, mean of ratio - 1 - log ratio, the k3 of
        http://joschu.net/blog/kl-approx.html), `clip_fraction` (share of actions whose gradient a clip removes),
        `ratio_mean`, `ratio_max` (0 if there is no action), `num_tokens`, and with `dual_clip` `dual_clip_fraction`
        (share of actions whose gradient the dual clip removes; they are part of `clip_fraction`).

    Raises:
        TypeError: `action_mask` is not bool.
        ValueError: the shapes differ, or `dual_clip` is not above 1.
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is the ratio that ends a loss: it must be above 1, not {dual_clip}")
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    log_ratio = (select(logprobs, action_mask) - select(old_logprobs, action_mask)).clamp(max=_MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    kept_advantages = select(advantages, action_mask)
    unclipped = -kept_advantages * ratio
    clipped = -kept_advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(unclipped, clipped)
    no_gradient = clipped > unclipped
    dual_stats = {}
    if dual_clip is not None:
        ceiling = -kept_advantages * dual_clip
        too_high = (kept_advantages < 0) & (losses > ceiling)
        losses = torch.where(too_high, ceiling, losses)
        no_gradient = no_gradient | too_high
        dual_stats["dual_clip_fraction"] = masked_mean(too_high, action_mask)
    num_tokens = action_mask.sum()
    # Positions outside the mask have advantage 0, and so loss 0.
    loss = divide(losses.sum(), num_tokens, denominator)
    kept_ratio = select(ratio, action_mask)
    return loss, detached(
        approx_kl=masked_mean(torch.expm1(log_ratio) - log_ratio, action_mask),
        clip_fraction=masked_mean(no_gradient, action_mask),
        ratio_mean=masked_mean(ratio, action_mask),
        ratio_max=kept_ratio.max() if kept_ratio.numel() else kept_ratio.sum(),
        num_tokens=num_tokens,
        **dual_stats,
    )


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor,
    cliprange_value: float,
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Clipped value loss: mean of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 over the actions.

    The form of Ziegler et al. 2019 (openai/lm-human-preferences, `loss` in train_policy.py). Only `values` receives a
    gradient.

    Args:
        values: (B, R), of the critic being trained.
        old_values: (B, R), of the critic at the rollout.
        returns: (B, R), its targets.
        action_mask: (B, R), True on response tokens up to and including EOS.
        cliprange_value: c, in units of value.
        denominator: default the number of actions.

    Returns:
        The loss; stats `value_clip_fraction` (share of actions whose gradient the clip removes), `explained_variance`
        (1 - Var(R - V) / Var(R); 1 is perfect, 0 no better than a constant; 0 if all returns are equal) and
        `num_tokens`.

    Raises:
        TypeError: `action_mask` is not bool.
        ValueError: the shapes differ.
    """
    kept_values = select(values, action_mask)
    kept_old_values = select(old_values.detach(), action_mask)
    kept_returns = select(returns.detach(), action_mask)
    # clamp, not old + clamp(V - old): within the range the two squares are then equal to the last bit.
    clipped_values = kept_values.clamp(kept_old_values - cliprange_value, kept_old_values + cliprange_value)
    unclipped = (kept_values - kept_returns).square()
    clipped = (clipped_values - kept_returns).square()
    num_tokens = action_mask.sum()
    # Positions outside the mask have value and return 0, and so loss 0.
    loss = divide(0.5 * torch.maximum(unclipped, clipped).sum(), num_tokens, denominator)
    residual_variance = masked_variance(kept_values.detach() - kept_returns, action_mask)
    variance = masked_variance(kept_returns, action_mask)
    return loss, detached(
        value_clip_fraction=masked_mean(clipped > unclipped, action_mask),
        explained_variance=torch.where(variance > 0, 1 - residual_variance / variance, 0.0),
        num_tokens=num_tokens,
    )
