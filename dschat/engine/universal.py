"""The state of an engine by parameter, and its way into an engine of another ZeRO stage or number of ranks.

A folder of it is DeepSpeed's universal checkpoint (Lian et al. 2024, arXiv:2406.18820): of each trained parameter the
float32 weight and Adam's two moments, whole. DeepSpeed 0.19.8 writes one from stages 1 to 3. Reading it we do
ourselves: its own reader at stage 3 gives every parameter group the weight decay of the first and counts one step for
each group, which trains on 1e-3 off; and it reads neither at stage 0 nor across stages.
"""

import contextlib
import io
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.serialization import safe_globals

PARAMETER_NAMES = "parameter_names"
THEIRS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]  # all that its files hold but plain values
WEIGHT, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")


class Place(NamedTuple):
    """Where this rank's optimizer keeps a part of a parameter."""

    name: str
    owner: Tensor  # the float32 weights, as the inner optimizer knows them
    here: slice  # of the owner, flat
    part: slice  # of the whole parameter, flat


def parameter_names(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """Of the trained parameters of a stage-0 engine, in the order of its optimizer's state."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [names[parameter] for group in engine.optimizer.param_groups for parameter in group["params"]]


def write_universal(source: Path, target: Path) -> None:
    """From the files that DeepSpeed wrote into ``source``, at any stage; on one rank."""
    if not list(source.glob("*_optim_states.pt")):
        _write_plain(source, target)
        return
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


@torch.no_grad()
def read_universal(engine: deepspeed.DeepSpeedEngine, folder: Path, source: Path) -> None:
    """Put the weights and moments of ``folder``, and the schedule and counters of ``source``, from which that was
    made, into a fresh engine of the same model. On every rank."""
    stage = engine.zero_optimization_stage()
    inner = engine.optimizer.optimizer if stage else engine.optimizer
    num_steps, scaler = _optimizer_record(source)
    for place in _places(engine, stage):
        state = inner.state[place.owner]
        state["step"] = torch.tensor(num_steps, dtype=torch.float32, device=place.owner.device)
        for key in (WEIGHT, *MOMENTS):
            if key != WEIGHT and key not in state:
                state[key] = torch.zeros_like(place.owner, requires_grad=False)
            values = place.owner.detach() if key == WEIGHT else state[key]
            values.view(-1)[place.here].copy_(_read(folder, place.name, key)[place.part])
    _refresh_weights(engine, stage, folder)
    record = _model_record(source)
    engine.lr_scheduler.load_state_dict(record["lr_scheduler"])
    for group, rate in zip(inner.param_groups, record["lr_scheduler"]["_last_lr"], strict=True):
        group["lr"] = rate
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, record[counter])
    if stage and scaler is not None:
        engine.optimizer.loss_scaler = scaler


def _places(engine: deepspeed.DeepSpeedEngine, stage: int) -> Iterator[Place]:
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    zero = engine.optimizer
    if stage == 0:
        for group in zero.param_groups:
            for parameter in group["params"]:
                everything = slice(0, parameter.numel())
                yield Place(names[parameter], parameter, everything, everything)
    elif stage < 3:
        for parameters, owner in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in parameters:
                if (mapping := parameter._hp_mapping) is not None:
                    here, part = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield Place(
                        names[parameter], owner, _slice(here.start, here.numel), _slice(part.start, part.numel)
                    )
    else:
        rank = deepspeed.comm.get_rank()
        for parameters, owner in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for parameter in parameters:
                numel = parameter.partition_numel()  # the last shard may end in padding
                start = min(rank * numel, parameter.ds_numel)
                real = min(numel, parameter.ds_numel - start)
                yield Place(names[parameter], owner, _slice(offset, real), _slice(start, real))
                offset += numel


def _refresh_weights(engine: deepspeed.DeepSpeedEngine, stage: int, folder: Path) -> None:
    """The weights that the model computes with, from the float32 ones."""
    if stage in (1, 2):
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(_read(folder, name, WEIGHT).view_as(parameter))
    elif stage == 3:
        zero = engine.optimizer
        for shards, flat in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            shards.copy_(flat)
        for parameter in engine.module.parameters():
            parameter.partition()  # small ones stay gathered: drop that stale copy


def _write_plain(source: Path, target: Path) -> None:
    record = _model_record(source)
    for number, name in enumerate(record[PARAMETER_NAMES]):
        state = record["optimizer"]["state"][number]
        folder = target / "zero" / name
        folder.mkdir(parents=True)
        for key, value in {WEIGHT: record["module"][name], **{key: state[key] for key in MOMENTS}}.items():
            torch.save({"param": value}, folder / f"{key}.pt")


def _read(folder: Path, name: str, key: str) -> Tensor:
    """(numel,)"""
    saved = torch.load(folder / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=True)
    return (saved["param"] if isinstance(saved, dict) else saved).view(-1)


def _model_record(source: Path) -> dict[str, Any]:
    return torch.load(min(source.glob("*_model_states.pt")), map_location="cpu", weights_only=True)


def _optimizer_record(source: Path) -> tuple[float, Any]:
    """Adam's number of steps, and at stages 1 to 3 the scaler of the loss."""
    files = sorted(source.glob("*_optim_states.pt"))
    if not files:
        return float(_model_record(source)["optimizer"]["state"][0]["step"]), None
    with safe_globals(THEIRS):
        record = torch.load(files[0], map_location="cpu", weights_only=True)["optimizer_state_dict"]
    inner = record.get("base_optimizer_state") or record["optimizer_state_dict"]
    return float(inner["state"][0]["step"]), record["loss_scaler"]


def _slice(start: int, numel: int) -> slice:
    return slice(start, start + numel)
