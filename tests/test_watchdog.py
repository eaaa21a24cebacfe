"""Ranks that die or stall: the job ends in time, says which rank it was, and leaves no process behind."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from dschat.engine.watchdog import Report, State, Watchdog
from tests.conftest import ROOT
from tests.ranks import free_port

import pytest

TIMEOUT = 5.0
HEADROOM = 40.0  # to start and to end, on a busy machine


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def launch(launcher: str, *argv: str, seconds: float = TIMEOUT + HEADROOM) -> tuple[list[int], str, float]:
    """(exit codes, output, seconds) of a job of two ranks, which must leave nothing running."""
    port, environment = free_port(), os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: text for name, text in environment.items() if name not in ("RANK", "WORLD_SIZE")}
    commands = {
        "deepspeed": [["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(port)]],
        "torchrun": [["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]],
        "none": [[], []],
    }[launcher]
    start, processes = time.time(), []
    for rank, words in enumerate(commands):
        module = "--module" if launcher == "deepspeed" else "-m"
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = environment | (place if launcher == "none" else {})
        command = [sys.executable, *words, module, "tests.rank_driver", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, process_group=0, **pipes))
    try:
        output = "".join(process.communicate(timeout=seconds)[0] for process in processes)
        pids = [int(pid) for pid in re.findall(r"^pid (\d+)$", output, re.MULTILINE)]
        assert len(pids) == 2, output
        deadline = time.time() + 5
        while any(map(is_running, pids)) and time.time() < deadline:
            time.sleep(0.05)
        assert not any(map(is_running, pids)), output
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [process.returncode for process in processes], output, time.time() - start


@pytest.mark.parametrize(
    ("launcher", "rank", "fault", "message"),
    [
        ("none", 1, "SIGKILL", r"rank 1 \(process \d+\) was killed by SIGKILL; out of memory is the usual cause"),
        (
            "none",
            0,
            "SIGSTOP",
            r"rank 0 did not answer for 5 s: .*; last at tests/rank_driver.py:\d+ \(main\)",
        ),
        pytest.param(
            "none",
            1,
            "spin",
            r"rank 1 made no step for 5 s \(--stall_timeout\); last at tests/rank_driver.py:\d+ \(sp",
            marks=pytest.mark.long,  # on a busy machine rank 0, which waits for it, may be the first
        ),
        ("none", 1, "user", r"error: bad.jsonl:3: mend it"),
        (
            "deepspeed",
            1,
            "SIGSTOP",
            r"rank 1 did not answer for 5 s: stopped, or its machine is gone",
        ),
        pytest.param(
            "deepspeed",
            0,
            "SIGKILL",
            r"rank 0 \(process \d+\) was killed by SIGKILL; out of memory is the usual cause",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "torchrun",
            1,
            "SIGSTOP",
            r"rank 1 did not answer for 5 s: stopped, or its machine is gone",
            marks=pytest.mark.long,
        ),
        ("torchrun", 1, "crash", r"RuntimeError: boom"),
    ],
)
def test_a_rank_that_dies_or_stalls_ends_the_job_with_its_name(launcher, rank, fault, message):
    codes, output, seconds = launch(launcher, str(rank), fault, str(TIMEOUT))
    assert all(codes) and re.search(message, output), output
    assert "is done" not in output
    assert seconds < TIMEOUT + HEADROOM


@pytest.mark.parametrize(
    ("heard", "moved", "guilty", "message"),
    [
        ((0.1, 0.1), (0.1, 0.1), [], ""),
        ((0.1, 0.1), (5.1, 5.1), [1], "rank 1 made no step for 5 s"),
        ((0.1, 4.6), (5.1, 5.1), [], ""),  # stopped between a step and its report
        ((0.1, 5.1), (5.6, 5.6), [1], "rank 1 did not answer for 5 s"),
        ((5.1, 0.1), (5.1, 0.1), [0], "rank 0 made no step for 5 s"),  # its own silence means nothing
    ],
)
def test_verdict(heard, moved, guilty, message):
    """Of rank 0, which waits for rank 1; seconds since each rank was heard and has moved."""
    watchdog = object.__new__(Watchdog)
    watchdog.rank, watchdog.timeout = 0, TIMEOUT
    reports = Report(waits=True), Report()
    watchdog.states = {n: State(reports[n], 100 - heard[n], 100 - moved[n]) for n in (0, 1)}
    found = watchdog.verdict(100.0)
    assert found[0] == guilty and found[1].startswith(message) and bool(found[1]) == bool(message)


def test_ranks_that_wait_for_the_one_that_prepares_or_are_all_stopped_do_not_stall():
    """Each for longer than a stall may last."""
    codes, output, _ = launch("none", "0", "patience", "4")
    assert codes == [0, 0] and output.count("is done, 2") == 2, output
