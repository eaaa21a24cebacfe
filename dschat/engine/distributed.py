"""Ranks, devices and the few collectives the programs need. One process without a launcher is a world of one."""

import atexit
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dschat.engine import watchdog

import datasets
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers


@dataclass(frozen=True)
class Runtime:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.world_size


def init_runtime(seed: int, stall_timeout: float = 0.0) -> Runtime:
    """Join the process group (from the launcher's environment, or alone), seed every library, pick the device.

    Several ranks are watched, unless ``stall_timeout`` is 0: one that dies, or stalls for so many seconds, ends the
    job with its name.

    All ranks get the same seed: what must differ between ranks (which rows, which random numbers) is indexed by the
    global row, so that the number of ranks does not change a run.
    """
    quiet_libraries()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif world_size > 1:  # ranks that share the cores would otherwise each start a thread per core
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            store, _, _ = next(dist.rendezvous("env://"))
            if stall_timeout:
                atexit.register(watchdog.Watchdog(store, rank, world_size, stall_timeout).stop)
            group = {"store": store, "rank": rank, "world_size": world_size}
            dist.init_process_group(backend, timeout=watchdog.NEVER, **group)
        atexit.register(_leave)
        # Of DeepSpeed's own operators none is used here. To find out which of them could be built it runs compilers,
        # and one that only its inference kernels use, a shared-memory all-reduce, it would build: half a minute.
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(backend, auto_mpi_discovery=False)
    set_seed(seed)
    return Runtime(rank, world_size, device)


def set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def all_reduce_sum(values: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Sum over ranks, in float64 so that token counts stay exact."""
    total = values.detach().to(runtime.device, torch.float64)
    if runtime.world_size > 1:
        dist.all_reduce(total)
        watchdog.progress()
    return total


def all_reduce_max(value: float, runtime: Runtime) -> float:
    maximum = torch.tensor(float(value), device=runtime.device, dtype=torch.float64)
    if runtime.world_size > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
        watchdog.progress()
    return maximum.item()


def gather_rows(rows: torch.Tensor, runtime: Runtime, group_size: int = 1) -> torch.Tensor:
    """(B, …) of every rank to (B · world_size, …), interleaved: global group g of ``group_size`` neighbours is group
    g // world_size of rank g % world_size.

    The counterpart of cutting a global batch as ``rows[rank::world_size]``. All ranks must pass the same shape.
    """
    if runtime.world_size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(runtime.world_size)]
    dist.all_gather(parts, rows.contiguous())
    watchdog.progress()
    groups = [part.unflatten(0, (-1, group_size)) for part in parts]
    return torch.stack(groups, dim=1).flatten(0, 2)


def gather_objects(items: list, runtime: Runtime, group_size: int = 1) -> list:
    """Lists of picklable items of equal length from every rank, interleaved as in `gather_rows`."""
    if runtime.world_size == 1:
        return items
    parts: list[list] = [[] for _ in range(runtime.world_size)]
    dist.all_gather_object(parts, items)
    watchdog.progress()
    starts = range(0, len(items), group_size)
    return [item for start in starts for part in parts for item in part[start : start + group_size]]


@contextmanager
def main_process_first(runtime: Runtime) -> Iterator[None]:
    """Rank 0 runs the body alone (and fills caches), then the first rank of every other node, whose disk may be its
    own, then the others."""
    turn = 0 if runtime.is_main else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        barrier(runtime)
    with watchdog.alone():
        yield
    for _ in range(2 - turn):
        barrier(runtime)


def barrier(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier()
        watchdog.progress()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_libraries() -> None:
    """Keep the terminal for this run's own lines: what libraries say about themselves is left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
