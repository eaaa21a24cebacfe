"""ZeRO 3 from the first byte: weights are cut up while they are read, so that no rank ever holds all of a model."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dschat.engine.deepspeed_config import engine_config

import torch
from transformers.integrations import deepspeed as hugging_face


@contextmanager
def sharded_loading(zero_stage: int, dtype: torch.dtype) -> Iterator[None]:
    """Inside, at stage 3, ``from_pretrained`` leaves each rank its share of every weight, read by rank 0 alone, one
    after the other. All ranks load the same. At other stages nothing changes."""
    if zero_stage < 3:
        yield
        return
    config = hugging_face.HfDeepSpeedConfig(engine_config(3, dtype))  # it works as long as it is alive
    try:
        yield
    finally:
        hugging_face.unset_hf_deepspeed_config()
        del config


@contextmanager
def whole_loading() -> Iterator[None]:
    """Inside, models are whole all the same: those whose weights are computed with before they are cut up."""
    before = hugging_face._hf_deepspeed_config_weak_ref
    hugging_face.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hugging_face._hf_deepspeed_config_weak_ref = before


@contextmanager
def whole_weights(parameters: Iterable[Any], *, changed: bool = False) -> Iterator[None]:
    """Inside, these parameters are whole, on every rank, where they are shares of ZeRO 3; what rank 0 makes of them
    stays, if they are ``changed``. A collective."""
    shares = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shares:
        yield
        return
    import deepspeed  # loaded where there are shares; those who chat have none, and need not wait for it

    with deepspeed.zero.GatheredParameters(shares, modifier_rank=0 if changed else None):
        yield
