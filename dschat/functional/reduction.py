"""What the losses share: the division by a count, the dict of statistics, the check of shapes, what a pair costs."""

from collections.abc import Callable

from dschat.functional.masks import select

import torch
from torch import Tensor

Stats = dict[str, Tensor]


def divide(total: Tensor, own_count: Tensor, denominator: Tensor | float | None) -> Tensor:
    """total / denominator (own_count by default); `total`, which is then 0, where nothing was counted: never 0 / 0."""
    chosen = own_count if denominator is None else denominator
    chosen = torch.as_tensor(chosen, dtype=torch.float32, device=total.device)
    return total / torch.where(own_count > 0, chosen, 1.0)


def token_mean(x: Tensor, action_mask: Tensor, *, denominator: Tensor | float | None = None) -> Tensor:
    """Sum of `x` over the actions, divided by a count: a per-token KL or entropy as a term of the policy's loss.

    Args:
        x: (B, R), differentiable.
        action_mask: (B, R), True = counts.
        denominator: default the number of actions; a program passes that of the whole optimizer step.

    Returns:
        A float32 scalar in the unit of `x`; 0 on a connected graph, with zero gradients, when nothing counts.

    Raises:
        TypeError: `action_mask` is not bool.
        ValueError: the shapes differ.
    """
    return divide(select(x, action_mask).sum(), action_mask.sum(), denominator)


def detached(**stats: Tensor) -> Stats:
    """The statistics as float32 scalars outside the graph."""
    return {name: value.detach().float() for name, value in stats.items()}


def require_same_shape(**tensors: Tensor) -> None:
    """Refuses what would otherwise broadcast, (B,) with (B, 1) into (B, B).

    Raises:
        ValueError: two of the shapes differ; the message names them all.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must agree: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def share_correct(margins: Tensor) -> Tensor:
    """1 for a positive margin, 0 for a negative one, one half for a tie."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def smooth_labels(loss_of: Callable[[Tensor], Tensor], margins: Tensor, label_smoothing: float) -> Tensor:
    """What a pair with margin h (better minus worse) costs on average if its label is wrong with probability e.

    (1 - e) l(h) + e l(-h), with e in [0, 0.5): Mitchell 2023, https://ericmitchell.ai/cdpo.pdf.
    """
    if label_smoothing == 0:  # for an infinite margin, 0 * l(-h) would be NaN
        return loss_of(margins)
    return (1 - label_smoothing) * loss_of(margins) + label_smoothing * loss_of(-margins)
