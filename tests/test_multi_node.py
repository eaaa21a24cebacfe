"""Two nodes of one rank each: two launchers on this machine's loopback, each with a data folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.programs import STEPS, arguments, run
from tests.ranks import free_port

import pytest


def deepspeed(node: int, port: int, hostfile: Path) -> list[str]:
    """As docs/scaling.md has it, on each node with its own --node_rank."""
    place = ["--no_ssh", "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    return [*launcher, "--hostfile", str(hostfile), *place]


def torchrun(node: int, port: int, hostfile: Path) -> list[str]:
    place = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    return [*launcher, *place, "--master_addr", "127.0.0.1", "--master_port", str(port)]


@pytest.fixture(scope="module")
def alone(model_dirs, data_file, cache_dir, tmp_path_factory):
    """The losses of one process with as many rows a step."""
    flags = {"model_name_or_path": model_dirs("llama"), "per_device_train_batch_size": 8}
    return losses(run("sft", data_file, cache_dir, tmp_path_factory.mktemp("alone"), **flags))


def losses(directory) -> list[float]:
    lines = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.long
@pytest.mark.parametrize("launcher", [deepspeed, torchrun], ids=lambda launcher: launcher.__name__)
def test_two_nodes_without_a_shared_disk_train_as_one_process(launcher, alone, model_dirs, data_file, tmp_path):
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    program, model, port = str(ROOT / "training" / STEPS["sft"] / "main.py"), model_dirs("llama"), free_port()
    nodes = []
    for node in (0, 1):
        flags = {"model_name_or_path": model, "zero_stage": 2, "checkpoint_interval": 0}
        argv = arguments("sft", data_file, str(tmp_path / f"disk{node}"), tmp_path / f"out{node}", **flags)
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        words = [*launcher(node, port, tmp_path / "hosts"), program, *argv]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(words, env=env, cwd=tmp_path, **output))
    try:
        outputs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-6000:]
    prepared = [sorted(path.name for path in (tmp_path / f"disk{node}").rglob("*.arrow")) for node in (0, 1)]
    assert prepared[0] and prepared[0] == prepared[1], "each node prepared the data on its own disk"
    assert losses(tmp_path / "out0") == pytest.approx(alone, rel=1e-4)
    assert not (tmp_path / "out1" / "model.safetensors").exists(), "the first node saves"
