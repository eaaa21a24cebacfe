"""Liger's fused Triton kernels (Hsu et al. 2024) in place of a model's own norms, rotary embedding and gated MLPs."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from dschat.errors import UserError

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Our losses read the logits of chosen positions, which a model patched for Liger's would not give.
WITHOUT_LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
TOLERANCE = 0.01  # of the L2 norm: bf16 rounds a layer by a third of it at most, another activation changes it by more


def require_liger(device: torch.device) -> None:
    """
    Raises:
        UserError: no GPU, or no liger-kernel, an optional package that is imported nowhere but here.
    """
    if device.type != "cuda":
        raise UserError("--use_liger_kernel: Liger's kernels run on a GPU only; leave the flag out")
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        raise UserError("--use_liger_kernel needs liger-kernel, which is not installed: pip install liger-kernel")


def apply_liger(model: PreTrainedModel) -> None:
    """Give a model, in place, the kernels that Liger has for its family. Do it before adapters and DeepSpeed.

    Liger also replaces classes and functions of the family's module, for the models that come after. Here the classes
    are put back: they know no biases. The functions, such as the rotary embedding, cannot be had for one model alone;
    they and the layers compute as before on a CPU, where step 2 scores its probe texts at ZeRO 3.

    Raises:
        UserError: a family without kernels, or one whose code is not that of transformers.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel  # with it comes the Trainer, which takes a second

    base: Any = model.base_model  # of a classifier too; some families are patched by the class of the whole model
    family, source = base.config.model_type, sys.modules[type(base).__module__]
    refusal = f"--use_liger_kernel: Liger has no kernels for the family {family} ({base.config.name_or_path or 'toy'})"
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN or not source.__name__.startswith("transformers."):
        raise UserError(f"{refusal}; leave the flag out")
    names, own = dict(vars(source)), {layer: dict(vars(layer)) for layer in base.modules()}
    try:
        apply_liger_kernel(base, WITHOUT_LOSSES)
    except (TypeError, ValueError, AttributeError, ImportError, NotImplementedError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{refusal} that fit this version of transformers ({problem}); leave the flag out") from None
    for name, plain in names.items():
        if (fused := getattr(source, name)) is not plain:
            kept = isinstance(plain, type | Fused)  # Fused: by another model of the family
            setattr(source, name, plain if kept else Fused(fused, plain, name))
    for layer, before in own.items():
        if vars(layer).get("forward") is not before.get("forward"):
            settings = {name: value for name, value in vars(layer).items() if name not in before}
            layer.forward = MethodType(_forward(layer.forward.__func__, type(layer), settings), layer)


@dataclass(eq=False)
class Fused:
    """``fused`` on a GPU, where its first result is compared with that of ``plain``; ``plain`` elsewhere."""

    fused: Callable
    plain: Callable
    name: str
    is_checked: bool = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not _on_gpu(args):
            return self.plain(*args, **options)
        if self.is_checked:
            return self.fused(*args, **options)
        with torch.no_grad():
            expected = self.plain(*args, **options)  # first: a fused kernel may write into what it reads
        result = self.fused(*args, **options)
        _require_close(result, expected, self.name)
        self.is_checked = True
        return result


def _forward(fused: Callable, kind: type[nn.Module], settings: dict[str, Any]) -> Fused:
    """A forward that needs nothing of its layer but what ``kind`` gives it, as ZeRO 3's copy of a model has it."""

    def forward(layer: nn.Module, *args: Any, **options: Any) -> Any:
        return fused(_WithSettings(layer, settings), *args, **options)

    plain: Any = kind.forward
    return Fused(forward, plain, kind.__name__)


class _WithSettings:
    """A layer as Liger's forward sees it: with the attributes that Liger sets, such as how a norm rounds. Weights are
    taken when they are read: a recorded step (dschat/rlhf/decode_step.py) and ZeRO 3 put others in their place."""

    def __init__(self, layer: nn.Module, settings: dict[str, Any]):
        self._layer, self._settings = layer, settings

    def __getattr__(self, name: str) -> Any:
        return self._settings[name] if name in self._settings else getattr(self._layer, name)


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(x.is_cuda for x in args if isinstance(x, Tensor))


@torch.no_grad()
def _require_close(result: Any, expected: Any, name: str) -> None:
    """Liger takes an activation or a rounding for granted, which a config may have changed.

    Raises:
        UserError: more than rounding is between them.
    """
    pairs = [(result, expected)] if isinstance(result, Tensor) else zip(result, expected, strict=True)
    for x, y in pairs:
        gap, size = (x.float() - y.float()).norm().item(), y.float().norm().item()
        if math.isfinite(size) and not gap <= TOLERANCE * size:  # a gap that is not a number is one
            raise UserError(
                f"--use_liger_kernel: Liger's kernel for {name} gives other numbers than the model's own (by "
                f"{gap / max(size, 1e-30):.1%}); leave the flag out"
            )
