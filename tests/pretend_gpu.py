"""A GPU that is not there: "cuda:0", backed by the CPU's memory, for finding what would stop on a real one.

Numbers are those of the CPU, bit for bit. Which tensors are on the GPU is remembered by their storage, which views
share. `_Calls` answers what Python asks of a tensor and moves it; `_Kernels` sees every operation, of the backward
pass too, and refuses those that no GPU would do: on tensors of both devices, or with a generator of the other one.
New threads get both, since torch keeps them by thread. DeepSpeed's accelerator and the NCCL group are stood in for.

What it does not show: kernels, streams and memory of a GPU, its own random numbers (a GPU's generator is refused, the
default one is the CPU's), and on which device a file's tensors are loaded without `map_location`: here the CPU.
`torch.jit.trace` is refused: the project records steps for a CPU only.
"""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests import fake_graphs

import deepspeed
import torch
import torch.distributed as dist
import torchgen
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import _allowed_determinism_checks_to_fns

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 2**36
aten = torch.ops.aten


@cache
def _element_wise() -> set[str]:
    """The operations beside whose tensors a number of the CPU, a tensor without dimensions, may stand on a GPU: those
    whose kernels torch generates without a check of devices."""
    text = (Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    operations = (part.partition("(") for part in text.split("\n- func: ")[1:])
    names = {name for name, _, rest in operations if "device_check: NoCheck" in rest}
    return {f"aten.{name}" if "." in name else f"aten.{name}.default" for name in names}


def _tensors(value: Any) -> Iterator[Tensor]:
    """All in arguments or in a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


class Places:
    """Which storages count as the GPU's."""

    def __init__(self) -> None:
        self.num_operations = 0  # that were the GPU's
        self.calls = threading.local()  # `given`: the arguments of the call that this thread is in

    def on_gpu(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.device.type == "cpu" and hasattr(tensor.untyped_storage(), "on_gpu")

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        with torch._C.DisableTorchFunction():
            if tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if device.type == "cuda":
                    storage.on_gpu = True  # torch keeps a storage's Python object as long as the storage
                elif hasattr(storage, "on_gpu"):
                    del storage.on_gpu
        return tensor


class _Kernels(TorchDispatchMode):
    """Every operation: its tensors must be of one device, and what it makes is of that device."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            given = [x for x in _tensors((args, kwargs)) if x.device.type == "cpu"]
            on_gpu = [x for x in given if hasattr(x.untyped_storage(), "on_gpu")]
            if func.namespace == "c10d" and func.overloadpacket is not torch.ops.c10d.barrier:
                if len(on_gpu) < len(given):
                    raise RuntimeError(f"No backend type associated with device type cpu: {func} over NCCL")
            elif on_gpu:
                self.places.num_operations += 1
                self._check(func, args, kwargs, len(on_gpu) < len(given))
            result = func(*args, **kwargs)
            if (on_gpu and func.overloadpacket is not aten.copy_) or (not given and self._is_made_for_gpu()):
                for x in _tensors(result):
                    if x.device.type == "cpu":
                        x.untyped_storage().on_gpu = True
            return result

    def _is_made_for_gpu(self) -> bool:
        """Whether what is made from nothing is made inside of a call, or a backward pass, on tensors of the GPU."""
        return any(map(self.places.on_gpu, _tensors(getattr(self.places.calls, "given", None))))

    def _check(self, func: Any, args: tuple, kwargs: dict, mixed: bool) -> None:
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if not mixed or func.overloadpacket in (aten.copy_, aten._to_copy):
            return
        here = self.places.on_gpu
        indices = func.overloadpacket in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_)
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            for x in _tensors(value):
                if x.device.type != "cpu" or here(x):
                    continue
                is_index = indices and argument.name == "indices" and here(args[0])
                is_number = x.dim() == 0 and not written and str(func) in _element_wise()
                if not is_index and not is_number:
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                        f"cpu! ({func}, its {argument.name}, of shape {tuple(x.shape)}, is on the CPU)"
                    )


class _Calls(TorchFunctionMode):
    """Every call of torch from Python: where a tensor is, where it is to go."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places
        self.special: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: self.device,  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: lambda x: places.on_gpu(x),  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda x: self.device(x) == CPU,  # type: ignore[attr-defined]
            Tensor.get_device: lambda x: 0 if places.on_gpu(x) else x.get_device(),
            Tensor.grad.__set__: self.set_grad,  # type: ignore[attr-defined]
            Tensor.numpy: self.numpy,
            Tensor.__array__: self.array,
            Tensor.new_tensor: self.new_tensor,
            Tensor.to: self.to,
            Tensor.cpu: lambda x, *_, **__: self.move(x, CPU),
            Tensor.cuda: lambda x, *_, **__: self.move(x, GPU),
            Tensor.pin_memory: self.pin_memory,
            Tensor.__deepcopy__: lambda x, memo: places.put(x.__deepcopy__(memo), self.device(x)),
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, calls = kwargs or {}, self.places.calls
        before, calls.given = getattr(calls, "given", None), (args, kwargs)
        try:
            return self._call(func, args, kwargs)
        finally:
            calls.given = before

    def _call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func in self.special:
            return self.special[func](*args, **kwargs)
        if kwargs.get("device") is None:
            return func(*args, **kwargs)
        device = _device(kwargs["device"])
        if device.type == "cuda":
            if kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            kwargs = kwargs | {"device": CPU}
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if func in (torch.as_tensor, torch.asarray) and source is not None and self.device(source) != device:
            source = source.clone()  # a copy on the other device, not the same memory
            return self.places.put(func(source, *args[1:], **kwargs), device)
        result = func(*args, **kwargs)
        return self.places.put(result, device) if isinstance(result, Tensor) else result

    def device(self, x: Tensor) -> torch.device:
        return GPU if self.places.on_gpu(x) else x.device

    def move(self, x: Tensor, device: torch.device, *, copy: bool = False, **options: Any) -> Tensor:
        if self.device(x) != device and x.device.type == "cpu":
            copy = True
        if device.type == "cuda" and x.device.type != "cpu":
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        return self.places.put(x.to(CPU if device.type == "cuda" else device, copy=copy, **options), device)

    def to(self, x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        kwargs.pop("non_blocking", None)
        other = args[0] if args else kwargs.pop("other", None)
        if isinstance(other, Tensor):
            return self.move(x, self.device(other), copy=copy, dtype=other.dtype)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        options = {"dtype": dtype, "memory_format": layout}
        options = {name: value for name, value in options.items() if value is not None}
        return self.move(x, self.device(x) if device is None else _device(device), copy=copy, **options)

    def new_tensor(self, x: Tensor, data: Any, *, device: Any = None, **options: Any) -> Tensor:
        target = self.device(x) if device is None else _device(device)
        return self.places.put(x.new_tensor(data, device=CPU if target.type == "cuda" else target, **options), target)

    def numpy(self, x: Tensor, **options: Any) -> Any:
        if self.places.on_gpu(x):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
            )
        return x.numpy(**options)

    def array(self, x: Tensor, dtype: Any = None) -> Any:
        found = self.numpy(x)
        return found if dtype is None else found.astype(dtype)

    def pin_memory(self, x: Tensor, *_: Any) -> Tensor:
        if self.places.on_gpu(x):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        return x

    def set_grad(self, x: Tensor, grad: Tensor | None) -> None:
        if grad is not None and self.device(grad) != self.device(x):
            raise RuntimeError("attempting to assign a gradient with device type 'cpu' to a tensor on 'cuda'")
        x.grad = grad


def _device(given: Any) -> torch.device:
    device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    return GPU if device.type == "cuda" else device


class _Accelerator(CPU_Accelerator):
    """DeepSpeed's, of a CPU, by the name of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = "cuda", "nccl"

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return "cuda:0"

    def device_count(self) -> int:
        return 1

    @property
    def FloatTensor(self) -> Callable[..., Tensor]:  # noqa: N802
        return partial(torch.tensor, dtype=torch.float32, device="cuda")

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.is_cuda


def _in_this_thread(places: Places) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(_Kernels(places))
    stack.enter_context(_Calls(places))
    return stack


@contextmanager
def pretend_gpu() -> Iterator[Places]:
    """Inside, torch has one GPU."""
    places, join, backward = Places(), dist.init_process_group, torch.autograd._engine_run_backward
    start, init = threading.Thread._bootstrap_inner, {"nccl": "gloo"}  # type: ignore[attr-defined]

    def run_backward(*args: Any, **options: Any) -> Any:
        with _Calls(
            places
        ):  # torch leaves a mode while its function runs, here one in which hooks and checkpoints run
            return backward(*args, **options)

    def bootstrap(thread: threading.Thread) -> None:
        with _in_this_thread(places):
            start(thread)

    def metadata(x: Tensor) -> Any:  # of a checkpoint's tensors, taken inside of calls and outside of them
        with torch._C.DisableTorchFunction():
            return x.shape, x.dtype, x.device

    def trace(*_: Any, **__: Any) -> None:
        raise RuntimeError("recording is for the CPU, and what is recorded cannot run under torch's modes")

    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (MEMORY, MEMORY),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    silent = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")
    zero = ("current_device", "max_memory_reserved", "max_memory_allocated", "memory_allocated")
    # A function for each: torch.compile's own tables know functions by what they are.
    fakes |= {name: lambda *_: None for name in silent} | {name: lambda *_: 0 for name in zero}
    fakes |= fake_graphs.FAKES
    real_accelerator.get_accelerator()  # DeepSpeed chooses its own now, not inside, and so does bitsandbytes
    importlib.import_module("bitsandbytes")
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        stack.enter_context(mock.patch.object(real_accelerator, "ds_accelerator", _Accelerator()))
        stack.enter_context(mock.patch.object(torch.jit, "trace", trace))
        stack.enter_context(mock.patch.dict(_allowed_determinism_checks_to_fns, {"default": metadata}))
        group = mock.patch.object(dist, "init_process_group", lambda name, **more: join(init.get(name, name), **more))
        stack.enter_context(group)
        place = mock.patch.object(dist.distributed_c10d, "_get_object_coll_device", lambda *_: "cuda")
        stack.enter_context(place)  # where NCCL sends objects from
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        stack.enter_context(mock.patch.object(threading.Thread, "_bootstrap_inner", bootstrap))
        assert deepspeed.get_accelerator().current_device_name() == "cuda:0"
        stack.enter_context(_in_this_thread(places))
        yield places
