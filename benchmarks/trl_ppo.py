"""TRL's PPO trainer, a step at a time."""

from typing import Any

import datasets
import torch
from shapes import EOS_ID, random_prompts, word_tokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_settings import common, hand_over, weights_dtype
from turns import Facts, Passes, Turns, now
from workloads import ppo_models


def ppo(args: Any, turns: Turns) -> None:
    models = ppo_models(args, weights_dtype(args))
    passes = Passes(models)
    vocab_size = models["actor"].config.vocab_size
    tokenizer = word_tokenizer(vocab_size)
    num_prompts = args.batch * (args.turns + 1)
    prompts = random_prompts(vocab_size, num_prompts, args.prompt, args.seed + 1)
    accumulation = args.batch // (args.micro_batch or args.batch)
    own = {
        "per_device_train_batch_size": args.batch // accumulation,
        "gradient_accumulation_steps": accumulation,
        "num_mini_batches": args.minibatches,
        "num_ppo_epochs": args.ppo_epochs,
        "local_rollout_forward_batch_size": args.batch,
        "response_length": args.response,
        "temperature": 1.0,
        "stop_token": "eos",
        "total_episodes": num_prompts,
        "num_sample_generations": 0,
    }
    trainer = PPOTrainer(
        PPOConfig(**(common(args) | own | args.trl_settings)),
        tokenizer,
        model=models["actor"],
        ref_model=models["ref"],
        reward_model=models["reward"],
        value_model=models["critic"],
        train_dataset=datasets.Dataset.from_dict({"input_ids": prompts.tolist()}),
    )
    marks = mark_phases(ppo_trainer, trainer, args.prompt)

    def facts() -> Facts:
        ended = now()
        return {
            "sequences": len(marks["lengths"]),
            "prompt_tokens": len(marks["lengths"]) * args.prompt,
            "lengths": marks["lengths"],
            "response_tokens": sum(marks["lengths"]),
            "optimizer_steps": marks.pop("optimizer_steps"),
            "weights": {role: sum(p.numel() for p in model.parameters()) for role, model in models.items()},
            "dtype": str(models["actor"].dtype),
            "passes": passes.take(),
            "rollout_s": marks["sampled"] - marks["begun"],
            "score_s": marks["scored"] - marks["sampled"],
            "train_s": ended - marks.pop("scored"),
        }

    trainer.add_callback(hand_over(turns, facts))
    trainer.train()


def mark_phases(module: Any, trainer: Any, prompt: int) -> dict[str, Any]:
    """Clock readings of the step that runs: ``begun`` and ``sampled`` around the rollout, ``scored`` before the first
    micro-batch is trained on; the ``lengths`` of the responses, the ``optimizer_steps``."""
    marks: dict[str, Any] = {}
    generation, accumulate = module.batch_generation, trainer.accelerator.accumulate

    def sample(*given: Any) -> Any:
        marks["begun"] = now()
        result = generation(*given)
        marks["sampled"] = now()
        ended = (result[0][:, prompt:] == EOS_ID).int()
        size = ended.shape[1]
        marks["lengths"] = torch.where(ended.any(1), ended.argmax(1) + 1, size).tolist()
        return result

    def train(*given: Any) -> Any:
        marks.setdefault("scored", now())
        return accumulate(*given)

    def count(*_: Any) -> None:
        marks["optimizer_steps"] = marks.get("optimizer_steps", 0) + 1

    module.batch_generation, trainer.accelerator.accumulate = sample, train
    trainer.optimizer.optimizer.register_step_post_hook(count)
    return marks
