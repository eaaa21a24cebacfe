"""From scores to per-token rewards, and from rewards to advantages and returns."""

from dschat.functional.masks import select

import torch
from torch import Tensor


def shape_rewards(scores: Tensor, kl: Tensor, action_mask: Tensor, kl_coef: Tensor | float) -> Tensor:
    """Per-token rewards: -kl_coef * kl on every action, plus the response's score on its last action.

    R(x, y) = r(x, y) - kl_coef * KL (Ziegler et al. 2019, eq. 2), spread over the tokens. The score lies on the last
    token that the policy chose (EOS, if it ended), never on a padded slot after it.

    Args:
        scores: (B,) reward-model scores; that of a row without actions is ignored.
        kl: (B, R) per-token KL estimate in nats.
        action_mask: (B, R), True on response tokens up to and including EOS.
        kl_coef: weight of the KL, in score units per nat.

    Returns:
        (B, R) float32, 0 where `action_mask` is False.

    Raises:
        ValueError: the shapes do not agree.
    """
    if scores.shape != kl.shape[:1]:
        raise ValueError(f"scores of shape {tuple(scores.shape)} for KL of shape {tuple(kl.shape)}; expected (B,)")
    # How many actions there are from here on: 1 at the last action (and on what is not an action just before it).
    actions_left = action_mask.flip(1).cumsum(dim=1).flip(1)
    score_at_last = torch.where(actions_left == 1, scores[:, None], 0.0)
    return select(score_at_last - kl_coef * kl.float(), action_mask)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, action_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation and the returns the critic learns, neither whitened nor differentiable.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = sum_l (gamma * lam)^l delta_{t+l} (Schulman et al. 2016, eq. 16),
    where t counts actions: what lies between two of them (another speaker's turn) is stepped over without discount.
    The value after the last action is 0, for a response cut by the length limit too. returns = advantages + values.

    Args:
        rewards: (B, R).
        values: (B, R), the critic's estimate before each action.
        action_mask: (B, R), True on actions; padding on either side and holes are allowed.
        gamma: discount, 1 for a response judged as a whole.
        lam: 0 is the one-step TD error, 1 the whole return minus the value.

    Returns:
        advantages and returns, (B, R) float32 each, 0 where `action_mask` is False.
    """
    rewards, values = select(rewards, action_mask), select(values, action_mask)
    size = action_mask.shape[1]
    index = torch.arange(size, device=action_mask.device).expand_as(action_mask)
    # next_action[:, t]: the first action at or after t; `size`, whose value is the appended 0, where there is none.
    next_action = torch.where(action_mask, index, size).flip(1).cummin(dim=1).values.flip(1)
    next_action = torch.nn.functional.pad(next_action, (0, 1), value=size)[:, 1:]
    next_values = torch.nn.functional.pad(values, (0, 1)).gather(1, next_action)
    deltas = select(rewards + gamma * next_values - values, action_mask)
    decays = torch.where(action_mask, gamma * lam, 1.0)

    # Where there is no action, delta is 0 and the decay 1: the accumulator passes through unchanged.
    advantages = torch.empty_like(rewards)
    accumulator = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(size)):
        accumulator = torch.addcmul(deltas[:, t], decays[:, t], accumulator)
        advantages[:, t] = accumulator
    advantages = select(advantages, action_mask)
    return advantages, advantages + values
