"""LoRA (Hu et al. 2021) through PEFT: adapters put on a model, saved in PEFT's format, merged and read back."""

import copy
from pathlib import Path
from types import MethodType
from typing import Any

from dschat.errors import UserError
from dschat.models.adapted import adapted_layers
from dschat.models.adapter_files import record_base, require_same_base
from dschat.models.specs import LoraSpec

import torch
from peft import LoraConfig, LoraModel, PeftConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

NAME = "default"  # of the trained adapter inside a model; files do not hold it
PREFIX = "base_model.model."  # PEFT's, in front of every weight in a file


# Training


def add_lora(model: PreTrainedModel, spec: LoraSpec) -> LoraConfig:
    """Put adapters of rank ``spec.dim``, scaled by alpha / dim, on a model, in place, and freeze what is under them.

    They start at zero: the model computes what it did, bit for bit. No dropout, no biases. A head named ``score``
    stays trainable; with ``spec.only`` False so does all but the adapted weights.

    Raises:
        UserError: as `adapted_layers`.
    """
    targets = adapted_layers(model, spec.module_name)
    is_conv1d = isinstance(model.get_submodule(targets[0]), Conv1D)  # GPT-2 stores its weights transposed
    config = LoraConfig(
        r=spec.dim,
        lora_alpha=2 * spec.dim if spec.alpha is None else spec.alpha,
        target_modules=_short_names(model, targets),
        fan_in_fan_out=is_conv1d,
    )
    _attach(model, config, spec.only)
    return config


def _attach(model: PreTrainedModel, config: LoraConfig, only: bool) -> None:
    LoraModel(model, config, NAME)  # freezes the whole model, then adds what is trained
    if not only:
        adapted = {id(layer.get_base_layer().weight) for layer in model.modules() if isinstance(layer, LoraLayer)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in adapted)
    head: Any = getattr(model, "score", None)
    if head is not None:
        head.requires_grad_(True)

    def rebuild(self: PreTrainedModel) -> PreTrainedModel:
        other = type(self)(self.config)
        _attach(other, copy.deepcopy(config), only)
        return other

    model.rebuild = MethodType(rebuild, model)  # type: ignore[assignment]  # how ZeRO 3's copy of it is made


def _short_names(model: PreTrainedModel, layers: list[str]) -> list[str]:
    """The last parts of the names where they mean exactly these layers: then a deeper model lacks weights, aloud."""
    ends = {name.rsplit(".", 1)[-1] for name in layers}
    meant = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ends]
    return sorted(ends) if meant == layers else layers


# Saving


def save_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str, base: str) -> None:
    """The adapters and the head, if the model has one, as ``PeftModel.from_pretrained`` reads them; the tokenizer.

    ``base`` is the directory or hub name of the trunk, where every loader looks for it, and whose weights are to stay
    what they are: their fingerprint is put beside.
    """
    head: Any = getattr(model, "score", None)
    weights = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    config: Any = copy.deepcopy(model.peft_config[NAME])
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.task_type, config.inference_mode = TaskType.CAUSAL_LM, True
    if head is not None:
        weights |= {f"score.{name}": weight for name, weight in head.state_dict().items()}
        config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["classifier", "score"]
    config.save_pretrained(directory)
    path = str(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    save_file({f"{PREFIX}{name}": weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
    record_base(directory, base)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model on the CPU for saving: W + B A alpha / r, summed in float32, in place of each adapted layer.

    ``model`` stays what it is: merging and taking apart again would leave rounding in its frozen weights.
    """
    with torch.device("meta"):
        plain = type(model)(model.config)
    weights = {}
    for name, value in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner, _, kind = name.rpartition(".")
        if owner.endswith(".base_layer"):
            layer: Any = model.get_submodule(owner.removesuffix(".base_layer"))
            if kind == "weight":
                value = (value.float() + layer.get_delta_weight(NAME).float()).to(value.dtype)
            name = f"{owner.removesuffix('.base_layer')}.{kind}"
        weights[name] = value.detach().cpu()
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    return plain


# Loading


def merge_adapter(model: PreTrainedModel, directory: str) -> PreTrainedModel:
    """A plain model, made of ``model``: W + B A alpha / r with the adapter of ``directory``, its head too.

    Raises:
        UserError: as `read_adapter` and `load_adapter`.
    """
    config, weights = read_adapter(directory)
    of_scorer = config.task_type == TaskType.SEQ_CLS or any(name.startswith("score.") for name in weights)
    head: Any = getattr(model, "score", None) if of_scorer else None  # a policy's adapter has none
    tuner = load_adapter(model, head, config, weights, directory, NAME)
    return tuner.merge_and_unload()  # type: ignore[return-value]


def read_adapter(directory: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The configuration and the weights, under the names that they have in a model.

    Raises:
        UserError: no adapter directory, a damaged one, an adapter other than LoRA; as `require_same_base`.
    """
    where = Path(directory)
    if not (where / CONFIG_NAME).is_file():
        raise UserError(f"{directory} holds no {CONFIG_NAME}; give the output of step 2 with --lora_dim")
    try:
        config = PeftConfig.from_pretrained(directory)
        weights = load_file(str(where / SAFETENSORS_WEIGHTS_NAME))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: the adapter cannot be read ({problem}); train it again") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{directory} holds a {config.peft_type} adapter; only LoRA is supported, see --lora_dim")
    require_same_base(directory)
    config.modules_to_save, config.inference_mode = None, True  # the head is read here, and nothing is trained
    return config, {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def load_adapter(
    model: PreTrainedModel,
    head: nn.Module | None,
    config: LoraConfig,
    weights: dict[str, torch.Tensor],
    directory: str,
    name: str,
) -> LoraModel:
    """Add the adapter to ``model``, in place, and load it and ``head``: exactly the weights that they have.

    Raises:
        UserError: an adapter of another model, a missing or unexpected weight.
    """
    try:
        tuner = LoraModel(model, config, name)
    except ValueError as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{_misfit(directory, model)} ({problem}); train it from this actor") from None
    write_adapter(model, head, weights, directory, name)
    return tuner


def write_adapter(
    model: PreTrainedModel, head: nn.Module | None, weights: dict[str, torch.Tensor], directory: str, name: str
) -> None:
    """Give the adapter that ``model`` has under this name, and ``head``, exactly these weights of ``directory``.

    Raises:
        UserError: a missing or unexpected weight.
    """
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if head is not None:
        own |= {f"score.{key}": weight for key, weight in head.state_dict().items()}
    wanted, found = ({(k, *v.shape) for k, v in tensors.items()} for tensors in (own, weights))
    if wanted != found:
        odd, *shape = min(wanted ^ found)
        missing, unexpected = len(wanted - found), len(found - wanted)
        raise UserError(
            f"{_misfit(directory, model)}: {missing} weights are missing and {unexpected} unexpected, for instance "
            f"{odd} {tuple(shape)}; train it from this actor"
        )
    if head is not None:
        head.load_state_dict({key: weights.pop(f"score.{key}") for key in head.state_dict()})
    set_peft_model_state_dict(model, weights, adapter_name=name)


def _misfit(directory: str, model: PreTrainedModel) -> str:
    kind = model.config.model_type
    return f"{directory}: the adapter was trained on another model than this {kind}"
