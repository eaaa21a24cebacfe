"""The whole run in a checkpoint, and a run that goes on from one as if it had never been interrupted.

A checkpoint holds the engines, through DeepSpeed's own files; in `state.json` what a person may want to know; in
`shared.pt` the parts that are equal on every rank, and in `rank_*.pt` what is not, with the generators of random
numbers. The .pt files are tensors and plain values, read with ``weights_only=True``.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from dschat.engine.checkpoint import (
    CheckpointError,
    attempt,
    checkpoint_name,
    damage,
    list_checkpoints,
    remove_checkpoint,
    write_checkpoint,
)
from dschat.engine.distributed import Runtime, barrier, gather_objects
from dschat.engine.engine_state import engine_bytes, load_engine, save_engine
from dschat.engine.output_lock import lock_output_dir
from dschat.engine.random_state import random_state, set_random_state
from dschat.engine.run_identity import RunIdentity, differences
from dschat.engine.specs import CheckpointSpec
from dschat.engine.stop_signals import StopSignals
from dschat.errors import Stopped, UserError

import deepspeed
import torch

VERSION = 1
FINISHED = "finished.json"
SCRATCH = ".universal"
LIMITS = "micro_batches_of_rank_{}.json"
WAYS_OUT = "go back to that, choose another --output_dir, or start over with --fresh"

Result = TypeVar("Result")


class Part(Protocol):
    """Something of a run that changes. Its state is tensors and plain values, and that of rank 0 is everyone's; not so
    where an attribute ``of_each_rank`` is true: such a part has a method ``load_shards`` too, as that of `EMA`."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class RunState:
    """Checkpoints of one run in ``<output_dir>/checkpoints``, and the lock on that directory; calls are collectives.

    In order: `is_finished`, `restore`, then ``with`` it the loop over `steps`, then `finish`.
    """

    def __init__(self, output_dir: str, spec: CheckpointSpec, runtime: Runtime, say: Callable[[str], None]):
        """
        Raises:
            UserError: another process works in ``output_dir``, or it cannot be written.
        """
        self.output_dir, self.folder = Path(output_dir), Path(output_dir) / "checkpoints"
        self.spec, self.runtime, self.say = spec, runtime, say
        self.step = 0  # of the steps done
        self._start, self._seconds = time.time(), 0.0
        self._lock: TextIO | None = None
        self._source: Path | None = None  # the checkpoint to go on from
        self._saved = ""  # name of the newest checkpoint that holds this run
        self._signals = StopSignals()
        self._on_main(self._take_lock)

    @property
    def is_new(self) -> bool:
        """Whether the run starts here, rather than go on from a checkpoint."""
        return self._source is None

    @property
    def seconds(self) -> float:
        """That the run has taken, its earlier parts included."""
        return self._seconds + time.time() - self._start

    def micro_batch_limits(self) -> dict[str, int]:
        """By flag, the largest micro-batches that memory has room for, as far as earlier starts of this run have found
        out on any rank."""
        files = sorted(self.folder.glob(LIMITS.format("*")))  # on several nodes those of this one
        if self.spec.fresh:
            for path in files:
                path.unlink(missing_ok=True)
            return {}
        found: dict[str, int] = {}
        for limits in gather_objects([[json.loads(path.read_text(encoding="utf-8")) for path in files]], self.runtime):
            for name, value in (item for one in limits for item in one.items()):
                found[name] = min(value, found.get(name, value))
        if found:
            limits = ", ".join(f"--{name} {value}" for name, value in found.items())
            self.say(f"memory ran out in this run before: micro-batches of at most {limits} (--fresh forgets it)")
        return found

    @property
    def limits_file(self) -> Path:
        """Where this rank notes `micro_batch_limits` for the next start."""
        return self.folder / LIMITS.format(self.runtime.rank)

    def is_finished(self, identity: Callable[[], RunIdentity]) -> bool:
        """Whether the output directory holds this very run, done; else what to go on from is settled.

        Args:
            identity: called on rank 0.

        Raises:
            UserError: another run is there, or none of its checkpoints is sound, or none is there and one is required.
        """
        self._identity = self._on_main(identity)
        if self.spec.fresh:
            return False
        if finished := self._on_main(self._read_finished):
            self._require_same(RunIdentity(**finished), f"{self.output_dir} holds a finished run of another kind")
            self.say(f"{self.output_dir} holds this run, finished; nothing is left to do (--fresh runs it again)")
            self._on_main(lambda: os.utime(self.output_dir / "run.json"))  # for those who wait for it to be written
            return True
        self._source = source = self._newest_sound()
        if source is None:
            if self.spec.resume == "required":
                raise UserError(f"{self.folder} holds no checkpoint to continue from, as --resume required demands")
            return False
        self._record = self._on_main(lambda: json.loads((source / "state.json").read_text(encoding="utf-8")))
        if self._record["version"] != VERSION:
            raise UserError(f"{source} was written by another version of dschat: start over with --fresh")
        saved = RunIdentity(**self._record["identity"])
        self._require_same(saved, f"{source} is of a run of another kind")
        for change in differences(saved.rounding, self._identity.rounding):
            self.say(f"{change}: the run goes on equal up to rounding, no longer bit for bit")
        return False

    def restore(self, engines: dict[str, deepspeed.DeepSpeedEngine], parts: dict[str, Part]) -> None:
        """Put everything where the checkpoint was; call it last, as it sets the generators. Without one the run
        starts, and what an earlier one left in ``checkpoints`` goes.
        """
        self._engines, self._parts = engines, parts
        if self._source is None:
            if removed := self._on_main(self._start_anew):
                self.say(f"--fresh: {removed} checkpoints of an earlier run are removed")
            return
        record, source = self._record, self._source
        self.step, self._seconds, self._start = record["step"], record["seconds"], time.time()
        for name, engine in engines.items():
            layout = (record["zero_stages"][name], record["ranks"])
            load_engine(engine, source / name, *layout, self.folder / SCRATCH, self.runtime)
        shared = torch.load(source / "shared.pt", map_location="cpu", weights_only=True)
        ranks = [torch.load(path, map_location="cpu", weights_only=True) for path in sorted(source.glob("rank_*.pt"))]
        own = ranks[self.runtime.rank % len(ranks)]
        same_layout = (record["ranks"], record["zero_stages"]) == (self.runtime.world_size, self._zero_stages)
        for name, part in parts.items():
            if same_layout or not hasattr(part, "load_shards"):
                part.load_state_dict((shared | own["parts"])[name])
            else:
                part.load_shards([shared[name]] if name in shared else [rank["parts"][name] for rank in ranks])
        set_random_state(own["random"])
        self._saved = source.name
        self.say(f"continuing from {source}, after step {self.step}")

    def __enter__(self) -> "RunState":
        self._signals.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._signals.__exit__(*error)

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps that are left, up to ``total``. After each: a checkpoint where one is due.

        Raises:
            Stopped: a signal came during the step; the run is saved.
        """
        while self.step < total:
            yield self.step + 1
            self.step += 1
            if self.spec.checkpoint_interval and self.step % self.spec.checkpoint_interval == 0:
                self.save()
            self.stop_if_asked()

    def stop_if_asked(self, minibatch: int = 0) -> None:
        """A point inside a step where the run can be saved too: so many minibatches after `step`.

        Raises:
            Stopped: a signal came before; the run is saved.
        """
        number = self._signals.agreed(self.runtime)
        if not number:
            return
        saved = self.save(minibatch)
        message = f"stopped after step {self.step}" + (f" and {minibatch} minibatches" if minibatch else "")
        if saved:
            message += f": the run is saved in {self.folder / self._saved}; the same command continues it"
        else:
            message += f": it could not be saved; the same command continues from {self._saved or 'the beginning'}"
        raise Stopped(number, message if self.runtime.is_main else "")

    def save(self, minibatch: int = 0) -> bool:
        """Write a checkpoint. Where that fails, say why and go on: what was trained is still in memory."""
        name = checkpoint_name(self.step, minibatch)
        if name == self._saved:
            return True
        writers: list[Callable[[Path], None]] = [self._write_parts]
        writers += [partial(save_engine, *item) for item in self._engines.items()]
        try:
            num_bytes = attempt(self.runtime, self._num_bytes)
            write_checkpoint(self.folder, name, self.spec.keep_checkpoints, num_bytes, writers, self.runtime)
        except CheckpointError as error:
            self.say(f"no checkpoint after step {self.step}: {error}; free some room, the run goes on without it")
            return False
        self._saved = name
        return True

    def finish(self) -> None:
        """The output directory holds all that came of the run: the checkpoints are no longer needed, the lock ends."""
        barrier(self.runtime)
        if self.runtime.is_main:
            written = self.folder / f"{FINISHED}.tmp"
            written.write_text(json.dumps(dataclasses.asdict(self._identity), indent=2) + "\n", encoding="utf-8")
            os.replace(written, self.folder / FINISHED)
            for path in list_checkpoints(self.folder):
                remove_checkpoint(path)
        if self._lock is not None:
            self._lock.close()

    def _write_parts(self, folder: Path) -> None:
        own = {name: part for name, part in self._parts.items() if getattr(part, "of_each_rank", False)}
        if self.runtime.is_main:
            shared = {name: part.state_dict() for name, part in self._parts.items() if name not in own}
            torch.save(shared, folder / "shared.pt")
            record = {
                "version": VERSION,
                "step": self.step,
                "seconds": self.seconds,
                "ranks": self.runtime.world_size,
                "zero_stages": self._zero_stages,
                "identity": dataclasses.asdict(self._identity),
            }
            (folder / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        state = {"random": random_state(), "parts": {name: part.state_dict() for name, part in own.items()}}
        torch.save(state, folder / f"rank_{self.runtime.rank:05d}.pt")

    @property
    def _zero_stages(self) -> dict[str, int]:
        return {name: engine.zero_optimization_stage() for name, engine in self._engines.items()}

    def _num_bytes(self) -> int:
        size = sum(map(engine_bytes, self._engines.values())) + 2**20
        for part in self._parts.values():
            copies = self.runtime.world_size if getattr(part, "of_each_rank", False) else 1
            size += copies * _tensor_bytes(part.state_dict())
        return size

    def _newest_sound(self) -> Path | None:
        names = self._on_main(lambda: [path.name for path in list_checkpoints(self.folder)])
        damaged: list[str] = []
        for path in (self.folder / name for name in names):
            if (file := damage(path, self.runtime)) is None:
                for bad in damaged:
                    self.say(f"{bad}; going on from the one before")
                return path
            damaged.append(f"{path} is damaged ({file})")
        if damaged:
            raise UserError(f"{'; '.join(damaged)}: put the files back, or start over with --fresh")
        return None

    def _read_finished(self) -> dict[str, Any] | None:
        path = self.folder / FINISHED
        if not path.is_file() or not (self.output_dir / "run.json").is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    def _require_same(self, saved: RunIdentity, where: str) -> None:
        if found := differences(saved.result, self._identity.result):
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(f"{where}: {'; '.join(found[:3])}{more}: {WAYS_OUT}")

    def _start_anew(self) -> int:
        """The number of checkpoints that went."""
        (self.folder / FINISHED).unlink(missing_ok=True)
        earlier = list_checkpoints(self.folder)
        for path in earlier:
            remove_checkpoint(path)
        return len(earlier)

    def _take_lock(self) -> None:
        try:
            self._lock = lock_output_dir(str(self.output_dir))
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--output_dir {self.output_dir}: {error}; make it writable, or choose another") from None

    def _on_main(self, action: Callable[[], Result]) -> Result:
        """What ``action`` gives on rank 0, on every rank; so, too, the user's mistake that it finds."""
        result, mistake = None, ""
        if self.runtime.is_main:
            try:
                result = action()
            except UserError as error:
                mistake = str(error)
        result, mistake = gather_objects([(result, mistake)], self.runtime)[0]
        if mistake:
            raise UserError(mistake)
        return result


def limit_micro_batches(path: Path, limits: dict[str, int]) -> None:
    """Note them in a `RunState.limits_file`."""
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(limits), encoding="utf-8")
    os.replace(written, path)


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    children = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_tensor_bytes, children))
