"""The state of a DeepSpeed engine in a folder: weights, optimizer, schedule; through DeepSpeed's own files."""

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from dschat.engine.distributed import Runtime, barrier
from dschat.errors import UserError

import deepspeed

TAG = "state"
UNIVERSAL = "universal"
ADAM_BYTES = 12  # of a trained weight: itself and two moments in float32


def engine_bytes(engine: deepspeed.DeepSpeedEngine) -> int:
    """What `save_engine` writes at most, all ranks together."""
    size = 0
    for parameter in engine.module.parameters():
        numel = getattr(parameter, "ds_numel", parameter.numel())
        size += numel * (parameter.element_size() + (ADAM_BYTES if parameter.requires_grad else 0))
    return size + 2**20


def save_engine(name: str, engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Write the engine's state as ``name`` into ``folder``. A collective, to its end on every rank even where a file
    cannot be written.

    Raises:
        OSError, RuntimeError: a file of this rank could not be written.
    """
    writer, problems = engine.checkpoint_engine, []
    write = writer.save

    def save(state_dict: dict[str, Any], path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:
            problems.append(error)  # raised here, it would leave the other ranks in DeepSpeed's barrier

    writer.save = save
    engine._copy_recovery_script = lambda folder: None  # a program that turns the files into a model: we save models
    try:
        engine.save_checkpoint(str(folder / name), tag=TAG, save_latest=False)
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

    With as many ranks and the same ZeRO stage the engine is bit for bit what it was. At stage 0 any number of ranks
    reads the same file; between stages 1 and 2, and numbers of ranks there, DeepSpeed's universal checkpoint in
    ``scratch`` serves.

    Raises:
        UserError: the state is of a layout that DeepSpeed cannot turn into this one.
    """
    stage = engine.zero_optimization_stage()
    if stage == saved_stage and (stage == 0 or saved_ranks == runtime.world_size):
        _load(engine, folder, TAG)
        return
    if not {stage, saved_stage} <= {1, 2}:
        raise UserError(
            f"{folder.parent} was written at ZeRO {saved_stage} on {saved_ranks} ranks and cannot be continued at "
            f"ZeRO {stage} on {runtime.world_size}: go back to that, or start over with --fresh (ZeRO 0 continues on "
            "any number of ranks, and so do ZeRO 1 and 2, also one as the other)"
        )
    if runtime.is_main:
        shutil.rmtree(scratch, ignore_errors=True)
        _to_universal(folder / TAG, scratch / UNIVERSAL)
    barrier(runtime)
    engine._config.load_universal_checkpoint = True
    try:
        _load(engine, scratch, UNIVERSAL)
    finally:
        engine._config.load_universal_checkpoint = False
    barrier(runtime)
    if runtime.is_main:
        shutil.rmtree(scratch)


def _load(engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")


def _to_universal(source: Path, target: Path) -> None:
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
