"""Every recipe is planned for the machine that its first line names, and fits there."""

import re

from tests.test_recipes import PATHS, RECIPES, call, load_program, name_of, stubs
from training.stages import named_models

import pytest

__all__ = ["stubs"]  # a fixture
SIZED = re.compile(r"for (\d+) GPUs? of (\d+) GB")
REWARD = re.compile(r"with the reward model of (\S+):")  # else it is as large as the policy


@pytest.fixture(scope="module")
def programs():
    return {stage: load_program(stage) for stage in PATHS}


def models_of(recipe):
    """What a recipe that names no model is planned with: custom takes any, and steps 2 and 3 the output of step 1."""
    found = {(model.family, model.size): model.path for model in named_models().values()}
    path = found.get((recipe.parts[-3], recipe.stem.removeprefix("run_")), "facebook/opt-125m")
    return "facebook/opt-125m" if path == "toy" and not recipe.parts[-5].startswith("step1") else path


# Seconds each at most: one family, and of what is on a CPU, whose plan asks the allocator, one.
FEW = [r for r in RECIPES if r.parts[-3] == "llama2" or (r.parts[-2] == "cpu" and r.parts[-5].startswith("step1"))]
OTHERS = [pytest.param(r, marks=pytest.mark.long, id=name_of(r)) for r in RECIPES if r not in FEW]


@pytest.mark.parametrize("recipe", [*(pytest.param(r, id=name_of(r)) for r in FEW), *OTHERS])
def test_a_dry_run_of_a_recipe_fits_the_machine_it_is_made_for(recipe, programs, stubs, tmp_path, capsys):
    stage, path, text = recipe.parts[-5], models_of(recipe), recipe.read_text()
    paths = [
        "--actor_model_name_or_path",
        path,
        "--critic_model_name_or_path",
        reward[1] if (reward := REWARD.search(text)) else path,
        "--reward",
        "function:x.py:score",
    ]
    paths = paths if stage.startswith("step3") else ["--model_name_or_path", path]
    out = tmp_path / "out"
    given = [*paths, "--data_path", "no/such/data", "--output_dir", str(out), "--dry_run"]
    machine = SIZED.search(text)
    if recipe.parts[-3] != "toy":  # whose models fit anywhere; how much is free here may change
        given += ["--plan_for", f"{machine[1]}x{machine[2]}" if machine else "1x24"]
    programs[stage].main(call(recipe, given, stubs)[2:])
    shown = capsys.readouterr().out
    assert "it fits; the largest that would: --" in shown and "peak of a rank" in shown
    assert not out.exists(), "nothing is written"
