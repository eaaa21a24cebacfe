"""A disk that is full in earnest: a tmpfs of a few megabytes. Where none can be mounted these tests are skipped."""

import errno
import subprocess
from contextlib import suppress
from pathlib import Path

from dschat.engine.checkpoint import CheckpointError, damage, list_checkpoints, write_checkpoint
from dschat.engine.distributed import Runtime
from dschat.engine.stop_signals import StopSignals
from dschat.errors import run_program
from tests.programs import run
from tests.test_resume import kill_fuzz

import pytest
import torch

ALONE = Runtime(0, 1, torch.device("cpu"))
MEGABYTES = 8
FLAGS = {"max_steps": 60, "num_train_epochs": 60, "log_interval": 1, "checkpoint_interval": 20, "dropout": 0.2}


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(folder)]
    with suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            yield folder
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
    pytest.skip("a small tmpfs cannot be mounted here: that takes root's rights")


def fill(folder: Path, leave: int = 0) -> Path:
    """Leave so many bytes of the disk free."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        with pytest.raises(OSError, match=f"Errno {errno.ENOSPC}"):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - leave)
    return ballast


def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_keeps_the_one_before(disk):
    def write(name: str, megabytes: int) -> None:
        content = bytes(2**20)

        def files(folder: Path) -> None:
            for number in range(megabytes):
                (folder / f"{number}.pt").write_bytes(content)

        write_checkpoint(disk, name, 2, 2**20, [files], ALONE)  # it says too little, so that the writing itself fails

    write("step_00000001", 3)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write("step_00000002", 6)
    assert [path.name for path in disk.iterdir()] == ["step_00000001"]
    assert damage(disk / "step_00000001", ALONE) is None
    write("step_00000002", 2)
    assert [path.name for path in list_checkpoints(disk)] == ["step_00000002", "step_00000001"]


@pytest.mark.parametrize("leave", [0, 100_000])
def test_a_run_whose_disk_fills_up_ends_with_a_line_and_goes_on_when_there_is_room_again(
    leave, disk, model_dirs, data_file, cache_dir, tmp_path, monkeypatch, capsys
):
    """After the first checkpoint: with no byte left its metrics fail, with some its checkpoints and its model."""
    flags = FLAGS | {"model_name_or_path": model_dirs("llama")}
    run("sft", data_file, cache_dir, tmp_path / "whole", **flags)
    checkpoints = disk / "out" / "checkpoints"

    def agreed(self, runtime) -> int:
        if list_checkpoints(checkpoints) and not (disk / "ballast").exists():
            fill(disk, leave)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(StopSignals, "agreed", agreed)
        with pytest.raises(SystemExit, match="^2$"):
            run_program(lambda: run("sft", data_file, cache_dir, disk / "out", **flags))
    shown = capsys.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("error: ") and "No space left on device" in last and "free some room" in last
    assert "Traceback" not in shown.err
    assert ("no checkpoint after step 40: it needs up to" in shown.out) == bool(leave)
    [kept] = list_checkpoints(checkpoints)
    assert kept.name == "step_00000020" and damage(kept, ALONE) is None
    (disk / "ballast").unlink()
    run("sft", data_file, cache_dir, disk / "out", **flags)
    assert "continuing from" in capsys.readouterr().out
    expected = kill_fuzz.results(tmp_path / "whole")
    assert len(expected) > 6 and kill_fuzz.results(disk / "out") == expected
