"""From flags to the models and the rewards of a run."""

from pathlib import Path
from typing import Any

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import create_frozen_model, create_train_engine, unwrap
from dschat.engine.distributed import Runtime
from dschat.engine.ema import EMA
from dschat.engine.micro_batches import MicroBatches
from dschat.engine.sharded_loading import sharded_loading
from dschat.errors import UserError
from dschat.models.adapted import has_adapters, trained_table
from dschat.models.liger import apply_liger
from dschat.models.load import load_causal_lm, load_trained_scorer
from dschat.models.precision import upcast_layernorm
from dschat.models.scorer import Scorer, check_probes
from dschat.models.trunk import shared_copy
from dschat.report.reward_quality import QUALITY_FOLDER, read_quality, weakness
from dschat.rlhf.reward_api import ApiReward
from dschat.rlhf.reward_lora import LoraReward
from dschat.rlhf.reward_sources import FullReward, FunctionReward
from dschat.rlhf.reward_specs import RewardSpec
from dschat.rlhf.rewards import CombinedReward, RewardSource
from dschat.rlhf.rlhf_engine import RLHFEngine, load_critic, load_critic_on_trunk, same_tokenizer
from dschat.rlhf.specs import ModelsSpec

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    engine = create_actor_and_reference(spec, adapters, tokenizer, dtype=dtype, runtime=runtime)
    sources = [create_source(reward, spec, engine, tokenizer, dtype, runtime) for reward in spec.rewards]
    if spec.critic is not None:
        critic = create_critic(spec, engine, tokenizer, dtype=dtype)
        engine.critic = create_train_engine(critic, spec.critic, dtype=dtype, runtime=runtime)
    if spec.ema_decay is not None:
        engine.ema = EMA(engine.actor, spec.ema_decay)
    weights = [reward.weight for reward in spec.rewards]
    return engine, CombinedReward(list(zip(sources, weights, strict=True)))


def create_actor_and_reference(
    spec: ModelsSpec,
    adapter_dirs: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    runtime: Runtime,
) -> RLHFEngine:
    """The engine without a critic. The reward adapters go onto the reference before it may be sharded.

    Dropout is off in all models: a log-probability that depends on a coin flip is not one. Where adapters are all that
    is trained of the actor, the reference is made of the actor's own frozen weights.

    Raises:
        UserError: not a language model, an adapter of another one.
    """

    def load(stage: int) -> PreTrainedModel:
        with sharded_loading(stage, dtype):
            model = load_causal_lm(
                spec.actor_path, tokenizer, dtype=dtype, dropout=0.0, quantization=spec.quantization
            )
        if spec.use_liger_kernel:
            apply_liger(model)
        if spec.upcast_layernorm:  # after the kernels, in place of those for norms
            upcast_layernorm(model)
        return model

    actor, lora, trunk = load(spec.actor.zero_stage), spec.actor_lora, None
    if lora is not None and lora.only:
        trunk, reference = shared_copy(actor), shared_copy(actor)
    else:
        reference = load(spec.reference_stage)
    if lora is not None:
        from dschat.models.lora import add_lora  # PEFT takes a second to import

        add_lora(actor, lora)
    adapters = {}
    if adapter_dirs:
        from dschat.models.adapters import add_adapter_reward  # PEFT takes a second to import

        given = {"normalize": spec.normalize_reward}
        adapters = {directory: add_adapter_reward(reference, directory, **given) for directory in adapter_dirs}
    place: dict[str, Any] = {"zero_stage": spec.reference_stage, "offload": spec.offload_reference}
    return RLHFEngine(
        actor=create_train_engine(actor, spec.actor, dtype=dtype, runtime=runtime),
        critic=None,
        ref=create_frozen_model(reference, dtype=dtype, device=runtime.device, **place),
        family=actor,
        adapters=adapters,
        actor_base=spec.actor_path if lora is not None and not spec.save_merged else None,
        trunk=trunk,
    )


def create_critic(
    spec: ModelsSpec, engine: RLHFEngine, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
) -> Scorer:
    """What the critic starts from, with its adapters, if it has any.

    Raises:
        UserError: as `load_critic` and `load_critic_on_trunk`.
    """
    path, lora, normalize = (
        spec.critic_path or critic_start(spec.rewards, tokenizer),
        spec.critic_lora,
        spec.normalize_reward,
    )
    if spec.share_trunk:
        assert engine.trunk is not None and lora is not None
        base = spec.actor_path
        critic = load_critic_on_trunk(engine.trunk, path, base, tokenizer, lora, normalize=normalize)
    else:
        base = path or spec.actor_path
        assert spec.critic is not None
        with sharded_loading(spec.critic.zero_stage, dtype):
            critic = load_critic(path, spec.actor_path, tokenizer, dtype=dtype, normalize=normalize)
        if spec.use_liger_kernel:
            apply_liger(critic.model)
        if lora is not None:
            from dschat.models.lora import add_lora  # PEFT takes a second to import

            add_lora(critic.model, lora)
    engine.critic_base = base if lora is not None and not spec.save_merged else None
    return critic


def trained_tables(engine: RLHFEngine) -> list[str]:
    """Of each model with adapters: how much of it is trained."""
    models = {"actor": engine.actor, "critic": engine.critic}
    modules = {role: unwrap(model) for role, model in models.items() if model is not None}
    return [f"{role}\n{trained_table(module)}" for role, module in modules.items() if has_adapters(module)]


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

    def memory(model: nn.Module | None) -> MicroBatches:
        return MicroBatches(runtime, [model], unit="{} answers to score")

    if reward.kind == "full":
        own = load_tokenizer(reward.target)
        given: dict[str, Any] = {"dtype": dtype, "normalize": spec.normalize_reward, "verify": False}
        with sharded_loading(spec.reward_stage, dtype):
            scorer = load_trained_scorer(reward.target, own, **given)
        if spec.use_liger_kernel:
            apply_liger(scorer.model)
        place: dict[str, Any] = {"zero_stage": spec.reward_stage, "offload": spec.offload_reward}
        model = create_frozen_model(scorer, dtype=dtype, device=runtime.device, **place)
        if spec.normalize_reward:
            check_probes(reward.target, model)
        return FullReward(model, own, tokenizer, memory=memory(model), **batch)
    if reward.kind == "lora":
        adapter, verify = engine.adapters[reward.target], spec.normalize_reward
        return LoraReward(adapter, reward.target, tokenizer, verify=verify, memory=memory(engine.ref), **batch)
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
