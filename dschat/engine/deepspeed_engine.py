"""DeepSpeed engines for trained and frozen models; with deepspeed_config.py the only file that knows its keys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from dschat.engine.deepspeed_config import ENGINE_KEY, engine_config
from dschat.engine.distributed import Runtime, barrier
from dschat.engine.memory_plan import BUCKET, BUCKET_PADDING
from dschat.engine.optimizer import create_optimizer, create_scheduler
from dschat.engine.specs import TrainSpec

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel


def create_train_engine(
    model: nn.Module, spec: TrainSpec, *, dtype: torch.dtype, runtime: Runtime
) -> deepspeed.DeepSpeedEngine:
    """A model with its optimizer and schedule under ZeRO. `backward` any number of times, then ``engine.step()``.

    In half precision stage 0 becomes stage 1: DeepSpeed 0.19.8 at stage 0 in bf16 makes a hidden first Adam step,
    which leaves the first real update at 0.735 of its size (betas 0.9, 0.95). Stage 1 computes the same without it.
    """
    model.to(runtime.device)
    if spec.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    optimizer = create_optimizer(model, spec.learning_rate, spec.weight_decay, spec.lora_learning_rate)
    scheduler = create_scheduler(optimizer, spec.lr_scheduler_type, spec.num_warmup_steps, spec.num_steps)
    zero_stage = max(spec.zero_stage, 1) if dtype in ENGINE_KEY else spec.zero_stage
    config = engine_config(zero_stage, dtype, spec.offload) | {"managed_gradient_accumulation": False}
    num_trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    # DeepSpeed takes the whole of a bucket, 500 million numbers, for the smallest model too.
    config["zero_optimization"]["reduce_bucket_size"] = min(BUCKET, num_trained + BUCKET_PADDING)
    config["gradient_clipping"] = spec.max_grad_norm if zero_stage else 0.0  # DeepSpeed's own default is 1.0
    if zero_stage == 0:
        _clip_in_optimizer(model, optimizer, spec.max_grad_norm)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def create_frozen_model(
    model: nn.Module, *, zero_stage: int, dtype: torch.dtype, device: torch.device, offload: bool = False
) -> nn.Module | deepspeed.DeepSpeedEngine:
    """A model that is only ever evaluated: sharded by DeepSpeed at stage 3; at stages 0 to 2, which shard nothing of a
    model without an optimizer, the plain module on this rank's device. ``offload``, at stage 3: its weights live in
    the CPU's memory."""
    model.requires_grad_(False)
    if zero_stage < 3:
        return model.to(device).eval()
    config = engine_config(3, dtype)
    if offload:
        config["zero_optimization"]["offload_param"] = {"device": "cpu"}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def backward(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor) -> None:
    """Accumulate the gradient of ``loss``, whose sum over micro-batches **and ranks** is the objective.

    DeepSpeed averages gradients over ranks; the factor undoes that, so the programs divide each loss by the tokens (or
    pairs) of the whole optimizer step and neither accumulation nor the number of ranks changes the result.

    A loss that is not finite makes its whole gradient so, where it may be finite by itself: ``engine.step()`` then
    changes no weight, on any rank, and `grad_norm` tells.
    """
    factor = torch.where(torch.isfinite(loss.detach()), float(engine.world_size), torch.nan)
    engine.backward(loss * factor, scale_wrt_gas=False)


def grad_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """The L2 norm of the whole gradient of the last step, before clipping; not finite where the step was left out."""
    recorded = getattr(engine.module, "dschat_grad_norm", None)
    return float(recorded if recorded is not None else engine.get_global_grad_norm() or 0.0)


def learning_rate(engine: deepspeed.DeepSpeedEngine) -> float:
    """Of the step that comes next."""
    return engine.get_lr()[0]


def unwrap(model: nn.Module | deepspeed.DeepSpeedEngine) -> nn.Module:
    return model.module if isinstance(model, deepspeed.DeepSpeedEngine) else model


def is_sharded(model: nn.Module | deepspeed.DeepSpeedEngine) -> bool:
    return isinstance(model, deepspeed.DeepSpeedEngine) and model.zero_optimization_stage() == 3


def has_collectives(model: nn.Module | deepspeed.DeepSpeedEngine | None) -> bool:
    """Whether passes of it are: at ZeRO 2 those back, at 3 all. Below, only its steps are."""
    return isinstance(model, deepspeed.DeepSpeedEngine) and model.zero_optimization_stage() > 1


@contextmanager
def whole_model(engine: deepspeed.DeepSpeedEngine | nn.Module, device: torch.device) -> Iterator[Any]:
    """The module with all of its current weights on this rank, in eval mode, for generation.

    Below stage 3 it is the engine's own module. At stage 3 it is a copy made by gathering each parameter once, so that
    a rollout needs no collective per token and ranks may decode answers of unequal length; it is dropped on exit.
    """
    if not is_sharded(engine):
        module = unwrap(engine)
        was_training = module.training
        module.eval()
        try:
            yield module
        finally:
            module.train(was_training)
        return
    copy = gather_copy(engine, device, on_this_rank=True)
    assert copy is not None
    yield copy


def gather_copy(engine: deepspeed.DeepSpeedEngine, device: torch.device, *, on_this_rank: bool) -> nn.Module | None:
    """A plain copy of a stage-3 model on ``device``, on ranks with ``on_this_rank``. A collective."""
    source = engine.module
    copy: Any = None
    if on_this_rank:
        with torch.device("meta"):
            copy = _build_like(source)
        for name, module in source.named_modules():  # a forward of one module's own, as models/precision.py sets it
            if "forward" in vars(module):
                copy.get_submodule(name).forward = MethodType(module.forward.__func__, copy.get_submodule(name))
        copy = copy.to_empty(device=device)
        for owner in (m for m in copy.modules() if isinstance(m, PreTrainedModel)):
            owner.tie_weights()
        copy.to(next(source.parameters()).dtype)
    targets = dict(copy.named_parameters()) if copy is not None else {}
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if copy is not None:
                    targets[name].copy_(parameter)
        if copy is not None:
            buffers = dict(source.named_buffers())
            for module_name, module in copy.named_modules():
                for key in module._buffers:
                    name = f"{module_name}.{key}" if module_name else key
                    module._buffers[key] = buffers[name].detach().clone().to(device)
            copy.eval().requires_grad_(False)
    return copy


def save_weights(engine: deepspeed.DeepSpeedEngine, save: Callable[[nn.Module], None], runtime: Runtime) -> None:
    """Call ``save`` with the whole model on rank 0, and wait for it on the others. A collective."""
    if is_sharded(engine):
        whole = gather_copy(engine, torch.device("cpu"), on_this_rank=runtime.is_main)
    else:
        whole = unwrap(engine)
    if runtime.is_main:
        assert whole is not None
        save(whole)
    barrier(runtime)


def _build_like(source: nn.Module) -> nn.Module:
    """A module of the same structure: as it says itself (models/scorer.py, models/lora.py), else from its config."""
    if hasattr(source, "rebuild"):
        return source.rebuild()  # type: ignore[operator]
    return type(source)(source.config)


def _clip_in_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
    """At stage 0 DeepSpeed clips without telling the norm; torch does both, on gradients that are reduced by then. A
    gradient that is not finite is dropped, as DeepSpeed does at the other stages: the weights stay, the norm shows."""
    limit = max_grad_norm if max_grad_norm > 0 else float("inf")

    def clip(*_: Any) -> None:
        model.dschat_grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        if not torch.isfinite(model.dschat_grad_norm):
            model.zero_grad(set_to_none=True)

    hook: Callable[..., None] = clip
    optimizer.register_step_pre_hook(hook)
