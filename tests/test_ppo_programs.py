"""Step 3 as a program with what its own main reads: its companions, bad rollouts, runs without a critic."""

import json
from pathlib import Path

from dschat.errors import UserError
from tests.programs import run

import pytest
import torch
from safetensors.torch import load_file

RULE = """
calls = 0

def lengths(responses):
    return [len(response) / 10 for response in responses]

def second_is_nan(responses):  # the first call is the evaluation before training
    global calls
    calls += 1
    return [float("nan") if calls == 2 else 1.0 for _ in responses]

def nothing(responses):
    return [None] * len(responses)
"""


@pytest.fixture(scope="module")
def models(model_dirs, data_file, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    reward = run("reward", data_file, cache_dir, root / "reward", model_name_or_path=model_dirs("llama"))
    (root / "rule.py").write_text(RULE)
    return {"actor": model_dirs("llama"), "reward": reward, "rule": f"function:{root}/rule.py"}


def lines(directory: str) -> list[dict]:
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(directory: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(str(Path(directory) / name / "model.safetensors"))


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not one[key].equal(other[key]) for key in one)


def test_every_companion_of_the_algorithm_in_one_run(models, data_file, cache_dir, tmp_path, capsys):
    out = run(
        "ppo",
        data_file,
        cache_dir,
        tmp_path,
        actor_model_name_or_path=models["actor"],
        critic_model_name_or_path=models["reward"],
        reward=[f"2*full:{models['reward']}", f"-1*{models['rule']}:lengths"],
        num_samples_per_prompt=2,
        per_device_generation_batch_size=3,
        generation_batches=2,
        kl_target=0.001,
        kl_horizon=20,
        kl_penalty="k3",
        kl_in="loss",
        missing_eos="bootstrap",
        ptx_data_path=[data_file],
        unsup_coef=0.5,
        enable_ema=True,
        ema_decay=0.9,
        critic_warmup_rollouts=1,
        actor_learning_rate=1e-3,
        max_steps=4,
        log_interval=1,
        eval_interval=2,
        best_metric="objective",
        best_of_n=2,
        explain=1,
        show_batch=True,
    )
    text = capsys.readouterr().out
    assert "self-check passed" in text and "Human" in text  # of show_batch
    training = [line for line in lines(out) if "objective/score_mean" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(out) if "eval/objective" in line] == [0, 2, 4]
    warm, *later = training
    assert "critic/loss" in warm and "policy/loss" not in warm
    assert all(line.keys() >= {"policy/loss", "policy/kl_loss", "policy/ptx_loss", "critic/loss"} for line in later)
    # kl_coef stays while the critic warms up, and changes after each rollout that trained the policy.
    coefs = [line["objective/kl_coef"] for line in training]
    assert coefs[0] == coefs[1] and len({*coefs[1:]}) == 3
    for line in training:
        assert line["rewards/num_bad_rollouts"] == 0 and line["policy/updates_left_out"] == 0
        assert {"rewards/full/score_mean", "rewards/function:lengths/score_mean"} <= line.keys()
    folders = {path.name for path in Path(out).iterdir() if path.is_dir()}
    assert folders >= {"actor", "actor_ema", "critic", "best", "explain", "tensorboard"}
    assert differ(weights(out, "actor"), weights(out, "actor_ema"))
    samples = [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) > 3 and any("best_of_2" in row.values() for row in samples)
    assert any((Path(out) / "explain").iterdir())


def test_a_bad_rollout_is_skipped_written_down_and_leaves_the_weights_alone(models, data_file, cache_dir, tmp_path):
    out = run("ppo", data_file, cache_dir, tmp_path, actor_model_name_or_path=models["actor"],
              reward=[f"{models['rule']}:second_is_nan"], max_steps=1, actor_learning_rate=1e-2)  # fmt: skip
    [repro] = (Path(out) / "repro").iterdir()
    assert len(json.loads(repro.read_text())["rows"]) == 8 and repro.name == "step_000001.json"
    assert not any("policy/loss" in line for line in lines(out))
    assert [line["step"] for line in lines(out) if "eval/score_mean" in line] == [0, 1]
    assert not differ(weights(out, "actor"), load_file(str(Path(models["actor"]) / "model.safetensors")))
    with pytest.raises(UserError, match="3.* in a row"):
        run("ppo", data_file, cache_dir, tmp_path / "none", actor_model_name_or_path=models["actor"],
            reward=[f"{models['rule']}:nothing"], max_steps=4, log_interval=2)  # fmt: skip


def test_without_a_critic_and_with_nothing_to_gain_the_run_stops_early(models, data_file, cache_dir, tmp_path):
    """A learning rate at which no answer changes: no evaluation is better than the first."""
    out = run(
        "ppo",
        data_file,
        cache_dir,
        tmp_path,
        actor_model_name_or_path=models["actor"],
        reward=[f"{models['rule']}:lengths"],
        advantage_estimator="rloo",
        num_samples_per_prompt=2,
        actor_learning_rate=1e-12,
        max_steps=6,
        eval_interval=1,
        best_metric="score",
        early_stopping_patience=2,
        log_interval=2,
    )
    assert not (Path(out) / "critic").exists() and (Path(out) / "best").exists()
    found = lines(out)
    assert not any(name.startswith("critic/") for line in found for name in line)
    assert [line["step"] for line in found if "eval/score_mean" in line] == [0, 1, 2]
    assert [line["step"] for line in found if "policy/loss" in line] == [2]


PLAIN = {"ppo_epochs": 2, "actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "kl_coef": 0.5}
PLAIN |= {"max_steps": 3, "eval_fraction": 0.1}


@pytest.fixture(scope="module")
def plain(models, data_file, cache_dir, tmp_path_factory):
    names = {"actor_model_name_or_path": models["actor"], "critic_model_name_or_path": models["reward"]}
    flags = PLAIN | names
    return flags, run("ppo", data_file, cache_dir, tmp_path_factory.mktemp("plain"), **flags)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("temperature", 0.5),
        ("kl_coef", 5.0),
        ("gamma", 0.5),
        ("lam", 0.1),
        ("cliprange", 1e-4),
        ("cliprange_value", 1e-4),
        ("whiten_advantages", False),
        ("normalize_reward", False),
        ("clip_reward_value", 0.01),
        ("missing_eos_penalty", 9.0),
        ("ppo_epochs", 1),
        ("generation_batches", 2),
        ("gradient_accumulation_steps", 2),
        ("actor_weight_decay", 0.5),
        ("critic_weight_decay", 0.5),
        ("critic_learning_rate", 1e-2),
        ("max_answer_seq_len", 6),
        ("max_grad_norm", 0.01),
    ],
)
def test_a_flag_changes_the_weights(flag, value, plain, data_file, cache_dir, tmp_path):
    flags, expected = plain
    changed = run("ppo", data_file, cache_dir, tmp_path / "changed", **(flags | {flag: value}))
    assert any(differ(weights(expected, model), weights(changed, model)) for model in ("actor", "critic"))
