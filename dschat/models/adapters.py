"""A reward model that is LoRA adapters and a head on a language model's own trunk, in PEFT's format.

Step 2 trains one with ``--lora_dim``; step 3 puts it on the frozen reference, so that no second model is in memory:
LLaMA-Factory's ``reward_model_type: lora``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dschat.engine.sharded_loading import whole_loading
from dschat.models.load import load_scorer
from dschat.models.lora import load_adapter, merge_adapter, read_adapter
from dschat.models.scorer import Scorer, load_score_stats

import torch
from peft.functional import set_adapter
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "reward"  # of the adapter inside a model; files do not hold it


class AdapterScorer(Scorer):
    """A reward model on the trunk of a frozen language model, whose own logits stay bit for bit what they were.

    Only the head is its own. ``model`` may be sharded by DeepSpeed after this is made: each call runs the model from
    its root, as DeepSpeed's hooks want it, and on every rank, for it is then a collective.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear, mean: float = 0.0, std: float = 1.0):
        super().__init__(model, mean, std)
        self.head = head
        self.eval()

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, begins_like: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T), (B, T) -> (B, T) float32: (raw - mean) / std of each prefix; at padding it means nothing."""
        return super().forward(input_ids, attention_mask, begins_like)

    def _values(self, **inputs: Any) -> torch.Tensor:
        """Of what reaches the vocabulary projection with the adapter on; only one position goes through it."""
        found = []

        def keep(_: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            found.append(args[0])
            return args[0][:, -1:]

        projection: Any = self.model.get_output_embeddings()
        hook = projection.register_forward_pre_hook(keep)
        try:
            with _adapter_on(self.model):
                self.model(**inputs)
        finally:
            hook.remove()
        [hidden] = found
        self.head.to(hidden.device, hidden.dtype)  # the trunk may have moved
        return self._read(self.head, hidden)


def add_adapter_reward(model: PreTrainedModel, adapter_dir: str, *, normalize: bool = True) -> AdapterScorer:
    """Put the adapter of ``adapter_dir`` on a frozen causal language model, off until its scorer is called.

    Call it before DeepSpeed shards ``model``. Parameters of the adapter and the head are all that is added.

    Raises:
        UserError: no adapter directory, an adapter of another model, a missing or unexpected weight.
    """
    output: Any = model.get_output_embeddings()
    config, weights = read_adapter(adapter_dir)
    head = nn.Linear(output.in_features, 1, bias="score.bias" in weights, device=output.weight.device)
    load_adapter(model, head, config, weights, adapter_dir, NAME)
    model.requires_grad_(False)
    set_adapter(model, [], inference_mode=True)
    stats = load_score_stats(adapter_dir) if normalize else (0.0, 1.0)
    return AdapterScorer(model, head.to(output.weight.dtype).requires_grad_(False), *stats)


def load_merged_scorer(
    adapter_dir: str, base_path: str, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
) -> PreTrainedModel:
    """The sequence classifier that the model at ``base_path`` and the adapter make together, W + B A alpha / r.

    A plain trainable model without dropout: the critic of step 3 starts from it. Give the path that the actor came
    from; where the adapter was trained does not matter.

    Raises:
        UserError: as `add_adapter_reward`.
    """
    with whole_loading():
        classifier = load_scorer(base_path, tokenizer, dtype=dtype, dropout=0.0)
    return merge_adapter(classifier, adapter_dir).requires_grad_(True).eval()


@contextmanager
def _adapter_on(model: PreTrainedModel) -> Iterator[None]:
    """The adapter takes part in the forward pass inside, and never outside, whatever happens."""
    set_adapter(model, NAME, inference_mode=True)
    try:
        yield
    finally:
        set_adapter(model, [], inference_mode=True)
