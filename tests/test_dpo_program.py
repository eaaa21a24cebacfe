"""The DPO program: its loss against a plain loop, its limits, and what its user meets."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.micro_batches import MicroBatches
from dschat.errors import UserError
from dschat.rlhf.preference_objective import Objective, probability_above
from dschat.rlhf.reference_logprobs import reference_logprobs
from dschat.rlhf.specs import CONSTANTS
from tests.conftest import ROOT
from tests.dpo_oracle import AWAY, kto_losses, mean_loss, pair_loss
from tests.dpo_parts import MAX_LEN, PlainEngine, answer_rows, lines
from tests.families import tiny_model
from tests.programs import STEPS, arguments, program, run

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LOSSES = tuple(CONSTANTS)
PAIRED = tuple(loss for loss in LOSSES if loss != "kto")


@pytest.fixture(scope="module")
def models(tokenizer):
    """A policy that has moved away from its reference."""
    reference = tiny_model("llama", tokenizer)
    policy = copy.deepcopy(reference)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std())
    return policy, reference


@pytest.fixture(scope="module")
def few(data_file, cache_dir, tokenizer, models):
    """loss -> seven rows, so that no batch size divides them, with the reference's log-probabilities."""
    from dschat.report.progress import Console
    from dschat.rlhf.answer_rows import AnswerRows

    made = {}
    for is_paired in (True, False):
        whole = answer_rows(data_file, cache_dir, tokenizer, is_paired)
        shape = {"pad_token_id": tokenizer.pad_token_id, "max_len": MAX_LEN, "seed": 3, "batch_size": 3}
        rows = AnswerRows(whole.rows.select(range(7)), is_paired, **shape, runtime=whole.runtime)
        found = reference_logprobs(models[1], models[1], "few", rows, cache_dir, Console(False))
        rows.ref_logps = found[0]
        made[is_paired] = rows
    return {loss: made[loss != "kto"] for loss in LOSSES}


def micro_batches(rows, size: int, num: int) -> list[dict]:
    """The seven rows as ``num`` micro-batches of ``size``, filled up at the end."""
    from dschat.data.loader import epoch_batches

    (step,) = epoch_batches(len(rows.rows), size, num, 0, 1, seed=0, epoch=0, shuffle=False)
    return [rows.collate(micro_batch) for micro_batch in step]


def one_step(policy, objective, rows, size: int, num: int) -> tuple[dict, dict]:
    """(statistics, gradients) of `train_step`."""
    engine = PlainEngine(copy.deepcopy(policy))
    batches = micro_batches(rows, size, num)
    stats, num_rows = program("dpo").train_step(
        engine, engine.model, objective, batches, MicroBatches(rows.runtime), rows.runtime
    )
    assert num_rows == len(rows.rows)
    return stats, engine.gradients()


def distance(one: dict, other: dict) -> float:
    """The largest difference, as a share of the largest gradient."""
    assert one.keys() == other.keys()
    largest = max(value.abs().max() for value in other.values())
    return max(((one[name] - other[name]).abs().max() / largest).item() for name in other)


# The step against a plain loop


@pytest.mark.parametrize("away", [False, True], ids=["defaults", "away from the defaults"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_step_is_that_of_a_plain_loop(loss_type, away, models, few):
    constants = AWAY[loss_type] if away else dict(CONSTANTS[loss_type])
    if not away and loss_type == "simpo":
        constants["simpo_gamma"] = 1.0  # half of beta
    rows = few[loss_type]
    stats, gradients = one_step(models[0], Objective(loss_type, constants), rows, 4, 2)

    policy, reference = (copy.deepcopy(model).double() for model in models)
    others = [rows.rows[i] for i in rows.others] if loss_type == "kto" else None
    loss = mean_loss(loss_type, constants, policy, reference, list(rows.rows), others, MAX_LEN)
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: p.grad.float() for name, p in policy.named_parameters() if p.grad is not None}
    assert max(value.abs().max() for value in expected.values()) > 1e-3
    assert distance(gradients, expected) < 1e-5
    if loss_type == "kto" and not away:
        assert stats["kl"] > 0.1, "z0 plays a part"


@pytest.mark.parametrize("loss_type", LOSSES)
def test_accumulation_changes_nothing(loss_type, models, few):
    objective = Objective(loss_type, AWAY[loss_type])
    stats, gradients = one_step(models[0], objective, few[loss_type], 8, 1)
    for size, num in ((4, 2), (2, 4), (1, 8)):
        other_stats, other = one_step(models[0], objective, few[loss_type], size, num)
        assert distance(other, gradients) < 5e-6
        assert other_stats == pytest.approx(stats, rel=1e-4, abs=1e-6)


def test_the_statistics_of_a_step_of_pairs(models, few):
    """Rewards beta * (policy - reference), from the oracle's sequences."""
    from tests.dpo_oracle import logp

    rows = few["sigmoid"]
    stats, _ = one_step(models[0], Objective("sigmoid", AWAY["sigmoid"]), rows, 4, 2)
    with torch.no_grad():
        rewards = {
            name: [
                0.3
                * (logp(models[0], row[key], row["prompt_len"]) - logp(models[1], row[key], row["prompt_len"])).item()
                for row in rows.rows
            ]
            for name, key in (("chosen_reward", "chosen_ids"), ("rejected_reward", "rejected_ids"))
        }
    for name, values in rewards.items():
        assert stats[name] == pytest.approx(sum(values) / 7, abs=1e-4)
    margins = [a - b for a, b in zip(rewards["chosen_reward"], rewards["rejected_reward"], strict=True)]
    assert stats["margin"] == pytest.approx(sum(margins) / 7, abs=1e-4)
    assert stats["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 7)
    assert stats["num_pairs"] == 7
    sft = [
        -logp(models[0], r["chosen_ids"], r["prompt_len"]) / (len(r["chosen_ids"]) - r["prompt_len"])
        for r in rows.rows
    ]
    assert stats["sft_loss"] == pytest.approx(sum(sft).item() / 7, rel=1e-4)


def test_what_fills_up_a_batch_plays_no_part(models, few):
    rows = few["kto"]
    objective = Objective("kto", AWAY["kto"])
    batches = micro_batches(rows, 4, 2)
    results = []
    for change in (0, 5):
        for batch in batches:
            filler = ~batch["row_mask"].repeat(2)
            batch["input_ids"][filler] = batch["input_ids"][filler] * 0 + 7 + change
            batch["ref_logps"][~batch["row_mask"]] = math.nan if change else 0.0
            batch["good"][~batch["row_mask"]] = bool(change)
        engine = PlainEngine(copy.deepcopy(models[0]))
        results.append(
            (
                program("dpo").train_step(
                    engine, engine.model, objective, batches, MicroBatches(rows.runtime), rows.runtime
                )[0],
                engine,
            )
        )
    assert results[0][0] == results[1][0]
    one, other = (engine.gradients() for _, engine in results)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_an_evaluation_after_a_step_has_no_dropout(loss_type, tokenizer, few):
    rows, objective = few[loss_type], Objective(loss_type, AWAY[loss_type])
    engine = PlainEngine(tiny_model("gpt2", tokenizer))
    found = []
    for _ in range(2):
        engine.train()
        found.append(
            program("dpo").evaluate(engine, engine.model, objective, rows.in_order(), MicroBatches(rows.runtime))
        )
    assert found[0] == found[1]


# Accuracy without pairs


def test_the_probability_that_a_good_answer_is_above_a_bad_one():
    """By counting: (2 > 1), (2 = 2), (3 > 1), (3 > 2), (0 < 1), (0 < 2)."""
    assert probability_above(torch.tensor([2.0, 3.0, 0.0]), torch.tensor([2.0, 1.0])) == pytest.approx(3.5 / 6)
    assert probability_above(torch.zeros(3), torch.zeros(2)) == 0.5
    assert probability_above(torch.tensor([1.0]), torch.tensor([0.0, -1.0])) == 1
    assert math.isnan(probability_above(torch.tensor([]), torch.tensor([1.0])))
    assert math.isnan(probability_above(torch.tensor([1.0]), torch.tensor([])))


def test_the_probability_above_against_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    xs, ys = (torch.randint(0, 9, (size,), generator=generator).float() for size in (31, 17))
    wins = sum((x > y) + 0.5 * (x == y) for x in xs.tolist() for y in ys.tolist())
    assert probability_above(xs, ys) == pytest.approx(wins / (31 * 17))


# Whole programs


def dpo(model: str, data: str, cache: Path | str, out: Path, **flags) -> str:
    return run("dpo", data, str(cache), out, model_name_or_path=model, **flags)


def weights(directory: str) -> dict[str, torch.Tensor]:
    return load_file(str(Path(directory) / "model.safetensors"))


def same(one: str, other: str) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_before_training_all_is_tied_and_training_lowers_the_loss(
    loss_type, model_dirs, data_file, cache_dir, tmp_path
):
    flags = {"data_split": "0,1,0", "eval_data_path": data_file, "max_steps": 8, "lr_scheduler_type": "constant"}
    out = dpo(model_dirs("llama"), data_file, cache_dir, tmp_path, loss_type=loss_type, **flags)
    first, last = (lines(out)[i] for i in (0, -1))
    assert first["step"] == 0 and last["step"] == 8 and first["stage"] == "dpo"
    if loss_type not in ("simpo", "orpo"):
        at_the_start = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0, "kto": 0.5}
        assert first["eval/loss"] == pytest.approx(at_the_start[loss_type], abs=1e-6)
        assert first["eval/accuracy"] == 0.5 and first["eval/margin"] == 0
    if loss_type in ("sigmoid", "ipo", "hinge"):  # 0.5 lies in the middle of its interval
        assert 0.1 < first["eval/accuracy_low"] < 0.5 and first["eval/accuracy_high"] < 0.9
        assert first["eval/accuracy_low"] + first["eval/accuracy_high"] == pytest.approx(1)
    assert last["eval/loss"] < 0.97 * first["eval/loss"]
    assert last["eval/accuracy"] > first["eval/accuracy"] and last["eval/margin"] > first["eval/margin"]


@pytest.mark.parametrize(
    ("loss_type", "own"),
    [
        ("sigmoid", {"chosen_reward", "rejected_reward", "num_pairs", "perf/pairs_per_s"}),
        ("kto", {"good_reward", "bad_reward", "num_good", "num_bad", "kl", "perf/answers_per_s"}),
    ],
)
def test_what_a_run_leaves_behind(loss_type, own, model_dirs, data_file, cache_dir, tmp_path):
    flags = {"eval_interval": 1, "beta": 0.2, "max_steps": 3, "log_interval": 2}
    out = Path(dpo(model_dirs("llama"), data_file, cache_dir, tmp_path, loss_type=loss_type, **flags))
    shared = {"loss", "accuracy", "margin"}
    trained = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in trained] == [2, 3]
    assert set(trained[0]) == {"step", "stage", "time", "lr", "grad_norm", "num_bad_steps"} | shared | own
    measured = [line for line in lines(out) if "eval/loss" in line]
    assert [line["step"] for line in measured] == [0, 1, 2, 3]
    wanted = {f"eval/{name}" for name in shared | own if not name.startswith("perf")}
    wanted |= {"eval/accuracy_low", "eval/accuracy_high"} if loss_type == "sigmoid" else set()
    assert set(measured[0]) == {"step", "stage", "time"} | wanted
    record = json.loads((out / "run.json").read_text())
    assert record["role"] == "policy" and record["config"]["beta"] == 0.2 and record["metrics"]["eval/loss"] > 0
    assert record["config"]["desirable_weight"] == (None if loss_type == "sigmoid" else 1.0)
    assert len(record["data"]["train_fingerprint"]) > 8 and record["seed"] == 7
    assert (out / "tensorboard").is_dir() and (out / "generation_config.json").is_file()


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_the_whole_held_out_set_is_measured_and_the_saved_policy_is_the_measured_one(
    loss_type, model_dirs, data_file, cache_dir, tmp_path
):
    """The last evaluation again, row by row, from the saved directory and the start model, on plain transformers."""
    from dschat.data.collate_answers import mismatched_rows
    from dschat.data.prepare import load_rows

    model, found = model_dirs("llama"), []
    for size in (1, 3, 100):
        flags = {
            "per_device_eval_batch_size": size,
            "max_steps": 4,
            "loss_type": loss_type,
            "max_seq_len": 44,
            "eval_fraction": 0.5,
        }
        found.append(lines(dpo(model, data_file, cache_dir, tmp_path / str(size), **flags))[-1])
    config = program("dpo").Config(
        model_name_or_path=model, data_path=[data_file], output_dir="x", eval_fraction=0.5, data_output_path=cache_dir
    )
    kind = "feedback" if loss_type == "kto" else "preference"
    held_out = list(load_rows(config.data_spec(7), kind, load_tokenizer(model), 44).eval)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (tmp_path / "3", model))
    c = CONSTANTS[loss_type]
    with torch.no_grad():
        if loss_type == "kto":
            others = [held_out[i] for i in mismatched_rows(len(held_out), 7)]
            borrowed = (len(o["input_ids"]) - o["prompt_len"] for o in others)
            assert any(r["prompt_len"] + size > 44 for r, size in zip(held_out, borrowed, strict=True)), "one is cut"
            losses = kto_losses(c, policy, reference, held_out, others, 44)
            num = found[1]["eval/num_good"] + found[1]["eval/num_bad"]
        else:
            losses = [pair_loss(loss_type, c, policy, reference, row) for row in held_out]
            num = found[1]["eval/num_pairs"]
    assert num == len(held_out) > 5
    assert found[1]["eval/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    for other in (found[0], found[2]):
        names = [name for name in other if name.startswith("eval/")]
        assert [other[n] for n in names] == pytest.approx([found[1][n] for n in names], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_the_reference_is_read_the_second_time_and_changes_no_bit(
    loss_type, model_dirs, data_file, cache_dir, tmp_path, capsys
):
    told = []
    for name in "ab":
        dpo(model_dirs("llama"), data_file, tmp_path / "cache", tmp_path / name, loss_type=loss_type, max_steps=5)
        told.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("reference: ")])
    assert told[0] == [f"reference: {part} log-probabilities computed" for part in ("training", "held-out")]
    assert told[1] == [line.replace("computed", "read from the cache") for line in told[0]]
    assert same(tmp_path / "a", tmp_path / "b")


def test_another_template_or_one_changed_answer_is_computed_again(model_dirs, data_file, tmp_path, capsys):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    changed = tmp_path / "changed.jsonl"
    records = [json.loads(line) for line in Path(data_file).read_text().splitlines()]
    for record in records:
        record["chosen"] = record["chosen"].replace("7", "8")
    changed.write_text("".join(json.dumps(record) + "\n" for record in records))
    runs = [(data_file, {}), (data_file, {"chat_template": str(template)}), (str(changed), {}), (data_file, {})]
    told = []
    for number, (data, flags) in enumerate(runs):
        dpo(model_dirs("llama"), data, tmp_path / "cache", tmp_path / str(number), max_steps=1, **flags)
        told.append(capsys.readouterr().out.count("read from the cache"))
    assert told == [0, 0, 0, 2]


def test_another_start_model_is_another_reference(model_dirs, data_file, tmp_path, capsys):
    trained = dpo(model_dirs("llama"), data_file, tmp_path / "cache", tmp_path / "a")
    capsys.readouterr()
    out = dpo(trained, data_file, tmp_path / "cache", tmp_path / "b")
    assert "read from the cache" not in capsys.readouterr().out
    assert lines(out)[0]["eval/margin"] == 0


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_a_loss_without_a_reference_asks_none(loss_type, model_dirs, data_file, tmp_path, capsys):
    dpo(model_dirs("llama"), data_file, tmp_path / "cache", tmp_path / "out", loss_type=loss_type, max_steps=1)
    assert "reference" not in capsys.readouterr().out
    assert not (tmp_path / "cache" / "reference_logprobs").exists()


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_another_reference(zero_stage, model_dirs, data_file, cache_dir, tmp_path):
    """Asked of a policy that was trained once: the first evaluation is the last one of that training."""
    start = model_dirs("llama")
    trained = dpo(start, data_file, cache_dir, tmp_path / "a", max_steps=4)
    flags = {"reference_model_name_or_path": start, "zero_stage": zero_stage, "max_steps": 2}
    again = dpo(trained, data_file, cache_dir, tmp_path / "b", **flags)
    last, first = lines(trained)[-1], lines(again)[0]
    for name in ("eval/loss", "eval/margin", "eval/accuracy", "eval/chosen_reward"):
        assert first[name] == pytest.approx(last[name], rel=1e-4, abs=1e-5), name
    assert abs(first["eval/margin"]) > 1e-3


def test_the_start_model_as_the_reference_is_the_default(model_dirs, data_file, tmp_path):
    start = model_dirs("llama")
    one = dpo(start, data_file, tmp_path / "c1", tmp_path / "a")
    other = dpo(start, data_file, tmp_path / "c2", tmp_path / "b", reference_model_name_or_path=start)
    assert same(one, other)


def test_dropout_is_on_in_training_and_off_in_reference_and_evaluation(model_dirs, data_file, tmp_path):
    out = dpo(model_dirs("gpt2"), data_file, tmp_path / "cache", tmp_path / "out", dropout=0.3)
    first, second = lines(out)[:2]
    assert first["eval/margin"] == 0 and first["eval/accuracy"] == 0.5
    assert abs(second["margin"]) > 1e-3, "the first step, of a policy that is its reference"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("learning_rate", 1e-4), ("weight_decay", 0.5), ("max_grad_norm", 0.01), ("gradient_accumulation_steps", 2)]
    + [("num_warmup_steps", 2), ("seed", 8), ("per_device_train_batch_size", 2), ("data_split", "1,1,0")]
    + [("max_seq_len", 28), ("dtype", "bf16"), ("beta", 0.3), ("label_smoothing", 0.2), ("sft_coef", 0.5)],
)
def test_a_flag_changes_the_weights(flag, value, model_dirs, data_file, cache_dir, tmp_path):
    one = dpo(model_dirs("llama"), data_file, cache_dir, tmp_path / "a", max_steps=3)
    other = dpo(model_dirs("llama"), data_file, cache_dir, tmp_path / "b", **({"max_steps": 3} | {flag: value}))
    assert not same(one, other)


def test_gradient_checkpointing_changes_nothing_and_the_first_batch_is_shown(
    model_dirs, data_file, cache_dir, tmp_path, capsys
):
    one = dpo(model_dirs("llama"), data_file, cache_dir, tmp_path / "a")
    capsys.readouterr()
    flags = {"gradient_checkpointing": True, "show_batch": True}
    other = dpo(model_dirs("llama"), data_file, cache_dir, tmp_path / "b", **flags)
    text = capsys.readouterr().out
    assert "in the loss" in text and "<|endoftext|>]" in text and "Assistant:[" in text
    first, second = weights(one), weights(other)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


# Flags that do not go together


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--loss_type kto --label_smoothing 0.1", "--label_smoothing has no effect with --loss_type kto"),
        ("--loss_type orpo --label_smoothing 0.1", "only with sigmoid, ipo, hinge, simpo"),
        ("--loss_type kto --sft_coef 1", "--sft_coef has no effect"),
        ("--loss_type orpo --sft_coef 1", "--sft_coef has no effect"),
        ("--loss_type orpo --beta 0.1", "--beta has no effect with --loss_type orpo"),
        ("--loss_type orpo --beta 0", "--beta has no effect with --loss_type orpo"),
        ("--simpo_gamma 1", "only with simpo"),
        ("--orpo_lambda 1", "only with orpo"),
        ("--desirable_weight 2", "only with kto"),
        ("--loss_type simpo --undesirable_weight 2", "only with kto"),
        ("--loss_type simpo --reference_model_name_or_path x", "simpo has no reference"),
        ("--loss_type orpo --reference_model_name_or_path x", "orpo has no reference"),
        ("--beta 0", "--beta 0.0: expected a number above 0"),
        ("--loss_type simpo --simpo_gamma -1", "--simpo_gamma -1.0: expected 0 or more"),
        ("--sft_coef -1", "--sft_coef -1.0"),
        ("--loss_type orpo --orpo_lambda -1", "--orpo_lambda -1.0"),
        ("--loss_type kto --desirable_weight 0", "--desirable_weight 0.0"),
        ("--loss_type kto --undesirable_weight 0", "--undesirable_weight 0.0"),
        ("--label_smoothing 0.5", "below 0.5"),
        ("--label_smoothing -0.1", "at least 0"),
        ("--loss_type dpo", "invalid choice"),
    ],
)
def test_a_flag_that_does_not_belong_or_is_out_of_range(flags, told, tmp_path):
    argv = ["--model_name_or_path", "x", "--data_path", "y", "--output_dir", str(tmp_path / "out"), *flags.split()]
    with pytest.raises(UserError) as error:
        program("dpo").main(argv)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_flags_become_the_constants_of_their_loss(loss_type):
    config = program("dpo").Config(
        model_name_or_path="x", data_path=["y"], output_dir="z", loss_type=loss_type, **AWAY[loss_type]
    )
    assert config.objective() == Objective(loss_type, AWAY[loss_type])
    plain = program("dpo").Config(model_name_or_path="x", data_path=["y"], output_dir="z", loss_type=loss_type)
    assert plain.objective().constants == CONSTANTS[loss_type] | ({"simpo_gamma": 1.0} if loss_type == "simpo" else {})


def test_gamma_follows_beta():
    config = program("dpo").Config(
        model_name_or_path="x", data_path=["y"], output_dir="z", loss_type="simpo", beta=2.5
    )
    assert config.objective().constants["simpo_gamma"] == 1.25


# Answers without a partner


def judged(path: Path, labels: list[bool]) -> str:
    records = [{"prompt": f"question {i}", "response": f"answer {i * i}", "label": x} for i, x in enumerate(labels)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_kto_learns_from_single_answers(model_dirs, cache_dir, tmp_path):
    data = judged(tmp_path / "judged.jsonl", [i % 3 == 0 for i in range(24)])
    flags = {"loss_type": "kto", "data_split": "0,1,0", "eval_data_path": data, "max_steps": 20, "num_train_epochs": 9}
    out = dpo(model_dirs("llama"), data, cache_dir, tmp_path / "out", **flags)
    first, last = (lines(out)[i] for i in (0, -1))
    assert (first["eval/num_good"], first["eval/num_bad"]) == (8, 16)
    assert last["eval/accuracy"] > 0.8 and last["eval/good_reward"] > last["eval/bad_reward"]
    assert last["eval/margin"] == pytest.approx(last["eval/good_reward"] - last["eval/bad_reward"])


def test_a_step_with_one_kind_only_has_no_accuracy(model_dirs, cache_dir, tmp_path):
    data = judged(tmp_path / "judged.jsonl", [i == 0 for i in range(12)])
    flags = {"loss_type": "kto", "data_split": "0,1,0", "eval_data_path": data, "max_steps": 12}
    flags |= {"per_device_train_batch_size": 1, "eval_fraction": 0.1}
    out = dpo(model_dirs("llama"), data, cache_dir, tmp_path / "out", **flags)
    trained = [line for line in lines(out) if "loss" in line]
    assert all(line["accuracy"] is None and line["margin"] is None and line["loss"] > 0 for line in trained)


@pytest.mark.parametrize(
    ("labels", "flags", "told"),
    [
        ([True] * 20, {}, "good and bad answers"),
        ([False] * 20, {}, "not bad ones only"),
        ([i % 2 == 0 for i in range(20)], {"max_eval_samples": 1}, "ones only; give more"),
    ],
)
def test_kto_needs_good_and_bad_answers_on_both_sides(labels, flags, told, model_dirs, cache_dir, tmp_path):
    data = judged(tmp_path / "judged.jsonl", labels)
    with pytest.raises(UserError) as error:
        dpo(model_dirs("llama"), data, cache_dir, tmp_path / "out", loss_type="kto", **flags)
    assert told in str(error.value) and "\n" not in str(error.value)


# Failures


def test_losses_that_stay_no_number_stop_the_run(model_dirs, data_file, cache_dir, tmp_path):
    flags = {"learning_rate": 1e30, "max_steps": 9, "num_train_epochs": 3, "lr_scheduler_type": "constant"}
    with pytest.raises(RuntimeError, match="3 steps in a row are not finite, the last one step 4; .*lower"):
        dpo(model_dirs("llama"), data_file, cache_dir, tmp_path, **flags)


def test_a_dialogue_that_the_model_has_no_positions_for(model_dirs, data_file, cache_dir, tmp_path):
    with pytest.raises(UserError, match="256 positions"):
        dpo(model_dirs("llama"), data_file, cache_dir, tmp_path, max_seq_len=300)


def test_one_held_out_pair_at_least(model_dirs, tmp_path):
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    with pytest.raises(UserError, match="no rows are left to train or to evaluate on"):
        dpo(model_dirs("llama"), str(data), tmp_path / "cache", tmp_path / "out", data_split="0,1,0")


# Ranks


@pytest.mark.parametrize(
    "max_tokens", [pytest.param(0, id="by rows", marks=pytest.mark.long), pytest.param(120, id="by length")]
)
def test_two_ranks_are_as_good_as_one(max_tokens, model_dirs, data_file, cache_dir, tmp_path):
    """ZeRO 2, behind torchrun; ragged last micro-batches; KTO is the loss that ranks could change."""
    model = model_dirs("llama")
    trained = dpo(model, data_file, cache_dir, tmp_path / "trained")  # as the reference, so that nothing is tied
    flags = {"loss_type": "kto", "reference_model_name_or_path": trained, "zero_stage": 2}
    flags |= {"max_steps": 5, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    dpo(model, data_file, cache_dir, tmp_path / "one", per_device_train_batch_size=6, **flags)
    flags |= {"model_name_or_path": model, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 5}
    flags |= {"max_tokens_per_batch": max_tokens}
    argv = arguments("dpo", data_file, cache_dir, tmp_path / "two", **flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = ROOT / "training" / STEPS["dpo"] / "main.py"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(path), *argv], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert len(found) == len(expected) == 7
    for a, b in zip(found, expected, strict=True):
        names = [name for name in b if name not in ("stage", "time", "perf/answers_per_s")]
        one, two = ([math.nan if line[n] is None else line[n] for n in names] for line in (b, a))
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4, nan_ok=True)
    first, second = (weights(str(tmp_path / name)) for name in ("one", "two"))
    assert all(torch.allclose(first[name], second[name], atol=2e-4) for name in first)
