"""Normalisation layers that compute in float32 inside a model of half precision."""

from types import MethodType
from typing import Any

from dschat.errors import UserError

import torch
from torch import Tensor, nn


def upcast_layernorm(model: nn.Module) -> int:
    """Make every normalisation layer of a model compute in float32 and return its input's dtype: one rounding.

    LLaMA-Factory's ``--upcast_layernorm`` makes the parameters float32; here they keep their dtype, since in half
    precision DeepSpeed's optimizer holds float32 masters of them anyway. In bf16 the RMS norms of Llama, Mistral and
    Qwen otherwise round before and after the product with their weight; torch's LayerNorm and Gemma's norm round once
    as they are, and a float32 model gives the same bits. Classes, names, config and saved files stay what they are.
    A model built anew from the config has plain layers, so pass it here too, and so must all that has to agree exactly
    with this model, such as its reference in the KL penalty.

    Returns:
        The number of normalisation layers: LayerNorm and RMSNorm of torch and of every model family.

    Raises:
        UserError: the model has none.
    """
    layers = [module for module in model.modules() if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))]
    if not layers:
        raise UserError(
            f"--upcast_layernorm: {type(model).__name__} has no LayerNorm or RMSNorm to upcast; leave the flag out"
        )
    for layer in layers:
        layer.forward = MethodType(_forward_in_float32, layer)
    return len(layers)


def _forward_in_float32(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The forward of the layer's own class, run on float32 values."""
    forward: Any = type(layer).forward
    return forward(_InFloat32(layer), _upcast(hidden)).to(hidden.dtype)


class _InFloat32:
    """A layer as its own forward sees it: its tensors, taken when they are read (ZeRO 3 gathers them late), upcast."""

    def __init__(self, layer: nn.Module):
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        return _upcast(value) if isinstance(value, Tensor) else value


def _upcast(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def tolerance(dtype: torch.dtype) -> float:
    """How far two forwards of the same weights may differ, in nats: rounding, not mathematics."""
    return 1e-3 if dtype == torch.float32 else 0.3
