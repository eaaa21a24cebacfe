"""--dry_run and --calibrate: sizes against published numbers, real tensors and arithmetic by hand."""

import dataclasses
import json

from dschat.engine.memory_plan import Machine, PlannedModel, find_machine
from dschat.engine.workload import RESPONSE, SCORER, SFT, ModelUse, PassUse, Workload
from dschat.errors import UserError
from dschat.models.heap_trace import MAPPED, heap_traced
from dschat.models.memory_trace import sft_pass, traced
from dschat.models.plan import make_plan, pass_bytes, planned_model
from dschat.models.shapes import KNOWN
from dschat.planning import DOES_NOT_FIT, time_lines
from tests.families import tiny_config
from tests.programs import arguments, program

import pytest
import torch
from transformers import AutoModelForCausalLM

GPU = Machine(4, 80e9, 100e9, on_cpu=False, libraries=0.0, name="")
CPU = dataclasses.replace(GPU, on_cpu=True)
PUBLISHED = {  # parameters, of the safetensors metadata and the papers
    "facebook/opt-1.3b": 1_315_758_080,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_known_shapes_have_the_published_number_of_weights(path):
    assert planned_model(ModelUse("model", path), torch.bfloat16).num_weights == PUBLISHED[path]


def test_the_sizes_of_opt_are_those_of_their_names():
    for path in (path for path in KNOWN if "opt" in path):
        size = path.rpartition("-")[2]
        named = float(size[:-1]) * (1e9 if size[-1] == "b" else 1e6)
        assert planned_model(ModelUse("model", path), torch.bfloat16).num_weights == pytest.approx(named, rel=0.06)


def test_what_rests_under_zero_by_hand():
    """1000 weights on 4 ranks. float32: 4 a weight, two moments of 4; from stage 1 on a master copy of 4 more."""
    model = PlannedModel("m", "m", 1000, 1000, itemsize=4, zero_stage=0)
    rests = [dict(dataclasses.replace(model, zero_stage=stage).resting(CPU)) for stage in range(4)]
    assert rests[0] == {"weights": 4000, "optimizer": 8000}
    assert rests[1] == rests[2] == {"weights": 4000, "optimizer": 3000}
    assert rests[3] == {"weights": 1000, "optimizer": 3000, "gradients": 1000, "buffers": 4000}
    half = PlannedModel("m", "m", 1000, 100, itemsize=2, zero_stage=2)  # adapters on a frozen trunk
    assert dict(half.resting(CPU)) == {"weights": 2000, "optimizer": 300}
    away = dataclasses.replace(half, offload=True)
    assert dict(away.resting(GPU)) == {"weights": 2000} and away.on_host(GPU) == (12 + 4 + 2) * 25
    assert dict(away.resting(CPU)) == {"weights": 2000, "optimizer": 300, "gradients": 100, "buffers": 50}
    assert away.on_host(CPU) == 0 and away.in_step(CPU).total() == 0
    frozen = dataclasses.replace(half, num_trained=0, zero_stage=3, offload=True)
    assert frozen.resting(GPU).total() == 0 and frozen.on_host(GPU) == 500 and frozen.resting(CPU).total() == 500
    assert dict(dataclasses.replace(half, num_trained=0, shares_trunk=True).resting(GPU)) == {"weights": 0}
    assert half.checkpoint == (2 + 12) * 100, "nothing of what is frozen"
    assert half.output == 2 * 1000 and dataclasses.replace(half, saves_adapter=True).output == 2 * 100
    average = dataclasses.replace(half, has_average=True)
    assert average.checkpoint == (2 + 12 + 4) * 100 and average.output == 2 * 2 * 1000


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "bloom"])
def test_the_trace_counts_what_a_real_pass_saves(family, tokenizer):
    """Of a real float32 model on the CPU: every different tensor that autograd keeps until the backward pass."""
    config, kept = tiny_config(family, tokenizer), {}
    model = AutoModelForCausalLM.from_config(config)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # which stays alive, so that no other takes its place
        return tensor

    ids = torch.ones(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    saved = sum(storage.nbytes() for storage in kept.values())
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config)
    found = traced(shape, config.vocab_size, sft_pass(shape, 4, 64), on_cpu=True)
    fullest = max(found, key=lambda moment: sum(moment.values()))
    assert 0.9 * saved < fullest["activations"] < 1.4 * saved
    assert fullest["logits"] >= 2 * logits.nbytes, "they and their gradient"


def test_the_heap_of_a_pass_is_that_of_its_pieces_and_more(tokenizer):
    """What is asked of the allocator: every small piece, whose place it keeps, and what is too large for the heap; at
    the end, where they are kept, the gradients."""
    config = tiny_config("llama", tokenizer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = traced(model, config.vocab_size, sft_pass(model, 64, 128), on_cpu=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = heap_traced(model, sft_pass(model, 64, 128), keeps_gradients=True, num_passes=2)
    live = max(sum(moment.values()) for moment in counted)
    assert live < max(sum(moment.values()) for moment in found) < 3 * live
    logits = 4 * 64 * 128 * config.vocab_size
    large = max(moment.get("large tensors", 0) for moment in found)
    assert (large >= 2 * logits) == (logits >= MAPPED)
    assert found[2]["activations"] >= 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("kind", "checkpointing"), [(SFT, False), (SFT, True), (SCORER, True)])
def test_two_depths_tell_of_any_other(kind, checkpointing, tmp_path, tokenizer):
    """A model of 5 layers, by extrapolation, against its own pass traced whole."""
    from dschat.models import plan

    config = tiny_config("llama", tokenizer)
    config.num_hidden_layers, config.layer_types = 5, None
    config.save_pretrained(tmp_path)
    item = PassUse("", "model", kind, 8, 64, train=True)
    guessed = pass_bytes(item, ModelUse("model", str(tmp_path), checkpointing=checkpointing), torch.float32, False)
    shape = (str(tmp_path), checkpointing, (0, None, "auto", True), False)
    whole = plan._traced_pass(item, shape, torch.float32, False, False, 5)
    for one, other in zip(guessed, whole, strict=True):
        assert sum(one.values()) == pytest.approx(sum(other.values()), rel=0.02)


def test_the_gradients_of_one_model_wait_while_the_other_trains(tmp_path, tokenizer):
    """Step 3: the actor's backward pass, then the critic's, then the actor's step, then the critic's. (On a CPU a pass
    has its own in it.)"""
    tiny_config("llama", tokenizer).save_pretrained(tmp_path)
    uses = [ModelUse("actor", str(tmp_path)), ModelUse("critic", str(tmp_path), is_scorer=True)]
    passes = [PassUse("actor", "actor", RESPONSE, 2, 16, 8, train=True)]
    passes += [PassUse("critic", "critic", SCORER, 2, 16, train=True)]
    plan = make_plan(Workload("", "fp32", uses, passes, 0, (16, "")), GPU)
    actor, critic = (4 * model.num_weights for model in plan.models)
    assert [(phase.name, phase.extra["gradients"]) for phase in plan.phases] == [
        *(("actor: loss", 0), ("actor: gradients", actor), ("actor: step", actor + critic)),
        *(("critic: loss", actor), ("critic: gradients", actor + critic), ("critic: step", critic)),
    ]


@pytest.mark.parametrize("text", ["x", "8x", "0", "-1x80", "eight"])
def test_machines_that_cannot_be_are_refused(text):
    with pytest.raises(UserError, match="--plan_for"):
        find_machine(text)


def test_machines_here_and_elsewhere(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    there, two, one = find_machine("8x80"), find_machine("2"), find_machine("")
    assert (there.num_ranks, there.free, there.on_cpu) == (8, 80e9, False)
    assert (two.num_ranks, one.num_ranks) == (2, 1)
    if one.on_cpu:
        assert two.free - one.libraries < one.free, "two ranks share what is free"


def plan_of(capsys, stage, *more, **flags):
    argv = [*arguments(stage, "no/such/data", "c", "no/such/folder", **flags), "--dry_run", *more]
    code = 0
    try:
        program(stage).main(argv)
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_what_would_help_most(capsys):
    flags = {"model_name_or_path": "facebook/opt-1.3b", "dtype": "auto", "max_seq_len": 512}
    code, shown = plan_of(capsys, "sft", "--plan_for", "1x16", **flags)
    assert code == DOES_NOT_FIT and "IT DOES NOT FIT" in shown
    assert "what would help most: --lora_dim 64, which leaves a peak of" in shown and ": it fits" in shown
    code, shown = plan_of(capsys, "sft", "--plan_for", "1x16", lora_dim=64, **flags)
    assert code == 0 and "it fits; the largest that would: --per_device_train_batch_size" in shown
    rows = int(shown.rpartition("--per_device_train_batch_size ")[2])
    flags |= {"lora_dim": 64, "per_device_train_batch_size": rows}
    assert plan_of(capsys, "sft", "--plan_for", "1x16", **flags)[0] == 0
    flags["per_device_train_batch_size"] = rows + max(1, rows // 20)
    assert plan_of(capsys, "sft", "--plan_for", "1x16", **flags)[0] == DOES_NOT_FIT


def test_what_the_plan_is_known_to_miss_is_said_where_it_misses_it(model_dirs, capsys):
    flags = {"max_prompt_seq_len": 8, "max_answer_seq_len": 8, "actor_model_name_or_path": model_dirs("llama")}
    warning = "runs on a CPU took up to 22 % more than planned"
    for place, is_missed in (("2", True), ("2x16", False)):
        code, shown = plan_of(
            capsys, "ppo", "--plan_for", place, **flags, critic_model_name_or_path=model_dirs("llama")
        )
        assert code == 0 and (warning in shown) == is_missed, shown
    assert warning not in plan_of(capsys, "sft", model_name_or_path=model_dirs("llama"))[1]


def test_calibration_by_hand():
    """Steps end at 10, 14 and 18 s after an evaluation that ends at 2: 4 s each; the last evaluation takes 1 s."""
    times = [{"time": 2.0, "eval/loss": 1.0}, *({"time": t, "lr": 0.1} for t in (10.0, 14.0, 18.0)), {"time": 19.0}]
    first, second = time_lines(times, num_steps=100, eval_interval=40)
    assert first.startswith("measured in 3 steps: a step 4.00 s, the first 8.00 s, an evaluation 1.00 s; peak ")
    assert second == "time: 100 steps and 4 evaluations like these take 0.11 hours"


def test_calibrating_runs_real_steps_and_leaves_nothing(model_dirs, data_file, cache_dir, tmp_path, capsys):
    argv = arguments(
        "sft", data_file, cache_dir, tmp_path / "out", model_name_or_path=model_dirs("llama"), max_steps=9
    )
    program("sft").main([*argv, "--calibrate", "2"])
    shown = capsys.readouterr().out
    assert "measured in 2 steps: a step" in shown and "time: 9 steps and 2 evaluations like these take" in shown
    assert not list(tmp_path.iterdir()), json.dumps([path.name for path in tmp_path.iterdir()])
    with pytest.raises(UserError, match="--plan_for goes with --dry_run"):
        program("sft").main([*argv, "--plan_for", "8x80"])
