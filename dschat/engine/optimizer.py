"""AdamW with weight decay on matrices only, and the learning-rate schedules.

These are those of transformers, number for number (a test compares them). They are written out because
`transformers.optimization` imports the Trainer's surroundings with them: PEFT, bitsandbytes and more, for two seconds.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

END_RATE = 1e-7  # where the polynomial schedule ends


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


def create_scheduler(optimizer: torch.optim.Optimizer, name: str, num_warmup_steps: int, num_steps: int) -> LambdaLR:
    """One of `dschat.flags.SCHEDULES`, after a linear warm-up, which "constant" has not.

    Raises:
        ValueError: a polynomial schedule whose rate is at its end, END_RATE, from the start.
    """
    rate = optimizer.defaults["lr"]
    if name == "polynomial" and rate <= END_RATE:
        raise ValueError(f"a polynomial schedule ends at {END_RATE}; the learning rate, {rate}, must be above")
    return LambdaLR(
        optimizer, partial(rate_factor, name=name, num_warmup_steps=num_warmup_steps, num_steps=num_steps, rate=rate)
    )


def rate_factor(step: int, *, name: str, num_warmup_steps: int, num_steps: int, rate: float) -> float:
    """What the learning rate of ``step``, counted from 0, is multiplied by. ``rate``: what it is of, at its peak."""
    if name == "constant":
        return 1.0
    if step < num_warmup_steps:
        return step / num_warmup_steps
    if name == "constant_with_warmup":
        return 1.0
    decay_steps = max(1, num_steps - num_warmup_steps)
    if name == "linear":
        return max(0.0, (num_steps - step) / decay_steps)
    progress = (step - num_warmup_steps) / decay_steps
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":  # of one cycle: it stays at the end, where the cosine would rise again
        return 0.5 * (1.0 + math.cos(math.pi * progress)) if progress < 1 else 0.0
    assert name == "polynomial", name
    return (max(0.0, 1.0 - progress) * (rate - END_RATE) + END_RATE) / rate  # of power 1
