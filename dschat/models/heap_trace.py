"""What a pass takes of a CPU's memory: the trace of memory_trace.py, which asks the allocator for all that it counts.

A process does not shrink to what it uses. glibc gives large pieces back to the system, but of smaller ones it keeps
the place, and an aligned piece, as torch asks for, fills a hole of its own size only while nothing small has
settled in the gaps beside it: what autograd notes of each operation does. How large the heap gets so depends on the
order in which pieces are made and let go (with adapters, 2.5 times what it held). So they are asked for, in that
order, while autograd makes its notes, and never written to: an untouched page costs nothing. Where the C library is
another one, they are only counted.
"""

import ctypes
import json
import os
import traceback
from functools import cache
from typing import Any

from dschat.engine.memory_plan import ACTIVATIONS, LARGE
from dschat.models.memory_trace import LiveBytes, Moments, Pass, all_true_masks, traced_attention

import torch
from torch import Tensor, nn

MAPPED = 2**25  # bytes of a piece that glibc never puts into the heap: DEFAULT_MMAP_THRESHOLD_MAX on 64 bits
NUM_STEPS = 2  # of training, after which the heap hardly grows
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


@cache
def _mallinfo() -> Any:
    """glibc's, or None."""
    try:
        found = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return None
    found.restype = _Mallinfo
    return found


class HeapBytes(LiveBytes):
    """By kind: ACTIVATIONS, by how much the heap is larger than what was in use before; LARGE, what is not in it.

    ``keeps_gradients``: until they are dropped by the caller, as at ZeRO 0 and 1; else another owner counts them.
    """

    def __init__(self, model: nn.Module, keeps_gradients: bool):
        super().__init__(model, vocab_size=0, keeps_gradients=keeps_gradients)
        self._asked: dict[int, Tensor] = {}
        self._before = self._used()

    def kind_of(self, tensor: Tensor) -> str:
        return LARGE if tensor.untyped_storage().nbytes() >= MAPPED else ACTIVATIONS

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._kinds and self.kind_of(tensor) == ACTIVATIONS:
            self._asked[storage._cdata] = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
        super()._count(tensor)

    def _free(self, key: int, num_bytes: int) -> None:
        super()._free(key, num_bytes)
        self._asked.pop(key, None)

    def _now(self) -> dict[str, int]:
        if _mallinfo() is None:
            return dict(self.live)
        found = _mallinfo()()
        return {ACTIVATIONS: found.arena + found.hblkhd - self._before, LARGE: self.live[LARGE]}

    @staticmethod
    def _used() -> int:
        if _mallinfo() is None:
            return 0
        found = _mallinfo()()
        return found.uordblks + found.hblkhd


def heap_traced(model: nn.Module, run: Pass, *, keeps_gradients: bool, num_passes: int) -> Moments:
    """The moments of ``run``, of a model on the meta device, over optimizer steps of ``num_passes``; 0: no training.

    In a process of its own, whose heap is as small as this one's and is gone afterwards.
    """

    def steps() -> Moments:
        with traced_attention(model, True), all_true_masks(), HeapBytes(model, keeps_gradients) as counted:
            for _ in range(NUM_STEPS if num_passes else 1):
                for _ in range(num_passes or 1):
                    counted.begin()
                    run()
                model.zero_grad(set_to_none=True)
        return counted.peaks

    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            found = file.read()
        os.waitpid(child, 0)
        if not found:
            raise RuntimeError("the trace of a pass failed; see above")
        return json.loads(found)
    try:
        os.write(writer, json.dumps(steps()).encode())
    except BaseException:
        traceback.print_exc()
    os._exit(0)
