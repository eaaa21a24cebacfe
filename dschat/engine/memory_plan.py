"""Arithmetic of a run's memory: what each rank holds under ZeRO, what each phase adds, whether it fits.

Bytes throughout; GB are 1e9. The rules are those of DeepSpeed 0.19.8 as this project sets it up, read in its source
and checked against measured peaks (benchmarks/plan.py, docs/scaling.md). Where a run may need less than the rule says
(rows shorter than the limit), the plan is the most that it can need.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dschat.errors import UserError

import torch

WEIGHTS, GATHERED, OPTIMIZER, AVERAGE = "weights", "gathered weights", "optimizer", "moving average"
ACTIVATIONS, LOGITS, GRADIENTS, CACHE = "activations", "logits", "gradients", "KV cache"
BUFFERS, LIBRARIES = "buffers", "libraries"
LARGE = "large tensors"  # of a pass on a CPU, which are not in its heap
BUCKET, BUCKET_PADDING = 500_000_000, 2**20  # elements of a gradient bucket: at most; for what pads a shard
MAX_LIVE = 1_000_000_000  # DeepSpeed's default: weights that stay gathered at stage 3
# CPU: what the libraries take beyond their import, once they run (thread pools, kernels, tensorboard): what remains of
# a run of the smallest model, `python benchmarks/plan.py --only "sft small"`.
RUNNING_LIBRARIES = 100e6
GPU_LIBRARIES = 1.5e9  # CUDA's context and kernels, NCCL's buffers, cuBLAS's workspace: assumed, not measured
RANKS_PER_NODE = 8
Bytes = Counter[str]  # by kind


@dataclass(frozen=True)
class Machine:
    """What each of ``num_ranks`` ranks may use."""

    num_ranks: int
    free: float  # of the memory that it trains in, its libraries included
    host_free: float  # of the host's, for what is offloaded
    on_cpu: bool
    libraries: float
    name: str


def find_machine(plan_for: str) -> Machine:
    """This machine with the launcher's ranks, or as ``plan_for`` says: "8" ranks here, "8x80" eight GPUs of 80 GB.

    Raises:
        UserError: ``plan_for`` is neither.
    """
    count, _, size = plan_for.partition("x")
    try:
        num_ranks, giga = int(count or os.environ.get("WORLD_SIZE", "1")), float(size or 0)
        if num_ranks < 1 or giga < 0 or plan_for.endswith("x"):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--plan_for {plan_for}: expected ranks, such as 2, or GPUs and their GB, such as 8x80"
        ) from None
    host, here = host_free(), int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(num_ranks, RANKS_PER_NODE)
    if giga:
        name = f"{num_ranks} GPU{'s' if num_ranks > 1 else ''} of {giga:g} GB"
        return Machine(num_ranks, giga * 1e9, host / here, False, GPU_LIBRARIES, name)
    name = f"{num_ranks} rank{'s' if num_ranks > 1 else ''} here"
    if torch.cuda.is_available():
        return Machine(num_ranks, torch.cuda.mem_get_info()[0], host / here, False, GPU_LIBRARIES, f"{name}, GPU")
    libraries = resident_bytes() + RUNNING_LIBRARIES
    return Machine(num_ranks, host / num_ranks + resident_bytes(), host, True, libraries, f"{name}, CPU")


def host_free() -> float:
    """Of this machine's memory, or of the container's where that allows less."""
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    meminfo, limit, used = (
        Path("/proc/meminfo"),
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory.current"),
    )
    if meminfo.is_file():
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
        free = min(free, float(text) - float(used.read_text(encoding="utf-8")))
    return free


def resident_bytes() -> float:
    """Of this process, now."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return float(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class PlannedModel:
    """One model of a run, in numbers."""

    role: str
    name: str
    num_weights: int
    num_trained: int  # 0: only ever evaluated
    itemsize: int  # bytes of a weight
    zero_stage: int
    accumulates: bool = False  # several micro-batches make a step
    offload: bool = False
    has_average: bool = False
    shares_trunk: bool = False  # only what is trained is its own
    saves_adapter: bool = False  # and not the whole model
    num_quantized: int = 0  # of the weights, to ``quantized_bits``
    quantized_bits: int = 0

    @property
    def weight_bytes(self) -> int:
        """Of its own weights. A quantized weight has its share of a float32 scale for every 64."""
        if self.shares_trunk:
            return self.itemsize * self.num_trained
        each = self.quantized_bits / 8 + 4 / 64
        return self.itemsize * (self.num_weights - self.num_quantized) + int(each * self.num_quantized)

    def is_away(self, machine: Machine) -> bool:
        """Whether offload puts its share into another memory; a CPU has but one."""
        return self.offload and not machine.on_cpu

    def resting(self, machine: Machine) -> Bytes:
        """What a rank holds of it from step to step."""
        ranks, share = machine.num_ranks, self.num_trained // machine.num_ranks
        held: Bytes = Counter({WEIGHTS: self.weight_bytes // (ranks if self.zero_stage == 3 else 1)})
        if self.num_trained:
            held[OPTIMIZER] = 8 * self.num_trained if self.zero_stage == 0 else 12 * share
        if self.num_trained and self.zero_stage == 3:
            held[GRADIENTS] = self.itemsize * share
            held[BUFFERS] = self._bucket(machine)
        if self.has_average:
            held[AVERAGE] = 4 * (share if self.zero_stage == 3 else self.num_trained)
        if self.is_away(machine):
            for kind in (OPTIMIZER, GRADIENTS, *([WEIGHTS] if self.zero_stage == 3 else [])):
                held.pop(kind, None)
        elif self.offload:
            held += self._of_offload(share)
        return held

    def _of_offload(self, share: int) -> Bytes:
        """What it keeps all the time, though a step alone needs it: float32 gradients, and below stage 3 the weights
        on their way from the step to the model."""
        return Counter({GRADIENTS: 4 * share, BUFFERS: 0 if self.zero_stage == 3 else self.itemsize * share})

    def on_host(self, machine: Machine) -> int:
        """Bytes of a rank that offload puts into the host's memory: what is trained there and its optimizer; at stage
        3 the weights and gradients as the model has them, below it the gradients of several micro-batches."""
        if not self.is_away(machine):
            return 0
        share = self.num_trained // machine.num_ranks
        held = 12 * share + self._of_offload(share).total()
        if self.zero_stage == 3:
            return held + self.weight_bytes // machine.num_ranks + self.itemsize * share
        return held + (self.itemsize * share if self.accumulates else 0)

    def in_use(self, machine: Machine) -> Bytes:
        """While it computes, whatever it computes."""
        is_gathered = self.zero_stage == 3 and not self.shares_trunk
        return Counter({GATHERED: self.itemsize * min(self.num_weights, MAX_LIVE)} if is_gathered else {})

    def in_backward(self, machine: Machine) -> Bytes:
        """The gradients and the buffers that reduce them, at their fullest."""
        ranks, trained = machine.num_ranks, self.num_trained
        whole, share = self.itemsize * trained, self.itemsize * trained // ranks
        if self.zero_stage < 2:
            return Counter({GRADIENTS: whole})
        if self.zero_stage == 3:
            return Counter({BUFFERS: 2 * min(whole, self.itemsize * BUCKET)})
        reduced = min(whole, self.itemsize * BUCKET) // ranks if ranks > 1 else 0
        held = 0 if self.offload else share
        held += share if self.accumulates and not self.is_away(machine) else 0
        return Counter({GRADIENTS: held, BUFFERS: self._bucket(machine) + reduced})

    def waiting(self, machine: Machine) -> Bytes:
        """The gradients between the backward pass and the step, beside what rests."""
        found = self.in_backward(machine) if self.num_trained else Counter()
        return Counter({GRADIENTS: found[GRADIENTS]})

    def in_step(self, machine: Machine) -> Bytes:
        """The gradients as the optimizer takes them."""
        ranks, trained = machine.num_ranks, self.num_trained
        if self.zero_stage == 0:
            return Counter({GRADIENTS: 4 * trained, BUFFERS: 4 * min(trained, BUCKET)})
        share = 0 if self.offload else trained // ranks  # offload keeps them all the time
        if self.zero_stage == 3:
            return Counter({GRADIENTS: 4 * share})
        # Of the reduced gradients a flat copy, and in half precision one more in float32.
        flat = (4 + (self.itemsize if self.itemsize < 4 else 0)) * share
        if self.zero_stage == 1:
            whole = self.itemsize * trained + self.itemsize * share
            return Counter({GRADIENTS: whole, BUFFERS: flat + self._bucket(machine)})
        return Counter({GRADIENTS: self.itemsize * share, BUFFERS: flat})

    def _bucket(self, machine: Machine) -> int:
        """Taken whole on a GPU; a CPU gives only the pages that are written."""
        padding = 0 if machine.on_cpu else BUCKET_PADDING
        return self.itemsize * min(self.num_trained + padding, BUCKET)

    @property
    def checkpoint(self) -> int:
        """On disk, of all ranks together: what is trained, three float32 numbers more of it, and their average."""
        return (self.itemsize + 12 + (4 if self.has_average else 0)) * self.num_trained

    @property
    def output(self) -> int:
        """On disk, at the end: the whole model or its adapters, and a second time as their average."""
        size = self.num_trained if self.saves_adapter else self.num_weights
        return self.itemsize * size * (2 if self.has_average else 1) if self.num_trained else 0


@dataclass(frozen=True)
class Phase:
    """A part of the work, and what it takes beside what rests."""

    name: str
    extra: Mapping[str, int]  # at its fullest time
    activations: int = 0  # the most of them at any time
    is_step: bool = False  # of the optimizer

    def beside(self, others: Bytes) -> "Phase":
        """The same while others hold so much."""
        return replace(self, extra=Counter(self.extra) + others)


@dataclass(frozen=True)
class Plan:
    """A whole run on one rank."""

    title: str
    machine: Machine
    models: Sequence[PlannedModel]
    phases: Sequence[Phase]
    num_checkpoints: int

    @property
    def resting(self) -> Bytes:
        held: Bytes = Counter({LIBRARIES: int(self.machine.libraries)})
        for model in self.models:
            held.update(model.resting(self.machine))
        return held

    @property
    def kept(self) -> int:
        """Bytes of the heap at its largest. A CPU's allocator keeps the place of small tensors that were let go, as
        most activations are, and fills it with others; large ones it gives back to the system."""
        return max(phase.activations for phase in self.phases) if self.machine.on_cpu else 0

    def bytes_of(self, phase: Phase) -> float:
        own = Counter(phase.extra)
        in_heap = own[ACTIVATIONS] + own[GRADIENTS] + own[CACHE]
        return self.resting.total() + own.total() + max(0, self.kept - in_heap)

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=self.bytes_of)

    @property
    def peak(self) -> float:
        return self.bytes_of(self.fullest)

    @property
    def on_host(self) -> int:
        return sum(model.on_host(self.machine) for model in self.models)

    @property
    def missing(self) -> float:
        """Bytes that a rank lacks; 0 or less where it fits."""
        return max(self.peak - self.machine.free, self.on_host - self.machine.host_free)

    @property
    def disk(self) -> float:
        """The checkpoints that are kept and the one that is being written, and what the run leaves behind."""
        checkpoints = (self.num_checkpoints + 1) * sum(model.checkpoint for model in self.models)
        return checkpoints + sum(model.output for model in self.models)
