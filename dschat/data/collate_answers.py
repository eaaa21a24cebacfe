"""Rows of answers to compare -> CPU tensors padded on the left: every answer ends at the right edge.

So the vocabulary projection, the largest tensor of a step, sees the last R columns only. Each row makes two
sequences, which stand in two halves of the batch: chosen and rejected, or an answer and the mismatched one of KTO.
"""

from collections.abc import Sequence
from typing import Any

from dschat.data.loader import Batch, _pad_right
from dschat.functional import lengths_to_mask

import numpy as np
import torch


def collate_pairs(rows: Sequence[dict[str, Any]], num_real: int, pad_token_id: int) -> Batch:
    """input_ids, attention_mask (2B, T), response_mask (2B, R): the chosen answers, then the rejected; row_mask (B,).

    See `_two_halves`.
    """
    prompt_lens = [row["prompt_len"] for row in rows]
    halves = [[row[name] for row in rows] for name in ("chosen_ids", "rejected_ids")]
    return _two_halves(halves, prompt_lens, num_real, pad_token_id)


def collate_feedback(
    rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], num_real: int, pad_token_id: int, max_len: int
) -> Batch:
    """input_ids, attention_mask (2B, T), response_mask (2B, R): the rows' answers, then the mismatched ones: each
    row's prompt with the answer of the row in its place of ``others``, cut at ``max_len`` tokens; row_mask, good (B,).

    See `_two_halves`.
    """
    prompt_lens = [row["prompt_len"] for row in rows]
    mismatched = [
        (row["input_ids"][: row["prompt_len"]] + other["input_ids"][other["prompt_len"] :])[:max_len]
        for row, other in zip(rows, others, strict=True)
    ]
    halves = [[row["input_ids"] for row in rows], mismatched]
    batch = _two_halves(halves, prompt_lens, num_real, pad_token_id)
    return batch | {"good": torch.tensor([row["good"] for row in rows], dtype=torch.bool)}


def mismatched_rows(num_rows: int, seed: int) -> list[int]:
    """For each row another one, whose answer it borrows; every row lends once. Needs two rows or more."""
    assert num_rows > 1, "a single row has no other"
    order = np.random.default_rng([seed, 0, 1]).permutation(num_rows)
    others = np.empty_like(order)
    others[order] = np.roll(order, -1)
    return others.tolist()


def _two_halves(
    halves: Sequence[Sequence[list[int]]], prompt_lens: list[int], num_real: int, pad_token_id: int
) -> Batch:
    """Sequences of prompt and answer, B in each half, side by side.

    attention_mask is True on tokens; response_mask, over the last R columns, on those of the answer. R is the longest
    answer of the batch. From row num_real on response_mask and row_mask are False.
    """
    sequences = [sequence for half in halves for sequence in half]
    backwards, attended = _pad_right([sequence[::-1] for sequence in sequences], pad_token_id)
    row_mask = torch.arange(len(prompt_lens)) < num_real
    lengths = torch.tensor([len(s) - p for s, p in zip(sequences, prompt_lens * len(halves), strict=True)])
    response_mask = lengths_to_mask(lengths, int(lengths.max()), "left")
    return {
        "input_ids": backwards.flip(1),
        "attention_mask": attended.flip(1),
        "response_mask": response_mask & row_mask.repeat(len(halves))[:, None],
        "row_mask": row_mask,
    }
