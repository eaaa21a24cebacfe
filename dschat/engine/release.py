"""Letting go of a frozen model whose work is done."""

from dschat.engine.deepspeed_engine import is_sharded, unwrap

import deepspeed
import torch
from torch import nn


def release(model: nn.Module | deepspeed.DeepSpeedEngine) -> None:
    """Give back the memory of a model of `create_frozen_model`, which cannot be used afterwards.

    The caller's last reference would do for a plain module. DeepSpeed 0.19.8 keeps a model of stage 3 for good, in a
    list of its hooks and in the cache of a method; so its weights, whole or this rank's shares, are emptied.
    """
    sharded = is_sharded(model)
    for parameter in unwrap(model).parameters():
        parameter.data = torch.empty(0)
        if sharded:
            parameter.ds_tensor.data = torch.empty(0)  # type: ignore[attr-defined]
