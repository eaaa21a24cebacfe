"""Models with random weights, by size name, and what their passes need: floating-point operations and bytes.

Operations count a multiplication and an addition as two, matrices and attention only, causal attention at its half.
Bytes are what must cross the memory once: weights, the key-value cache, the state of Adam; not activations. Both are
of the work itself (real tokens, the longest answer's steps), not of what an implementation makes of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dschat.data.templates import ensure_template
from dschat.data.tokenizer import EOS, PAD

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOS_ID, PAD_ID = 0, 1
_OPT = {"max_position_embeddings": 2048, "vocab_size": 50272, "dropout": 0.0}
_TINY = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
_7B = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
# size -> config class and arguments: tiny is what dschat.models.create makes, then the shapes of OPT and of Llama 2
SIZES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "tiny": (LlamaConfig, _TINY | {"vocab_size": 4096, "max_position_embeddings": 1024, "tie_word_embeddings": True}),
    "125m": (OPTConfig, _OPT | {"num_hidden_layers": 12, "hidden_size": 768, "ffn_dim": 3072}),
    "350m": (
        OPTConfig,
        _OPT
        | {"num_hidden_layers": 24, "hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16}
        | {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
    ),
    "1.3b": (
        OPTConfig,
        _OPT | {"num_hidden_layers": 24, "hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32},
    ),
    "7b": (LlamaConfig, _7B | {"vocab_size": 32000, "max_position_embeddings": 4096}),
}


def model_config(size: str, vocab_size: int | None = None) -> PretrainedConfig:
    """``vocab_size``: another one than the size's own."""
    kind, options = SIZES[size]
    given = options | ({"vocab_size": vocab_size} if vocab_size else {})
    return kind(**given, eos_token_id=EOS_ID, pad_token_id=PAD_ID, bos_token_id=None)


def random_model(config: PretrainedConfig, dtype: torch.dtype, seed: int, *, scorer: bool = False) -> PreTrainedModel:
    """The same seed gives the same weights. ``scorer``: a sequence classifier with one label."""
    torch.manual_seed(seed)
    if not scorer:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, dtype=dtype)


@torch.no_grad()
def set_stops(model: PreTrainedModel, mean_length: float | None) -> None:
    """Decide how long sampled answers are, by a frozen bias of the vocabulary projection, in whatever engine samples.

    EOS gets the probability 1 / ``mean_length`` at every step: lengths are geometric, and cutting them off at four
    times the mean takes 2 % off it. None: EOS is never drawn, every answer has the length limit. The pad token is
    never drawn. The bias costs every engine the same; nothing else forces a length, so no engine can tell.
    """
    head: Any = model.get_output_embeddings()
    head.weight[EOS_ID] = 0.0
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    bias[[EOS_ID, PAD_ID]] = -1e4
    head.bias = nn.Parameter(bias, requires_grad=False)
    if mean_length is not None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, head.weight.shape[0], (8, 32), generator=generator).to(head.weight.device)
        others = model(input_ids=ids).logits[:, 1:].float().logsumexp(-1).mean()
        head.bias[EOS_ID] = others - torch.tensor(mean_length - 1.0).log()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A made-up word for every id, so that a vocabulary of any size has its tokenizer."""
    words = {EOS: EOS_ID, PAD: PAD_ID} | {f"w{i}": i for i in range(2, vocab_size)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD)
    ensure_template(tokenizer, "plain")
    return tokenizer


def random_prompts(vocab_size: int, num_prompts: int, length: int, seed: int) -> torch.Tensor:
    """(num_prompts, length) int64, without EOS and pad."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab_size, (num_prompts, length), generator=generator)


@dataclass(frozen=True)
class Work:
    """What a phase needs: floating-point operations, bytes through the memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that decide its work."""

    block_weights: int  # of all matrices between embedding and vocabulary projection
    head_weights: int  # of the vocabulary projection or the score
    num_weights: int  # that are trained
    attention_width: int  # heads times their size, over all layers
    cache_width: int  # numbers in the cache for a token: keys and values of all layers
    itemsize: int  # bytes of a weight

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Shape":
        config, trunk = model.config, model.base_model
        head: Any = model.get_output_embeddings() or model.score
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            block_weights=sum(m.weight.numel() for m in trunk.modules() if isinstance(m, nn.Linear)),
            head_weights=head.weight.numel(),
            num_weights=sum(p.numel() for p in model.parameters() if p.requires_grad),
            attention_width=config.num_hidden_layers * heads * head_size,
            cache_width=config.num_hidden_layers * 2 * kv_heads * head_size,
            itemsize=head.weight.element_size(),
        )

    def forward(self, lengths: Sequence[int], num_projected: int) -> Work:
        """One pass over sequences of these ``lengths``, of which ``num_projected`` positions go through the head."""
        matrices = 2 * (self.block_weights * sum(lengths) + self.head_weights * num_projected)
        attention = sum(2 * self.attention_width * length * (length + 1) for length in lengths)
        return Work(matrices + attention, (self.block_weights + self.head_weights) * self.itemsize)

    def train(self, lengths: Sequence[int], num_projected: int) -> Work:
        """Forward, a backward of twice its work, and a step of Adam: weights, gradient, two moments and a float32
        master copy read, all but the gradient written."""
        once = self.forward(lengths, num_projected)
        state = self.num_weights * (3 * self.itemsize + 24)
        return Work(3 * once.flops, 3 * once.bytes + state)

    def rollout(self, prompt_lengths: Sequence[int], response_lengths: Sequence[int]) -> Work:
        """The prompts at once, then a step for each further token of the longest response. A step reads the weights
        once and the cache of every row that still runs; the last token of a response is not fed again."""
        fed = [range(p + 1, p + r) for p, r in zip(prompt_lengths, response_lengths, strict=True)]  # contexts
        num_fed, contexts = sum(map(len, fed)), sum(map(sum, fed))
        prefill = self.forward(prompt_lengths, len(prompt_lengths))
        flops = 2 * (self.block_weights + self.head_weights) * num_fed + 4 * self.attention_width * contexts
        weights = (self.block_weights + self.head_weights) * self.itemsize * (max(response_lengths) - 1)
        return prefill + Work(flops, weights + self.cache_width * self.itemsize * contexts)
