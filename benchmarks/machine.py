"""The machine of a run: what it is, what it can do at its best, and which versions ran on it."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from programs import ROOT
from shapes import Work
from turns import synchronize

LIBRARIES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "trl", "accelerate")


@dataclass(frozen=True)
class Limits:
    """What the hardware did a second, at its best: operations of a product, bytes read and written by a copy."""

    flops: float
    bytes: float

    def least_seconds(self, work: Work) -> float:
        """No program does it faster, but where the data stays in the processor's cache."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """The best of several, for a neighbour can only slow them down."""
    size, num_bytes = (8192, 2**32) if device.type == "cuda" else (1024, 2**28)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    product, copy = best_seconds(lambda: a @ b), best_seconds(lambda: target.copy_(source))
    return Limits(flops=2 * size**3 / product, bytes=2 * num_bytes / copy)


def best_seconds(run: Callable[[], Any], repeats: int = 15) -> float:
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    known = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    known["load"] = os.getloadavg()[0]  # of the minute before: who else was busy
    if torch.cuda.is_available():
        known["gpu"] = torch.cuda.get_device_name()
    environment = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    return known | {name: os.environ[name] for name in environment if name in os.environ}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of this tree; with + where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
