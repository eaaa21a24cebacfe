"""Which rows make which micro-batch on which rank, and rows -> CPU tensors.

Masks are made here, once, from lengths. A row that only fills a ragged last batch is marked by `num_real` and masked
out by the collators, so no example is dropped or counted twice on any number of ranks.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

Batch = dict[str, torch.Tensor]


class MicroBatch(NamedTuple):
    """Rows of one micro-batch; the first `num_real` count, the others only fill up."""

    indices: list[int]
    num_real: int


def epoch_batches(
    num_rows: int,
    per_device_batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
) -> list[list[MicroBatch]]:
    """The optimizer steps of one epoch for one rank: each a list of `accumulation` micro-batches of constant size.

    A global batch is the next per_device_batch_size * accumulation * world_size rows of the epoch's permutation, so
    it depends on that product alone; of it, rank r takes every world_size-th row from r on.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_rows) if shuffle else np.arange(num_rows)
    rows_per_rank = per_device_batch_size * accumulation
    steps = []
    for start in range(0, num_rows, rows_per_rank * world_size):
        chunk = order[start : start + rows_per_rank * world_size].tolist()
        mine = chunk[rank::world_size]
        filled = mine + [chunk[0]] * (rows_per_rank - len(mine))
        step = []
        for first in range(0, rows_per_rank, per_device_batch_size):
            num_real = min(max(len(mine) - first, 0), per_device_batch_size)
            step.append(MicroBatch(filled[first : first + per_device_batch_size], num_real))
        steps.append(step)
    return steps


def rows_at(rows: datasets.Dataset, indices: Sequence[int]) -> list[dict[str, Any]]:
    """``[rows[i] for i in indices]``, read at once: a quarter of the time."""
    columns = rows[list(indices)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def split_by_tokens(
    step_of_ranks: Sequence[list[MicroBatch]], rank: int, sizes: Sequence[tuple[int, int]], max_tokens: int
) -> list[MicroBatch]:
    """One rank's rows of an optimizer step, shortest first, as micro-batches of at most ``max_tokens`` tokens, padding
    counted; a row that is larger by itself stands alone. The step as a whole is what it was.

    Args:
        step_of_ranks: the step as `epoch_batches` gives it to each rank: all take equally many micro-batches from it.
        rank: whose micro-batches to return.
        sizes: of each row of the data, how many sequences it makes and how long the longest is, in tokens.
    """
    portions = [_portions(step, sizes, max_tokens) for step in step_of_ranks]
    mine = [MicroBatch(rows, len(rows)) for rows in portions[rank]]
    filler = MicroBatch(step_of_ranks[rank][0].indices[:1], 0)
    return mine + [filler] * (max(map(len, portions)) - len(mine))


def _portions(step: list[MicroBatch], sizes: Sequence[tuple[int, int]], max_tokens: int) -> list[list[int]]:
    rows = [row for batch in step for row in batch.indices[: batch.num_real]]
    portions: list[list[int]] = []
    num_sequences = 0
    for row in sorted(rows, key=lambda row: sizes[row][1]):
        count, longest = sizes[row]
        if not portions or (num_sequences + count) * longest > max_tokens:
            portions.append([])
            num_sequences = 0
        portions[-1].append(row)
        num_sequences += count
    return portions


class PromptStream:
    """Endless batches of constant size: fresh permutations, one after the other without a gap. ``position`` counts the
    batches given out and may be set."""

    def __init__(self, num_rows: int, batch_size: int, seed: int, position: int = 0):
        """
        Raises:
            ValueError: no rows.
        """
        if num_rows < 1:
            raise ValueError("PromptStream needs at least one row")
        self.num_rows, self.batch_size, self.seed, self.position = num_rows, batch_size, seed, position
        self._order = lru_cache(maxsize=2)(self._permutation)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        start = self.position * self.batch_size
        rows: list[int] = []
        while len(rows) < self.batch_size:
            epoch, offset = divmod(start + len(rows), self.num_rows)
            rows += self._order(epoch)[offset : offset + self.batch_size - len(rows)].tolist()
        self.position += 1
        return rows

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)


def collate_sft(rows: Sequence[dict[str, Any]], num_real: int, pad_token_id: int) -> Batch:
    """input_ids (B, T) int64, attention_mask (B, T) bool, loss_mask (B, T) bool: False in rows from num_real on."""
    input_ids, attention_mask = _pad_right([row["input_ids"] for row in rows], pad_token_id)
    loss_mask = _pad_right([row["loss_mask"] for row in rows], 0)[0].bool()
    loss_mask[num_real:] = False
    loss_mask[:, 0] = False  # nothing predicts the first token
    return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


def collate_rankings(rows: Sequence[dict[str, Any]], num_real: int, pad_token_id: int) -> Batch:
    """The answers to B prompts, K at most each, as M sequences in the order of the rows.

    input_ids, attention_mask, loss_mask (M, T): loss_mask is True on the tokens of the answers, the end token
    included; answer_mask (B, K): True where a row has a k-th answer, M of them; ranks (B, K): 1 is best, 0 where there
    is no answer or the row only fills up; margin (B,).
    """
    input_ids, attention_mask = _pad_right([ids for row in rows for ids in row["input_ids"]], pad_token_id)
    ranks, answer_mask = _pad_right([row["ranks"] for row in rows], 0)
    is_real = torch.arange(len(rows)) < num_real
    sizes = torch.tensor([len(row["ranks"]) for row in rows])
    prompt_lens = torch.tensor([row["prompt_len"] for row in rows]).repeat_interleave(sizes)
    in_answer = torch.arange(input_ids.shape[1]) >= prompt_lens[:, None]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "loss_mask": attention_mask & in_answer & is_real.repeat_interleave(sizes)[:, None],
        "answer_mask": answer_mask,
        "ranks": ranks * is_real[:, None],
        "margin": torch.tensor([row["margin"] for row in rows], dtype=torch.float32),
    }


def collate_prompts(rows: Sequence[dict[str, Any]], pad_token_id: int) -> Batch:
    """input_ids (B, P) int64, attention_mask (B, P) bool, padded on the LEFT: generation goes on at the right edge."""
    reversed_ids, reversed_mask = _pad_right([row["prompt_ids"][::-1] for row in rows], pad_token_id)
    return {"input_ids": reversed_ids.flip(1), "attention_mask": reversed_mask.flip(1)}


def num_rows(batch: Batch) -> int:
    """Of a batch of any `collate_*` here or in `collate_answers`: rows of the data, each of which may make several
    sequences."""
    return len(batch.get("ranks", batch.get("row_mask", batch["input_ids"])))


def take_rows(batch: Batch, rows: slice) -> Batch:
    """The given rows of a batch, with all of their sequences, padded as they were."""
    number, num_sequences = num_rows(batch), len(batch["input_ids"])
    if "answer_mask" in batch:
        row_of_sequence = batch["answer_mask"].nonzero()[:, 0]
    else:
        row_of_sequence = torch.arange(number, device=batch["input_ids"].device).repeat(num_sequences // number)
    picked = torch.zeros(number, dtype=torch.bool, device=row_of_sequence.device)
    picked[rows] = True
    sequences = picked[row_of_sequence]
    of_sequences = ("input_ids", "attention_mask", "loss_mask", "response_mask")
    return {name: value[sequences if name in of_sequences else picked] for name, value in batch.items()}


def _pad_right(sequences: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) int64 padded with value to the longest sequence, and (B, T) bool: True where a sequence has a token."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.full((len(sequences), int(lengths.max())), value, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
