"""From flags to the models and the rewards of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, create_frozen_model, create_train_engine
from dschat.engine.distributed import Runtime
from dschat.engine.ema import EMA
from dschat.errors import UserError
from dschat.models.load import load_trained_scorer
from dschat.report.reward_quality import QUALITY_FOLDER, read_quality, weakness
from dschat.rlhf.reward_api import ApiReward
from dschat.rlhf.reward_lora import LoraReward
from dschat.rlhf.reward_sources import FullReward, FunctionReward
from dschat.rlhf.rewards import CombinedReward, RewardSource, RewardSpec
from dschat.rlhf.rlhf_engine import RLHFEngine, create_actor_and_reference, load_critic, same_tokenizer

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelsSpec:
    """Which models a run has and how; see the flags of the same names in step 3."""

    actor_path: str
    critic_path: str | None  # None: the first reward model that reads the actor's ids, else the actor
    rewards: tuple[RewardSpec, ...]
    actor: TrainSpec
    critic: TrainSpec | None  # None: the advantages need none
    reference_stage: int
    reward_stage: int
    normalize_reward: bool
    upcast_layernorm: bool
    ema_decay: float | None  # None: no moving average
    micro_batch_size: int  # responses that a model scores at once
    api_timeout: float
    api_retries: int


def create_models(
    spec: ModelsSpec, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, runtime: Runtime
) -> tuple[RLHFEngine, CombinedReward]:
    """Actor, reference, critic, moving average; and the rewards, of which a lora one lives on the reference.

    Raises:
        UserError: a directory of the wrong kind, a source that cannot be made: no such directory, function or server.
    """
    adapters = tuple(reward.target for reward in spec.rewards if reward.kind == "lora")
    if len(adapters) > 1:
        raise UserError(f"--reward: one lora reward at most, found {' '.join(adapters)}")
    engine = create_actor_and_reference(
        spec.actor_path,
        tokenizer,
        spec.actor,
        spec.reference_stage,
        dtype=dtype,
        runtime=runtime,
        upcast_norms=spec.upcast_layernorm,
        adapter_dirs=adapters,
        normalize_reward=spec.normalize_reward,
    )
    sources = [create_source(reward, spec, engine, tokenizer, dtype, runtime) for reward in spec.rewards]
    if spec.critic is not None:
        path = spec.critic_path or critic_start(spec.rewards, tokenizer)
        critic = load_critic(path, spec.actor_path, tokenizer, dtype=dtype, normalize=spec.normalize_reward)
        engine.critic = create_train_engine(critic, spec.critic, dtype=dtype, runtime=runtime)
    if spec.ema_decay is not None:
        engine.ema = EMA(engine.actor, spec.ema_decay)
    weights = [reward.weight for reward in spec.rewards]
    return engine, CombinedReward(list(zip(sources, weights, strict=True)))


def check_quality(rewards: tuple[RewardSpec, ...], allow_weak: bool) -> list[str]:
    """A line on each reward model, from the report that step 2 left in its directory.

    Raises:
        UserError: a model that its report calls weak, unless ``allow_weak``; a damaged report.
    """
    lines = []
    for path in (reward.target for reward in rewards if reward.kind in ("full", "lora")):
        quality = read_quality(str(Path(path) / QUALITY_FOLDER))
        if quality is None:
            lines.append(f"{path}: nothing is known of its quality; rw_eval.py of step 2 measures it")
            continue
        reason = weakness(quality)
        if reason and not allow_weak:
            mend = "train a better one, or pass --allow_weak_reward_model"
            raise UserError(f"{path} is too weak a reward model for PPO: {reason}; {mend}")
        low, high = quality["ci95"]
        known = f"accuracy {quality['accuracy']:.2f} (95 %: {low:.2f} to {high:.2f})"
        lines.append(f"{path}: {known}" + (f"; weak, and used all the same: {reason}" if reason else ""))
    return lines


def create_source(
    reward: RewardSpec,
    spec: ModelsSpec,
    engine: RLHFEngine,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    runtime: Runtime,
) -> RewardSource:
    """One source of ``spec.rewards``."""
    batch: dict[str, Any] = {"micro_batch_size": spec.micro_batch_size, "device": runtime.device}
    if reward.kind == "full":
        own = load_tokenizer(reward.target)
        normalize = spec.normalize_reward
        device = None if spec.reward_stage == 3 else runtime.device  # at stage 3 no rank holds it whole on its device
        scorer = load_trained_scorer(reward.target, own, dtype=dtype, normalize=normalize, device=device)
        model = create_frozen_model(scorer, zero_stage=spec.reward_stage, dtype=dtype, device=runtime.device)
        return FullReward(model, own, tokenizer, **batch)
    if reward.kind == "lora":
        adapter, verify = engine.adapters[reward.target], spec.normalize_reward
        return LoraReward(adapter, reward.target, tokenizer, verify=verify, **batch)
    if reward.kind == "api":
        api = ApiReward(
            reward.target,
            tokenizer,
            batch_size=spec.micro_batch_size,
            timeout=spec.api_timeout,
            retries=spec.api_retries,
        )
        api.check()
        return api
    return FunctionReward(reward.target, tokenizer)


def critic_start(rewards: tuple[RewardSpec, ...], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first reward model among the sources that reads the actor's ids; None where there is none."""
    paths = [reward.target for reward in rewards if reward.kind in ("full", "lora")]
    return next((path for path in paths if same_tokenizer(tokenizer, path)), None)
