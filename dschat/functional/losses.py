"""Losses of supervised fine-tuning, of the reward model and of DPO.

Each returns a differentiable scalar and a dict of detached float32 scalars. A loss is a sum over what counts, divided
by `denominator`: by default the batch's own count; a program passes the count of the whole optimizer step (all
micro-batches, all ranks), so that the sum of its micro-batch losses is the loss of one big batch. Statistics that are
means are means over what counts in this batch, to be weighted by its `num_*` when batches are put together. A batch in
which nothing counts has loss 0 and zero gradients on a connected graph.
"""

from dschat.functional.logprobs import token_logprobs
from dschat.functional.masks import masked_mean, select
from dschat.functional.reduction import Stats, detached, divide, require_same_shape

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _share_correct(margins: Tensor) -> Tensor:
    """1 for a positive margin, 0 for a negative one, one half for a tie."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def sft_loss(
    logits: Tensor,
    input_ids: Tensor,
    loss_mask: Tensor,
    *,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Negative log-likelihood, in nats, of the tokens in `loss_mask`: token t is scored by the logits at t - 1.

    Args:
        logits: (B, T, V); only the scored positions are converted to float32.
        input_ids: (B, T).
        loss_mask: (B, T), True on tokens to learn. Nothing predicts the first column; its mask is ignored.
        weights: (B, T) factors of the tokens' losses, 1 by default (below 1 on prompt tokens, say).
        denominator: default `loss_mask[:, 1:].sum()`, with weights the sum of theirs.

    Returns:
        The loss; stats `loss_sum` (weighted sum, before the division) and `num_tokens` (scored tokens).

    Raises:
        TypeError: `loss_mask` is not bool.
        ValueError: the shapes do not agree.
    """
    require_same_shape(logits=logits[..., 0], input_ids=input_ids, loss_mask=loss_mask)
    if loss_mask.dtype != torch.bool:
        raise TypeError(f"a mask must be a bool tensor (True = counts), not {loss_mask.dtype}")
    scored = loss_mask[:, 1:]
    nll = -token_logprobs(logits[:, :-1][scored], input_ids[:, 1:][scored])
    num_tokens = scored.sum()
    own_count = num_tokens
    if weights is not None:
        require_same_shape(weights=weights, loss_mask=loss_mask)
        token_weights = weights[:, 1:][scored].float()
        nll, own_count = nll * token_weights, token_weights.sum()
    total = nll.sum()
    return divide(total, own_count, denominator), detached(loss_sum=total, num_tokens=num_tokens)


def pairwise_ranking_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Bradley-Terry loss of a reward model: -log sigmoid(chosen - rejected - margin), the mean over the pairs.

    Ouyang et al. 2022, eq. 1 (K = 2); the margin, by how much the chosen one is better, is Touvron et al. 2023
    (Llama 2), eq. 2.

    Args:
        chosen_scores: (B,) scores of whole responses.
        rejected_scores: (B,) scores of their rivals.
        margin: (B,), at least 0; none by default.
        denominator: default the number of pairs.

    Returns:
        The loss in nats; stats `accuracy` (chosen scored higher; a tie counts half; the margin plays no part),
        `margin` (mean of chosen - rejected) and `num_pairs`.

    Raises:
        ValueError: the shapes differ ((B,) against (B, 1) would broadcast to B * B pairs).
    """
    require_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    margins = chosen_scores.float() - rejected_scores.float()
    surplus = margins
    if margin is not None:
        require_same_shape(chosen_scores=chosen_scores, margin=margin)
        surplus = margins - margin.float()
    num_pairs = torch.ones_like(margins).sum()
    loss = divide(-logsigmoid(surplus).sum(), num_pairs, denominator)
    return loss, detached(
        accuracy=divide(_share_correct(margins).sum(), num_pairs, None),
        margin=divide(margins.sum(), num_pairs, None),
        num_pairs=num_pairs,
    )


def listwise_ranking_loss(
    scores: Tensor, ranks: Tensor, *, denominator: Tensor | float | None = None
) -> tuple[Tensor, Stats]:
    """Bradley-Terry loss over K ranked responses: the mean over each prompt's pairs, then over the prompts.

    Ouyang et al. 2022, eq. 1, whose 1 / (K choose 2) becomes 1 / (number of pairs with different ranks). With two
    responses each it equals `pairwise_ranking_loss`.

    Args:
        scores: (N, K) scores of the responses of N prompts.
        ranks: (N, K) integers: 1 is best, equal ranks are ties (left out), 0 marks an absent response (padding).
        denominator: default the number of prompts with at least one pair.

    Returns:
        The loss in nats; stats over all pairs `accuracy` (a tie in score counts half), `margin` (mean of better -
        worse), `num_pairs`, and `num_prompts` (those with a pair).

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(scores=scores, ranks=ranks)
    present = ranks > 0
    kept = select(scores, present)
    pairs = present[:, :, None] & present[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    margins = kept[:, :, None] - kept[:, None, :]
    pairs_per_prompt = pairs.sum(dim=(1, 2))
    num_prompts = (pairs_per_prompt > 0).sum()
    per_prompt = select(-logsigmoid(margins), pairs).sum(dim=(1, 2)) / pairs_per_prompt.clamp(min=1)
    return divide(per_prompt.sum(), num_prompts, denominator), detached(
        accuracy=masked_mean(_share_correct(margins), pairs),
        margin=masked_mean(margins, pairs),
        num_pairs=pairs.sum(),
        num_prompts=num_prompts,
    )


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
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
    losses = (1 - label_smoothing) * loss_of(h) + label_smoothing * loss_of(-h)
    num_pairs = torch.ones_like(h).sum()
    return divide(losses.sum(), num_pairs, None), detached(
        chosen_reward=divide(beta * chosen.sum(), num_pairs, None),
        rejected_reward=divide(beta * rejected.sum(), num_pairs, None),
        margin=divide(beta * h.sum(), num_pairs, None),
        accuracy=divide(_share_correct(h).sum(), num_pairs, None),
        num_pairs=num_pairs,
    )
