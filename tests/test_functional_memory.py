"""What stands in memory: the vocabulary in float32 one block at a time, and nothing kept for backward but logits."""

import dschat.functional.logprobs as logprobs_module
from dschat.functional import entropy, full_kl, token_logprobs

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK, SHAPE = 64, (4, 6, 32)  # two of 24 positions at a time


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest float32 tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.numel = max(self.numel, leaf.numel())
        return result


def plain_entropy(logits, inputs):
    logp = logits.log_softmax(-1, dtype=torch.float32)
    return -(logp.exp() * logp).sum(-1)


FUNCTIONS = {
    "token_logprobs": lambda logits, inputs: token_logprobs(logits, inputs["ids"]),
    "entropy": lambda logits, inputs: entropy(logits),
    "full_kl": lambda logits, inputs: full_kl(logits, inputs["reference"]),
}


def case():
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(2))
    ids = torch.randint(SHAPE[2], SHAPE[:2], generator=generator)
    return logits.requires_grad_(), {"ids": ids, "reference": reference}


def largest(function) -> tuple[int, int]:
    """Elements of the largest float32 tensor of the forward and of the backward pass."""
    logits, inputs = case()
    with LargestFloat32() as forward:
        result = function(logits, inputs)
    with LargestFloat32() as backward:
        result.sum().backward()
    assert logits.grad.any()
    return forward.numel, backward.numel


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_copies_of_the_logits_are_one_block_large(name, monkeypatch):
    monkeypatch.setattr(logprobs_module, "_CPU_BLOCK", BLOCK)
    assert largest(FUNCTIONS[name]) == (BLOCK, BLOCK)
    assert largest(plain_entropy) == (4 * 6 * 32,) * 2  # what the measurement would show otherwise


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_the_inputs_are_kept_for_the_backward_pass(name):
    logits, inputs = case()
    kept = []

    def pack(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        FUNCTIONS[name](logits, inputs)
    extra = {"token_logprobs": ["ids"], "entropy": [], "full_kl": ["reference"]}[name]
    assert kept == [logits.data_ptr(), *(inputs[key].data_ptr() for key in extra)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused(name):
    logits, inputs = case()
    (slope,) = torch.autograd.grad(FUNCTIONS[name](logits, inputs).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
