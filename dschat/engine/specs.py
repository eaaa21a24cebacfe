"""What the flags say of engines and checkpoints. Plain values: flags are read before any library is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSpec:
    """How a trained model is optimized."""

    learning_rate: float
    weight_decay: float
    lr_scheduler_type: str
    num_warmup_steps: int
    num_steps: int
    max_grad_norm: float  # 0: no clipping
    zero_stage: int
    gradient_checkpointing: bool = False
    lora_learning_rate: float = 5e-4  # of the factors of adapters, where the model has any
    offload: bool = False  # what ZeRO shards lives in the CPU's memory, and the optimizer's step is made there


@dataclass(frozen=True)
class CheckpointSpec:
    """When and how many; see the flags of the same names."""

    checkpoint_interval: int  # steps; 0: only on a signal
    keep_checkpoints: int
    resume: str  # auto or required
    fresh: bool
