"""Rows of different lengths laid end to end: a model computes real tokens only, and a prompt that rows share once.

Everything but attention works on single tokens, so a batch can be one row of all its tokens. Attention puts them back
into rows, padded on the right, where being causal is all the masking that they need (`dschat.models.attention`). It
knows them by a mask of whole numbers, which Hugging Face's models hand through as they hand through any 4D mask.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from dschat.models.attention import NAME, Rows
from dschat.models.forward import attends_to_all, model_inputs, takes_positions

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# What a group of rows costs beyond its attention, in pairs of tokens; on a GPU an estimate.
_GROUP_ON_CPU, _GROUP_ON_GPU = 2.0**14, 2.0**20


@dataclass(frozen=True)
class Packed:
    """The N tokens that a batch of (B, T) ids and their mask come to."""

    input_ids: Tensor  # (1, N)
    position_ids: Tensor  # (1, N)
    rows: Rows
    columns: Tensor  # (B, T) int64: where in N the token is; 0 at padding

    def run(self, model: Callable[..., Any], family: PreTrainedModel, **options: Any) -> Any:
        """What ``model`` (a module, the engine around it, or what calls it) gives for the tokens.
        ``family``: the model inside.

        Raises:
            RuntimeError: a layer did not hand the rows to its attention, so that each token saw those of all rows.
        """
        inputs = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        output = model(**inputs, attention_mask=self.rows.as_mask(), **options)
        if self.rows.num_uses < family.config.get_text_config().num_hidden_layers:
            raise RuntimeError(f"{type(family).__name__} does not take packed rows")
        return output

    def at_tokens(self, values: Tensor) -> Tensor:
        """(1, N) -> (B, T): what was found for each token; at padding it means nothing."""
        return values[0][self.columns]


def can_pack(family: PreTrainedModel) -> bool:
    """Whether positions and masks may be given freely: not with BLOOM's ALiBi, nor with sliding windows, nor to code
    from the hub, which may do anything with them."""
    is_known = type(family).__module__.startswith("transformers.") and family.config._attn_implementation == NAME
    return is_known and takes_positions(family) and attends_to_all(family)


def token_logits(
    model: nn.Module,
    family: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    wanted: Tensor,
    begins_like: Tensor | None = None,
) -> Tensor:
    """(1, M, V): the logits that predict the M tokens where ``wanted`` is True, row by row. Only these positions go
    through the vocabulary projection.

    Args:
        model: the module or its engine; ``family``: the Hugging Face model inside.
        input_ids, attention_mask: (B, T), padding anywhere.
        wanted: (B, T) bool; nothing predicts the first token of a row.
        begins_like: see `pack`.
    """
    wanted = wanted[:, 1:]
    if can_pack(family):
        packed = pack(input_ids, attention_mask, begins_like)
        before = packed.columns[:, :-1][wanted]
        return packed.run(model, family, logits_to_keep=before).logits
    inputs = model_inputs(family, input_ids, attention_mask)
    ends = wanted.any(0).nonzero()
    size = wanted.shape[1] + 1 - (int(ends[0]) if len(ends) else 0)
    return model(**inputs, use_cache=False, logits_to_keep=size).logits[:, :-1][wanted[:, 1 - size :]][None]


def token_values(
    call: Callable[..., Tensor],
    family: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    begins_like: Tensor | None = None,
) -> Tensor:
    """(B, T), (B, T) -> (B, T): what ``call``, given the inputs of a Hugging Face model, finds at each token; what
    stands at padding means nothing. ``family``: the model that it calls; ``begins_like``: see `pack`."""
    if can_pack(family):
        packed = pack(input_ids, attention_mask, begins_like)
        return packed.at_tokens(packed.run(call, family))
    return call(**model_inputs(family, input_ids, attention_mask), use_cache=False)


def on_tokens(values: Tensor, wanted: Tensor) -> Tensor:
    """What was found for each of M ``wanted`` tokens, (1, M), at their places: (B, T), 0 elsewhere."""
    return values.new_zeros(wanted.shape).masked_scatter(wanted, values)


def pack(input_ids: Tensor, attention_mask: Tensor, begins_like: Tensor | None = None) -> Packed:
    """The tokens of a batch, laid end to end row by row.

    Args:
        input_ids, attention_mask: (B, T), bool, padding anywhere.
        begins_like: (B,) int64: for each row another, or itself, with which it may have its first tokens in common.
            Those that are the same are computed once, in the other row; which must be one that is like itself.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    num_rows, host_lengths = len(mask), np.array(lengths.clamp(min=1).tolist())
    size = int(host_lengths.max())
    places = torch.arange(size, device=mask.device)[None]  # of a token in its row
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]  # in each row: its tokens, then padding
    ids = input_ids.gather(1, order)
    shared = torch.zeros_like(lengths) if begins_like is None else _num_shared(ids, lengths, begins_like)
    own = lengths - shared
    starts = (own.cumsum(0) - own)[:, None]
    others = starts if begins_like is None else starts[begins_like]
    is_own, is_shared = (places >= shared[:, None]) & (places < lengths[:, None]), places < shared[:, None]
    columns = torch.where(is_shared, others + places, (starts + places - shared[:, None]) * is_own)
    own_at, shared_at = (which.flatten().nonzero().squeeze(1) for which in (is_own, is_shared))
    groups = _groups(host_lengths, _GROUP_ON_GPU if mask.is_cuda else _GROUP_ON_CPU)
    shapes = tuple((len(group), int(host_lengths[group].max())) for group in groups)
    in_groups = (_first_places(groups, shapes).to(mask.device)[:, None] + places).flatten()
    first, more, of_more = in_groups[own_at], in_groups[shared_at], columns.flatten()[shared_at]
    at_places = columns.new_zeros(sum(rows * length for rows, length in shapes))
    at_places[first] = torch.arange(len(first), device=mask.device)
    at_places[more] = of_more
    return Packed(
        ids.flatten()[own_at][None],
        places.expand(num_rows, -1).flatten()[own_at][None],
        Rows(shapes, at_places, first, more, of_more),
        torch.zeros_like(input_ids).scatter(1, order, columns),
    )


def by_prompt(rows: Iterable[int], prompts: Sequence[Hashable], lengths: Sequence[int]) -> list[int]:
    """``rows``, in an order in which they make good batches: those with the same prompt next to each other, prompts by
    their longest row."""
    groups: dict[Hashable, list[int]] = {}
    for row in rows:
        groups.setdefault(prompts[row], []).append(row)
    return list(chain(*sorted(groups.values(), key=lambda group: max(lengths[row] for row in group))))


def neighbours(is_same: Tensor) -> Tensor:
    """(B - 1,) bool: whether a row has the prompt of the one before it -> (B,) the ``begins_like`` of `pack`."""
    rows = torch.arange(len(is_same) + 1, device=is_same.device)
    rows[1:] *= ~is_same
    return rows.cummax(0).values


def _num_shared(ids: Tensor, lengths: Tensor, other: Tensor) -> Tensor:
    """(B, T), padded on the right, (B,), (B,) -> (B,): how many first tokens each row has from its other one."""
    rows, places = torch.arange(len(ids), device=ids.device), torch.arange(ids.shape[1], device=ids.device)
    is_whole = other == rows
    equal = (ids == ids[other]) & (places < torch.minimum(lengths, lengths[other])[:, None])
    return equal.int().cumprod(1).sum(1) * (~is_whole & is_whole[other])


def _groups(lengths: np.ndarray, cost: float) -> list[Tensor]:
    """Rows, by their lengths, in groups that are padded to their longest: those at which attention has least to do.

    A group of R rows costs R L^2, its pairs of tokens, and ``cost``. Of rows from the longest to the shortest the best
    groups are runs, found end by end (dynamic programming).
    """
    order = np.argsort(-lengths, kind="stable")
    pairs, number = lengths[order].astype(float) ** 2, len(lengths)
    least, start = np.zeros(number + 1), np.zeros(number + 1, dtype=int)
    for end in range(1, number + 1):
        costs = least[:end] + pairs[:end] * np.arange(end, 0, -1) + cost
        start[end] = costs.argmin()
        least[end] = costs[start[end]]
    groups, end = [], number
    while end:
        groups.append(torch.from_numpy(order[start[end] : end]))
        end = start[end]
    return groups[::-1]


def _first_places(groups: list[Tensor], shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """(B,): the place of the first token of each row, where groups and their rows are laid end to end."""
    found, size = torch.empty(sum(map(len, groups)), dtype=torch.int64), 0
    for group, (num_rows, length) in zip(groups, shapes, strict=True):
        found[group] = size + length * torch.arange(num_rows)
        size += num_rows * length
    return found
