"""Advantages without a critic: the samples of one prompt are each other's baseline."""

from dschat.functional.masks import select

import torch
from torch import Tensor


def _centred_groups(totals: Tensor, group_size: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(G, group_size) totals minus their group's mean over counted rows, 0 elsewhere; (G, 1) numbers of such rows."""
    if totals.dim() != 1 or group_size < 2 or len(totals) % group_size:
        raise ValueError(
            f"totals of shape {tuple(totals.shape)}, not (B,) in whole groups (of 2 or more): {group_size}"
        )
    kept = select(totals, counts).reshape(-1, group_size)
    counted = counts.reshape(-1, group_size)
    num_counted = counted.sum(dim=1, keepdim=True)
    # Measured from the group's largest, equal totals are exactly 0, however their mean would have been rounded.
    largest = torch.where(counted, kept, -torch.inf).amax(dim=1, keepdim=True)
    offsets = torch.where(counted, kept - largest, 0.0)
    return torch.where(counted, offsets - offsets.sum(dim=1, keepdim=True) / num_counted, 0.0), num_counted


@torch.no_grad()
def rloo_advantages(totals: Tensor, group_size: int, counts: Tensor) -> Tensor:
    """Leave-one-out: each response's total minus the mean total of the other counted responses to its prompt.

    Ahmadian et al. 2024 (arXiv 2402.14740), RLOO; not differentiable.

    Args:
        totals: (B,) one number per response, score minus KL penalty, say; rows of one prompt lie together (row
            i * group_size + j is sample j of prompt i).
        group_size: responses per prompt, at least 2.
        counts: (B,) bool, False for a response without a score: it takes no part in any baseline and gets 0.

    Returns:
        (B,) float32 in units of the totals; 0 for a response that is alone in its group.

    Raises:
        TypeError: `counts` is not bool.
        ValueError: B is not a multiple of `group_size`, that is below 2, or the shapes are not (B,).
    """
    centred, num_counted = _centred_groups(totals, group_size, counts)
    # x - (sum - x) / (n - 1) = (x - sum / n) * n / (n - 1)
    return (centred * num_counted / (num_counted - 1).clamp(min=1)).flatten()


@torch.no_grad()
def grpo_advantages(totals: Tensor, group_size: int, counts: Tensor) -> Tensor:
    """Group-relative: (total - mean) / (std + 1e-6) over the counted responses to a prompt; not differentiable.

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2. The paper does not say which std; this is that of a sample
    (divided by n - 1), as in the implementations that its users tuned (TRL, verl).

    Args:
        totals: (B,) one number per response; rows of one prompt lie together, see `rloo_advantages`.
        group_size: responses per prompt, at least 2.
        counts: (B,) bool, False for a response without a score: it takes no part in mean and std and gets 0.

    Returns:
        (B,) float32, without a unit; exactly 0 where all totals of a group are equal or only one counts.

    Raises:
        TypeError: `counts` is not bool.
        ValueError: B is not a multiple of `group_size`, that is below 2, or the shapes are not (B,).
    """
    centred, num_counted = _centred_groups(totals, group_size, counts)
    variance = centred.square().sum(dim=1, keepdim=True) / (num_counted - 1).clamp(min=1)
    return (centred / (variance.sqrt() + 1e-6)).flatten()
