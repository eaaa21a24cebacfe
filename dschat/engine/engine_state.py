"""The state of a DeepSpeed engine in a folder: what is trained, its optimizer, its schedule; in DeepSpeed's own files.

Frozen weights, as those under adapters, are not in it: whoever goes on has loaded them from where the run had them,
and its identity tells whether they are still the same (run_identity.py).
"""

import shutil
from pathlib import Path
from typing import Any

from dschat.engine.distributed import Runtime, barrier
from dschat.engine.universal import PARAMETER_NAMES, parameter_names, read_universal, write_universal

import deepspeed
from torch import Tensor, nn

TAG = "state"
MODULE = "module"  # DeepSpeed's key of the model's own state
ADAM_BYTES = 12  # of a trained weight: itself and two moments in float32


def engine_bytes(engine: deepspeed.DeepSpeedEngine) -> int:
    """What `save_engine` writes at most, all ranks together."""
    size = sum(buffer.nbytes for buffer in engine.module.buffers())
    for parameter in engine.module.parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        size += numel * (parameter.element_size() + ADAM_BYTES) if parameter.requires_grad else 0
    return size + 2**20


def save_engine(name: str, engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Write the engine's state as ``name`` into ``folder``. A collective, to its end on every rank even where a file
    cannot be written.

    Raises:
        OSError, RuntimeError: a file of this rank could not be written.
    """
    writer, problems = engine.checkpoint_engine, []
    write, own = writer.save, _own_names(engine.module)

    def save(state_dict: dict[str, Any], path: str) -> None:
        if MODULE in state_dict:  # DeepSpeed leaves out a frozen weight, but neither its second name nor its scales
            kept = {name: value for name, value in state_dict[MODULE].items() if name in own}
            state_dict = state_dict | {MODULE: kept}
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            problems.append(error)  # raised here, it would leave the other ranks in DeepSpeed's barrier

    writer.save = save
    engine._copy_recovery_script = lambda folder: None  # a program that turns the files into a model: we save models
    try:
        more = {} if engine.zero_optimization_stage() else {PARAMETER_NAMES: parameter_names(engine)}
        place: dict[str, Any] = {"tag": TAG, "save_latest": False}
        engine.save_checkpoint(str(folder / name), client_state=more, exclude_frozen_parameters=True, **place)
    finally:
        del writer.save, engine._copy_recovery_script
    if problems:
        raise problems[0]


def load_engine(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    saved_stage: int,
    saved_ranks: int,
    scratch: Path,
    runtime: Runtime,
) -> None:
    """Put the state of `save_engine` into a fresh engine of the same model. A collective.

    With as many ranks and the same ZeRO stage the engine is bit for bit what it was; with others it goes on equal up
    to rounding, through a universal checkpoint in ``scratch``.
    """
    stage = engine.zero_optimization_stage()
    if stage == saved_stage and (stage == 0 or saved_ranks == runtime.world_size):
        _load(engine, folder, TAG)
        return
    if runtime.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        write_universal(folder / TAG, scratch)
    barrier(runtime)
    read_universal(engine, scratch, folder / TAG)
    barrier(runtime)
    if runtime.is_main:
        shutil.rmtree(scratch)


def _load(engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_trained)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Put all that was saved into the model.

    Raises:
        RuntimeError: it is not all that a model like this one saves, or more.
    """
    found, own = dst.load_state_dict(src, strict=False), _own_names(dst)
    if odd := [*(name for name in found.missing_keys if name in own), *found.unexpected_keys]:
        raise RuntimeError(f"the checkpoint is of another model: {', '.join(odd[:3])}")


def _own_names(module: nn.Module) -> set[str]:
    """Of the trained weights, under all their names, and of the buffers: what a run changes of a model."""
    trained = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return trained | {name for name, _ in module.named_buffers(remove_duplicate=False)}
