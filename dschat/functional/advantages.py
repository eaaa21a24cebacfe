"""From scores to per-token rewards, and from rewards to advantages and returns."""

from dschat.functional.masks import select

import torch
from torch import Tensor


def score_unfinished(scores: Tensor, finished: Tensor, penalty: float, kind: str) -> Tensor:
    """The scores under the rule for responses that the length limit cut off before EOS.

    "subtract": score - penalty. "replace": -penalty, whatever the score was (Huang et al. 2024, arXiv 2403.17031,
    the "EOS trick"). "bootstrap": 0, with no penalty: the value of the state after the cut stands in for the score,
    see `final_values` of `gae`.

    Args:
        scores: (B,); those of finished responses come back as they are.
        finished: (B,) bool, True for a response that ended with EOS.
        penalty: score units, not negative; unused by "bootstrap".
        kind: "subtract", "replace" or "bootstrap".

    Returns:
        (B,) float32.

    Raises:
        TypeError: `finished` is not bool.
        ValueError: unknown `kind`, or the shapes differ.
    """
    if kind == "subtract":
        unfinished = scores.float() - penalty
    elif kind == "replace":
        unfinished = torch.full_like(scores, -penalty, dtype=torch.float32)
    elif kind == "bootstrap":
        unfinished = torch.zeros_like(scores, dtype=torch.float32)
    else:
        raise ValueError(f"unknown rule for unfinished responses {kind!r}: choose subtract, replace or bootstrap")
    return torch.where(finished, select(scores, finished), unfinished)


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
def gae(
    rewards: Tensor,
    values: Tensor,
    action_mask: Tensor,
    gamma: float,
    lam: float,
    *,
    final_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation and the returns the critic learns, neither whitened nor differentiable.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = sum_l (gamma * lam)^l delta_{t+l} (Schulman et al. 2016, eq. 16),
    where t counts actions: what lies between two of them (another speaker's turn) is stepped over without discount.
    The value after the last action is `final_values`, 0 by default. returns = advantages + values.

    Args:
        rewards: (B, R).
        values: (B, R), the critic's estimate before each action.
        action_mask: (B, R), True on actions; padding on either side and holes are allowed.
        gamma: discount, 1 for a response judged as a whole.
        lam: 0 is the one-step TD error, 1 the whole return minus the value.
        final_values: (B,) the critic's estimate of the state after each row's last action: for a response that the
            length limit cut off, what it may still earn; 0 where the response really ended. Ignored in a row without
            actions. Default: 0 for all.

    Returns:
        advantages and returns, (B, R) float32 each, 0 where `action_mask` is False.

    Raises:
        TypeError: `action_mask` is not bool.
        ValueError: the shapes do not agree.
    """
    rewards, values = select(rewards, action_mask), select(values, action_mask)
    final_values = rewards.new_zeros(len(rewards)) if final_values is None else final_values.float()
    if final_values.shape != rewards.shape[:1]:
        raise ValueError(f"final_values of shape {tuple(final_values.shape)} for {len(rewards)} rows; expected (B,)")
    size = action_mask.shape[1]
    index = torch.arange(size, device=action_mask.device).expand_as(action_mask)
    # next_action[:, t]: the first action at or after t; `size`, where the final value is appended, if none.
    next_action = torch.where(action_mask, index, size).flip(1).cummin(dim=1).values.flip(1)
    next_action = torch.nn.functional.pad(next_action, (0, 1), value=size)[:, 1:]
    next_values = torch.cat([values, final_values[:, None]], dim=1).gather(1, next_action)
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


def rewards_to_go(rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards of this and all later actions, G_t = r_t + gamma * G_{t+1}; not differentiable.

    t counts actions, as in `gae`: what lies between two of them is stepped over without discount. With gamma 1 and
    the rewards of `shape_rewards` it is the advantage of REINFORCE++ before its normalisation over the batch,
    r(x, y) - kl_coef * (the KL from this token on): Hu 2025 (arXiv 2501.03262).

    Args:
        rewards: (B, R).
        action_mask: (B, R), True on actions; padding on either side and holes are allowed.
        gamma: discount.

    Returns:
        (B, R) float32, 0 where `action_mask` is False.

    Raises:
        TypeError: `action_mask` is not bool.
        ValueError: the shapes differ.
    """
    # The whole return (lambda 1) over a critic that says 0.
    return gae(rewards, torch.zeros_like(rewards), action_mask, gamma, 1.0)[1]
