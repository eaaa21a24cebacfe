"""One kernel for the tanh form of GELU, which transformers writes out as eight operations over the widest layer."""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu

_WRITTEN_OUT = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation, BloomGelu)


def use_fused_gelu(model: nn.Module) -> None:
    """Give the layers of a model that write out GELU's tanh form (GPT-2, GPT-J, Phi, BLOOM) torch's kernel for it.

    The same formula, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) (Hendrycks and Gimpel 2016, section 2), rounded
    once, where bf16 was rounded at each operation; the backward pass keeps x alone. Classes, config and saved files
    stay what they are. A model built anew from the config has the plain layers.
    """
    layers: list[Any] = [module for module in model.modules() if type(module) in _WRITTEN_OUT]
    for layer in layers:
        layer.forward = MethodType(_fused, layer)


def _fused(_: nn.Module, hidden: Tensor) -> Tensor:
    return nn.functional.gelu(hidden, approximate="tanh")
