"""Runs steps 1, 2, DPO and 3 at every ZeRO stage in one process per rank, and writes each run's losses as JSON.

python -m tests.zero_driver <model> <reward model> <reward adapter> <data> <cache> <output> <stages> [gpu]

With adapters, on one rank stage 0 alone, on two 2 and 3. DPO is run at stage 0, and on two ranks at all.
On two ranks it and what has adapters are offloaded where there is anything to offload. ``gpu``: on the one that is
not there (`tests/pretend_gpu.py`).
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from dschat.engine.distributed import init_runtime
from dschat.errors import run_program
from tests.pretend_gpu import pretend_gpu
from tests.programs import run


def losses(directory: str) -> list[dict]:
    names = ("loss", "policy/loss", "critic/loss", "grad_norm", "policy/grad_norm", "critic/grad_norm")
    names += ("eval/perplexity", "eval/accuracy", "eval/margin", "eval/score_mean", "objective/kl_per_seq")
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in names if name in line} for line in lines]


def main() -> None:
    with pretend_gpu() if sys.argv[8:] == ["gpu"] else nullcontext():
        run_all(*sys.argv[1:8])


def run_all(base: str, reward: str, adapter: str, data: str, cache: str, root: str, stages: str) -> None:
    runtime = init_runtime(0)
    world = runtime.world_size
    result = {}
    for stage in map(int, stages.split(",")):
        out = Path(root) / f"zero{stage}-ranks{world}"
        # The global batch is the same on any number of ranks, and every step has a ragged last micro-batch.
        common = {"max_steps": 3, "num_train_epochs": 3}
        sizes = {"per_device_train_batch_size": 6 // world, "gradient_accumulation_steps": 2}
        sft = run("sft", data, cache, out / "sft", model_name_or_path=base, zero_stage=stage, **sizes, **common)
        rm = run("reward", data, cache, out / "reward", model_name_or_path=base, zero_stage=stage, **sizes, **common)
        offload = {"offload": world > 1 and stage > 0}
        ppo_sizes = {
            "per_device_generation_batch_size": 4 // world,
            "num_samples_per_prompt": 2,
            "per_device_training_batch_size": 2 // world,
            "gradient_accumulation_steps": 2,
            "ppo_epochs": 2,
        }
        models = {"actor_model_name_or_path": base, "critic_model_name_or_path": reward}
        placed = {"actor_zero_stage": stage, "critic_zero_stage": stage}
        rates = {"actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3}
        ppo = run("ppo", data, cache, out / "ppo", **models, **placed, **rates, **ppo_sizes, **common)
        runs = {"sft": sft, "reward": rm, "ppo": ppo}
        if world > 1 or stage == 0:
            given = {"model_name_or_path": base, "zero_stage": stage} | offload
            runs["dpo"] = run("dpo", data, cache, out / "dpo", **given, **sizes, **common)
        if stage in ((0,) if world == 1 else (2, 3)):
            lora = {"lora_dim": 4, "zero_stage": stage} | offload
            runs["sft-lora"] = run(
                "sft", data, cache, out / "sft-lora", model_name_or_path=base, **lora, **sizes, **common
            )
            models["critic_model_name_or_path"] = adapter
            shared = {"actor_lora_dim": 4, "critic_lora_dim": 4, "share_trunk": True, "critic_learning_rate": 1e-3}
            runs["ppo-lora"] = run(
                "ppo", data, cache, out / "ppo-lora", **models, **placed, **shared, **offload, **ppo_sizes, **common
            )
        if runtime.is_main:
            result[str(stage)] = {name: losses(directory) for name, directory in runs.items()}
    if runtime.is_main:
        (Path(root) / f"ranks{world}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
