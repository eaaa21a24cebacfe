"""DeepSpeed's configuration, but for what depends on the model (deepspeed_engine.py)."""

from typing import Any

import torch

ENGINE_KEY = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def engine_config(zero_stage: int, dtype: torch.dtype, offload: bool = False) -> dict[str, Any]:
    """DeepSpeed's. The batch keys are required and unused: the programs own their batches."""
    zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload and zero_stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW steps on a CPU too, and needs no compiler
        "steps_per_print": 2**31,
    }
    if dtype in ENGINE_KEY:
        config[ENGINE_KEY[dtype]] = {"enabled": True}
    return config
