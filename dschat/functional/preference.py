"""Losses that learn from preferences or from judged answers, without a reward model: DPO, KTO, SimPO, ORPO.

They take log-probabilities of whole responses, see `sequence_logprobs`. Results, denominators and empty batches as in
`dschat.functional.losses`.
"""

from dschat.functional.masks import masked_mean, select
from dschat.functional.reduction import Stats, detached, divide, require_same_shape, share_correct, smooth_labels

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Average log-probabilities are at most this when their odds are taken: float32 cannot tell exp of more from 1.
_MAX_LOGP = -torch.finfo(torch.float32).eps


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of each row's response: the sum over its tokens.

    Args:
        logprobs: (B, T) nats per token, any floating dtype.
        mask: (B, T), True on the tokens of the response; what stands elsewhere changes nothing.

    Returns:
        (B,) float32 nats; 0 for a row without tokens.

    Raises:
        TypeError: `mask` is not bool.
        ValueError: the shapes differ.
    """
    return select(logprobs, mask).sum(dim=1)


def _pair_stats(chosen_rewards: Tensor, rejected_rewards: Tensor, margins: Tensor) -> Stats:
    """Means over the pairs, from (B,) each; all 0 where there is no pair."""
    num_pairs = torch.ones_like(margins).sum()
    return detached(
        chosen_reward=divide(chosen_rewards.sum(), num_pairs, None),
        rejected_reward=divide(rejected_rewards.sum(), num_pairs, None),
        margin=divide(margins.sum(), num_pairs, None),
        accuracy=divide(share_correct(margins).sum(), num_pairs, None),
        num_pairs=num_pairs,
    )


def _per_token(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,), (B,): nats per token of the chosen and of the rejected responses, from sums and numbers of tokens."""
    require_same_shape(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    for lengths in (chosen_lengths, rejected_lengths):
        if (lengths < 1).any():
            raise ValueError(f"a response has at least 1 token; lengths has a {int(lengths.min())}")
    return chosen_logps.float() / chosen_lengths, rejected_logps.float() / rejected_lengths


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Direct preference optimisation, the mean over the pairs.

    With h = (policy - ref) of the chosen response minus the same of the rejected one: "sigmoid" -log sigmoid(beta h)
    (Rafailov et al. 2023, eq. 7), "ipo" (h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17), "hinge" max(0, 1 - beta h)
    (Liu et al. 2023, RSO). With label smoothing e the loss is the expectation when a label is wrong with probability
    e, (1 - e) l(h) + e l(-h): for "sigmoid", conservative DPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf).

    Args:
        policy_chosen_logps: (B,) log-probability, in nats, summed over the tokens of the chosen response.
        policy_rejected_logps: (B,) the same of the rejected response.
        ref_chosen_logps: (B,) the chosen one under the reference.
        ref_rejected_logps: (B,) the rejected one under the reference.
        beta: strength of the tie to the reference, above 0.
        label_smoothing: probability that a preference label is wrong, in [0, 0.5).
        loss_type: "sigmoid", "ipo" or "hinge".
        denominator: default the number of pairs.

    Returns:
        The loss; stats `chosen_reward` and `rejected_reward` (means of beta * (policy - ref)), `margin` (their
        difference), `accuracy` (chosen reward higher; a tie counts half) and `num_pairs`.

    Raises:
        ValueError: unknown `loss_type`, or the shapes differ.
    """
    require_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    chosen = policy_chosen_logps.float() - ref_chosen_logps.float()
    rejected = policy_rejected_logps.float() - ref_rejected_logps.float()

    def loss_of(h: Tensor) -> Tensor:
        if loss_type == "sigmoid":
            return -logsigmoid(beta * h)
        if loss_type == "ipo":
            return (h - 1 / (2 * beta)).square()
        if loss_type == "hinge":
            return torch.relu(1 - beta * h)
        raise ValueError(f"unknown DPO loss {loss_type!r}: choose sigmoid, ipo or hinge")

    h = chosen - rejected
    losses = smooth_labels(loss_of, h, label_smoothing)
    stats = _pair_stats(beta * chosen, beta * rejected, beta * h)
    return divide(losses.sum(), stats["num_pairs"], denominator), stats


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    good: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Kahneman-Tversky optimisation, from single answers judged good or bad: the mean over the rows.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8. With r = policy - ref and z0 = max(0, kl), a good answer
    costs desirable_weight * (1 - sigmoid(beta (r - z0))), a bad one undesirable_weight * (1 - sigmoid(beta (z0 - r))).

    Args:
        policy_logps: (B,) log-probability, in nats, summed over the tokens of the answer.
        ref_logps: (B,) the same under the reference.
        good: (B,) bool, True for a good answer, False for a bad one.
        kl: scalar, nats: the mean of policy - ref over answers to other prompts (mismatched on purpose), of the whole
            optimizer step; it receives no gradient.
        beta: strength of the tie to the reference, above 0.
        desirable_weight: weight of the good answers.
        undesirable_weight: weight of the bad ones.
        denominator: default the number of rows.

    Returns:
        The loss; stats `good_reward` and `bad_reward` (means of beta * r over the good and over the bad answers, 0
        where there are none), `num_good`, `num_bad` and `kl` (z0).

    Raises:
        TypeError: `good` is not bool.
        ValueError: the shapes do not agree.
    """
    require_same_shape(policy_logps=policy_logps, ref_logps=ref_logps)
    if kl.dim():
        raise ValueError(f"kl of shape {tuple(kl.shape)}; expected a scalar")
    reference_point = kl.detach().clamp(min=0)
    log_ratio = policy_logps.float() - ref_logps.float()
    rewards = beta * log_ratio
    num_good, num_rows = good.sum(), torch.ones_like(rewards).sum()
    stats = detached(
        good_reward=masked_mean(rewards, good),
        bad_reward=masked_mean(rewards, ~good),
        num_good=num_good,
        num_bad=num_rows - num_good,
        kl=reference_point,
    )
    gain = beta * (log_ratio - reference_point)
    losses = torch.where(good, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))
    return divide(losses.sum(), num_rows, denominator), stats


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Simple preference optimisation, without a reference: the mean over the pairs.

    Meng et al. 2024 (arXiv 2405.14734), eq. 6: -log sigmoid(h - gamma), h the difference of the rewards
    beta * log-probability per token. Label smoothing e: (1 - e) l(h) + e l(-h), as in `dpo_loss`.

    Args:
        chosen_logps: (B,) log-probability, in nats, summed over the tokens of the chosen response.
        rejected_logps: (B,) the same of the rejected response.
        chosen_lengths: (B,) tokens of the chosen response, at least 1.
        rejected_lengths: (B,) tokens of the rejected one, at least 1.
        beta: scale of the rewards, above 0.
        gamma: by how much the chosen reward should be the higher one, at least 0 (the paper's ratio is gamma / beta).
        label_smoothing: probability that a preference label is wrong, in [0, 0.5).
        denominator: default the number of pairs.

    Returns:
        The loss; stats `chosen_reward` and `rejected_reward` (means), `margin` (their difference, before gamma),
        `accuracy` (chosen reward higher; a tie counts half) and `num_pairs`.

    Raises:
        ValueError: the shapes differ, or a length is below 1.
    """
    chosen, rejected = _per_token(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    chosen, rejected = beta * chosen, beta * rejected
    losses = smooth_labels(lambda h: -logsigmoid(h - gamma), chosen - rejected, label_smoothing)
    stats = _pair_stats(chosen, rejected, chosen - rejected)
    return divide(losses.sum(), stats["num_pairs"], denominator), stats


def _log_odds(logps: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(logps), finite in value and gradient for any logps from 0 to -1e38."""
    # The value ends where P is 1, the slope does not: 1 / (1 - P) there meets a slope 1 - P of the log-probability.
    capped = logps + (logps.clamp(max=_MAX_LOGP) - logps).detach()
    return capped - torch.log(-torch.expm1(capped))


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    coef: float,
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Odds-ratio preference optimisation: SFT on the chosen response and a term that prefers it; mean over the pairs.

    Hong et al. 2024 (arXiv 2403.07691), eq. 6: -log P_w + coef * L_OR, with L_OR = -log sigmoid(log odds_w -
    log odds_l) (eq. 7), odds = P / (1 - P) and P = exp(log-probability per token) (their section 4.1).

    Args:
        chosen_logps: (B,) log-probability, in nats, summed over the tokens of the chosen response.
        rejected_logps: (B,) the same of the rejected response.
        chosen_lengths: (B,) tokens of the chosen response, at least 1.
        rejected_lengths: (B,) tokens of the rejected one, at least 1.
        coef: weight of the preference, the paper's lambda.
        denominator: default the number of pairs.

    Returns:
        The loss in nats; stats `chosen_reward` and `rejected_reward` (means of the log-probability per token),
        `margin` (mean of the log odds ratio), `accuracy` (chosen odds higher; a tie counts half), `num_pairs` and
        `sft_loss` (mean of the first term).

    Raises:
        ValueError: the shapes differ, or a length is below 1.
    """
    chosen, rejected = _per_token(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    losses = -chosen - coef * logsigmoid(log_odds_ratio)
    stats = _pair_stats(chosen, rejected, log_odds_ratio)
    stats["sft_loss"] = -stats["chosen_reward"]
    return divide(losses.sum(), stats["num_pairs"], denominator), stats
