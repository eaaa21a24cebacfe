"""The benchmarks measure what they say: the work by formula against counters of torch, lengths, turns, ratios."""

import json
import math
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from dschat.config import parse_config
from dschat.data.records import to_example
from dschat.errors import UserError
from dschat.rlhf.rollout import Sampling, generate, row_uniforms
from tests import programs
from tests.conftest import ROOT

import datasets
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, OPTConfig

sys.path.append(str(ROOT / "benchmarks"))

import data  # noqa: E402
import growth  # noqa: E402
import harness  # noqa: E402
import machine  # noqa: E402
import rollout  # noqa: E402
import shapes  # noqa: E402
import start_up  # noqa: E402
import step3  # noqa: E402
import supervised  # noqa: E402
import turns  # noqa: E402
import workloads  # noqa: E402

LLAMA = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LLAMA |= {"intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 1}
OPT = {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 40, "word_embed_proj_dim": 8}
OPT |= {"vocab_size": 50, "max_position_embeddings": 64, "dropout": 0.0}
# All heads of all layers, side by side.
WIDTHS = {"llama": 2 * 4 * 8, "opt": 3 * 16}


def tiny(family: str, **options):
    config = LlamaConfig(**LLAMA) if family == "llama" else OPTConfig(**OPT)
    config._attn_implementation = "eager"  # whose products the counter knows
    return shapes.random_model(config, torch.float32, 0, **options).eval()


def counted(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("scorer", [False, True])
def test_the_operations_of_a_pass_are_those_that_torch_counts(family, scorer):
    model = tiny(family, scorer=scorer)
    ids = torch.randint(2, 50, (3, 7))
    found = shapes.Shape.of(model).forward([7, 7, 7], 21).flops
    # Torch multiplies the masked half of attention too: T (T - 1) / 2 pairs, two products of 2 operations each.
    assert found + 3 * 4 * WIDTHS[family] * 7 * 6 / 2 == counted(lambda: model(input_ids=ids))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_work_of_a_rollout_is_that_of_its_steps(family):
    model = tiny(family)
    shape = shapes.Shape.of(model)
    cache, cache_bytes = DynamicCache(config=model.config), 0
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))

    def run():
        nonlocal cache_bytes
        model(input_ids=torch.randint(2, 50, (2, 5)), past_key_values=cache, logits_to_keep=1)
        for step in range(3):  # answers of 4 and 2 tokens: the second row leaves after one step
            rows = 2 if step == 0 else 1
            if step == 1:
                cache.batch_select_indices(torch.tensor([0]))
            model(input_ids=torch.randint(2, 50, (rows, 1)), past_key_values=cache)
            cache_bytes += sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)

    operations = counted(run)
    found = shape.rollout([5, 5], [4, 2])
    assert found.flops + 2 * 4 * WIDTHS[family] * 5 * 4 / 2 == operations
    assert found.bytes == 4 * weights * (1 + 3) + cache_bytes
    assert shape.rollout([5, 5], [1, 1]) == shape.forward([5, 5], 2)


def test_training_is_three_passes_and_a_step_of_adam():
    shape = shapes.Shape(100, 10, 120, 16, 8, 2)
    once = shape.forward([3, 5], 4)
    assert once.flops == 2 * (100 * 8 + 10 * 4) + 2 * 16 * (3 * 4 + 5 * 6)
    assert once.bytes == 110 * 2
    train = shape.train([3, 5], 4)
    assert train == shapes.Work(3 * once.flops, 3 * once.bytes + 120 * (6 + 24))
    assert train + once == shapes.Work(4 * once.flops, 4 * once.bytes + 120 * 30)


def test_every_size_has_its_name():
    sizes = {}
    for name in shapes.SIZES:
        with torch.device("meta"):
            model = shapes.random_model(shapes.model_config(name), torch.bfloat16, 0)
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    assert (
        sizes["125m"] == 125_239_296 and sizes["350m"] == 331_196_416 and sizes["1.3b"] == 1_315_758_080
    )  # on the hub
    assert sizes["7b"] == 6_738_415_616
    assert sizes["tiny"] == 4096 * 256 + 4 * (4 * 256**2 + 3 * 256 * 768 + 2 * 256) + 256


def test_the_same_seed_makes_the_same_model():
    one, same, other = (shapes.random_model(LlamaConfig(**LLAMA), torch.float32, seed) for seed in (3, 3, 4))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_lengths_are_as_they_were_asked_for(family):
    model = tiny(family)
    prompts = shapes.random_prompts(50, 300, 4, seed=1)
    assert prompts.min() >= 2 and torch.equal(prompts, shapes.random_prompts(50, 300, 4, seed=1))
    mask = torch.ones_like(prompts)

    def lengths(mean: float | None) -> torch.Tensor:
        shapes.set_stops(model, mean)
        ends = {"eos_token_id": shapes.EOS_ID, "pad_token_id": shapes.PAD_ID}
        answers = generate(model, prompts, mask, Sampling(32), row_uniforms(300, 32, 2), **ends)
        assert not (answers.response_ids[answers.response_mask] == shapes.PAD_ID).any()
        return answers.response_mask.sum(1)

    assert (lengths(None) == 32).all()
    drawn = lengths(8.0)
    chance = model(input_ids=prompts).logits.softmax(-1)[..., shapes.EOS_ID]
    assert torch.allclose(chance, torch.tensor(1 / 8), rtol=0.05)
    # Geometric and cut off at 32: the mean is 8 (1 - (7/8)^32) = 7.9, of 300 its standard error 0.4.
    assert 6.7 < drawn.float().mean() < 9.1
    assert drawn.max() == 32 and drawn.min() == 1
    assert not any(p is model.lm_head.bias for p in model.parameters() if p.requires_grad)


def test_a_tokenizer_has_a_token_for_every_id():
    tokenizer = shapes.word_tokenizer(300)
    assert len(tokenizer) == 300
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (shapes.EOS_ID, shapes.PAD_ID)
    assert tokenizer.decode([2, 299]) == "w2 w299"


def test_the_limit_is_that_of_the_scarcer_of_the_two():
    limits = machine.Limits(flops=100.0, bytes=10.0)
    assert limits.least_seconds(shapes.Work(200, 10)) == 2
    assert limits.least_seconds(shapes.Work(200, 50)) == 5
    row = harness.phase_row("us", "train", 4.0, shapes.Work(2e9, 4e7), machine.Limits(1e9, 1e9), ["7"])
    assert row == ["us", "train", "4000.0", "7", "2.00", "0.040", "0.5", "0.0", "50%"]
    assert len(row) == len(harness.phase_header("tokens/s"))


def test_a_ratio_is_taken_round_by_round():
    # The second round was slow for both, the third for neither.
    ratio = harness.Ratio.of([10.0, 4.0, 30.0], [5.0, 4.0, 10.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.5, 2.5)
    assert harness.Ratio.of([3.0], [2.0]) == harness.Ratio(1.5, 1.5, 1.5)
    found = harness.ratios({"us": [4.0, 4.0], "them": [2.0, 2.0], "others": [1.0, 1.0]})
    assert {name: value.median for name, value in found.items()} == {"us / them": 2.0, "us / others": 4.0}


def test_sides_take_turns_and_must_do_the_same():
    order = []

    def side(name):
        def turn():
            order.append(name)
            return {"steps": 1, "turn": len(order)}

        return turn

    first, rest = turns.interleave(
        {"a": side("a"), "b": side("b")}, 1, 2, lambda facts: harness.require_same(facts, ["steps"])
    )
    assert "".join(order) == "ababab"
    assert [facts["turn"] for facts in first["b"]] == [2] and [facts["turn"] for facts in rest["a"]] == [3, 5]
    with pytest.raises(AssertionError, match="differ in turn"):
        turns.interleave({"a": side("a"), "b": side("b")}, 1, 1, lambda facts: harness.require_same(facts, ["turn"]))


WORKER = """
import sys, time
sys.path.append("benchmarks")
from turns import Turns
turns = Turns()
turns.begin()
print("a library talks")
for step in range(9):
    if step == 2:
        raise ValueError("out of work")
    time.sleep(0.2)
    turns.end(step=step)
    turns.begin()
"""


def test_a_side_works_in_its_turns_only_and_says_why_it_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    side = turns.Side("them", [str(program)], tmp_path / "them.log")
    facts = [side.turn(), side.turn()]
    assert [f["step"] for f in facts] == [0, 1]
    assert facts[0]["seconds"] > facts[1]["seconds"] > 0.19  # the first holds the start
    assert 0.05 < facts[0]["peak_gb"] < 20
    with pytest.raises(UserError, match="them ended before its turn did: ValueError: out of work"):
        side.turn()
    side.stop()
    assert side.process.returncode == 1
    other = turns.Side("us", [str(program)], tmp_path / "us.log")
    other.turn()
    other.stop()
    assert other.process.returncode == 0


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_passes_are_counted_once_by_role(family):
    models = {"actor": tiny(family), "critic": tiny(family, scorer=True)}
    passes = turns.Passes(models)
    models["actor"](input_ids=torch.ones(2, 5, dtype=torch.long))
    models["actor"](torch.ones(2, 3, dtype=torch.long))
    models["critic"].base_model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert passes.take() == {"actor": [2, 16], "critic": [1, 4]}
    models["actor"](input_ids=torch.ones(2, 5, dtype=torch.long))
    assert passes.take() == {}


def test_tokens_of_a_batch_by_hand():
    attended = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    scored = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()  # row 2 only fills up
    found = workloads.count_tokens("sft", attended, scored)
    assert found == {"tokens": 8, "positions": 16, "lengths": [3, 4, 1], "projected": 5, "rows": 3}
    pairs = workloads.count_tokens("dpo", attended[:2], scored[:2])
    assert pairs == {"tokens": 7, "positions": 8, "lengths": [3, 4], "projected": 4, "rows": 1}
    assert workloads.count_tokens("reward", attended[:2], scored[:2])["projected"] == 2
    both = workloads.add_facts([found, pairs])
    assert both == {"tokens": 15, "positions": 24, "lengths": [3, 4, 1, 3, 4], "projected": 9, "rows": 4}


def test_trl_gets_our_rows():
    sft = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "loss_mask": [False, True, True]}])
    assert workloads.trl_rows("sft", sft)[0] == {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    pair = datasets.Dataset.from_list([{"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9], "prompt_len": 2}])
    assert workloads.trl_rows("dpo", pair)[0] == {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    ranked = datasets.Dataset.from_list([{"input_ids": [[5, 6, 7], [5, 6, 8, 9]], "prompt_len": 2, "ranks": [1, 2]}])
    assert workloads.trl_rows("reward", ranked)[0] == {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]}
    for table, size in ((sft, [1, 3]), (pair, [1, 7]), (ranked, [1, 7])):
        assert workloads.data_size(workloads.StageRows(table, table)) == size


def test_made_up_dialogues_are_records(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        data.write_dialogues(path, 0.05, seed=3)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert 50_000 <= paths[0].stat().st_size < 60_000
    examples = [to_example(json.loads(line)) for line in paths[0].read_text().splitlines()]
    assert all(len(example["responses"]) == 2 for example in examples)
    assert {len(example["prompt"]) for example in examples} == {1, 3, 5, 7}


def benchmark(monkeypatch, run, path: Path, *flags: str) -> dict:
    """What a benchmark writes; its working processes are real."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags, "--json", str(path)])
    run()
    return json.loads(path.read_text())


SHORT = ("--repeats", "1", "--warmup", "1", "--batch", "4")


@pytest.mark.long
def test_rollout_measures_engines_on_the_same_work(tmp_path, monkeypatch):
    flags = (*SHORT, "--at_once", "3", "--prompt", "6", "--response", "8", "--engines", "dschat", "generate")
    found = benchmark(monkeypatch, rollout.main, tmp_path / "out.json", *flags)
    assert [row["side"] for row in found["table"]] == ["dschat", "generate"]
    assert all(facts["lengths"] == [8] * 4 for side in found["turns"].values() for facts in side)
    assert all(facts["seconds"] > 0 for side in found["turns"].values() for facts in side)
    assert found["ratios"]["dschat / generate"]["median"] > 0
    assert {"command", "commit", "hardware", "versions", "settings", "limits"} <= set(found)


def test_drawn_lengths_are_a_quarter_of_the_limit_in_the_mean():
    assert rollout.mean_length(Namespace(lengths="drawn", response=64)) == 16
    assert rollout.mean_length(Namespace(lengths="fixed", response=64)) is None
    with pytest.raises(UserError, match="--response 4"):
        rollout.mean_length(Namespace(lengths="drawn", response=4))


def test_the_work_of_a_step_is_that_of_its_phases():
    # A block of one weight, a head of none: operations are 2 for each token that a model sees.
    one = shapes.Shape(1, 0, 1, 0, 0, 2)
    found = step3.phase_work(
        {"actor": one, "critic": one, "reward": one}, Namespace(prompt=5, ppo_epochs=3), lengths=[4, 2]
    )
    assert found["rollout"].flops == 2 * (10 + 3 + 1)
    assert found["score"].flops == 3 * 2 * 16
    assert found["train"].flops == 3 * 2 * 3 * 2 * 16  # epochs, models, forward and backward


@pytest.mark.long
def test_step3_times_its_phases(tmp_path, monkeypatch):
    flags = (*SHORT, "--prompt", "6", "--response", "8", "--ppo_epochs", "2", "--minibatches", "2")
    found = benchmark(monkeypatch, step3.main, tmp_path / "out.json", *flags)
    assert [row["phase"] for row in found["table"]] == ["rollout", "score", "train", "step"]
    [facts] = found["turns"]["dschat"]
    assert facts["sequences"] == 4 and facts["optimizer_steps"] == 4 and facts["response_tokens"] == 32
    phases = sum(facts[f"{name}_s"] for name in ("rollout", "score", "train"))
    assert 0 < phases < facts["seconds"] < 2 * phases
    passes = found["first"]["dschat"][0]["passes"]
    # Four rows of 14 tokens, once to score them; the critic in two epochs more.
    assert {role: passes[role][1] for role in ("ref", "reward", "critic")} == {"ref": 56, "reward": 56, "critic": 168}


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "stage", [pytest.param("sft", marks=LONG), pytest.param("reward", marks=LONG), pytest.param("dpo", marks=LONG)]
)
def test_the_programs_are_measured_as_they_are(stage, tmp_path, monkeypatch):
    data.write_dialogues(tmp_path / "made.jsonl", 0.05, seed=3)
    flags = (*SHORT, "--data_path", str(tmp_path / "made.jsonl"), "--max_seq_len", "256")
    found = benchmark(monkeypatch, partial(supervised.compare, stage, None), tmp_path / "out.json", *flags)
    phases = ["train", "reference", "both"] if stage == "dpo" else ["train"]
    assert [row["phase"] for row in found["table"]] == phases
    [facts] = found["turns"]["dschat"]
    assert facts["rows"] == 4 and facts["optimizer_steps"] == 2
    assert len(facts["lengths"]) == (4 if stage == "sft" else 8)
    assert 0 < facts["tokens"] <= facts["positions"]
    assert math.isclose(facts["tokens"], sum(facts["lengths"]))
    assert facts["projected"] < facts["tokens"]
    if stage == "dpo":
        train, reference, both = (float(row["ms"]) for row in found["table"])
        assert train > 0 and reference > 0 and both == pytest.approx(train + reference, abs=0.11)
        assert reference == pytest.approx(4 * 1000 * facts["reference_s_per_row"], abs=0.06)
        assert facts["data"][0] * facts["reference_s_per_row"] < found["first"]["dschat"][0]["seconds"]


def test_growth_shows_each_point_with_all_its_phases(tmp_path, monkeypatch, capsys):
    calls = []

    def step(changes, dtype, repeats):
        calls.append((changes, dtype, repeats))
        return {"rollout": 0.5, "score": 0.25, "train": 1.0 + len(calls)}

    monkeypatch.setattr(growth, "random_step", step)
    monkeypatch.setattr(growth, "steps_on_ranks", lambda *_: iter([("2 ranks, ZeRO 3", step({"ranks": 2}, "", 0))]))
    flags = ["--dtype", "fp32", "--answers", "4", "8", "--lengths", "16", "--sizes", "tiny"]
    picture = tmp_path / "deep" / "growth.png"
    found = benchmark(monkeypatch, growth.main, tmp_path / "out.json", *flags, "--picture", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    changes = [changes for changes, *_ in calls]
    assert changes == [{"batch": 4}, {"batch": 8}, {"response": 16}, {"size": "tiny", "micro_batch": 4}, {"ranks": 2}]
    assert [row["step, ms"] for row in found["table"]] == ["2750", "3750", "4750", "5750", "6750"]
    assert found["found"]["ranks"]["2 ranks, ZeRO 3"]["train"] == 6.0
    assert "ranks                2 ranks, ZeRO 3          500        250" in capsys.readouterr().out


@pytest.mark.parametrize("stage", start_up.PROGRAMS)
def test_the_start_up_is_that_of_the_programs(stage, tmp_path):
    path, *flags = start_up.stage_arguments(stage, tmp_path, 5)
    program = programs.load(path.removeprefix("training/"))
    assert parse_config(program.Config, [*flags, "--output_dir", str(tmp_path)]).max_steps == 5


def test_the_cost_of_a_command_is_counted(tmp_path):
    seconds, cpu = start_up.whole(ROOT, ["-c", "import time; time.sleep(0.3)"])
    assert seconds >= 0.3 and 0 < cpu < seconds + 0.3
    with pytest.raises(UserError, match="failed: .*ValueError"):
        start_up.whole(ROOT, ["-c", "raise ValueError"])


@pytest.mark.long
def test_data_is_measured_twice(tmp_path, monkeypatch):
    found = benchmark(monkeypatch, data.main, tmp_path / "out.json", "--megabytes", "0.1", "--workers", "1")
    first, again = found["runs"].values()
    assert first["rows"] == again["rows"] > 30
    assert 50 < first["private_mb"] < first["rss_mb"] < 5000


def test_a_run_over_data_is_measured(tmp_path):
    data.write_dialogues(tmp_path / "made.jsonl", 0.02, seed=3)
    lines = (tmp_path / "made.jsonl").read_text().splitlines()
    data.train_tokenizer(lines, 300).save_pretrained(tmp_path / "tokenizer")
    spec = data.DataSpec((str(tmp_path / "made.jsonl"),), (), "1,0,0", 0.1, 0, str(tmp_path / "cache"), False, 1, 0)
    found = data.measure(spec, "sft", str(tmp_path / "tokenizer"), 4096)
    assert found["rows"] == len(lines) - round(0.1 * len(lines))
    assert found["reading"] > 0 and found["tokenising"] > 0
    assert 50 < found["private_mb"] < found["rss_mb"] < 20_000
