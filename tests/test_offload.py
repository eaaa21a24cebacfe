"""Offload on a CPU, where the host's memory is all there is: every stage works and computes what it does without, or
says why not. On two ranks: tests/test_zero.py."""

import json
from pathlib import Path

from dschat.errors import UserError
from tests.programs import arguments, program, run

import pytest

SUPERVISED = {
    "max_steps": 3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}
PPO = {"max_steps": 2, "per_device_training_batch_size": 4, "gradient_accumulation_steps": 2}
BOTH_FROZEN = {"offload_reference_model": True, "offload_reward_model": True}
MEASURED = ("loss", "policy/loss", "critic/loss", "grad_norm", "policy/grad_norm", "objective/kl_per_seq")


def losses(directory: str) -> list[dict]:
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in MEASURED if name in line} for line in lines if "lr" in line]


@pytest.fixture(scope="module")
def train(model_dirs, data_file, cache_dir, tmp_path_factory):
    """Runs a stage, and gives its losses, a line for each step."""
    llama, root = model_dirs("llama"), tmp_path_factory.mktemp("offload")
    reward = run("reward", data_file, cache_dir, root / "reward", model_name_or_path=llama)
    ppo = PPO | {"actor_model_name_or_path": llama, "critic_model_name_or_path": reward}

    def with_flags(stage: str, **flags) -> list[dict]:
        given = ppo if stage == "ppo" else SUPERVISED | {"model_name_or_path": llama}
        return losses(run(stage, data_file, cache_dir, tmp_path_factory.mktemp(stage), **given | flags))

    return with_flags


@pytest.fixture(scope="module")
def plain(train):
    """By stage, without offload at ZeRO 0; each run once."""
    found: dict[str, list[dict]] = {}

    def of(stage: str) -> list[dict]:
        if stage not in found:
            found[stage] = train(stage)
        return found[stage]

    return of


def placed(stage: str, zero: int) -> dict[str, int]:
    return {"actor_zero_stage": zero, "critic_zero_stage": zero} if stage == "ppo" else {"zero_stage": zero}


@pytest.mark.parametrize(
    ("stage", "zero", "more"),
    [
        *(("sft", zero, {}) for zero in (1, 2, 3)),
        *((stage, zero, {}) for stage, zero in (("reward", 1), ("reward", 3), ("dpo", 2), ("dpo", 3))),
        *(("ppo", zero, {}) for zero in (1, 2, 3)),
        *(("ppo", zero, BOTH_FROZEN) for zero in (2, 3)),
    ],
)
def test_an_offloaded_run_computes_what_it_does_without(stage, zero, more, train, plain):
    found, expected = train(stage, offload=True, **placed(stage, zero), **more), plain(stage)
    assert len(found) == len(expected) == (2 if stage == "ppo" else 3)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and len(one) >= 2
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("more", [{"offload_reference_model": True}, {"offload_reward_model": True}])
def test_a_frozen_model_alone_is_offloaded(more, train, plain):
    for one, other in zip(train("ppo", **more), plain("ppo"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("stage", "flags", "why"),
    [
        *(
            (s, {"offload": True}, "DeepSpeed offloads what ZeRO shards, at 0 nothing")
            for s in ("sft", "reward", "dpo")
        ),
        ("ppo", {"offload": True}, "give --actor_zero_stage 1, 2 or 3"),
        ("ppo", {"offload_reference_model": True, "reference_zero_stage": 2}, "at ZeRO 3 only; drop"),
        ("ppo", {"offload_reward_model": True, "reward_zero_stage": 1}, "at ZeRO 3 only; drop"),
        ("ppo", {"offload_reference_model": True, "actor_lora_dim": 4}, "under LoRA the reference has no weights"),
        ("ppo", {"offload_reward_model": True, "reward": ["lora:x"]}, "no reward is a full model"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_with_the_reason(stage, flags, why, tmp_path):
    models = {"actor_model_name_or_path": "x", "critic_model_name_or_path": "y"}
    models = models if stage == "ppo" else {"model_name_or_path": "x"}
    with pytest.raises(UserError, match=why):
        program(stage).main(arguments(stage, "no/data", "no/cache", tmp_path / "out", **models, **flags))
