"""What the weights of step 3's four models take in memory: all whole, adapters on the actor, all on one trunk.

    python benchmarks/shared_trunk.py --size 125m --lora_dim 16

Random weights in a temporary directory; the models are made as step 3 makes them. Weights are counted by their memory,
each once, whoever holds it.
"""

import argparse
import gc
import json
import tempfile
from typing import Any

from dschat.config import parse_config
from dschat.engine.distributed import init_runtime
from dschat.errors import run_program
from dschat.models.load import load_causal_lm, load_scorer, save_model
from dschat.models.lora import LoraSpec, add_lora
from dschat.rlhf.build import create_models
from dschat.rlhf.flags import PPOFlags

import torch
from shapes import SIZES, model_config, random_model, word_tokenizer


def flags(actor: str, reward: str, kind: str, dim: int) -> PPOFlags:
    given = ["--output_dir", "unused", "--data_path", "toy", "--actor_model_name_or_path", actor, "--dtype", "fp32"]
    given += ["--critic_model_name_or_path", reward, "--no-normalize_reward"]
    if kind != "whole":
        given += ["--actor_lora_dim", str(dim), "--critic_lora_dim", str(dim)]
    return parse_config(PPOFlags, [*given, *(["--share_trunk"] if kind == "shared" else [])], doc=__doc__)


def weight_bytes(models: list[Any]) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", default="125m", choices=tuple(SIZES))
    made.add_argument("--lora_dim", type=int, default=16)
    args = made.parse_args()
    runtime, dtype = init_runtime(0), torch.float32
    with tempfile.TemporaryDirectory() as root:
        actor, adapter, reward = f"{root}/actor", f"{root}/adapter", f"{root}/reward"
        config = model_config(args.size)
        tokenizer = word_tokenizer(config.vocab_size)
        save_model(random_model(config, dtype, 0), tokenizer, actor)
        base = weight_bytes([load_causal_lm(actor, tokenizer, dtype=dtype)])
        classifier = load_scorer(actor, tokenizer, dtype=dtype)
        save_model(classifier, tokenizer, reward)
        add_lora(classifier, LoraSpec(args.lora_dim))
        save_model(classifier, tokenizer, adapter, actor)
        for kind, path in (("whole", reward), ("adapters", reward), ("shared", adapter)):
            spec = flags(actor, path, kind, args.lora_dim).models_spec(1, 1)
            engine, rewards = create_models(spec, tokenizer, dtype=dtype, runtime=runtime)
            scorers = [getattr(source, "model", None) or source.scorer for source, _ in rewards.sources.values()]
            held = weight_bytes([engine.actor, engine.critic, engine.ref, *scorers])
            line = {"models": kind, "size": args.size, "lora_dim": args.lora_dim, "base_mb": round(base / 1e6, 1)}
            print(json.dumps(line | {"held_mb": round(held / 1e6, 1), "ratio": round(held / base, 3)}))
            del engine, rewards, scorers
            gc.collect()


if __name__ == "__main__":
    run_program(main)
