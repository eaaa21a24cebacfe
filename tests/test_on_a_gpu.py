"""The programs on the GPU that is not there (`tests/pretend_gpu.py`): no device is mixed, and the numbers are those of
the CPU."""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from dschat.data.tokenizer import load_tokenizer
from dschat.errors import Stopped
from dschat.models.load import load_trained_scorer
from dschat.report.reward_quality import read_quality
from dschat.rlhf.specs import Sampling
from inference.chatbot import load_chatbot, resolve_device
from inference.scores import load_answer_scorer
from inference.token_numbers import token_numbers
from tests import programs
from tests.dialogues import user
from tests.pretend_gpu import pretend_gpu
from tests.programs import run, stop_at
from tests.ranks import launch

import pytest
import torch

RULE = """
def lengths(responses):
    return [{"score": len(text) / 10, "masked": [(0, 1)] if text else []} for text in responses]

def vowels(responses):
    return [float(sum(c in "aeiou" for c in text)) for text in responses]
"""
EXACT, ROUNDED = 1e-6, 0.03  # in bf16 a CPU has its own attention, which rounds elsewhere


@pytest.fixture(scope="module")
def start(model_dirs, data_file, cache_dir, tmp_path_factory) -> Callable[..., str]:
    """Run a stage on the tiny models, in float32 unless told otherwise."""
    llama = model_dirs("llama")

    def call(stage: str, output: Path, **flags) -> str:
        if stage != "ppo":
            flags = {"model_name_or_path": llama} | flags
        return run(stage, data_file, cache_dir, output, **flags)

    return call


@pytest.fixture(scope="module")
def models(start, model_dirs, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    (root / "rule.py").write_text(RULE)
    adapter = start("reward", root / "adapter", lora_dim=4)
    rules = {name: f"function:{root / 'rule.py'}:{name}" for name in ("lengths", "vowels")}
    return {"actor": model_dirs("llama"), "reward": start("reward", root / "reward"), "adapter": adapter} | rules


@pytest.fixture
def alike(start, models, tmp_path, capsys) -> Callable[..., str]:
    """Run a stage on the CPU and on the GPU; the directory of the latter."""

    def call(stage: str, limit: float = EXACT, **flags) -> str:
        if stage == "ppo":
            flags = {
                "actor_model_name_or_path": models["actor"],
                "max_answer_seq_len": 6,
                "max_eval_samples": 4,
            } | flags
        expected = start(stage, tmp_path / "cpu", **flags)
        with pretend_gpu() as gpu:
            found = start(stage, tmp_path / "gpu", **flags)
        assert gpu.num_operations > 1000
        said = capsys.readouterr().out  # where something went wrong, and goes on
        assert "in place of slots" not in said and "without CUDA graphs" not in said
        require_equal(expected, found, limit)
        return found

    return call


def require_equal(expected: str, found: str, limit: float = EXACT) -> None:
    ours, theirs = ([*metrics(directory)] for directory in (found, expected))
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert math.isclose(mine[name], value, rel_tol=limit, abs_tol=limit), (name, mine[name], value)


def metrics(directory: str):
    for line in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        numbers = {name: value for name, value in json.loads(line).items() if isinstance(value, int | float)}
        yield {name: value for name, value in numbers.items() if not name.startswith(("time", "perf"))}


# Steps 1 and 2


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("sft", {"zero_stage": 2, "gradient_checkpointing": True, "prompt_loss_weight": 0.1}),
        pytest.param("sft", {"zero_stage": 3, "lora_dim": 4}, marks=pytest.mark.long),
        ("reward", {"judge": "vowels", "judge_samples": 2, "judge_max_new_tokens": 6, "gradient_checkpointing": True}),
        ("dpo", {"label_smoothing": 0.1, "sft_coef": 0.1}),
        ("dpo", {"lora_dim": 4, "loss_type": "kto"}),
    ],
)
def test_a_supervised_stage(stage, flags, alike, models):
    alike(stage, **{name: models.get(value, value) for name, value in flags.items()})


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_in_bf16_which_a_gpu_has_by_default(stage, start, tmp_path):
    expected = start(stage, tmp_path / "cpu", dtype="bf16")
    with pretend_gpu():
        found = start(stage, tmp_path / "gpu", dtype="auto")
    assert json.loads((tmp_path / "gpu" / "config.json").read_text())["dtype"] == "bfloat16"
    losses = [[line["loss"] for line in metrics(directory) if "loss" in line] for directory in (found, expected)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=ROUNDED)


LONGER = {"max_steps": 3, "num_train_epochs": 3, "log_interval": 1}


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_run_goes_on_from_its_checkpoint(stage, start, tmp_path, monkeypatch):
    whole = start(stage, tmp_path / "cpu", **LONGER)
    found = stopped_and_gone_on(start, monkeypatch, stage, tmp_path / "gpu", LONGER)
    assert [line["step"] for line in metrics(found) if "loss" in line] == [1, 2, 3]
    require_equal(whole, found)


def test_a_run_goes_on_at_another_zero_stage(start, tmp_path, monkeypatch):
    whole = start("sft", tmp_path / "cpu", **LONGER)
    require_equal(whole, stopped_and_gone_on(start, monkeypatch, "sft", tmp_path / "gpu", LONGER, zero_stage=2), 1e-4)


def stopped_and_gone_on(start, monkeypatch, stage: str, output: Path, flags: dict, **later) -> str:
    """Stopped where it can be for the second time; all on the GPU."""
    with pretend_gpu():
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, 2)
            start(stage, output, **flags)
        return start(stage, output, **(flags | later))


# Step 3


def test_ppo_with_every_companion(alike, models, data_file):
    alike(
        "ppo",
        critic_model_name_or_path=models["reward"],
        reward=[f"2*full:{models['reward']}", f"-1*{models['lengths']}"],
        judge=models["vowels"],
        ptx_data_path=[data_file],
        preference_data_path=[data_file],
        unsup_coef=0.5,
        num_samples_per_prompt=2,
        per_device_generation_batch_size=3,
        generation_batches=2,
        max_tokens_per_batch=200,
        kl_penalty="full",
        kl_in="loss",
        kl_target=0.001,
        kl_horizon=50,
        entropy_coef=0.01,
        max_ratio=50.0,
        missing_eos="bootstrap",
        whiten_rewards=True,
        enable_ema=True,
        best_metric="judge",
        best_of_n=2,
        explain=1,
        preflight="warn",
        preflight_prompts=3,
        preflight_samples=2,
        log_interval=1,
        eval_interval=1,
        max_steps=1,
        max_answer_seq_len=4,
        show_batch=True,
    )


GROUP = {"num_samples_per_prompt": 2, "per_device_generation_batch_size": 3, "max_steps": 1}
ADAPTERS = {"actor_lora_dim": 4, "critic_lora_dim": 4, "share_trunk": True, "max_steps": 1}


@pytest.mark.parametrize(
    "flags",
    [
        GROUP | {"reward": ["lengths"], "advantage_estimator": "grpo", "old_logprobs": "sampler"},
        GROUP | {"reward": ["full:reward"], "advantage_estimator": "rloo", "rollout_engine": "hf", "kl_penalty": "k3"},
        pytest.param(
            ADAPTERS | {"critic_model_name_or_path": "adapter", "actor_gradient_checkpointing": True},
            marks=pytest.mark.long,
        ),
    ],
    ids=["grpo", "rloo", "adapters"],
)
def test_ppo(flags, alike, models):
    def named(value):
        kind, _, name = value.rpartition(":")
        return f"{kind}:{models[name]}" if kind else models.get(value, value)

    alike("ppo", **{
        name: [*map(named, value)] if isinstance(value, list) else named(value) if isinstance(value, str) else value
        for name, value in flags.items()
    })  # fmt: skip


def test_ppo_goes_on_inside_of_an_update(start, models, tmp_path, monkeypatch):
    flags = {"actor_model_name_or_path": models["actor"], "critic_model_name_or_path": models["reward"]}
    flags |= {"max_answer_seq_len": 6, "max_eval_samples": 4, "max_steps": 1, "enable_ema": True}
    whole = start("ppo", tmp_path / "cpu", **flags)
    require_equal(whole, stopped_and_gone_on(start, monkeypatch, "ppo", tmp_path / "gpu", flags))


# Around training


ASKED = {"max_eval_samples": 8, "batch_size": 4, "eval_fraction": 0.2, "dtype": "fp32", "seed": 7}


def on_both(name: str, output: Path, **flags) -> list[Path]:
    """The folders that a program of the flags ``--output_dir`` writes on the CPU and on the GPU."""
    folders = [output / "cpu", output / "gpu"]
    for folder in folders:
        words = [f"--{flag} {value}" for flag, value in (flags | {"output_dir": folder}).items()]
        with pretend_gpu() if folder.name == "gpu" else nullcontext():
            programs.load(name).main(" ".join(words).split())
    return folders


@pytest.mark.long
def test_rw_eval(models, data_file, cache_dir, tmp_path):
    flags = ASKED | {"data_path": data_file, "data_output_path": cache_dir, "model_name_or_path": models["reward"]}
    flags |= {"judge": models["vowels"], "policy_model_name_or_path": models["actor"], "judge_max_new_tokens": 6}
    found = on_both("step2_reward_model_finetuning/rw_eval.py", tmp_path, judge_samples=4, **flags)
    own, other = (read_quality(folder) for folder in found)
    assert own["best_of_n"] and {**own, "model": 0} == {**other, "model": 0}


def test_prompt_eval(models, data_file, cache_dir, tmp_path):
    flags = {"data_path": data_file, "data_output_path": cache_dir, "model_name_or_path": models["actor"]}
    flags |= {"decoding": "greedy sample best_of_n beam", "reward": f"full:{models['reward']}", "best_of_n": 2}
    flags |= {"num_prompts": 3, "max_new_tokens": 4, "judge": models["vowels"], "batch_size": 4, "dtype": "fp32"}
    own, other = on_both("step1_supervised_finetuning/prompt_eval.py", tmp_path, **flags)
    texts = [(folder / "answers.jsonl").read_text(encoding="utf-8") for folder in (own, other)]
    assert texts[0] == texts[1] and texts[0].count("\n") == 12


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_chat(family, model_dirs, models):
    """BLOOM's answers are decoded in a loop of their own."""
    path = model_dirs(family)

    def talk(device: str) -> list:
        given = {"dtype": "fp32", "device": device, "seed": 3, "num_slots": 2}
        bots = {name: load_chatbot(path, Sampling(8), **given) for name in ("bot", "other")}
        bot, scorer = bots["bot"], load_answer_scorer(models["reward"], "fp32", resolve_device(device))
        assert bot.model.device.type == device and bool(bot.note) == (family == "bloom")
        first = [list(reply) for reply in bot.replies(user("tell me a short story please"), 3)]
        answer = "".join(first[0])
        again = list(bot.reply(user("tell me a short story please", answer, "what is the colour of the sky")))
        numbers = token_numbers(bots, "bot", ["other"], scorer, user("once upon a time"), "there was a king")
        assert numbers.kl == pytest.approx([0.0] * len(numbers.kl), abs=1e-6) and len(numbers.values) > 3
        for each in bots.values():
            each.decoder.close()
        return [first, again, numbers.logprobs, numbers.values]

    expected = talk("cpu")
    with pretend_gpu():
        assert str(talk("cuda")) == str(expected)


def test_the_reward_server(models):
    serve = programs.load("step2_reward_model_finetuning/serve.py")
    body = json.dumps({"messages": [[*user("what is this"), {"role": "assistant", "content": "a cat"}]]}).encode()

    def scores(device: torch.device) -> list[float]:
        tokenizer = load_tokenizer(models["reward"])
        given = {"dtype": torch.float32, "normalize": True, "device": device}
        return serve.Judge(load_trained_scorer(models["reward"], tokenizer, **given).eval(), tokenizer, device).scores(
            body
        )

    expected = scores(torch.device("cpu"))
    with pretend_gpu():
        assert scores(torch.device("cuda")) == expected


# Several ranks


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks(stage, models, data_file, cache_dir, tmp_path):
    """Which send each other nothing from the CPU; with offload and adapters too."""
    found = []
    for device in ("cpu", "gpu"):
        (tmp_path / device).mkdir()
        places = [models["actor"], models["reward"], models["adapter"], data_file, cache_dir, str(tmp_path / device)]
        launch("tests.zero_driver", 2, *places, str(stage), *[device] * (device == "gpu"), seconds=900)
        found.append(json.loads((tmp_path / device / "ranks2.json").read_text()))
    expected, on_gpu = (result[str(stage)] for result in found)
    assert len(expected) == 6
    for name, lines in expected.items():
        for one, other in zip(on_gpu[name], lines, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-6), name
