"""The reward model and the critic: a Hugging Face sequence classifier with one label, read at every position."""

import math
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.models.forward import model_inputs

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

STATS_FILE = "score_stats.safetensors"


class Scorer(nn.Module):
    """Wraps ``AutoModelForSequenceClassification(num_labels=1)``; its output is (raw - mean) / std.

    With mean 0 and std 1 the value at the last real token is what plain transformers returns. Step 3 sets the
    statistics of step 2, for the reward and for the critic alike, so that values start on the scale of the rewards.
    """

    def __init__(self, model: PreTrainedModel, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T), (B, T) -> (B, T) float32: the value of each prefix; what stands at padding means nothing."""
        inputs = model_inputs(self.model, input_ids, attention_mask)
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        head: Any = self.model.score
        return (head(hidden).squeeze(-1).float() - self.mean) / self.std

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)

    def rebuild(self) -> "Scorer":
        """A scorer of the same structure with weights of its own."""
        return Scorer(type(self.model)(self.model.config), self.mean, self.std)


def last_token_values(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T), (B, T) -> (B,): the value at the last real token of each row, on whichever side the padding is."""
    size = attention_mask.shape[1]
    positions = torch.arange(size, device=values.device)
    last = (positions * attention_mask.bool()).argmax(dim=1, keepdim=True)
    return values.gather(1, last).squeeze(1)


def save_score_stats(directory: str, mean: float, std: float) -> None:
    """Mean and standard deviation of the raw scores over the held-out pairs, beside the weights."""
    save_file({"mean": torch.tensor([mean]), "std": torch.tensor([std])}, str(Path(directory) / STATS_FILE))


def load_score_stats(directory: str) -> tuple[float, float]:
    """(mean, std) as step 2 stored them.

    Raises:
        UserError: the file is missing or holds a spread that cannot be divided by.
    """
    path = Path(directory) / STATS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: train the reward model with step 2, or pass --no-normalize_reward")
    try:
        stats = load_file(str(path))
        mean, std = stats["mean"].item(), stats["std"].item()
    except (SafetensorError, KeyError, OSError) as error:
        raise UserError(f"{path} is damaged ({error!r}); train the reward model with step 2 again") from None
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise UserError(f"{path}: the scores have no spread (mean {mean}, std {std}); train the reward model again")
    return mean, std
