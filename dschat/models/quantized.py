"""Frozen weights in 4 or 8 bits under adapters, by bitsandbytes (QLoRA: Dettmers et al. 2023)."""

import importlib.util
from typing import Any

from dschat.errors import UserError

import torch
from transformers import BitsAndBytesConfig


def quantized(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """The argument that makes `from_pretrained` quantize the linear layers of the blocks.

    Raises:
        UserError: bitsandbytes, which does it, is not installed.
    """
    if kind is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--load_in_{kind} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    heads = ["score", "lm_head", "embed_out"]
    if kind == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)}
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=heads, **four)}


def require_whole(path: str, kind: str | None) -> None:
    if kind is not None:
        raise UserError(
            f"--load_in_{kind}: {path} is an adapter, and would be merged into rounded weights; train it again with "
            "--lora_save_merged"
        )
