"""Two programs that take turns, A B A B …, each in a process of its own, so that a busy neighbour hits both alike.

A side runs its program up to the end of a step and waits there for its next turn; a step lasts from the end of the
one before to its own end, data loading and logging included. The first turn lasts from the start of the process.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dschat.errors import UserError

import torch

Facts = dict[str, Any]
GO = "go"


class Side:
    """The measuring end: a process that answers every turn with the facts of a step."""

    def __init__(self, name: str, command: list[str], log: Path):
        self.name, self.command, self.log = name, command, log
        self.process: subprocess.Popen | None = None

    def turn(self) -> Facts:
        """One step; its facts, with ``seconds`` and ``peak_gb``.

        Raises:
            UserError: the process ended.
        """
        start = time.perf_counter()
        if self.process is None:
            log = open(self.log, "w")  # noqa: SIM115  # the process has it for its life
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen([sys.executable, *self.command], text=True, **pipes)
        try:
            self.process.stdin.write(f"{GO}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(f"{self.name} ended before its turn did: {lines[-1][:300]} (command: {self.command[0]})")
        return {"seconds": time.perf_counter() - start} | json.loads(answer)

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(timeout=60)


class Turns:
    """The working end. What libraries print goes to stderr; facts go where stdout went."""

    def __init__(self) -> None:
        self.channel = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def begin(self) -> None:
        """Wait for a turn; leave the program when there is no other."""
        if sys.stdin.readline().strip() != GO:
            self._leave()

    def end(self, **facts: Any) -> None:
        """Hand the turn back, with all that the device was asked for done."""
        synchronize()
        self.channel.write(json.dumps(facts | {"peak_gb": peak_gb()}) + "\n")
        self.channel.flush()

    def _leave(self) -> NoReturn:
        """At once: what a program would do after its training is not measured."""
        sys.stderr.flush()
        os._exit(0)


def synchronize() -> None:
    """Until the accelerator has done all that it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds, once the accelerator is done."""
    synchronize()
    return time.perf_counter()


def peak_gb() -> float:
    """The most memory that this process has held: on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's memory before the exec too
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


def interleave(
    sides: dict[str, Callable[[], Facts]], warmup: int, repeats: int, check: Callable[[dict[str, Facts]], None]
) -> tuple[dict[str, list[Facts]], dict[str, list[Facts]]]:
    """Each side's turn in order, ``warmup`` + ``repeats`` rounds: the facts of the warm-up and of the rest.

    ``check`` gets the facts of every round, and raises where the sides have not done the same work.
    """
    rounds = []
    for _ in range(warmup + repeats):
        rounds.append({name: turn() for name, turn in sides.items()})
        check(rounds[-1])
    by_side = {name: [facts[name] for facts in rounds] for name in sides}
    return {n: f[:warmup] for n, f in by_side.items()}, {n: f[warmup:] for n, f in by_side.items()}


class Passes:
    """Forward passes through Hugging Face models and the positions in them, by role, up to `take`. Steps that our
    rollout engine has recorded do not go through the model again, and are not counted."""

    def __init__(self, models: dict[str, Any]):
        self.found: dict[str, list[int]] = {}
        self.hooks = [
            decoder_of(model).register_forward_pre_hook(self._counter(role), with_kwargs=True)
            for role, model in models.items()
        ]

    def _counter(self, role: str) -> Callable:
        def count(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            number, positions = self.found.get(role, [0, 0])
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.found[role] = [number + 1, positions + int(ids.numel())]

        return count

    def take(self) -> dict[str, list[int]]:
        """[passes, positions] of each role; after the first time nothing is counted any more, so nothing is slowed."""
        found, self.found = self.found, {}
        for hook in self.hooks:
            hook.remove()
        return found


def decoder_of(model: Any) -> torch.nn.Module:
    """What every forward goes through: OPT's language model calls the decoder inside of its trunk, past the trunk."""
    return getattr(model.base_model, "decoder", model.base_model)
