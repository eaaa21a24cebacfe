"""How TRL is set, so that both sides do the same: see trl_side.py."""

from collections.abc import Callable
from typing import Any

from dschat.models.load import resolve_dtype

import torch
from transformers import TrainerCallback
from turns import Facts, Turns


def common(args: Any) -> dict[str, Any]:
    """Settings of every trainer."""
    return {
        "output_dir": args.folder,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.95,
        "seed": args.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "bf16": autocast(args),
    }


def autocast(args: Any) -> bool:
    """bf16 either as the weights' own type, or as autocast over float32 weights: the default of TRL's trainers, which
    its PPO trainer does not obey with transformers 5 (it makes an Accelerator without it)."""
    return args.dtype == "bf16" and args.trl_bf16 == "autocast"


def weights_dtype(args: Any) -> torch.dtype:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.float32 if autocast(args) else resolve_dtype(args.dtype, device)


def hand_over(turns: Turns, facts: Callable[[], Facts]) -> TrainerCallback:
    """Ends a turn with the ``facts`` of every step."""

    class HandOver(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end(**facts())
            turns.begin()

    return HandOver()
