"""AdamW with weight decay on matrices only, and the learning-rate schedules of transformers."""

import torch
from torch import nn
from transformers import get_scheduler


def create_optimizer(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.95). Biases, norms and other vectors do not decay: shrinking them only shifts the scale.

    Kind is told by the number of dimensions, not by name, so it holds for every model family.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True
    )


def create_scheduler(
    optimizer: torch.optim.Optimizer, name: str, num_warmup_steps: int, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    return get_scheduler(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_steps)
