"""Several models on one copy of frozen weights: each has its own modules, adapters and head."""

import copy
from itertools import chain
from typing import Any

from dschat import remote_code
from dschat.errors import UserError
from dschat.models.specs import LoraSpec

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same model over again, on the very same parameters and buffers: no memory but that of Python objects.

    Make it before adapters are put on ``model`` and before DeepSpeed gets it; what is put on either is then on neither
    the other.
    """
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def shared_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """A sequence classifier with one label, its head all zeros, on the trunk of ``model``, made by `shared_copy` for
    it alone."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier: Any = AutoModelForSequenceClassification.from_config(
            config, trust_remote_code=remote_code.is_trusted()
        )
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    sample = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    classifier.score.to_empty(device=sample.device).to(sample.dtype)
    for parameter in classifier.score.parameters():
        nn.init.zeros_(parameter)
    return classifier.eval()


def critic_on_trunk(model: PreTrainedModel, adapter_dir: str | None, spec: LoraSpec) -> PreTrainedModel:
    """A classifier of adapters and a head on a `shared_copy`: those of the reward model in ``adapter_dir`` go on to be
    trained; without one they begin at zero.

    Raises:
        UserError: an adapter of another model, or of other adapters than ``spec``.
    """
    from dschat.models.lora import NAME, add_lora, read_adapter, write_adapter  # PEFT takes a second to import

    classifier = shared_classifier(model)
    if adapter_dir is None:
        add_lora(classifier, spec)
        return classifier
    config, weights = read_adapter(adapter_dir)
    own = add_lora(classifier, spec)
    for flag, given, found in (("dim", own.r, config.r), ("alpha", own.lora_alpha, config.lora_alpha)):
        if given != found:
            raise UserError(
                f"--share_trunk: the critic starts from the adapter {adapter_dir}, with {flag} {found}; give "
                f"--critic_lora_{flag} {found}"
            )
    write_adapter(classifier, classifier.score, weights, adapter_dir, NAME)  # type: ignore[arg-type]
    return classifier
