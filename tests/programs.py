"""Running the stage programs in this process, as `main(argv)`, on tiny settings."""

import importlib.util
import signal
from functools import cache
from pathlib import Path
from types import ModuleType

from dschat.engine.stop_signals import StopSignals

ROOT = Path(__file__).parents[1]
STEPS = {
    "sft": "step1_supervised_finetuning",
    "reward": "step2_reward_model_finetuning",
    "dpo": "step2_dpo_finetuning",
    "ppo": "step3_rlhf_finetuning",
}


@cache
def load(name: str) -> ModuleType:
    """A program below training/."""
    spec = importlib.util.spec_from_file_location(name.replace("/", "_").removesuffix(".py"), ROOT / "training" / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(stage: str) -> ModuleType:
    return load(f"{STEPS[stage]}/main.py")


def arguments(stage: str, data: str, cache_dir: str, output_dir: Path, **flags) -> list[str]:
    """Flags of a run of seconds; ``flags`` override."""
    given = {
        "data_path": data,
        "data_output_path": cache_dir,
        "output_dir": str(output_dir),
        "eval_fraction": 0.2,
        "dtype": "fp32",
        "seed": 7,
    }
    if stage == "ppo":
        given |= {
            "max_prompt_seq_len": 48,
            "max_answer_seq_len": 12,
            "per_device_generation_batch_size": 8,
            "per_device_training_batch_size": 4,
            "actor_learning_rate": 1e-4,
            "critic_learning_rate": 1e-4,
            "allow_weak_reward_model": True,
            "preflight": "off",
            "max_steps": 2,
        }
    else:
        given |= {
            "max_seq_len": 64,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3,
            "max_steps": 2,
        }
    argv = []
    for name, value in (given | flags).items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return argv


def run(stage: str, data: str, cache_dir: str, output_dir: Path, **flags) -> str:
    program(stage).main(arguments(stage, data, cache_dir, output_dir, **flags))
    return str(output_dir)


def run_stages(model: str, data: str, cache_dir: str, root: Path) -> dict[str, str]:
    """SFT from ``model``, a reward model from that, PPO from both: their output directories."""
    sft = run("sft", data, cache_dir, root / "sft", model_name_or_path=model)
    reward = run("reward", data, cache_dir, root / "reward", model_name_or_path=sft)
    models = {"actor_model_name_or_path": sft, "critic_model_name_or_path": reward}
    return {"sft": sft, "reward": reward, "ppo": run("ppo", data, cache_dir, root / "ppo", **models)}


def stop_at(monkeypatch, call: int) -> None:
    """A signal that is noticed at the n-th point where a run can be stopped."""
    calls = 0

    def agreed(self, runtime) -> int:
        nonlocal calls
        calls += 1
        return signal.SIGTERM if calls == call else 0

    monkeypatch.setattr(StopSignals, "agreed", agreed)
