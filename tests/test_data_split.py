"""The split of rows between stages and evaluation, and what becomes of weights."""

import json
import math
import sys
import types

from dschat.data.sources import hold_out, load_stage_data, split_stage
from dschat.errors import UserError

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def pair(n):
    return {"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def questions(table):
    return [row["prompt"][0]["content"] for row in table]


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(0, 300),
    shares=st.tuples(*[st.sampled_from([0, 0.5, 1, 2, 3, 4, 10])] * 3).filter(any),
    seed=st.integers(0, 5),
)
def test_stages_share_the_rows_exactly(num_rows, shares, seed):
    split = ",".join(map(str, shares))
    parts = [split_stage(num_rows, split, stage, seed) for stage in range(3)]
    assert sorted(np.concatenate(parts)) == list(range(num_rows))
    for part, share in zip(parts, shares, strict=True):
        assert math.fabs(len(part) - num_rows * share / sum(shares)) < 1 + 1e-9
        assert share or not len(part)


def test_split_is_a_seeded_shuffle():
    assert [len(split_stage(10, "2,4,4", stage, 0)) for stage in range(3)] == [2, 4, 4]
    assert list(split_stage(50, "1,0,0", 0, 0)) == list(split_stage(50, "1,0,0", 0, 0)) != list(range(50))
    assert list(split_stage(50, "1,0,0", 0, 0)) != list(split_stage(50, "1,0,0", 0, 1))


@pytest.mark.parametrize("split", ["", "1,2", "1,2,3,4", "a,b,c", "0,0,0", "-1,2,2", "nan,1,1", "inf,1,1"])
def test_bad_split(split):
    with pytest.raises(UserError, match="--data_split .*: must be three numbers, such as 2,4,4"):
        split_stage(10, split, 0, 0)


@settings(max_examples=40, deadline=None)
@given(num_rows=st.integers(1, 200), fraction=st.sampled_from([0, 0.001, 0.1, 0.5, 0.99]))
def test_hold_out(num_rows, fraction):
    train, held = hold_out(num_rows, fraction, 3)
    assert sorted([*train, *held]) == list(range(num_rows)) and len(train) >= 1
    assert len(held) == (min(max(1, round(num_rows * fraction)), num_rows - 1) if fraction else 0)


@pytest.fixture
def stage_data(tmp_path):
    def stage_data(stage, *paths, evaluation=(), split="2,4,4", fraction=0.1, **options):
        cache = str(tmp_path / "cache")
        return load_stage_data([str(p) for p in paths], list(evaluation), stage, split, fraction, 5, cache, **options)

    return stage_data


def test_no_stage_trains_on_held_out_rows_or_on_another_stage_s(tmp_path, stage_data):
    records = [pair(n) if n % 3 else {"prompt": f"question {n}"} for n in range(90)]
    path = write(tmp_path / "a.jsonl", records)
    parts = {stage: stage_data(stage, path) for stage in ("sft", "preference", "prompt")}
    held = {stage: set(questions(evaluation)) for stage, (_, evaluation, _) in parts.items()}
    assert len(held["prompt"]) == 9 and held["sft"] == held["preference"] < held["prompt"]
    trained = [question for train, _, _ in parts.values() for question in questions(train)]
    assert len(trained) == len(set(trained)) and not set(trained) & held["prompt"]
    dropped = parts["sft"][2]["no response"] + parts["preference"][2]["no preference between responses"]
    assert len(trained) + dropped == 81


def test_own_eval_split_is_used_and_all_of_train_is_trained_on(tmp_path, stage_data):
    splits = {"train": [pair(n) for n in range(10)], "test": [pair(n) for n in range(100, 103)]}
    table = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    table.save_to_disk(tmp_path / "saved")
    train, evaluation, _ = stage_data("sft", tmp_path / "saved", split="1,0,0")
    assert len(train) == 10 and questions(evaluation) == ["question 100", "question 101", "question 102"]
    plain = write(tmp_path / "b.jsonl", [pair(n) for n in range(200, 220)])
    train, evaluation, _ = stage_data("sft", tmp_path / "saved", plain, split="1,0,0")
    assert (len(train), len(evaluation)) == (28, 5), "3 of its own, 2 held out of the other"


def test_eval_data_path_leaves_every_row_for_training(tmp_path, stage_data):
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(10)])
    other = write(tmp_path / "b.jsonl", [pair(n) for n in range(20, 23)])
    train, evaluation, _ = stage_data("preference", path, evaluation=[other], split="0,1,0")
    assert len(train) == 10 and questions(evaluation) == ["question 20", "question 21", "question 22"]


def test_eval_data_path_means_its_eval_split_where_it_has_one(tmp_path, stage_data):
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(10)])
    tables = {name: datasets.Dataset.from_list([pair(name)]) for name in ("train", "test")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    _, evaluation, _ = stage_data("preference", path, evaluation=[str(tmp_path / "saved")])
    assert questions(evaluation) == ["question test"]


def test_no_evaluation_when_nothing_is_held_out(tmp_path, stage_data):
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(4)])
    train, evaluation, _ = stage_data("sft", path, split="1,0,0", fraction=0)
    assert (len(train), len(evaluation)) == (4, 0) and evaluation.column_names == train.column_names
    with pytest.raises(UserError, match="--eval_fraction 1.*below 1"):
        stage_data("sft", path, fraction=1)


def test_weights_repeat_or_thin_the_training_rows_only(tmp_path, stage_data):
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(40)])
    for weight, size in [("0.25", 9), ("2.5", 90), ("0.001", 1)]:
        train, evaluation, _ = stage_data("sft", f"{path}:{weight}", split="1,0,0")
        assert (len(train), len(evaluation)) == (size, 4)
        assert len(set(questions(train))) == min(size, 36)


def test_stage_without_rows_names_the_flag_and_the_counts(tmp_path, stage_data):
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(20)])
    with pytest.raises(UserError, match=r"--data_split 1,0,0 leaves no row .* \(sft 18, preference 0, prompt 0\)"):
        stage_data("preference", path, split="1,0,0")


def test_toy_records_already_belong_to_a_stage(tmp_path, stage_data, monkeypatch):
    def records(stage, part):
        for n in range(5 if part == "train" else 2):
            yield pair(f"{stage} {part} {n}")

    stub = types.ModuleType("dschat.data.toy")
    stub.records = records
    stub.__file__ = write(tmp_path / "toy.py", [])
    monkeypatch.setitem(sys.modules, "dschat.data.toy", stub)
    monkeypatch.setattr("dschat.data.toy", stub, raising=False)
    train, evaluation, _ = stage_data("preference", "toy", split="1,0,0")
    assert questions(train) == [f"question preference train {n}" for n in range(5)]
    assert questions(evaluation) == [f"question preference eval {n}" for n in range(2)]
    stub.records = lambda stage, part: iter([pair("new")])
    assert len(stage_data("preference", "toy")[0]) == 5, "its records are not made again"
    write(tmp_path / "toy.py", [{}])
    assert questions(stage_data("preference", "toy")[0]) == ["question new"], "unless its code changed"
    stub.records = lambda stage, part: iter([pair(f"{stage} {part} newest")])
    monkeypatch.setattr("dschat.data.toy_facts.__file__", write(tmp_path / "toy_facts.py", []))
    for stage in ("preference", "prompt"):
        train, evaluation, _ = stage_data(stage, "toy")
        assert questions(train) + questions(evaluation) == [f"question {stage} {p} newest" for p in ("train", "eval")]
