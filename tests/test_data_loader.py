"""Which rows go where, and what the tensors hold."""

from itertools import islice

from dschat.data.collate_answers import collate_pairs
from dschat.data.loader import (
    MicroBatch,
    PromptStream,
    collate_prompts,
    collate_rankings,
    collate_sft,
    epoch_batches,
    num_rows,
    rows_at,
    split_by_tokens,
    take_rows,
)
from dschat.data.prepare import row_sizes
from dschat.data.show import show_batch
from dschat.data.tokenizer import train_tokenizer

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sizes = st.integers(1, 4)


@settings(max_examples=120, deadline=None)
@given(num_rows=st.integers(0, 70), per_device=sizes, accumulation=sizes, world=sizes, shuffle=st.booleans())
def test_every_row_counts_once_on_any_number_of_ranks(num_rows, per_device, accumulation, world, shuffle):
    ranks = [epoch_batches(num_rows, per_device, accumulation, r, world, 3, 1, shuffle) for r in range(world)]
    real = [row for steps in ranks for step in steps for micro in step for row in micro.indices[: micro.num_real]]
    assert sorted(real) == list(range(num_rows))
    assert len({len(steps) for steps in ranks}) == 1
    for steps in ranks:
        assert all(len(step) == accumulation for step in steps)
        for micro in (micro for step in steps for micro in step):
            assert len(micro.indices) == per_device and 0 <= micro.num_real <= per_device
            assert all(0 <= row < num_rows for row in micro.indices)
        assert all(micro.num_real == per_device for step in steps[:-1] for micro in step), "only the last is ragged"


def global_batches(per_device, accumulation, world, num_rows=50):
    ranks = [epoch_batches(num_rows, per_device, accumulation, rank, world, 0, 2) for rank in range(world)]
    return [
        sorted(row for steps in ranks for micro in steps[number] for row in micro.indices[: micro.num_real])
        for number in range(len(ranks[0]))
    ]


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    expected = global_batches(12, 1, 1)
    assert [len(batch) for batch in expected] == [12, 12, 12, 12, 2]
    for shape in [(1, 12, 1), (6, 1, 2), (3, 2, 2), (1, 3, 4), (2, 2, 3)]:
        assert global_batches(*shape) == expected


def test_epochs_and_seeds_have_their_own_order_and_can_be_repeated():
    def order(seed, epoch, shuffle=True):
        return [row for step in epoch_batches(40, 4, 1, 0, 1, seed, epoch, shuffle) for row in step[0].indices]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert order(0, 0, shuffle=False) == list(range(40))


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(1, 20), batch_size=st.integers(1, 25))
def test_prompt_stream_glues_whole_epochs(num_rows, batch_size):
    batches = list(islice(PromptStream(num_rows, batch_size, 7), 3 * num_rows))
    assert all(len(batch) == batch_size for batch in batches)
    rows = [row for batch in batches for row in batch]
    for start in range(0, len(rows) - num_rows + 1, num_rows):
        assert sorted(rows[start : start + num_rows]) == list(range(num_rows))
    assert rows == [row for batch in islice(PromptStream(num_rows, batch_size, 7), 3 * num_rows) for row in batch]


def test_prompt_stream_reshuffles():
    rows = [row for batch in islice(PromptStream(10, 5, 0), 4) for row in batch]
    assert rows[:10] != rows[10:]
    with pytest.raises(ValueError, match="at least one row"):
        next(PromptStream(0, 2, 0))


T, F = True, False
PAD = 9  # also used as a real token below: masks must come from lengths


def check(batch, **expected):
    for name, value in expected.items():
        assert batch[name].tolist() == value, name


@pytest.mark.parametrize("indices", [[2, 0, 2], range(1, 3), []])
def test_rows_read_at_once_are_those_read_one_by_one(indices):
    kept = [
        {"input_ids": [[1, 2], [3]][:n], "margin": [None, 0.5, 1.0][n], "messages": [{"role": "user"}]}
        for n in range(3)
    ]
    rows = datasets.Dataset.from_list(kept).select([1, 2, 0])
    assert rows_at(rows, indices) == [rows[i] for i in indices]


def test_collate_sft():
    rows = [
        {"input_ids": [5, 9, 2], "loss_mask": [T, F, T]},
        {"input_ids": [9], "loss_mask": [F]},
        {"input_ids": [5, 2], "loss_mask": [F, T]},
    ]
    batch = collate_sft(rows, 2, PAD)
    check(
        batch,
        input_ids=[[5, 9, 2], [9, 9, 9], [5, 2, 9]],
        attention_mask=[[T, T, T], [T, F, F], [T, T, F]],
        loss_mask=[[F, F, T], [F, F, F], [F, F, F]],
    )
    assert [batch[name].dtype for name in batch] == [torch.int64, torch.bool, torch.bool]
    assert collate_sft(rows, 3, PAD)["loss_mask"][2].tolist() == [F, T, F]


def test_split_by_tokens():
    step = [MicroBatch([3, 0, 4], 3), MicroBatch([1, 2, 3], 2)]
    sizes = [(1, 5), (1, 2), (2, 3), (1, 6), (1, 20)]
    # By length 1, 2, 0, 3, 4: one sequence of 2, with two more 3 x 3, with another 4 x 5 = 20 are too many for 18.
    split = split_by_tokens([step], 0, sizes, 18)
    assert split == [MicroBatch([1, 2], 2), MicroBatch([0, 3], 2), MicroBatch([4], 1)]
    short = [MicroBatch([1, 3, 3], 1), MicroBatch([3, 3, 3], 0)]
    assert split_by_tokens([step, short], 1, sizes, 18) == [MicroBatch([1], 1), *[MicroBatch([1], 0)] * 2]
    assert split_by_tokens([step, short], 0, sizes, 18) == split


@pytest.mark.parametrize(
    ("row", "size"),
    [
        ({"input_ids": [1, 2, 3], "loss_mask": [False, True, True]}, (1, 3)),
        ({"input_ids": [[1, 2], [1, 2, 3, 4], [1]], "ranks": [1, 2, 2]}, (3, 4)),
        ({"chosen_ids": [1, 2], "rejected_ids": [1, 2, 3]}, (2, 3)),
        ({"input_ids": [1, 2, 3], "good": True}, (2, 3)),
    ],
    ids=["sft", "ranking", "preference", "feedback"],
)
def test_what_a_row_makes_in_a_batch(row, size):
    assert row_sizes(datasets.Dataset.from_list([row, row])) == [size, size]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), sizes, sizes, sizes, st.integers(1, 60), st.integers(0, 9))
def test_split_by_tokens_keeps_every_row_once(num_rows, batch_size, accumulation, world_size, max_tokens, seed):
    widths = np.random.default_rng(seed).integers(1, [4, 30], size=(num_rows, 2)).tolist()
    ranks = [epoch_batches(num_rows, batch_size, accumulation, r, world_size, seed, 0) for r in range(world_size)]
    for step in zip(*ranks, strict=True):
        split = [split_by_tokens(step, rank, widths, max_tokens) for rank in range(world_size)]
        assert len({len(mine) for mine in split}) == 1, "every rank comes equally often"
        for before, after in zip(step, split, strict=True):
            rows = [[row for b in batches for row in b.indices[: b.num_real]] for batches in (before, after)]
            assert sorted(rows[0]) == sorted(rows[1])
            for batch in after:
                real = [widths[row] for row in batch.indices[: batch.num_real]]
                tokens = sum(w for w, _ in real) * max((n for _, n in real), default=0)
                assert len(batch.indices) == max(1, batch.num_real) and (tokens <= max_tokens or len(real) == 1)


def test_collate_rankings():
    rows = [
        {"input_ids": [[1, 2, 3], [1, 9]], "ranks": [1, 2], "prompt_len": 1, "margin": 0.5},
        {"input_ids": [[4, 5, 9], [4, 5, 6, 7], [4, 5, 8]], "ranks": [1, 2, 2], "prompt_len": 2, "margin": 0.0},
        {"input_ids": [[1, 2, 3], [1, 9]], "ranks": [1, 2], "prompt_len": 1, "margin": 0.5},
    ]
    batch = collate_rankings(rows, 2, PAD)
    check(
        batch,
        input_ids=[[1, 2, 3, 9], [1, 9, 9, 9], [4, 5, 9, 9], [4, 5, 6, 7], [4, 5, 8, 9], [1, 2, 3, 9], [1, 9, 9, 9]],
        attention_mask=[[T, T, T, F], [T, T, F, F], [T, T, T, F], [T] * 4, [T, T, T, F], [T, T, T, F], [T, T, F, F]],
        loss_mask=[[F, T, T, F], [F, T, F, F], [F, F, T, F], [F, F, T, T], [F, F, T, F], [F] * 4, [F] * 4],
        answer_mask=[[T, T, F], [T, T, T], [T, T, F]],
        ranks=[[1, 2, 0], [1, 2, 2], [0, 0, 0]],
        margin=[0.5, 0.0, 0.5],
    )
    assert batch["margin"].dtype == torch.float32


def ids(rng):
    return rng.integers(1, 99, rng.integers(3, 9)).tolist()


def test_some_rows_of_a_batch_are_the_batch_of_some_rows():
    """Of every collate function, rows that only fill up included; but for the padding, which stays."""
    rng = np.random.default_rng(1)
    supervised = [{"input_ids": ids(rng), "loss_mask": [F, T, T] * 3} for _ in range(5)]
    for row in supervised:
        row["loss_mask"] = row["loss_mask"][: len(row["input_ids"])]
    rankings = [
        {"input_ids": [ids(rng) for _ in range(k)], "ranks": [*range(1, k + 1)], "prompt_len": 2, "margin": k / 2}
        for k in (2, 4, 1, 3, 2)
    ]
    pairs = [{"chosen_ids": ids(rng), "rejected_ids": ids(rng), "prompt_len": 2} for _ in range(5)]
    for collate, rows in ((collate_sft, supervised), (collate_rankings, rankings), (collate_pairs, pairs)):
        whole = collate(rows, 4, PAD)
        assert num_rows(whole) == 5
        for low, high in ((0, 5), (0, 2), (2, 4), (3, 5), (4, 5)):
            part = take_rows(whole, slice(low, high))
            expected = collate(rows[low:high], max(min(4, high) - low, 0), PAD)
            assert part.keys() == expected.keys() and num_rows(part) == high - low
            for name in {"row_mask", "margin"} & part.keys():
                assert torch.equal(part[name], expected[name])
            for name in ("attention_mask", "loss_mask", "response_mask", "answer_mask", "ranks"):
                if name in part:
                    assert part[name].sum(1).tolist() == expected[name].sum(1).tolist(), name
            real, wanted = part["attention_mask"], expected["attention_mask"]
            assert part["input_ids"][real].tolist() == expected["input_ids"][wanted].tolist()


def test_collate_prompts_pads_on_the_left():
    batch = collate_prompts([{"prompt_ids": [9]}, {"prompt_ids": [3, 9, 4]}], PAD)
    check(batch, input_ids=[[9, 9, 9], [3, 9, 4]], attention_mask=[[F, F, T], [T, T, T]])


def test_collators_pad_to_the_longest_of_the_micro_batch():
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(0, 9, n).tolist(), "loss_mask": [F] * n} for n in (3, 17, 5)]
    assert collate_sft(rows, 3, PAD)["input_ids"].shape == (3, 17)
    assert collate_sft(rows[:1], 1, PAD)["input_ids"].shape == (1, 3)


def test_show_batch(monkeypatch):
    tokenizer = train_tokenizer([], 258)
    ids = tokenizer("ab\x1bé!")["input_ids"]
    row = torch.tensor([[*ids, tokenizer.pad_token_id]] * 3)
    real = row != tokenizer.pad_token_id
    learned = torch.tensor([[F, T, T, T, T, F, F]] * 3)
    shown = show_batch(tokenizer, row, real, learned)
    assert shown == "\n\n".join(f"row {n}: 6 tokens, 4 in the loss\na[b\\x1bé]!" for n in range(2))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[2ma\x1b[0m\x1b[32mb\\x1bé\x1b[0m\x1b[2m!\x1b[0m" in show_batch(tokenizer, row, real, learned)
    monkeypatch.setenv("NO_COLOR", "1")
    assert show_batch(tokenizer, row, real, learned) == shown
