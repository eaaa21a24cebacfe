"""Losses of supervised fine-tuning and of the reward model; those of preferences are in `preference`.

Each returns a differentiable scalar and a dict of detached float32 scalars. A loss is a sum over what counts, divided
by `denominator`: by default the batch's own count; a program passes the count of the whole optimizer step (all
micro-batches, all ranks), so that the sum of its micro-batch losses is the loss of one big batch. Statistics that are
means are means over what counts in this batch, to be weighted by its `num_*` when batches are put together. A batch in
which nothing counts has loss 0 and zero gradients on a connected graph.
"""

from dschat.functional.logprobs import token_logprobs
from dschat.functional.reduction import Stats, detached, divide, require_same_shape, share_correct, smooth_labels

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sft_loss(
    logits: Tensor,
    token_ids: Tensor,
    *,
    weights: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Negative log-likelihood, in nats, of tokens to learn, under the logits that predict them.

    Args:
        logits: (..., V), any floating dtype: those of the position before each token.
        token_ids: (...).
        weights: (...) factors of the tokens' losses, 1 by default (below 1 on prompt tokens, say).
        denominator: default the number of tokens, with weights the sum of theirs.

    Returns:
        The loss; stats `loss_sum` (weighted sum, before the division) and `num_tokens`.

    Raises:
        ValueError: the shapes do not agree.
    """
    require_same_shape(logits=logits[..., 0], token_ids=token_ids)
    nll = -token_logprobs(logits, token_ids)
    num_tokens = nll.new_tensor(nll.numel())
    own_count = num_tokens
    if weights is not None:
        require_same_shape(weights=weights, token_ids=token_ids)
        nll, own_count = nll * weights.float(), weights.float().sum()
    total = nll.sum()
    return divide(total, own_count, denominator), detached(loss_sum=total, num_tokens=num_tokens)


def _pair_losses(
    better: Tensor, worse: Tensor, margin: Tensor | None, label_smoothing: float, center_coef: float
) -> Tensor:
    """What each pair of scores costs, (num_pairs,) in nats; all three tensors are (num_pairs,) float32."""
    needed = 0.0 if margin is None else margin
    losses = smooth_labels(lambda gap: -logsigmoid(gap - needed), better - worse, label_smoothing)
    if center_coef == 0:  # the square of far scores may be infinite
        return losses
    return losses + center_coef * (better + worse).square()


def pairwise_ranking_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Bradley-Terry loss of a reward model: -log sigmoid(chosen - rejected - margin), the mean over the pairs.

    Ouyang et al. 2022, eq. 1 (K = 2); the margin m, by how much the chosen one is better, is Touvron et al. 2023
    (Llama 2), eq. 2. With label smoothing e a pair whose scores differ by d costs what it would on average if its
    label were wrong with probability e, -(1 - e) log sigmoid(d - m) - e log sigmoid(-d - m) (the conservative loss of
    Mitchell 2023, https://ericmitchell.ai/cdpo.pdf). `center_coef` c adds c * (chosen + rejected)^2, which keeps the
    scores, that the differences leave free to drift, around 0 (Eisenstein et al. 2023, arXiv 2312.09244).

    Args:
        chosen_scores: (B,) scores of whole responses.
        rejected_scores: (B,) scores of their rivals.
        margin: (B,), in units of score, at least 0; none by default.
        label_smoothing: probability that a preference label is wrong, in [0, 0.5).
        center_coef: weight of the squared sum of a pair's scores, at least 0.
        denominator: default the number of pairs.

    Returns:
        The loss in nats; stats `accuracy` (chosen scored higher; a tie counts half; the margin plays no part),
        `margin` (mean of chosen - rejected) and `num_pairs`.

    Raises:
        ValueError: the shapes differ ((B,) against (B, 1) would broadcast to B * B pairs).
    """
    require_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    if margin is not None:
        require_same_shape(chosen_scores=chosen_scores, margin=margin)
        margin = margin.float()
    chosen, rejected = chosen_scores.float(), rejected_scores.float()
    losses = _pair_losses(chosen, rejected, margin, label_smoothing, center_coef)
    num_pairs = torch.ones_like(losses).sum()
    return divide(losses.sum(), num_pairs, denominator), detached(
        accuracy=divide(share_correct(chosen - rejected).sum(), num_pairs, None),
        margin=divide((chosen - rejected).sum(), num_pairs, None),
        num_pairs=num_pairs,
    )


def listwise_ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    margin: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    center_coef: float = 0.0,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Bradley-Terry loss over K ranked responses: the mean over each prompt's pairs, then over the prompts.

    Ouyang et al. 2022, eq. 1, whose 1 / (K choose 2) becomes 1 / (number of pairs with different ranks). What a pair
    costs is said at `pairwise_ranking_loss`; with two responses each this equals it, in every option.

    Args:
        scores: (N, K) scores of the responses of N prompts.
        ranks: (N, K) integers: 1 is best, equal ranks are ties (left out), 0 marks an absent response (padding).
        margin: (N,) of each of a prompt's pairs, in units of score, at least 0; none by default.
        label_smoothing: probability that the order of a pair is wrong, in [0, 0.5).
        center_coef: weight of the squared sum of a pair's scores, at least 0.
        denominator: default the number of prompts with at least one pair.

    Returns:
        The loss in nats; stats over all pairs `accuracy` (a tie in score counts half), `margin` (mean of better -
        worse), `num_pairs`, and `num_prompts` (those with a pair).

    Raises:
        ValueError: the shapes do not agree.
    """
    require_same_shape(scores=scores, ranks=ranks)
    if margin is not None and margin.shape != scores.shape[:1]:
        raise ValueError(f"margin of shape {tuple(margin.shape)} for {len(scores)} prompts; expected (N,)")
    present = ranks > 0
    is_pair = present[:, :, None] & present[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    row, better_at, worse_at = is_pair.nonzero(as_tuple=True)
    scores = scores.float()
    better, worse = scores[row, better_at], scores[row, worse_at]
    pair_margin = None if margin is None else margin.float()[row]
    losses = _pair_losses(better, worse, pair_margin, label_smoothing, center_coef)
    pairs_per_prompt = is_pair.sum(dim=(1, 2))
    num_pairs, num_prompts = pairs_per_prompt.sum(), (pairs_per_prompt > 0).sum()
    return divide((losses / pairs_per_prompt[row]).sum(), num_prompts, denominator), detached(
        accuracy=divide(share_correct(better - worse).sum(), num_pairs, None),
        margin=divide((better - worse).sum(), num_pairs, None),
        num_pairs=num_pairs,
        num_prompts=num_prompts,
    )
