"""The GPU that is not there refuses what a real one refuses, and nothing else."""

import copy
import threading

from tests.pretend_gpu import CPU, GPU, pretend_gpu

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MIX = "Expected all tensors to be on the same device"


@pytest.fixture(autouse=True)
def gpu():
    with pretend_gpu() as places:
        yield places


def there(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


REFUSED = {
    "sum": lambda: there(2) + torch.ones(2),
    "in place": lambda: torch.ones(2).add_(there(2)),
    "number in place": lambda: torch.ones(()).add_(there(1).sum()),
    "number of the GPU": lambda: torch.ones(2) * there(1).sum(),
    "product": lambda: there(2, 2) @ torch.ones(2, 2),
    "cat": lambda: torch.cat([there(2), torch.ones(2)]),
    "stack of numbers": lambda: torch.stack([there(1).sum(), torch.ones(())]),
    "number in a product": lambda: torch.addmm(torch.ones(()), there(2, 2), there(2, 2)),
    "where": lambda: torch.where(torch.ones(2).bool(), there(2), 0.0),
    "masked_fill": lambda: there(2).masked_fill(torch.ones(2).bool(), 0.0),
    "gather": lambda: there(1, 2).gather(1, torch.zeros(1, 1).long()),
    "embedding": lambda: F.embedding(torch.zeros(2).long(), there(3, 4)),
    "index of the GPU": lambda: torch.ones(3)[there(1).long()],
    "value put in": lambda: there(3).index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "layer": lambda: nn.Linear(2, 2)(there(1, 2)),
    "searchsorted": lambda: torch.searchsorted(there(1, 3), torch.ones(1, 1)),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_operation_on_tensors_of_both_devices_is_refused(name):
    with pytest.raises(RuntimeError, match=MIX):
        REFUSED[name]()


ALLOWED = {
    "number beside": lambda: there(2) * torch.tensor(3.0),
    "number in where": lambda: torch.where(there(2).bool(), there(2), torch.tensor(0.0)),
    "indices of the CPU": lambda: there(3)[torch.tensor([0, 2])],
    "mask of the CPU": lambda: there(3)[torch.tensor([True, False, True])],
    "put with indices of the CPU": lambda: there(3).index_put_((torch.tensor([0]),), torch.tensor(2.0)),
    "slice assigned": lambda: there(3).zero_().copy_(torch.ones(3)),
    "python numbers": lambda: (there(2) + 1).clamp(min=0).masked_fill(there(2).bool(), 2.0),
    "like": lambda: (
        torch.zeros_like(there(2)) + there(2).new_ones(2) + there(2).new_tensor([1.0, 2]) + there(1).expand(2)
    ),
    "factory": lambda: torch.arange(3, device=GPU) * there(3),
    "asked for by number": lambda: torch.zeros(2, device=0) + there(2),
    "moved": lambda: torch.ones(2).to("cuda") + torch.ones(2).cuda() + torch.ones(2).to(there(1)),
    "layer": lambda: nn.Linear(2, 2).to("cuda")(there(1, 2)),
    "context": lambda: torch.ones(2).to(GPU) + _made_in_context(),
    "copied": lambda: copy.deepcopy(there(2)) + there(2),
    "detached view": lambda: there(4).view(2, 2).T.detach()[0] + there(2),
}


def _made_in_context() -> torch.Tensor:
    with torch.device("cuda"):
        return torch.ones(2)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_what_a_gpu_allows_stays_on_it(name):
    result = ALLOWED[name]()
    assert result.device == GPU and result.is_cuda and not result.is_cpu


def test_the_cpu_stays_as_it_is():
    x = torch.ones(2, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.device == CPU and x.is_cpu and x.detach().numpy().tolist() == [1, 1]
    assert there(2).cpu().device == CPU and there(2).to("cpu", torch.float64).numpy().dtype == np.float64
    assert torch.zeros_like(there(2), device="cpu").is_cpu
    with pytest.raises(RuntimeError, match="recording is for the CPU"):
        torch.jit.trace(lambda a: a * 2, (torch.ones(2),))


def test_a_move_copies_once():
    x = torch.ones(2)
    y = x.to("cuda")
    assert y.to(GPU) is y and y.cuda() is y and y.data_ptr() != x.data_ptr() and x.is_cpu
    assert torch.as_tensor(x, device="cuda").data_ptr() != x.data_ptr() and x.is_cpu
    assert x.to(torch.float64).is_cpu and y.to(torch.float64).is_cuda and y.half().is_cuda


def test_memory_that_is_used_again_is_of_no_device(gpu):
    del gpu  # the fixture's; its memory is what is asked about
    for _ in range(50):
        there(1000)
        assert torch.empty(1000).is_cpu


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, np.asarray, np.array])
def test_numpy_takes_nothing_from_a_gpu(convert):
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        convert(there(2))


def test_a_generator_of_the_cpu_draws_nothing_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    for draw in (
        lambda: torch.rand(2, device="cuda", generator=generator),
        lambda: torch.randperm(4, device="cuda", generator=generator),
        lambda: there(2).uniform_(generator=generator),
        lambda: torch.multinomial(there(2), 1, generator=generator),
    ):
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
            draw()
    with pytest.raises(RuntimeError):
        torch.Generator(device="cuda")
    assert torch.rand(2, generator=generator).is_cpu


class _Mixes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones(2)


def test_the_backward_pass_is_seen_too():
    x = there(2).requires_grad_()
    with pytest.raises(RuntimeError, match=MIX):
        _Mixes.apply(x).sum().backward()
    weight = nn.Parameter(there(2, 2))
    with pytest.raises(RuntimeError, match="assign a gradient"):
        weight.grad = torch.ones(2, 2)

    def block(x):
        assert x.is_cuda  # when it is computed again, too
        return (x @ weight).tanh() + torch.arange(2, device=x.device)

    checkpoint(block, there(1, 2).requires_grad_(), use_reentrant=False).sum().backward()
    assert weight.grad.is_cuda


def test_a_thread_has_the_same_gpu():
    found = []

    def work():
        found.append(there(2).is_cuda)
        try:
            there(2) + torch.ones(2)
        except RuntimeError as error:
            found.append(MIX in str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_nccl_takes_no_tensor_of_the_cpu():
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    x = there(2)
    dist.all_reduce(x)
    dist.broadcast(x, 0)
    parts = [torch.empty_like(x)]
    dist.all_gather(parts, x)
    assert parts[0].tolist() == x.tolist()
    for call in (
        lambda: dist.all_reduce(torch.ones(2)),
        lambda: dist.broadcast(torch.ones(2), 0),
        lambda: dist.all_gather([torch.ones(2)], x),
    ):
        with pytest.raises(RuntimeError, match="over NCCL"):
            call()
    dist.barrier()
