"""Ranks that die or stall end the whole job, with that rank's name: whoever waits for them would wait for ever.

Each rank tells the others through the rendezvous store, a few times in every ``timeout``, that it is alive, how many
collectives it has finished and where its main thread is. Rank 0 looks after all, the others after rank 0, and every
rank after the processes of its own machine, whose end the kernel tells at once. The process group's own timeout, which
would also end a rank that waits while rank 0 prepares the data for an hour, is set out of the way.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from dschat.errors import before_crash, end_process

import torch.distributed as dist

NEVER = timedelta(days=365)  # of a process group: the judgement is ours
REPORTS_PER_TIMEOUT = 10
MAX_INTERVAL = 5.0  # seconds
SECONDS_TO_FIND_THE_DEAD = 1.0
ENGINE, ROOT = Path(__file__).parent, Path(__file__).parents[2]

_finished, _alone = 0, False  # of this process


def progress() -> None:
    """A collective, or another step that no rank makes alone, is finished."""
    global _finished
    _finished += 1


@contextmanager
def alone() -> Iterator[None]:
    """While a rank is in here the others may wait as long as it takes."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False
        progress()


class Report(NamedTuple):
    """What a rank says of itself."""

    number: int = 0
    finished: int = 0  # collectives
    is_alone: bool = False
    waits: bool = False  # in a collective
    place: str = "its start"  # of its main thread


@dataclass
class State:
    """What is known of a rank."""

    report: Report
    heard_at: float  # when a report came last, by our clock
    moved_at: float  # when it finished a collective last, by the reports


class Watchdog:
    """Two threads of one rank: one talks to the store, which may block; the other judges, and never blocks."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float):
        """A collective: waits for the watchdogs of all ranks.

        ``timeout``: seconds without a word, or without a finished collective, after which the job is ended.
        """
        self.rank, self.timeout = rank, timeout
        self.interval = min(timeout / REPORTS_PER_TIMEOUT, MAX_INTERVAL)
        self.store = dist.PrefixStore("watchdog", store.clone())  # type: ignore[attr-defined]
        self.looked_after = list(range(world_size)) if rank == 0 else [0]
        self.states = {other: State(Report(), 0.0, 0.0) for other in self.looked_after}
        self.store.set(f"process/{rank}", json.dumps([_machine(), os.getpid()]))
        where = self.store.multi_get([f"process/{other}" for other in range(world_size)])
        self.neighbours = {}  # rank: (pid, its file descriptor)
        for other, (machine, pid) in enumerate(map(json.loads, where)):
            if other != rank and machine == _machine() and hasattr(os, "pidfd_open"):
                with suppress(OSError):  # over already, or an old kernel
                    self.neighbours[other] = pid, os.pidfd_open(pid)
        self.stopped = threading.Event()
        self._excuse()
        for loop in (self._talk, self._judge):
            threading.Thread(target=loop, daemon=True, name=f"watchdog{loop.__name__}").start()
        before_crash.append(self._wait_for_the_judge)

    def stop(self) -> None:
        self.stopped.set()

    def _talk(self) -> None:
        number = 0
        while not self.stopped.is_set():
            number += 1
            with suppress(RuntimeError):  # the store is gone with its rank: the judge sees the silence
                self.store.set(f"report/{self.rank}", json.dumps(Report(number, _finished, _alone, *_whereabouts())))
                reports = self.store.multi_get([f"report/{other}" for other in self.looked_after])
                for other, report in zip(self.looked_after, reports, strict=True):
                    self._hear(other, Report(*json.loads(report)))
            self.stopped.wait(self.interval)

    def _hear(self, rank: int, report: Report) -> None:
        state, now = self.states[rank], time.monotonic()
        if report.number != state.report.number:
            state.heard_at = now
        if report.finished != state.report.finished:
            state.moved_at = now
        state.report = report

    def _excuse(self) -> None:
        for state in self.states.values():
            state.heard_at = state.moved_at = time.monotonic()

    def _judge(self) -> None:
        last = time.monotonic()
        while not self.stopped.is_set():
            self._look_for_the_dead(self.interval)
            now = time.monotonic()
            if now - last > self.timeout / 2 + self.interval:  # the whole job was stopped, and is continued
                self._excuse()
            last = now
            guilty, message = self.verdict(now)
            if guilty and not self.stopped.is_set():
                self._end(guilty, message)

    def verdict(self, now: float) -> tuple[list[int], str]:
        """The ranks that hold up the job, and a line that says so; none while all is well."""
        silence = {rank: now - state.heard_at for rank, state in self.states.items() if rank != self.rank}
        if silent := [rank for rank, seconds in silence.items() if seconds > self.timeout]:
            what = f"did not answer for {self.timeout:g} s: stopped, or its machine is gone"
            return silent, self._told(silent, what)
        if any(seconds > self.timeout / 2 for seconds in silence.values()):
            return [], ""  # it may have moved since, and is judged by its silence, or when it speaks again
        if any(state.report.is_alone for state in self.states.values()):
            for state in self.states.values():
                state.moved_at = now
        stuck = [rank for rank, state in self.states.items() if now - state.moved_at > self.timeout and self.rank == 0]
        guilty = [rank for rank in stuck if not self.states[rank].report.waits] or stuck
        return guilty, self._told(guilty, f"made no step for {self.timeout:g} s (--stall_timeout)")

    def _told(self, ranks: list[int], what: str) -> str:
        return "; ".join(f"rank {rank} {what}; last at {self.states[rank].report.place}" for rank in ranks)

    def _wait_for_the_judge(self) -> None:
        """Before this rank reports a crash: a lost connection may have a cause, the end of another rank."""
        self.stopped.wait(SECONDS_TO_FIND_THE_DEAD)

    def _look_for_the_dead(self, seconds: float) -> None:
        """End with the first rank of this machine that ends badly within ``seconds``."""
        poll = select.poll()
        ranks = {descriptor: rank for rank, (_, descriptor) in self.neighbours.items()}
        for descriptor in ranks:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(seconds * 1000):
            rank = ranks[descriptor]
            pid, _ = self.neighbours.pop(rank)
            os.close(descriptor)
            code = _exit_code(pid)
            if code and not self.stopped.is_set():
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                mend = "out of memory is the usual cause" if code == -signal.SIGKILL else "its own lines say why"
                self._end([], f"rank {rank} (process {pid}) {how}; {mend}")

    def _end(self, guilty: list[int], message: str) -> None:
        for rank in guilty:
            if rank in self.neighbours:  # a stopped process would outlive us
                with suppress(OSError):
                    signal.pidfd_send_signal(self.neighbours[rank][1], signal.SIGKILL)
        end_process(message)


def _machine() -> str:
    """The same where process ids mean the same processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{os.uname().nodename} {os.getpid()}"


def _whereabouts() -> tuple[bool, str]:
    """(does the main thread wait in a collective, the line of ours that it is at)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    waits, place = False, ""
    while frame is not None:
        code = frame.f_code
        path = Path(code.co_filename)
        waits = waits or path.name == "distributed_c10d.py"
        is_ours = ROOT in path.parents and ENGINE not in path.parents and "site-packages" not in path.parts
        if not place and is_ours:
            place = f"{path.relative_to(ROOT)}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return waits, place


def _exit_code(pid: int) -> int | None:
    """Of a process that has ended and for which its parent has not asked yet; minus the signal that killed it."""
    try:
        state, *_, status = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, ValueError):
        return None
    return os.waitstatus_to_exitcode(int(status)) if state in "ZX" else None
