"""Attention for a CPU in bf16: torch's kernel there spends most of its time outside of matrix products.

Measured with `benchmarks/attention.py`. Everywhere else (GPU, float32, dropout, score caps) it is torch's own
`scaled_dot_product_attention`, as Hugging Face calls it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "dschat"
_SCORES = 2**18  # scores of a block: their float32 copy stays in a core's cache
_QUERIES = 128  # of a block: those after them need no keys of later ones
KEPT_KEYS = 256  # up to so many the probabilities are kept for the backward pass; beyond, it computes them again


_of_mask: "WeakValueDictionary[int, Rows]" = WeakValueDictionary()


@dataclass(eq=False)
class Rows:
    """Where the N tokens of a packed batch (`dschat.models.packed`) stand in groups of R rows of L places, padded on
    the right; attention is computed group by group.

    A token stands in one row, or in several that begin alike.
    """

    shapes: tuple[tuple[int, int], ...]  # (R, L) of each group; P places in all
    columns: Tensor  # (P,) int64 in [0, N): the token at each place; any at padding
    places: Tensor  # (N,) int64 in [0, P): the first place of each token, of which its result is taken
    more_places: Tensor  # (M,): the other places of tokens that have several
    more_columns: Tensor  # (M,): those tokens
    num_uses: int = 0  # calls of `attention` that got it

    def __post_init__(self) -> None:
        _of_mask[self.columns.data_ptr()] = self

    def as_mask(self) -> Tensor:
        """(1, 1, 1, P): the columns, by whose place in memory `attention` finds the rest: on the way there DeepSpeed
        may make another tensor of it."""
        return self.columns[None, None, None]

    def spread(self, x: Tensor) -> list[Tensor]:
        """(1, H, N, D) -> (R, H, L, D) of each group."""
        parts = _Spread.apply(x[0].transpose(0, 1), self).split([rows * length for rows, length in self.shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, self.shapes, strict=True)]

    def collect(self, parts: list[Tensor]) -> Tensor:
        """(R, L, H, D) of each group -> (1, N, H, D)."""
        return _Collect.apply(torch.cat([part.flatten(0, 1) for part in parts]), self)[None]


class _Spread(torch.autograd.Function):
    """(N, H, D) -> (P, H, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows = ctx.rows
        result = gradient.index_select(0, rows.places)
        if len(rows.more_places):
            result.index_add_(0, rows.more_columns, gradient.index_select(0, rows.more_places))
        return result, None


class _Collect(torch.autograd.Function):
    """(P, H, D) -> (N, H, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.shape).index_copy_(0, ctx.rows.places, gradient), None


def use_fast_attention(model: PreTrainedModel) -> None:
    """Give a model whose attention is torch's own this one. Its config and saved files stay what they are."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' AttentionInterface has it: query (B, H, Q, D), key and value (B, H / groups, K, D), mask
    (B, 1, Q, K), True where attended to, or None -> (B, Q, H, D). The mask of `Rows` stands for causal attention in
    each of them."""
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        rows = _of_mask[attention_mask.data_ptr()]
        rows.num_uses += 1
        groups = zip(rows.spread(query), rows.spread(key), rows.spread(value), strict=True)
        parts = [attention(module, q, k, v, None, dropout, scaling, True, **options)[0] for q, k, v in groups]
        return rows.collect(parts), None
    in_bf16_on_cpu = query.is_cpu and query.dtype == key.dtype == value.dtype == torch.bfloat16
    is_plain = dropout == 0.0 and all(options.get(name) is None for name in ("softcap", "position_bias", "s_aux"))
    masked = attention_mask is not None and attention_mask.dtype == torch.bool
    if not (in_bf16_on_cpu and is_plain and (masked or attention_mask is None)):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and query.shape[2] > 1 and causal:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(query, key, value, attention_mask, scaling), None
    return _forward(query, key, value, attention_mask, scaling)[0], None


class _Attention(torch.autograd.Function):
    """softmax(scaling Q K^T) V, keeping the probabilities of short sequences only: memory grows with the tokens.

    With P the probabilities and dO the gradient of the result: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)),
    dQ = scaling dS K, dK = scaling dS^T Q (Dao et al. 2022, appendix B).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        query, key, value = (x.contiguous() for x in (query, key, value))  # copied once for both passes
        result, kept = _forward(query, key, value, mask, scaling, keep=key.shape[2] <= KEPT_KEYS)
        ctx.save_for_backward(query, key, value, *([] if mask is None else [mask]), *kept)
        ctx.has_mask, ctx.scaling = mask is not None, scaling
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *rest = ctx.saved_tensors
        mask = rest.pop(0) if ctx.has_mask else None
        gradient = gradient.transpose(1, 2).contiguous()
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for number, (rows, queries, num_keys) in enumerate(_blocks(query, key, mask)):
            keys = slice(num_keys)
            q, k, v = _grouped(query[rows, :, queries], key), key[rows, :, keys], value[rows, :, keys]
            p = rest[number] if rest else _probabilities(q, k, _part(mask, rows, queries, keys), ctx.scaling)
            upstream = _grouped(gradient[rows, :, queries], key)
            of_value[rows, :, keys] += _product(p.transpose(-1, -2), upstream)
            through = _product(upstream, v.transpose(-1, -2))
            of_scores = torch._softmax_backward_data(through, p, -1, p.dtype)
            of_query[rows, :, queries] = _ungrouped(_product(of_scores, k, ctx.scaling), query)
            of_key[rows, :, keys] += _product(of_scores.transpose(-1, -2), q, ctx.scaling)
        return of_query, of_key, of_value, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, *, keep: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The result (B, Q, H, D), and with ``keep`` the probabilities, block by block."""
    kept = []
    result = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for rows, queries, num_keys in _blocks(query, key, mask):
        keys = slice(num_keys)
        q, k, v = _grouped(query[rows, :, queries], key), key[rows, :, keys], value[rows, :, keys]
        p = _probabilities(q, k, _part(mask, rows, queries, keys), scaling)
        result[rows, queries] = _ungrouped(_product(p, v), query).transpose(1, 2)
        if keep:
            kept.append(p)
    return result, kept


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[tuple[slice, slice, int]]:
    """(rows of the batch, queries, number of keys that any of these queries attends to)."""
    num_rows, num_heads, num_queries, _ = query.shape
    for start in range(0, num_queries, _QUERIES):
        queries = slice(start, min(num_queries, start + _QUERIES))
        num_keys = key.shape[2]
        if mask is not None and num_queries > _QUERIES:
            attended = mask[:, :, queries].flatten(0, 2).any(0).nonzero()
            num_keys = int(attended[-1]) + 1 if len(attended) else 1
        size = max(1, _SCORES // (num_heads * (queries.stop - start) * num_keys))
        for first in range(0, num_rows, size):
            yield slice(first, first + size), queries, num_keys


def _part(mask: Tensor | None, rows: slice, queries: slice, keys: slice) -> Tensor | None:
    if mask is None:
        return None
    return (mask if len(mask) == 1 else mask[rows])[:, :, queries, keys]


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """(B, H, Q, D) -> (B, H / groups, groups * Q, D): the queries that share keys and values, one after the other."""
    return x.reshape(x.shape[0], key.shape[1], -1, x.shape[3])


def _ungrouped(x: Tensor, query: Tensor) -> Tensor:
    return x.reshape(x.shape[0], query.shape[1], -1, x.shape[3])


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """(B, G, groups * Q, D), (B, G, K, D) -> (B, G, groups * Q, K); the softmax itself is computed in float32. A query
    that attends to nothing attends to all alike, which is finite."""
    scores = _product(q, k.transpose(-1, -2), scaling)
    if mask is not None:
        by_query = scores.view(scores.shape[0], scores.shape[1], -1, mask.shape[2], scores.shape[3])
        by_query.masked_fill_(~mask[:, :, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def _product(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """factor * a @ b over the last two dimensions; the factor costs no pass and no rounding of its own."""
    flat_a, flat_b = a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:])
    if factor == 1.0:
        return torch.bmm(flat_a, flat_b).view(*a.shape[:2], a.shape[2], b.shape[3])
    nothing = a.new_zeros(()).expand(len(flat_a), a.shape[2], b.shape[3])
    return torch.baddbmm(nothing, flat_a, flat_b, beta=0.0, alpha=factor).view(*a.shape[:3], b.shape[3])


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
