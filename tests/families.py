"""A tiny configuration of each supported model family."""

from dschat.models.load import save_model

import torch
import transformers

COMMON = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
ROTARY = COMMON | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}

# family -> (config class, its arguments): learned positions (OPT, GPT-2), ALiBi (BLOOM), rotary (the others)
FAMILIES = {
    "opt": (
        "OPTConfig",
        COMMON | {"ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 16},
    ),
    "gpt2": ("GPT2Config", {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 256}),
    "gpt_neox": ("GPTNeoXConfig", COMMON | {"intermediate_size": 64, "max_position_embeddings": 256}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4, "hidden_size": 32}),
    "llama": ("LlamaConfig", ROTARY),
    "mistral": ("MistralConfig", ROTARY | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", ROTARY),
    "qwen3": ("Qwen3Config", ROTARY | {"head_dim": 8}),
    "gemma": ("GemmaConfig", ROTARY | {"head_dim": 8}),
    "phi": ("PhiConfig", ROTARY),
}


def tiny_config(family: str, tokenizer) -> transformers.PretrainedConfig:
    name, options = FAMILIES[family]
    tokens = {n: getattr(tokenizer, n) for n in ("pad_token_id", "eos_token_id", "bos_token_id")}
    return getattr(transformers, name)(vocab_size=len(tokenizer), **options, **tokens)


def tiny_model(family: str, tokenizer, scale: float = 4.0) -> transformers.PreTrainedModel:
    """Random weights, enlarged so that attention and positions really matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    return model.eval()


def save_tiny_model(family: str, tokenizer, directory: str) -> None:
    save_model(tiny_model(family, tokenizer), tokenizer, directory)


def ragged_prompts(tokenizer, sizes=(3, 9, 6, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of the given lengths and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(tokenizer), (len(sizes), max(sizes)), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, size in enumerate(sizes):
        mask[row, max(sizes) - size :] = True
    return torch.where(mask, ids, tokenizer.pad_token_id), mask


def count_tokens(model) -> list[int]:
    """Those of each forward of a Hugging Face model to come."""
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, options: sizes.append(options["input_ids"].numel()), with_kwargs=True
    )
    return sizes
