"""Out of memory where the other ranks wait in a collective: the same command goes on with smaller micro-batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dschat.engine.distributed import init_runtime
from dschat.engine.run_state import RunState, limit_micro_batches
from dschat.engine.specs import CheckpointSpec
from tests.conftest import ROOT
from tests.programs import arguments, program, run
from tests.ranks import free_port

import pytest


def start(rows, argv):
    """(exit codes, output) of two ranks, of which the second holds so many rows."""
    port, processes = free_port(), []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.memory_driver", str(rows), "sft", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, **pipes))
    try:
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], output


def flags_of(stage, model):
    return {
        "model_name_or_path": model,
        "zero_stage": stage,
        "max_steps": 6,
        "num_train_epochs": 9,
        "checkpoint_interval": 1,
        "per_device_train_batch_size": 4,
    }


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def expected(model_dirs, data_file, cache_dir, tmp_path_factory):
    """On one rank, with room for all."""
    flags = flags_of(0, model_dirs("llama")) | {"per_device_train_batch_size": 8}
    return losses(Path(run("sft", data_file, cache_dir, tmp_path_factory.mktemp("whole"), **flags)))


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_the_run_goes_on_with_half_of_the_rows(stage, expected, model_dirs, data_file, cache_dir, tmp_path):
    argv = arguments("sft", data_file, cache_dir, tmp_path, **flags_of(stage, model_dirs("llama")))
    codes, output = start(2, argv)
    assert codes[1] == os.EX_TEMPFAIL and codes[0] != 0, output
    assert "rank 1: out of memory on a micro-batch of 4 rows; start the same command again: it goes on" in output
    codes, output = start(2, argv)
    assert codes == [0, 0], output
    assert "memory ran out in this run before: micro-batches of at most --per_device_train_batch_size 2 (" in output
    assert "per_device_train_batch_size was 4 and is 2" in output
    found = losses(tmp_path)
    assert [step for step, _ in found] == list(range(1, 7))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)


def test_every_rank_takes_the_smallest_and_fresh_forgets(tmp_path):
    said = []

    def begin(fresh=False):
        run = RunState(str(tmp_path), CheckpointSpec(1, 1, "auto", fresh), init_runtime(0), said.append)
        run._lock.close()
        return run

    run = begin()
    assert run.micro_batch_limits() == {} and not said
    limit_micro_batches(run.limits_file, {"rows": 4, "tokens": 100})
    (tmp_path / "checkpoints" / "micro_batches_of_rank_1.json").write_text('{"rows": 2}')
    assert begin().micro_batch_limits() == {"rows": 2, "tokens": 100}
    assert said == ["memory ran out in this run before: micro-batches of at most --rows 2, --tokens 100 (--fresh "
                    "forgets it)"]  # fmt: skip
    assert begin(fresh=True).micro_batch_limits() == {} and begin().micro_batch_limits() == {} and len(said) == 1


@pytest.mark.parametrize(
    "stage, rows, accumulated, tokens, half, then",
    [
        ("sft", 4, 2, 0, {"rows": 2}, (2, 4, 0)),
        ("sft", 3, 1, 0, {"rows": 1}, (1, 3, 0)),
        ("dpo", 9, 1, 0, {"rows": 4}, (3, 3, 0)),  # 9 rows in parts of 4 do not come out even
        ("ppo", 6, 2, 300, {"rows": 3, "tokens": 150}, (3, 4, 150)),
        ("ppo", 1, 5, 1, {"rows": 1, "tokens": 1}, (1, 5, 1)),
    ],
)
def test_half_the_micro_batch_makes_the_same_step(stage, rows, accumulated, tokens, half, then, tmp_path):
    module = program(stage)
    name = module.Config.ROWS
    flags = {name: rows, "gradient_accumulation_steps": accumulated, "max_tokens_per_batch": tokens}
    models = {"actor_model_name_or_path": "a", "critic_model_name_or_path": "b"} if stage == "ppo" else {}
    models = models or {"model_name_or_path": "a"}
    config = module.Config(output_dir=str(tmp_path), data_path=["toy"], **flags, **models)
    names = {"rows": name, "tokens": "max_tokens_per_batch"}
    assert config.half_micro_batches() == {names[key]: value for key, value in half.items()}
    assert config.with_micro_batches({}) == config
    smaller = config.with_micro_batches(config.half_micro_batches())
    assert (getattr(smaller, name), smaller.gradient_accumulation_steps, smaller.max_tokens_per_batch) == then
    assert smaller.with_micro_batches(config.half_micro_batches()) == smaller
    assert smaller.step_sizes(2) == config.step_sizes(2)
