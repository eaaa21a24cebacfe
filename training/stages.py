"""The stages of e2e_rlhf.py: their programs, what each starts from, their flags and their recipes."""

import functools
from dataclasses import dataclass
from pathlib import Path

from dschat.config import read_flags
from dschat.errors import UserError

TRAINING = Path(__file__).resolve().parent
DEPLOYMENTS = ("cpu", "single_gpu", "single_node", "multi_node")
SET_HERE = ("output_dir", "model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path")
# Where the models of a family are on the hub, by their size: as it is written there, in capitals, or both.
HUB = {
    "opt": "facebook/opt-{0}",
    "llama2": "meta-llama/Llama-2-{0}-hf",
    "qwen2.5": "Qwen/Qwen2.5-{1}",
    "chinese": "Qwen/Qwen2.5-{1}",
    "japanese": "rinna/japanese-gpt-neox-{0}",
}
LORA = "_lora"  # behind the size of a recipe that trains adapters


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
    """The model of that name: of a recipe (opt-6.7b-lora), on the hub with or without -lora behind it, of OPT's sizes
    alone (1.3b), or a directory."""
    known = named_models()
    if text in known:
        return known[text]
    directory = Path(text).expanduser()
    if directory.is_dir():
        return Model(str(directory), "custom", "custom", directory.resolve().name)
    raise UserError(
        f"{text} is neither a directory nor a model with a recipe for step {STAGES[key].step}: {list_recipes(key)}"
    )


@functools.cache
def named_models() -> dict[str, Model]:
    """Every name of every model that has a recipe in some step. A name that two families have is the first one's."""
    found = {"toy": Model("toy", "toy", "toy", "toy")}
    for family, hub in HUB.items():
        scripts = [path for key in STAGES for path in recipes(key).glob(f"{family}/*/run_*.sh")]
        for size in sorted({path.stem.removeprefix("run_") for path in scripts}):
            base = size.removesuffix(LORA)
            suffix, path = "-lora" if size.endswith(LORA) else "", hub.format(base, base.upper())
            model = Model(path, family, size, f"{family}-{base}{suffix}")
            for name in (model.name, path + suffix, *([base + suffix] if family == "opt" else [])):
                found.setdefault(name, model)
    return found


def recipes(key: str) -> Path:
    return program(key).parent / "training_scripts"


def find_recipe(key: str, model: Model, deployment: str) -> Path:
    recipe = recipes(key) / model.family / deployment / f"run_{model.size}.sh"
    if not recipe.is_file():
        step = STAGES[key].step
        raise UserError(f"no recipe of step {step} for {model.name} on {deployment}; there are: {list_recipes(key)}")
    return recipe


def pairs(key: str) -> dict[str, list[str]]:
    """The deployments that each model has recipes of a step for, by the model's name."""
    found: dict[str, list[str]] = {}
    by_recipe = {(model.family, model.size): name for name, model in reversed(named_models().items())}
    for deployment in DEPLOYMENTS:
        for script in sorted(recipes(key).glob(f"*/{deployment}/run_*.sh")):
            family, size = script.parts[-3], script.stem.removeprefix("run_")
            name = "a model directory" if family == "custom" else by_recipe[family, size]
            found.setdefault(name, []).append(deployment)
    return dict(sorted(found.items()))


def list_recipes(key: str) -> str:
    """As 'a model directory on cpu, single_gpu; toy on cpu; …'."""
    return "; ".join(f"{name} on {', '.join(deployments)}" for name, deployments in pairs(key).items())


def pairs_table() -> list[str]:
    """A line for each (model, deployment): the steps that have a recipe for it."""
    steps = {"step 1": "sft", "step 2": "reward", "step 3": "ppo", "dpo": "dpo"}
    found = {name: pairs(key) for name, key in steps.items()}
    every = sorted({(model, place) for known in found.values() for model, places in known.items() for place in places})
    rows = [("model", "deployment", "recipes of")]
    for model, place in every:
        rows.append((model, place, ", ".join(name for name, known in found.items() if place in known.get(model, []))))
    return [f"{model:20}  {place:12}  {names}" for model, place, names in rows]
