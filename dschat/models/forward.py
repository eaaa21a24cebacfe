"""One way to call any Hugging Face causal model with padding on either side."""

import inspect

from dschat.functional import positions_from_mask

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def model_inputs(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Arguments whose result does not depend on where the padding is.

    Positions are counted from the mask. Families without ``position_ids`` (BLOOM) derive theirs from the mask.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long()}
    if takes_positions(model):
        inputs["position_ids"] = positions_from_mask(attention_mask)
    return inputs


def takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def attends_to_all(model: PreTrainedModel) -> bool:
    """Whether every layer attends to all tokens before, in keys and values that it would cache as they are."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def response_logits(
    model: nn.Module,
    family: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_size: int,
) -> torch.Tensor:
    """(B, P + R), (B, P + R) -> (B, R, V): the logits that predict the last R tokens.

    Only these positions go through the vocabulary projection. ``model`` is the module or its engine, ``family`` the
    Hugging Face model inside.
    """
    inputs = model_inputs(family, input_ids, attention_mask)
    return model(**inputs, use_cache=False, logits_to_keep=response_size + 1).logits[:, :-1]
