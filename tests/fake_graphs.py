"""CUDA graphs without a GPU: a recording is a list of operations on fixed memory, which a replay makes again.

As on a GPU, asking for a number while recording is an error, and so is a tensor made from Python's numbers.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
REFUSED = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.lift_fresh, aten.equal}


class FakeGraph:
    made: list["FakeGraph"] = []

    def __init__(self):
        self.operations, self.pool, self.replays = [], None, 0
        FakeGraph.made.append(self)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.operations:
            again = function(*args, **kwargs)
            inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in inputs:  # else a view, or in place
                    old.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in REFUSED:
            raise RuntimeError(f"{function} is not permitted when stream is capturing")
        results = function(*args, **(kwargs or {}))
        self.graph.operations.append((function, args, kwargs or {}, results))
        return results


@contextmanager
def _recording(graph, pool=None, capture_error_mode="global"):
    assert capture_error_mode == "thread_local" and not graph.operations
    graph.pool = pool
    with _Recording(graph):
        yield


FAKES = {
    "CUDAGraph": FakeGraph,
    "graph": _recording,
    "graph_pool_handle": lambda: (0, len(FakeGraph.made)),
    "current_stream": lambda: None,
    "stream": lambda stream: nullcontext(),
}


class _OnAGpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.is_cpu.__get__:
            return False
        if function == torch.Tensor.is_cuda.__get__:
            return True
        return function(*args, **(kwargs or {}))


@contextmanager
def as_on_a_gpu():
    """Every tensor says that it is on a GPU, and graphs can be recorded. Yields the list of them."""
    FakeGraph.made = []
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in FAKES.items():
            patch.setattr(torch.cuda, name, fake)
        with _OnAGpu():
            yield FakeGraph.made
