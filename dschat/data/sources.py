"""`--data_path` -> the training and evaluation examples of one stage.

Each source is read whole, whatever the stage; held-out rows are taken first, then the stage's share of the rest, and
only then what the stage can use: so no stage trains on what another evaluates on, and shares never overlap.
"""

from collections import Counter
from collections.abc import Sequence

from dschat.data.specs import parse_source
from dschat.data.tables import OWN_STAGE, concatenated, for_stage, read_source, weighted
from dschat.errors import UserError

import datasets
import numpy as np

STAGES = ("sft", "preference", "prompt")  # stage_index 0, 1, 2; --data_split has a share for each


def load_examples(
    data_path: list[str], part: str, stage: str, *, cache_dir: str, seed: int, skip_bad_records: bool = False
) -> tuple[datasets.Dataset, Counter[str]]:
    """All examples of one part ("train" or "eval") that a stage (of STAGE_NEEDS) can use, weighted."""
    tables, counter = [], Counter[str]()
    for text in data_path:
        path, weight = parse_source(text)
        table, dropped = read_source(path, part, stage, cache_dir, skip_bad_records)
        counter += dropped
        if table is not None:
            usable, dropped = for_stage(table, stage)
            counter += dropped
            tables.append(weighted(usable, weight, seed))
    return concatenated(tables, stage, counter, f"{' '.join(data_path)} ({part} part)"), counter


def split_stage(num_rows: int, data_split: str, stage_index: int, seed: int) -> np.ndarray:
    """The rows of one stage, in the order of a seeded permutation; the stages' rows are disjoint and cover all.

    "2,4,4" on 10 rows: 2, 4 and 4 of them. Cut points are round(num_rows * share so far), so that every size is
    within one row of its exact share.
    """
    shares = _shares(data_split)
    cuts = np.rint(num_rows * np.cumsum([0.0, *shares]) / sum(shares)).astype(int)
    return np.random.default_rng(seed).permutation(num_rows)[cuts[stage_index] : cuts[stage_index + 1]]


def _shares(data_split: str) -> list[float]:
    try:
        shares = [float(share) for share in data_split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(STAGES) or not all(0 <= share < float("inf") for share in shares) or sum(shares) <= 0:
        raise UserError(f"--data_split {data_split}: must be three numbers, such as 2,4,4 (sft, reward or dpo, ppo)")
    return shares


def hold_out(num_rows: int, eval_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows held out), both sorted: at least one row is held out, and at least one is not."""
    if not 0 <= eval_fraction < 1:
        raise UserError(f"--eval_fraction {eval_fraction}: must be at least 0 and below 1, such as 0.1")
    size = min(max(1, round(num_rows * eval_fraction)), num_rows - 1) if eval_fraction else 0
    order = np.random.default_rng([seed, 1]).permutation(num_rows)  # not the permutation of split_stage
    return np.sort(order[size:]), np.sort(order[:size])


def load_stage_data(
    data_path: Sequence[str],
    eval_data_path: Sequence[str],
    stage: str,
    data_split: str,
    eval_fraction: float,
    seed: int,
    cache_dir: str,
    skip_bad_records: bool = False,
) -> tuple[datasets.Dataset, datasets.Dataset, Counter[str]]:
    """(training examples, evaluation examples, what was dropped and why) of "sft", "preference", "feedback" (single
    answers, good or bad, out of the share of "preference") or "prompt".

    Evaluation: `eval_data_path`, or else each source's own eval split, or else `eval_fraction` of its rows, the same
    rows for every stage.
    """
    train, evaluation, counter = [], [], Counter[str]()
    index = STAGES.index(OWN_STAGE.get(stage, stage))
    for text in data_path:
        path, weight = parse_source(text)
        table, dropped = read_source(path, "train", stage, cache_dir, skip_bad_records)
        assert table is not None, "every source has a train part"
        counter += dropped
        if not eval_data_path:
            own, dropped = read_source(path, "eval", stage, cache_dir, skip_bad_records)
            counter += dropped
            if own is None:
                kept, held = hold_out(len(table), eval_fraction, seed)
                table, own = table.select(kept), table.select(held)
            evaluation.append(for_stage(own, stage)[0])
        if path != "toy":  # its records already belong to one stage
            table = _share(table, data_split, index, seed, path)
        usable, dropped = for_stage(table, stage)
        counter += dropped
        train.append(weighted(usable, weight, seed))
    examples = concatenated(train, stage, counter, f"--data_path {' '.join(data_path)}")
    for text in eval_data_path:
        table, dropped = _eval_table(parse_source(text)[0], stage, cache_dir, skip_bad_records)
        counter += dropped
        evaluation.append(table)
    if not eval_data_path and not any(map(len, evaluation)):
        return examples, examples.select([]), counter
    return examples, concatenated(evaluation, stage, counter, f"--eval_data_path {' '.join(eval_data_path)}"), counter


def load_evaluation(
    data_path: Sequence[str], stage: str, *, eval_fraction: float, seed: int, cache_dir: str, skip_bad_records: bool
) -> tuple[datasets.Dataset, Counter[str]]:
    """(examples to evaluate on, what was dropped and why), for tools that train nothing.

    Of each source the part for evaluation where it has one, else all of it, or with an ``eval_fraction`` above 0 the
    rows that `load_stage_data` holds out with this fraction and seed.
    """
    tables, dropped = [], Counter[str]()
    for path, _ in map(parse_source, data_path):
        table, reasons = read_source(path, "eval", stage, cache_dir, skip_bad_records)
        if table is None:
            table, reasons = read_source(path, "train", stage, cache_dir, skip_bad_records)
            assert table is not None, "every source has a train part"
            if eval_fraction:
                table = table.select(hold_out(len(table), eval_fraction, seed)[1])
        usable, unusable = for_stage(table, stage)
        tables.append(usable)
        dropped += reasons + unusable
    return concatenated(tables, stage, dropped, f"--data_path {' '.join(data_path)}"), dropped


def _share(table: datasets.Dataset, split: str, index: int, seed: int, path: str) -> datasets.Dataset:
    rows = split_stage(len(table), split, index, seed)
    if not len(rows):
        sizes = [len(split_stage(len(table), split, i, seed)) for i in range(len(STAGES))]
        counts = ", ".join(f"{name} {size}" for name, size in zip(STAGES, sizes, strict=True))
        raise UserError(
            f"--data_split {split} leaves no row of {path} for the {STAGES[index]} stage ({counts}); "
            "give its place a larger share or add data"
        )
    return table.select(rows)


def _eval_table(
    path: str, stage: str, cache_dir: str, skip_bad_records: bool
) -> tuple[datasets.Dataset, Counter[str]]:
    """A source given for evaluation: its eval split where it has one, else all of it."""
    table, counter = read_source(path, "eval", stage, cache_dir, skip_bad_records)
    if table is None:
        table, counter = read_source(path, "train", stage, cache_dir, skip_bad_records)
    assert table is not None, "every source has a train part"
    usable, dropped = for_stage(table, stage)
    return usable, counter + dropped
