"""One rank of the two-rank tests of the run state: engines at several ZeRO stages, stopped and continued.

RANK=0 WORLD_SIZE=1 python -m tests.resume_driver <folder> <case>,<case>,...

A case is `write:STAGE` (six steps, a checkpoint after three), `read:FROM:STAGE` (a fresh engine goes on from what
`write:FROM` left, maybe on another number of ranks), or `fail` (the last rank cannot write). Losses go to a JSON file.
"""

import json
import sys
from pathlib import Path

from dschat.engine.deepspeed_engine import TrainSpec, backward, create_train_engine, whole_model
from dschat.engine.distributed import Runtime, all_reduce_sum, init_runtime, set_seed
from dschat.engine.ema import EMA
from dschat.engine.run_identity import RunIdentity
from dschat.engine.run_state import CheckpointSpec, RunState
from dschat.errors import run_program

import torch
from torch import nn

ROWS, STEPS = 4, 6


class Net(nn.Module):
    """A frozen layer, the same in every process, under what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(37, 37, bias=False).requires_grad_(False)
        nn.init.eye_(self.base.weight)
        self.layers = nn.Sequential(nn.Linear(37, 53), nn.Dropout(0.0), nn.Tanh(), nn.Linear(53, 3))

    def rebuild(self) -> "Net":
        return Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.base(x)).square().mean(1)


class Case:
    def __init__(self, folder: Path, stage: int, runtime: Runtime, interval: int = 3):
        set_seed(0)
        self.runtime, spec = runtime, TrainSpec(1e-2, 0.1, "linear", 0, STEPS, 1.0, stage)
        self.engine = create_train_engine(Net(), spec, dtype=torch.float32, runtime=runtime)
        self.ema = EMA(self.engine, 0.5)
        folder.mkdir(exist_ok=True)
        self.said: list[str] = []
        self.state = RunState(str(folder), CheckpointSpec(interval, 2, "auto", False), runtime, self.said.append)
        self.state.is_finished(lambda: RunIdentity({"run": 1}, {"ranks": runtime.world_size}))
        self.state.restore({"net": self.engine}, {"ema": self.ema})

    def train(self) -> list[float]:
        losses = []
        with self.state:
            for step in self.state.steps(STEPS):
                rows = torch.randn(ROWS, 37, generator=torch.Generator().manual_seed(step))
                rows = rows[self.runtime.rank :: self.runtime.world_size]
                loss = self.engine(rows).sum() / ROWS
                backward(self.engine, loss)
                self.engine.step()
                self.ema.update()
                losses.append(all_reduce_sum(loss, self.runtime).item())
                losses.append(float(torch.rand(())))  # of the generator
        with self.ema.swapped(), whole_model(self.engine, self.runtime.device) as average:
            total = torch.stack([weight.double().sum() for weight in average.parameters()]).sum()
        return [*losses, total.item()]


def main() -> None:
    root, cases = Path(sys.argv[1]), sys.argv[2].split(",")
    runtime, found = init_runtime(0), {}
    for name in cases:
        kind, *arguments = name.split(":")
        folder = root / f"zero{arguments[0]}" if arguments else root / kind
        if kind == "fail":
            found[name] = fail(Case(folder, 2, runtime))
        else:
            found[name] = Case(folder, int(arguments[-1]), runtime, interval=3 if kind == "write" else 0).train()
    if runtime.is_main:
        (root / f"ranks{runtime.world_size}-{cases[0].replace(':', '-')}.json").write_text(json.dumps(found))


def fail(case: Case) -> list:
    save, rank = torch.save, case.runtime.rank

    def full(value, file, **options) -> None:
        if rank == case.runtime.world_size - 1 and "optim_states" in str(getattr(file, "name", file)):
            raise OSError(28, "No space left on device")
        save(value, file, **options)

    torch.save = full
    written = case.state.save()
    torch.save = save
    return [written, case.said, case.state.save(), sorted(path.name for path in case.state.folder.iterdir())]


if __name__ == "__main__":
    run_program(main)
