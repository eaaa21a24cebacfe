"""The shape of a model without its weights: from its directory, from the table below, or from the hub.

The table has the dimensions of the models that the recipes name, so that a run can be planned where no network is.
They are those of the published config.json files; nothing is ever trained from them.
"""

import copy
from functools import cache
from typing import Any

from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError
from dschat.models.activations import use_fused_gelu
from dschat.models.load import load_config, toy_config
from dschat.models.specs import LoraSpec

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

OPT_VOCABULARY, QWEN_VOCABULARY = 50272, 151936


def _opt(layers: int, heads: int, width: int, **other: Any) -> tuple[str, dict[str, Any]]:
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": width, "ffn_dim": 4 * width}
    return "OPTConfig", shape | {"vocab_size": OPT_VOCABULARY, "max_position_embeddings": 2048} | other


def _qwen(layers: int, heads: int, kv_heads: int, width: int, inner: int, **other: Any) -> tuple[str, dict[str, Any]]:
    shape = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    shape |= {"hidden_size": width, "intermediate_size": inner, "vocab_size": QWEN_VOCABULARY}
    return "Qwen2Config", shape | {"max_position_embeddings": 32768, "tie_word_embeddings": True} | other


KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "facebook/opt-125m": _opt(12, 12, 768),
    "facebook/opt-350m": _opt(24, 16, 1024, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(24, 32, 2048),
    "facebook/opt-2.7b": _opt(32, 32, 2560),
    "facebook/opt-6.7b": _opt(32, 32, 4096),
    "facebook/opt-13b": _opt(40, 40, 5120),
    "facebook/opt-30b": _opt(48, 56, 7168),
    "facebook/opt-66b": _opt(64, 72, 9216),
    "meta-llama/Llama-2-7b-hf": (
        "LlamaConfig",
        {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 11008}
        | {"vocab_size": 32000, "max_position_embeddings": 4096},
    ),
    "Qwen/Qwen2.5-0.5B": _qwen(24, 14, 2, 896, 4864),
    "Qwen/Qwen2.5-1.5B": _qwen(28, 12, 2, 1536, 8960),
    "Qwen/Qwen2.5-3B": _qwen(36, 16, 2, 2048, 11008),
    "Qwen/Qwen2.5-7B": _qwen(28, 28, 4, 3584, 18944, tie_word_embeddings=False, vocab_size=152064),
    "rinna/japanese-gpt-neox-3.6b": (
        "GPTNeoXConfig",
        {"num_hidden_layers": 36, "num_attention_heads": 22, "hidden_size": 2816, "intermediate_size": 11264}
        | {"vocab_size": 32000, "max_position_embeddings": 2048, "use_parallel_residual": False},
    ),
}


@cache
def find_shape(path: str) -> PretrainedConfig:
    """The config of a model that need not be here: ``path`` is a directory, toy, a name in `KNOWN`, or a hub name.

    Raises:
        UserError: no config can be had; the line says how to plan without the network.
    """
    if path == "toy":
        return toy_config(load_tokenizer("toy"))
    if path in KNOWN:
        kind, shape = KNOWN[path]
        return getattr(transformers, kind)(**shape)
    try:
        return load_config(path)
    except UserError as error:
        if "reachable hub name" not in str(error):
            raise
        raise UserError(f"{error}; a plan needs its config.json: give a directory that holds one") from None


def build(
    config: PretrainedConfig, dtype: torch.dtype, *, is_scorer: bool, lora: LoraSpec | None = None
) -> PreTrainedModel:
    """A model without memory, on the meta device.

    Raises:
        UserError: the family has no classifier for a scorer; a ``lora`` that fits no layer.
    """
    config = copy.deepcopy(config)
    kind: Any = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
    if is_scorer:
        config.num_labels = 1
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=dtype)
            use_fused_gelu(model)
            if lora is not None:
                from dschat.models.lora import add_lora  # PEFT takes a second to import

                add_lora(model, lora)
    except ValueError as error:
        raise UserError(f"{config.model_type}: {' '.join(str(error).split())[:200]}") from None
    return model


def with_depth(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same model with so many of its layers."""
    shallow = copy.deepcopy(config)
    shallow.num_hidden_layers = num_layers
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:num_layers]
    return shallow


def has_equal_layers(config: PretrainedConfig) -> bool:
    return len(set(getattr(config, "layer_types", None) or ["one"])) == 1
