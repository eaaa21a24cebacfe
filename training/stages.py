"""The stages of e2e_rlhf.py: their programs, what each starts from, their flags and their recipes."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from dschat.config import read_flags
from dschat.errors import UserError

TRAINING = Path(__file__).resolve().parent
DEPLOYMENTS = ("cpu", "single_gpu", "single_node", "multi_node")
SET_HERE = ("output_dir", "model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")


@dataclass(frozen=True)
class Stage:
    step: int  # as in --step
    title: str
    program: str  # below training/
    record: str = "run.json"  # what it leaves when it is done


# The keys are those of --sft.NAME and of summary.json.
STAGES = {
    "sft": Stage(1, "supervised fine-tuning", "step1_supervised_finetuning/main.py"),
    "reward": Stage(2, "reward model", "step2_reward_model_finetuning/main.py"),
    "ppo": Stage(3, "PPO", "step3_rlhf_finetuning/main.py"),
    "dpo": Stage(2, "DPO", "step2_dpo_finetuning/main.py"),
    "answers": Stage(3, "answers side by side", "step1_supervised_finetuning/prompt_eval.py", "summary.json"),
}
METHODS = {"ppo": ("sft", "reward", "ppo"), "dpo": ("sft", "dpo", "answers")}
# What of the stages before it a stage starts from.
NEEDS = {"sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "dpo": ("sft",), "answers": ("sft", "dpo")}


@dataclass(frozen=True)
class Model:
    path: str  # what a stage loads
    family: str  # its recipe is training_scripts/<family>/<deployment>/run_<size>.sh
    size: str
    name: str  # of its output directory


def program(key: str) -> Path:
    return TRAINING / STAGES[key].program


@functools.cache
def flag_types(key: str) -> dict[str, str]:
    """The flags of a stage's program that a user may give, read from its source: importing it would import torch."""
    sources = (
        "dschat/flags.py",
        "dschat/rlhf/flags.py",
        "dschat/rlhf/model_flags.py",
        "dschat/rlhf/monitor_flags.py",
        f"training/{STAGES[key].program}",
    )
    found = read_flags([TRAINING.parent / path for path in sources]) | {"config": "str"}
    return {name: kind for name, kind in found.items() if name not in SET_HERE}


def find_model(text: str, key: str) -> Model:
    if text == "toy":
        return Model("toy", "toy", "toy", "toy")
    if opt := re.fullmatch(r"(?:facebook/)?(?:opt-)?(\d+(?:\.\d+)?[mb])", text):
        return Model(f"facebook/opt-{opt[1]}", "opt", opt[1], f"opt-{opt[1]}")
    directory = Path(text).expanduser()
    if directory.is_dir():
        return Model(str(directory), "custom", "custom", directory.resolve().name)
    raise UserError(
        f"{text} is neither a directory nor a model with a recipe for step {STAGES[key].step}: {list_recipes(key)}"
    )


def recipes(key: str) -> Path:
    return program(key).parent / "training_scripts"


def find_recipe(key: str, model: Model, deployment: str) -> Path:
    recipe = recipes(key) / model.family / deployment / f"run_{model.size}.sh"
    if not recipe.is_file():
        step = STAGES[key].step
        raise UserError(f"no recipe of step {step} for {model.name} on {deployment}; there are: {list_recipes(key)}")
    return recipe


def list_recipes(key: str) -> str:
    """As 'toy on cpu, single_gpu, single_node; …'."""
    found: dict[str, list[str]] = {}
    for deployment in DEPLOYMENTS:
        for script in sorted(recipes(key).glob(f"*/{deployment}/run_*.sh")):
            family, size = script.parts[-3], script.stem.removeprefix("run_")
            name = {"toy": "toy", "custom": "a model directory"}.get(family, f"facebook/{family}-{size}")
            found.setdefault(name, []).append(deployment)
    return "; ".join(f"{name} on {', '.join(deployments)}" for name, deployments in found.items())
