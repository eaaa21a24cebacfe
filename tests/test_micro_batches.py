"""Out of memory in the middle of a pass, at every ZeRO stage: the step is that of enough memory."""

from types import SimpleNamespace

from dschat.engine.deepspeed_engine import TrainSpec, backward, create_train_engine, whole_model
from dschat.engine.distributed import Runtime, init_runtime, set_seed
from dschat.engine.micro_batches import MicroBatches, is_out_of_memory
from dschat.errors import StartAgain, UserError

import pytest
import torch
from deepspeed import DeepSpeedEngine
from torch import nn

ROWS, SIZE = 12, 5
runtime = None


class Limit(torch.autograd.Function):
    """Passes at most ``Memory.rows`` rows on; the others do not fit, on the way there or back."""

    @staticmethod
    def forward(ctx, x, way):
        ctx.way = way
        if way == "forward":
            Memory.hold(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.way == "backward":
            Memory.hold(gradient)
        return gradient, None


class Memory:
    rows = ROWS
    error: Exception = torch.OutOfMemoryError("CUDA out of memory")
    failures = 0

    @classmethod
    def hold(cls, x):
        if len(x) > cls.rows:
            cls.failures += 1
            raise cls.error


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        # At ZeRO 3 weights of over 100,000 numbers are let go of after each use.
        self.first, self.middle, self.last = nn.Linear(7, 300), nn.Linear(300, 400), nn.Linear(400, 1)
        self.way = way

    def rebuild(self):
        return Net(self.way)

    def forward(self, x):
        return self.last(Limit.apply(self.middle(self.first(x).tanh()).tanh(), self.way)).square()[:, 0]


def train(stage, dtype, way, limits):
    """The weights and losses of three steps of two micro-batches each, ``limits[step]`` rows fitting."""
    set_seed(3)
    spec = TrainSpec(1e-2, 0.1, "constant", 0, 3, 1.0, stage)
    engine = create_train_engine(Net(way).to(dtype), spec, dtype=dtype, runtime=runtime)
    said, losses = [], []

    def say(line):
        said.append(line)
        # Asked for by its attribute, the weight would be gathered: a broken forward is still a forward to DeepSpeed.
        middle = dict(engine.module.named_parameters())["middle.weight"]
        assert stage < 3 or not middle.numel(), "held by the pass that broke"

    memory = MicroBatches(runtime, say=say)
    rows = torch.randn(3, 2, ROWS, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step, limit in enumerate(limits):
        Memory.rows = limit

        def accumulate(step=step):
            total = torch.zeros(())
            for batch in memory.cut(list(rows[step]), len, lambda batch, some: batch[some]):
                loss = engine(batch).float().sum() / (2 * ROWS)
                backward(engine, loss)
                total += loss.detach()
            return total

        losses.append(memory.run(engine, accumulate).item())
        engine.step()
    with whole_model(engine, runtime.device) as model:
        weights = torch.cat([weight.detach().float().view(-1) for weight in model.parameters()])
    return weights, losses, said


@pytest.fixture(autouse=True)
def one_rank():
    global runtime
    runtime = runtime or init_runtime(0)
    Memory.failures = 0


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize(
    "stage, dtype", [(0, torch.float32), (1, torch.bfloat16), (2, torch.float32), (3, torch.float32)]
)
def test_the_steps_stay_the_same(stage, dtype, way):
    weights, losses, said = train(stage, dtype, way, [ROWS] * 3)
    assert not said and not Memory.failures
    halved, halved_losses, said = train(stage, dtype, way, [ROWS, 3, 3])
    assert Memory.failures == 2 and len(said) == 2  # 12 rows do not fit, 6 do not, 3 do; and so it stays
    assert "out of memory on a micro-batch of 12 rows" in said[0] and "of 6 rows" in said[1]
    rounding = 1e-6 if dtype == torch.float32 else 2e-2
    assert halved_losses == pytest.approx(losses, rel=rounding)
    torch.testing.assert_close(halved, weights, rtol=rounding, atol=rounding)


def asks(rows):
    """What has room for no more than so many of 8 rows."""

    def run(memory, ask):
        def compute():
            for batch in memory.cut([torch.zeros(8, 1)], len, lambda batch, some: batch[some]):
                Memory.hold(batch)
            return "done"

        Memory.rows = rows
        return ask(memory, compute)

    return run


def engine_at(stage, cpu_offload=False):
    """Of that stage, which is all that is asked of it before a pass has to be undone."""
    engine = object.__new__(DeepSpeedEngine)
    nn.Module.__init__(engine)
    engine.zero_optimization_stage = lambda: stage
    engine.optimizer = SimpleNamespace(cpu_offload=cpu_offload)
    return engine


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("stage", [2, 3])
def test_no_rank_makes_other_passes_than_the_rest_in_any_model_that_shares_the_micro_batches(stage, trains):
    """Memory runs out in a critic at ZeRO 0, or in scoring; the actor, whose passes are collectives, is cut alike."""
    critic, noted, said = engine_at(0), [], []

    def ask(memory, compute):
        return memory.run(critic, compute) if trains else memory.ask(compute)

    pair = Runtime(1, 2, torch.device("cpu"))
    memory = MicroBatches(pair, [engine_at(stage), critic, None], lambda: noted.append(1), said.append)
    with pytest.raises(StartAgain, match="rank 1: out of memory on a micro-batch of 8 rows; start the same command"):
        asks(4)(memory, ask)
    assert noted == [1] and memory.halvings == 0 and not said
    forgetful = MicroBatches(pair, [engine_at(stage)], say=said.append)
    with pytest.raises(torch.OutOfMemoryError):
        asks(4)(forgetful, ask)
    for place, models in ((runtime, [engine_at(stage)]), (pair, [engine_at(1), None])):
        alone = MicroBatches(place, models, say=said.append)
        assert asks(4)(alone, lambda memory, compute: memory.ask(compute)) == "done" and alone.halvings == 1
    assert len(said) == 2


def test_an_optimizer_in_the_memory_of_the_cpu_starts_again_and_one_row_is_the_end():
    noted = []
    memory = MicroBatches(runtime, [], lambda: noted.append(1))
    with pytest.raises(StartAgain):
        asks(4)(memory, lambda memory, compute: memory.run(engine_at(2, cpu_offload=True), compute))
    assert noted == [1]
    with pytest.raises(UserError, match="out of memory on a micro-batch of 1 rows; shorten them"):
        asks(0)(memory, lambda memory, compute: memory.ask(compute))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected
