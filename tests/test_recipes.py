"""Every script under training_scripts: short, executable, made of flags that its program has."""

import dataclasses
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

from dschat.config import parse_config
from dschat.flags import REMOVED

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # e2e_rlhf.py is a program, not part of an installed package
RECIPES = sorted((ROOT / "training").glob("step*/training_scripts/*/*/run_*.sh"))
PATHS = {
    "step1_supervised_finetuning": ["--model_name_or_path", "a b", "--data_path", "c d", "e", "--output_dir", "o p"],
    "step2_reward_model_finetuning": ["--model_name_or_path", "a b", "--data_path", "c d", "e", "--output_dir", "o p"],
    "step2_dpo_finetuning": ["--model_name_or_path", "a b", "--data_path", "c d", "e", "--output_dir", "o p"],
    "step3_rlhf_finetuning": ["--actor_model_name_or_path", "a b", "--critic_model_name_or_path", "x y"]
    + ["--data_path", "c d", "e", "--output_dir", "o p"],
}
STUB = '#!/usr/bin/env bash\nprintf \'%s\\0\' "$0" "$@"\n'  # says how it was called


def name_of(recipe):
    return "/".join([recipe.parts[-5].removesuffix("_finetuning"), *recipe.parts[-3:]])


def load_program(stage, name="main.py"):
    spec = importlib.util.spec_from_file_location(f"program_{stage}_{name[:-3]}", ROOT / "training" / stage / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def configs():
    return {stage: load_program(stage).Config for stage in PATHS}


@pytest.fixture
def stubs(tmp_path):
    """A folder first in PATH whose `python` and `deepspeed` print their arguments."""
    for name in ("python", "deepspeed"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def call(recipe, flags, env):
    result = subprocess.run([str(recipe), *flags], env=env, capture_output=True, text=True, check=True)
    return result.stdout.split("\0")[:-1]


def test_there_are_recipes_for_all_three_steps_of_each_actor():
    found = {(recipe.parts[-5], recipe.parts[-3], recipe.parts[-2], recipe.stem[4:]) for recipe in RECIPES}
    wanted = [("toy", place, "toy") for place in ("cpu", "single_gpu", "single_node")]
    wanted += [("custom", place, "custom") for place in ("cpu", "single_gpu", "single_node", "multi_node")]
    wanted += [("opt", "single_gpu", size) for size in ("1.3b", "6.7b_lora")]
    wanted += [("opt", "single_node", size) for size in ("1.3b", "1.3b_lora", "6.7b", "13b", "30b_lora")]
    wanted += [("opt", "multi_node", "66b"), ("llama2", "single_node", "7b"), ("llama2", "single_gpu", "7b_lora")]
    wanted += [("qwen2.5", "single_gpu", size) for size in ("0.5b", "1.5b", "7b_lora")]
    wanted += [("qwen2.5", "single_node", "7b")]
    assert found >= {(stage, *pair) for stage in PATHS for pair in wanted}
    first = "step1_supervised_finetuning"
    others = {(first, "chinese", "single_gpu", "1.5b"), (first, "japanese", "single_gpu", "3.6b_lora")}
    small = {("opt", place, "350m") for place in ("single_gpu", "single_node", "multi_node")}
    others |= {(stage, *pair) for stage in ("step2_reward_model_finetuning", "step2_dpo_finetuning") for pair in small}
    assert found - {(stage, *pair) for stage in PATHS for pair in wanted} == others


def test_a_slurm_job_is_one_torchrun_on_each_node(tmp_path, stubs):
    for name, text in (("scontrol", "printf 'n1\nn2\n'"), ("srun", 'printf "%s\\n" "$DSCHAT_LAUNCH" "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "4", "SLURM_JOB_ID": "7"}
    words = [str(ROOT / "training/examples/slurm.sh"), "recipe.sh", "--seed", "1"]
    shown = subprocess.run(words, env=stubs | job, capture_output=True, text=True, check=True).stdout.splitlines()
    place = "--rdzv_backend c10d --rdzv_endpoint n1:29500 --rdzv_id 7"
    assert shown[0] == f"torchrun --nnodes 2 --nproc_per_node 4 {place}"
    assert shown[1:] == ["--kill-on-bad-exit=1", "recipe.sh", "--seed", "1"]


def test_a_sweep_leaves_out_what_does_not_fit(tmp_path, stubs):
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(
        '#!/usr/bin/env bash\necho "$@"\n[[ "$*" != *"zero_stage 2 --lora_dim 0"*"--dry_run"* ]] || exit 3\n'
    )
    recipe.chmod(0o755)
    words = [str(ROOT / "training/examples/sweep.sh"), str(recipe), "out", "--seed", "1"]
    shown = subprocess.run(words, env=stubs, capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [line.split()[-1] for line in shown if "--dry_run" not in line]
    assert runs == ["out/zero2-lora128", "out/zero3-lora0", "out/zero3-lora128"] and len(shown) == 7


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_is_short_executable_and_its_flags_exist(recipe, configs, stubs):
    lines = recipe.read_text().splitlines()
    assert len(lines) <= 15 and os.access(recipe, os.X_OK)
    assert lines[0] == "#!/usr/bin/env bash" and lines[1].startswith("# Step ")
    stage, deployment = recipe.parts[-5], recipe.parts[-2]
    launcher, main, *flags = call(recipe, [*PATHS[stage], "--seed", "5"], stubs)
    assert Path(launcher).name == ("deepspeed" if deployment.endswith("node") else "python")
    assert Path(main).resolve() == ROOT / "training" / stage / "main.py"
    config = parse_config(configs[stage], flags, removed=REMOVED)
    assert config.seed == 5 and config.output_dir == "o p" and config.data_path == ["c d", "e"]
    given = {word.removeprefix("--").removeprefix("no-") for word in flags if word.startswith("--")}
    defaults = {field.name: field.default for field in dataclasses.fields(configs[stage])}
    paths = {word.removeprefix("--") for word in PATHS[stage]}
    assert sum(getattr(config, name) != defaults[name] for name in given - paths) >= 2, "flags that differ"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_gives_no_flag_its_default(recipe, configs, stubs):
    """Where a recipe builds on another, a default may undo the other's flag."""
    text = recipe.read_text()
    if "main.py" not in text:
        return
    stage = recipe.parts[-5]
    config = parse_config(configs[stage], call(recipe, PATHS[stage], stubs)[2:])
    for field in dataclasses.fields(configs[stage]):
        if f"--{field.name} " in text:
            assert getattr(config, field.name) != field.default, field.name


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_dschat_launch_replaces_the_launcher(recipe, tmp_path, stubs):
    command = f"{tmp_path / 'deepspeed'} --hostfile hosts"
    words = call(recipe, ["--output_dir", "x"], stubs | {"DSCHAT_LAUNCH": command})
    assert words[:3] == [str(tmp_path / "deepspeed"), "--hostfile", "hosts"] and words[3].endswith("main.py")


def test_the_repository_may_stand_in_a_folder_with_spaces(tmp_path, stubs):
    copy = tmp_path / "my clone"
    shutil.copytree(ROOT / "training", copy / "training", ignore=shutil.ignore_patterns("__pycache__"))
    for recipe in RECIPES:
        words = call(copy / recipe.relative_to(ROOT), ["--output_dir", "o p"], stubs)
        assert Path(words[1]).resolve() == copy / "training" / recipe.parts[-5] / "main.py"
        assert words[-2:] == ["--output_dir", "o p"]


def test_multi_node_shards_the_weights_and_one_node_the_optimizer(configs, stubs):
    for recipe in RECIPES:
        stage, family, deployment = recipe.parts[-5], recipe.parts[-3], recipe.parts[-2]
        if family == "custom":
            config = parse_config(configs[stage], call(recipe, PATHS[stage], stubs)[2:])
            stages = [value for name, value in vars(config).items() if name in ("zero_stage", "actor_zero_stage")]
            assert stages == [{"single_node": 2, "multi_node": 3}.get(deployment, 0)]


def test_e2e_reads_the_flags_that_the_programs_have(configs):
    e2e = importlib.import_module("e2e_rlhf")
    kinds = {int: "int", float: "float", bool: "bool", str: "str", list[str]: "list[str]"}
    everywhere: dict[str, str] = {}
    for key, stage in e2e.STAGES.items():
        config = load_program(*stage.program.split("/")).Config
        hints = typing.get_type_hints(config)
        wanted = {name: kinds.get(hint, str(hint)) for name, hint in hints.items() if name not in e2e.SET_HERE}
        assert e2e.flag_types(key) == wanted | {"config": "str"}
        for name, kind in wanted.items():
            assert everywhere.setdefault(name, kind) == kind, "a flag given to every stage means the same in each"
