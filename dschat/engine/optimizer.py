"""AdamW with weight decay on matrices only, and the learning-rate schedules of transformers."""

from typing import Any

import torch
from torch import nn
from transformers import get_scheduler


def create_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, lora_learning_rate: float
) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95). Biases, norms and other vectors do not decay: shrinking them only shifts the scale.

    Kind is told by the number of dimensions, not by name, so it holds for every model family. The factors of LoRA
    adapters, which PEFT names, have a learning rate of their own; they are the first group where there are any.
    """
    trained = [(".lora_" in name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for lora, p in trained if lora], "weight_decay": weight_decay, "lr": lora_learning_rate},
        {"params": [p for lora, p in trained if not lora and p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for lora, p in trained if not lora and p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True
    )


def create_scheduler(
    optimizer: torch.optim.Optimizer, name: str, num_warmup_steps: int, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    return get_scheduler(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_steps)
