"""Answers as batches, their log-probabilities, and the reference's on disk."""

import copy
import gc
import os
from pathlib import Path
from types import SimpleNamespace

from dschat.data.collate_answers import collate_feedback, collate_pairs, mismatched_rows
from dschat.engine.deepspeed_engine import create_frozen_model
from dschat.engine.distributed import init_runtime
from dschat.engine.release import release
from dschat.errors import UserError
from dschat.report.progress import Console
from dschat.rlhf import reference_logprobs as module
from dschat.rlhf.answer_logprobs import gather_answers, score_answers, with_mismatched_logps
from dschat.rlhf.answer_rows import AnswerRows
from dschat.rlhf.reference_logprobs import reference_logprobs, weights_hash, with_frozen_model
from tests.dpo_oracle import logp
from tests.dpo_parts import MAX_LEN, answer_rows
from tests.families import FAMILIES, tiny_model

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

PAIRS = [
    {"prompt_len": 2, "chosen_ids": [11, 12, 13, 14, 15], "rejected_ids": [11, 12, 16]},
    {"prompt_len": 3, "chosen_ids": [21, 22, 23, 24], "rejected_ids": [21, 22, 23, 25, 26]},
]
FEEDBACK = [
    {"prompt_len": 2, "input_ids": [11, 12, 13], "good": True},
    {"prompt_len": 1, "input_ids": [21, 22, 23, 24, 25], "good": False},
]


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model("llama", tokenizer)


@pytest.fixture
def pairs(data_file, cache_dir, tokenizer):
    return answer_rows(data_file, cache_dir, tokenizer, is_paired=True)


@pytest.fixture
def feedback(data_file, cache_dir, tokenizer):
    return answer_rows(data_file, cache_dir, tokenizer, is_paired=False)


# Batches


def test_pairs_are_padded_on_the_left_with_the_answers_at_the_right_edge():
    batch = collate_pairs(PAIRS, 2, 0)
    assert batch["input_ids"].tolist() == [
        [11, 12, 13, 14, 15],
        [0, 21, 22, 23, 24],
        [0, 0, 11, 12, 16],
        [21, 22, 23, 25, 26],
    ]
    assert batch["attention_mask"].int().tolist() == [[1] * 5, [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1] * 5]
    assert batch["response_mask"].int().tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["row_mask"].tolist() == [True, True]
    assert all(batch[name].dtype == torch.bool for name in ("attention_mask", "response_mask", "row_mask"))


def test_the_pad_token_inside_an_answer_counts():
    batch = collate_pairs(PAIRS, 2, 24)
    assert batch["response_mask"].sum(1).tolist() == [3, 1, 1, 2]
    assert batch["attention_mask"].sum(1).tolist() == [5, 4, 3, 5]


def test_a_row_that_fills_up_has_no_answer_but_keeps_its_tokens():
    batch = collate_pairs(PAIRS, 1, 0)
    assert batch["row_mask"].tolist() == [True, False]
    assert batch["response_mask"].sum(1).tolist() == [3, 0, 1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [5, 4, 3, 5]


def test_a_mismatched_answer_follows_the_rows_own_prompt_and_is_cut():
    batch = collate_feedback(FEEDBACK, FEEDBACK[::-1], 2, 0, 5)
    assert batch["input_ids"].tolist() == [
        [0, 0, 11, 12, 13],
        [21, 22, 23, 24, 25],
        [11, 12, 22, 23, 24],
        [0, 0, 0, 21, 13],
    ]
    assert batch["response_mask"].sum(1).tolist() == [1, 4, 3, 1]
    assert batch["good"].tolist() == [True, False]


@pytest.mark.parametrize("size", [2, 3, 50])
def test_every_row_borrows_from_another_and_lends_once(size):
    others = mismatched_rows(size, 3)
    assert sorted(others) == list(range(size)) and all(i != other for i, other in enumerate(others))
    assert others == mismatched_rows(size, 3)


def test_the_seed_draws_whose_answer_is_borrowed():
    assert mismatched_rows(50, 3) != mismatched_rows(50, 4)


@pytest.mark.parametrize(
    ("good", "told"), [([], "no rows"), ([True, True], "not good ones only"), ([False], "not bad ones only")]
)
def test_rows_without_both_sides_are_refused(good, told):
    features = {"good": datasets.Value("bool"), "prompt_len": datasets.Value("int32")}
    rows = datasets.Dataset.from_dict({"good": good, "prompt_len": [1] * len(good)}, datasets.Features(features))
    with pytest.raises(UserError, match=told):
        AnswerRows(rows, False, pad_token_id=0, max_len=8, seed=0, batch_size=2, runtime=init_runtime(0))


# Log-probabilities


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answers_log_probability_is_that_of_its_row_alone(family, tokenizer, pairs):
    model = tiny_model(family, tokenizer)
    batch = pairs.collate(pairs.steps[0][0])
    with torch.no_grad():
        scored = score_answers(model, model, batch)
        for i, row in enumerate(pairs.rows.select(range(3))):
            for column, name in enumerate(("chosen_ids", "rejected_ids")):
                assert scored.logps[i, column].item() == pytest.approx(
                    logp(model, row[name], row["prompt_len"]).item(), rel=2e-5
                )
                assert scored.lengths[i, column] == len(row[name]) - row["prompt_len"]


def test_a_known_second_half_is_taken_as_it_is(model, feedback):
    batch = feedback.collate(feedback.steps[0][0])
    with torch.no_grad():
        whole = score_answers(model, model, batch)
        part = score_answers(model, model, batch | {"mismatched_logps": torch.full((8,), -3.0)})
    assert torch.allclose(whole.logps[:, 0], part.logps[:, 0], atol=1e-5)
    assert part.logps[:, 1].tolist() == [-3.0] * 8 and torch.equal(whole.lengths, part.lengths)


def test_the_mean_over_mismatched_answers_leaves_out_what_fills_up(model, feedback):
    steps = [feedback.steps[0][0], feedback.steps[-1][0]]
    assert steps[1].num_real < 8
    batches = [feedback.collate(step) for step in steps]
    ratios = []
    for batch in batches:
        batch["ref_logps"] = torch.randn(8, 2, generator=torch.Generator().manual_seed(len(ratios)))
    engine = copy.deepcopy(model).train()
    known, kl = with_mismatched_logps(engine, model, batches, feedback.runtime)
    logps = [batch["mismatched_logps"] for batch in known]
    for step, batch, values in zip(steps, batches, logps, strict=True):
        for i, row in enumerate(step.indices[: step.num_real]):
            own, other = feedback.rows[row], feedback.rows[feedback.others[row]]
            ids = own["input_ids"][: own["prompt_len"]] + other["input_ids"][other["prompt_len"] :]
            expected = logp(model, ids[:MAX_LEN], own["prompt_len"]).item()
            assert values[i].item() == pytest.approx(expected, rel=2e-5)
            ratios.append(expected - batch["ref_logps"][i, 1].item())
    assert kl.item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-4) and not engine.training
    assert not any(values.requires_grad for values in logps)


def test_gathered_rows_are_the_real_ones_in_order(model, pairs):
    with torch.no_grad():
        parts = [score_answers(model, model, batch) for batch in pairs.in_order()]
    rows = gather_answers(parts, pairs.runtime)
    assert len(rows.logps) == len(pairs.rows) and rows.row_mask.all()
    expected = [len(row["chosen_ids"]) - row["prompt_len"] for row in pairs.rows]
    assert rows.lengths[:, 0].tolist() == expected
    assert not rows.logps.requires_grad


# The hash of the weights


def test_the_hash_is_of_content_and_not_of_place(model, tmp_path, tokenizer):
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab")
    assert weights_hash(one) == weights_hash(other) == weights_hash(model)


def test_any_change_of_the_reference_changes_the_hash(model):
    before = weights_hash(model)
    changed = []
    for name in dict(model.named_parameters()):
        other = copy.deepcopy(model)
        flat = dict(other.named_parameters())[name].data.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(10.0))
        changed.append(weights_hash(other))
    assert before not in changed and len(set(changed)) == len(changed)
    other = copy.deepcopy(model)
    other.config.rms_norm_eps *= 2
    assert weights_hash(other) != before
    assert weights_hash(copy.deepcopy(model).to(torch.bfloat16)) != before


def test_equal_bytes_of_another_name_shape_or_type_are_another_reference():
    def hashed(name: str, tensor: torch.Tensor) -> str:
        holder = torch.nn.Module()
        holder.config = SimpleNamespace(to_dict=dict)
        holder.register_buffer(name, tensor)
        return weights_hash(holder)

    values = torch.arange(6.0).to(torch.bfloat16)
    others = [hashed("b", values), hashed("a", values.view(2, 3)), hashed("a", values.view(torch.float16))]
    assert len({hashed("a", values), *others}) == 4 and hashed("a", values) == hashed("a", values.clone())


# The cache


def ask(model, rows, cache, weights="w"):
    return reference_logprobs(model, model, weights, rows, str(cache), Console(False))


def stored(cache) -> Path:
    (path,) = (cache / "reference_logprobs").iterdir()
    return path


def test_values_are_computed_once_and_read_afterwards(model, pairs, tmp_path):
    values, was_read = ask(model.train(), pairs, tmp_path)
    assert not was_read and values.shape == (len(pairs.rows), 2) and values.dtype == torch.float32
    row = pairs.rows[len(pairs.rows) - 1]
    for column, name in enumerate(("chosen_ids", "rejected_ids")):
        expected = logp(model, row[name], row["prompt_len"]).item()
        assert values[-1, column].item() == pytest.approx(expected, rel=2e-5)
    again, was_read = ask(None, pairs, tmp_path)  # no model is asked
    assert was_read and torch.equal(values, again)


def test_dropout_plays_no_part(tokenizer, pairs, tmp_path):
    model = tiny_model("gpt2", tokenizer).train()
    assert model.config.resid_pdrop > 0
    assert torch.equal(ask(model, pairs, tmp_path / "a")[0], ask(model.train(), pairs, tmp_path / "b")[0])


def test_the_batch_size_changes_no_value_but_its_last_bits(model, data_file, cache_dir, tokenizer, tmp_path):
    values = [
        ask(model, answer_rows(data_file, cache_dir, tokenizer, True, size), tmp_path)[0] for size in (1, 3, 100)
    ]
    assert torch.allclose(values[0], values[1], rtol=2e-5) and torch.allclose(values[0], values[2], rtol=2e-5)


@pytest.mark.parametrize(
    "damage",
    ["cut short", "empty", "text", "not finite", "a row less", "another name", "another type", "gone"],
)
def test_a_damaged_file_is_computed_again(damage, model, pairs, tmp_path):
    values, _ = ask(model, pairs, tmp_path)
    path = stored(tmp_path)
    if damage in ("cut short", "empty", "text"):
        path.write_bytes({"cut short": path.read_bytes()[:-5], "empty": b"", "text": b"no tensors" * 9}[damage])
    elif damage == "gone":
        path.unlink()
    else:
        broken = {
            "not finite": {"logps": torch.where(torch.arange(2) > 0, values, torch.nan)},
            "a row less": {"logps": values[1:].contiguous()},
            "another name": {"values": values},
            "another type": {"logps": values.double()},
        }[damage]
        save_file(broken, str(path))
    again, was_read = ask(model, pairs, tmp_path)
    assert not was_read and torch.equal(values, again)
    assert torch.equal(load_file(str(path))["logps"], values)
    assert ask(None, pairs, tmp_path)[1]


def test_another_reference_other_rows_another_seed_or_shape_are_other_entries(
    model, data_file, cache_dir, tokenizer, tmp_path
):
    def rows(is_paired=True, **changes):
        made = answer_rows(data_file, cache_dir, tokenizer, is_paired)
        shape = {"pad_token_id": 0, "max_len": MAX_LEN, "seed": 7, "batch_size": 8, "runtime": made.runtime} | changes
        return AnswerRows(shape.pop("rows", made.rows), is_paired, **shape)

    fewer = rows().rows.select(range(5, 9))
    cases = [(rows(), "v"), (rows(rows=fewer), "w"), (rows(rows=fewer.select([1, 0, 2, 3])), "w")]
    cases += [(rows(False), "w"), (rows(False, seed=8), "w"), (rows(max_len=60), "w"), (rows(batch_size=4), "w")]
    assert not ask(model, rows(), tmp_path)[1]
    for case, weights in cases:
        assert not ask(model, case, tmp_path, weights)[1]
    for case, weights in [(rows(), "w"), (rows(seed=8), "w"), *cases]:  # pairs borrow nothing
        assert ask(None, case, tmp_path, weights)[1]


def test_a_reference_that_is_not_finite_is_refused_and_not_kept(model, pairs, tmp_path):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(UserError, match="not finite") as error:
        ask(broken, pairs, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "reference_logprobs").exists()


def test_a_run_that_is_killed_while_writing_leaves_no_entry(model, pairs, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(model, pairs, tmp_path)
    monkeypatch.undo()
    assert not any(name.endswith(".safetensors") for name in os.listdir(tmp_path / "reference_logprobs"))
    assert not ask(model, pairs, tmp_path)[1]


# Another model as the reference


def live_bytes() -> int:
    """Of all tensors, each storage once."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_reference_is_out_of_memory_when_it_has_answered(zero_stage, model_dirs, tokenizer, pairs, tmp_path):
    path, found, sizes = model_dirs("llama"), [], []
    plain = AutoModelForCausalLM.from_pretrained(path)
    expected = ask(plain, pairs, tmp_path / "plain")[0]
    weights = weights_hash(plain)
    size = sum(parameter.numel() * 4 for parameter in plain.parameters())
    del plain

    def use(model, family, told):
        assert told == weights
        found.append(reference_logprobs(model, family, told, pairs, str(tmp_path), Console(False))[0])
        sizes.append(live_bytes())

    before = live_bytes()
    placed = {"dtype": torch.float32, "zero_stage": zero_stage, "runtime": pairs.runtime, "use_liger_kernel": False}
    with_frozen_model(path, path, tokenizer, MAX_LEN, use, **placed)
    assert torch.allclose(found[0], expected, rtol=1e-5)
    assert sizes[0] - before >= size
    assert live_bytes() - before < size / 20


def test_releasing_empties_the_shares_of_a_rank(model_dirs):
    model = AutoModelForCausalLM.from_pretrained(model_dirs("llama"))
    engine = create_frozen_model(model, zero_stage=3, dtype=torch.float32, device=init_runtime(0).device)
    assert all(parameter.ds_tensor.numel() for parameter in model.parameters())
    release(engine)
    assert not any(parameter.ds_tensor.numel() + parameter.numel() for parameter in model.parameters())


def test_a_reference_with_another_tokenizer_or_too_few_positions_is_refused(model_dirs, tokenizer, tmp_path):
    from dschat.data.tokenizer import train_tokenizer
    from tests.families import save_tiny_model

    path, other = model_dirs("llama"), str(tmp_path / "other")
    save_tiny_model("llama", train_tokenizer(["quite other words", "than those"], 300), other)
    placed = {"dtype": torch.float32, "zero_stage": 0, "runtime": init_runtime(0), "use_liger_kernel": False}
    with pytest.raises(UserError, match="different tokenizers"):
        with_frozen_model(other, path, tokenizer, MAX_LEN, lambda *_: None, **placed)
    with pytest.raises(UserError, match="256 positions"):
        with_frozen_model(path, path, tokenizer, 300, lambda *_: None, **placed)
