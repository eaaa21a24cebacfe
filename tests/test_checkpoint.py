"""Checkpoints as folders: whole or not there, sound or named as damaged, never one at the price of another."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from dschat.engine import stop_signals
from dschat.engine.checkpoint import CheckpointError, checkpoint_name, damage, list_checkpoints, write_checkpoint
from dschat.engine.distributed import Runtime
from dschat.engine.output_lock import LOCK, lock_output_dir
from dschat.engine.run_identity import content_key, differences
from dschat.engine.stop_signals import StopSignals
from dschat.errors import UserError
from tests.conftest import ROOT

import pytest
import torch

ALONE = Runtime(0, 1, torch.device("cpu"))


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "weights.pt").write_bytes(bytes(range(256)))
    (folder / "state.json").write_text('{"step": 1}\n')


def write(folder: Path, name: str, keep: int = 2, num_bytes: int = 1000, writers=(fill,)) -> None:
    write_checkpoint(folder, name, keep, num_bytes, writers, ALONE)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_names_sort_by_progress():
    inside = checkpoint_name(3, 12)
    assert checkpoint_name(3) < checkpoint_name(3, 2) < inside < checkpoint_name(4) < checkpoint_name(10)


def test_the_newest_are_kept_and_are_what_sha256sum_calls_sound(tmp_path):
    for step in range(4):
        write(tmp_path, checkpoint_name(step))
    assert names(tmp_path) == [checkpoint_name(3), checkpoint_name(2)]
    assert {path.name for path in tmp_path.iterdir()} == set(names(tmp_path))
    for name in names(tmp_path):
        assert damage(tmp_path / name, ALONE) is None
        subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / name, check=True)


@pytest.mark.parametrize("file", ["inner/weights.pt", "state.json", "SHA256SUMS"])
def test_any_flipped_byte_is_found_and_so_is_a_file_too_few_or_too_many(file, tmp_path):
    write(tmp_path, "step_00000001")
    path = tmp_path / "step_00000001"
    whole = (path / file).read_bytes()
    for position in {0, len(whole) // 2, len(whole) - 1}:
        (path / file).write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert damage(path, ALONE) is not None
    (path / file).unlink()
    assert damage(path, ALONE) is not None
    (path / file).write_bytes(whole)
    assert damage(path, ALONE) is None
    (path / "more").write_text("")
    assert damage(path, ALONE) == "more"


def test_what_is_newer_was_damaged_and_goes_as_does_a_folder_of_the_same_name(tmp_path):
    for step in (1, 2, 4):
        write(tmp_path, checkpoint_name(step))
    (tmp_path / checkpoint_name(2) / "state.json").write_text("broken")
    write(tmp_path, checkpoint_name(2))
    assert names(tmp_path) == [checkpoint_name(2)]
    assert damage(tmp_path / checkpoint_name(2), ALONE) is None


def half(folder: Path) -> None:
    (folder / "half.pt").write_bytes(b"1" * 100)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_checkpoint_and_not_half_a_new_one(tmp_path, monkeypatch):
    write(tmp_path, "step_00000001")
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(tmp_path, "step_00000002", writers=(fill, half))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 500, 500))
    with pytest.raises(CheckpointError, match=r"it needs up to 7\.00 GB in .*, of which 0\.0 MB are free"):
        write(tmp_path, "step_00000002", num_bytes=7 * 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert damage(tmp_path / "step_00000001", ALONE) is None


def test_an_end_at_any_instant_leaves_a_sound_checkpoint(tmp_path, monkeypatch):
    """The process ends before the n-th change that it makes to the file system, for every n."""
    calls = limit = 0

    def counted(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    write(tmp_path, "step_00000000", keep=1)
    for module, name in ((os, "rename"), (shutil, "rmtree"), (os, "fsync"), (os, "unlink"), (Path, "mkdir")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    for limit in range(40):
        calls, is_whole = 0, False
        try:
            write(tmp_path, checkpoint_name(1 + limit), keep=1)
            is_whole = True
        except KeyboardInterrupt:
            pass
        assert any(damage(path, ALONE) is None for path in list_checkpoints(tmp_path)), limit
        if is_whole:
            break
    assert limit > 8 and names(tmp_path) == [checkpoint_name(1 + limit)]


# Signals


def test_the_first_signal_is_noted_and_a_later_one_ends_the_process(monkeypatch):
    before, ends = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(os, "_exit", ends.append)
    with StopSignals() as signals:
        assert signals.agreed(ALONE) == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes the same request on
        assert signals.agreed(ALONE) == signal.SIGINT and not ends
        monkeypatch.setattr(stop_signals, "ONE_REQUEST", 0.0)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    assert ends == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


# The lock


def test_a_second_run_is_refused_until_the_first_process_is_gone(tmp_path):
    program = (
        "import sys, time; from dschat.engine.output_lock import lock_output_dir as lock; held = lock(sys.argv[1])"
    )
    program += "; print('held', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"process {first.pid} on .* is at work there"):
            lock_output_dir(str(tmp_path))
    finally:
        first.kill()
        first.wait()
    held = lock_output_dir(str(tmp_path))
    assert held is not None and str(os.getpid()) in (tmp_path / LOCK).read_text()
    held.close()


# What makes a run the same run


def test_a_model_is_told_by_its_content_wherever_it_is(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "run.json").write_text(name)
        (tmp_path / name / "metrics.jsonl").write_text(name)
    assert content_key(str(tmp_path / "one")) == content_key(str(tmp_path / "two"))
    (tmp_path / "two" / "model.safetensors").write_bytes(b"Weights")
    assert content_key(str(tmp_path / "one")) != content_key(str(tmp_path / "two"))
    assert content_key(str(tmp_path / "one" / "run.json")) != content_key(str(tmp_path / "two" / "run.json"))
    assert content_key("facebook/opt-125m") == "facebook/opt-125m"
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b was 2 and is 3", "c was None and is 4"]
