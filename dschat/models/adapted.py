"""What is, and what may be, under adapters in a model: names and numbers of its layers, without PEFT."""

from dschat.errors import UserError
from dschat.report.progress import table

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def adapted_layers(model: PreTrainedModel, module_name: str) -> list[str]:
    """Full names of the linear layers inside the transformer blocks: all of them (``auto``), or those whose name has
    one of the comma-separated parts in it (``q_proj,v_proj``; DeepSpeed-Chat's ``decoder.layers.``).

    Raises:
        UserError: a part that is in no name.
    """
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(blocks)
    ]
    if module_name == "auto":
        return linear
    parts = [part.strip() for part in module_name.split(",")]
    for part in parts:
        if not part or not any(part in name for name in linear):
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(f"--lora_module_name {module_name}: no linear layer has {part!r} in its name; use {kinds}")
    return [name for name in linear if any(part in name for part in parts)]


def has_adapters(model: nn.Module) -> bool:
    return any(".lora_" in name for name, _ in model.named_parameters())


def trained_table(model: nn.Module) -> str:
    """How many parameters are trained of how many, by kind."""
    sizes = {"adapters": [0, 0], "score head": [0, 0], "trunk": [0, 0]}
    for name, parameter in model.named_parameters():
        kind = "adapters" if ".lora_" in name else "score head" if "score." in name else "trunk"
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO 3 leaves a rank a share
        sizes[kind][0] += size if parameter.requires_grad else 0
        sizes[kind][1] += size
    sizes = {kind: size for kind, size in sizes.items() if size[1]}
    sizes["together"] = [sum(column) for column in zip(*sizes.values(), strict=True)]
    rows = [[kind, f"{trained:,}", f"{whole:,}", f"{trained / whole:.2%}"] for kind, (trained, whole) in sizes.items()]
    return table(["parameters", "trained", "all", "share"], rows)
