"""Neither ranks nor ZeRO nor offload change a run: all steps, with adapters too, agree with ZeRO 0 on one rank."""

import json
from pathlib import Path

from tests.programs import run
from tests.ranks import launch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytestmark = pytest.mark.long  # two minutes; tests/test_resume_ranks.py has every stage on two ranks in the short run


@pytest.fixture(scope="module")
def runs(model_dirs, data_file, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("zero")
    base = model_dirs("llama")
    reward = run("reward", data_file, cache_dir, root / "base-reward", model_name_or_path=base)
    adapter = run("reward", data_file, cache_dir, root / "adapter", model_name_or_path=base, lora_dim=4)
    results = {}
    for world_size in (1, 2):
        launch(
            "tests.zero_driver",
            world_size,
            base,
            reward,
            adapter,
            data_file,
            cache_dir,
            str(root),
            "0,1,2,3",
            seconds=900,
        )
        found = json.loads((root / f"ranks{world_size}.json").read_text())
        results |= {(int(stage), world_size): stages for stage, stages in found.items()}
    return root, results


DPO = [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)]  # where that is run
CASES = [(stage, world_size) for world_size in (1, 2) for stage in (0, 1, 2, 3)]


@pytest.mark.parametrize(("stage", "world_size"), CASES[1:])
def test_losses_agree_with_zero_0_on_one_rank(runs, stage, world_size):
    _, results = runs
    compared = 0
    for name, found in results[stage, world_size].items():
        expected = results[0, 1][name]
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for key in other:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), (name, key)
                compared += 1
    assert compared >= (28 if stage < 2 or world_size == 1 else 50)


def test_the_losses_move(runs):
    """Equal losses prove nothing if nothing is trained."""
    _, results = runs
    for name in ("sft", "reward", "dpo", "sft-lora"):
        losses = [line["loss"] for line in results[0, 1][name] if "loss" in line]
        assert len(losses) == 3 and max(losses) - min(losses) > 1e-2
    for name in ("ppo", "ppo-lora"):
        norms = [line["policy/grad_norm"] for line in results[0, 1][name] if "policy/grad_norm" in line]
        assert len(norms) == 3 and min(norms) > 0


@pytest.mark.parametrize(("stage", "world_size"), CASES)
def test_saved_models_agree_and_load_with_plain_transformers(runs, stage, world_size):
    root, _ = runs
    for folder, auto in (
        ("sft", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
        ("dpo", AutoModelForCausalLM),
        ("ppo/actor", AutoModelForCausalLM),
        ("ppo/critic", AutoModelForSequenceClassification),
    ):
        if folder == "dpo" and (stage, world_size) not in DPO:
            continue
        reference = auto.from_pretrained(Path(root) / "zero0-ranks1" / folder).state_dict()
        saved = Path(root) / f"zero{stage}-ranks{world_size}" / folder
        model, info = auto.from_pretrained(saved, output_loading_info=True)
        assert not info["missing_keys"]
        for name, value in model.state_dict().items():
            assert torch.allclose(value, reference[name], atol=1e-3), (folder, name)


@pytest.mark.parametrize("stage", [2, 3])
def test_saved_adapters_agree(runs, stage):
    root, _ = runs
    for folder in ("sft-lora", "ppo-lora/actor", "ppo-lora/critic"):
        expected, found = (
            load_file(root / f"zero{where}" / folder / "adapter_model.safetensors")
            for where in ("0-ranks1", f"{stage}-ranks2")
        )
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-3), (folder, name)
            assert value.abs().max() > 0
