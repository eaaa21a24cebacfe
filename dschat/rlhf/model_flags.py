"""The flags of step 3 about the models: how they are optimized, where their weights are, which are adapters."""

from dataclasses import dataclass

from dschat.config import flag, require_not_negative, require_positive
from dschat.errors import UserError
from dschat.flag_checks import check_lora
from dschat.flags import OFFLOAD_HELP, SCHEDULES, ZERO_STAGES, LoraModeFlags
from dschat.models.specs import LoraSpec


@dataclass(kw_only=True)
class OptimizerFlags:
    """Learning rates and memory of actor and critic."""

    actor_learning_rate: float = flag(9.65e-6, "peak")
    critic_learning_rate: float = flag(5e-6, "peak")
    actor_weight_decay: float = flag(0.0, "of matrices")
    critic_weight_decay: float = flag(0.0, "of matrices")
    lr_scheduler_type: str = flag("cosine", "of both learning rates", choices=SCHEDULES)
    num_warmup_steps: int = flag(0, "optimizer steps of linear warm-up")
    actor_gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass to save memory")
    critic_gradient_checkpointing: bool = flag(False, "the same for the critic")
    offload: bool = flag(False, OFFLOAD_HELP)
    offload_reference_model: bool = flag(False, "the reference's weights in the CPU's memory; at ZeRO 3, its default")
    offload_reward_model: bool = flag(False, "the same for a full reward")
    upcast_layernorm: bool = flag(False, "normalisation layers of actor and reference compute in float32")
    actor_zero_stage: int = flag(0, "DeepSpeed ZeRO stage of the actor", choices=ZERO_STAGES)
    critic_zero_stage: int = flag(0, "of the critic", choices=ZERO_STAGES)
    reference_zero_stage: int | None = flag(
        None, "of the reference; default: 3 with the actor's 3 or offloaded, else 0", choices=ZERO_STAGES
    )
    reward_zero_stage: int | None = flag(
        None, "of a full reward; default: 3 with the critic's 3 or offloaded, else 0", choices=ZERO_STAGES
    )

    def __post_init__(self) -> None:
        require_positive(self, "actor_learning_rate", "critic_learning_rate")
        require_not_negative(self, "actor_weight_decay", "critic_weight_decay", "num_warmup_steps")
        for role in ("reference", "reward"):
            stage = getattr(self, f"{role}_zero_stage")
            if getattr(self, f"offload_{role}_model") and stage not in (None, 3):
                raise UserError(
                    f"--offload_{role}_model: DeepSpeed offloads the weights of a frozen model at ZeRO 3 only; drop "
                    f"--{role}_zero_stage {stage}"
                )

    @property
    def reference_stage(self) -> int:
        return frozen_stage(self.reference_zero_stage, self.actor_zero_stage, self.offload_reference_model)

    @property
    def reward_stage(self) -> int:
        return frozen_stage(self.reward_zero_stage, self.critic_zero_stage, self.offload_reward_model)


@dataclass(kw_only=True)
class AdapterFlags(LoraModeFlags):
    """LoRA. With actor_lora_dim the reference is the actor without its adapter: no second copy of the weights."""

    actor_lora_dim: int = flag(0, "train adapters of this rank (LoRA) in place of the actor; 0: the whole actor")
    actor_lora_alpha: int | None = flag(None, "they count alpha / dim; default: twice the rank")
    actor_lora_module_name: str = flag("auto", "parts of names of linear layers, with commas; auto: all in the blocks")
    actor_lora_learning_rate: float = flag(5e-4, "of the actor's adapters, peak")
    critic_lora_dim: int = flag(0, "train adapters of this rank and the head in place of the critic")
    critic_lora_alpha: int | None = flag(None, "they count alpha / dim; default: twice the rank")
    critic_lora_module_name: str = flag("auto", "as actor_lora_module_name")
    critic_lora_learning_rate: float = flag(5e-4, "of the critic's adapters; its head's is critic_learning_rate")
    share_trunk: bool = flag(False, "actor, reference, critic and lora reward are adapters on one copy of the weights")

    def __post_init__(self) -> None:
        check_lora(self, "actor_", "critic_")

    def lora_spec(self, role: str) -> LoraSpec | None:
        names = ("dim", "alpha", "module_name")
        dim, alpha, module_name = (getattr(self, f"{role}_lora_{name}") for name in names)
        return LoraSpec(dim, alpha, module_name, self.only_optimize_lora) if dim else None


def frozen_stage(given: int | None, trained: int, offload: bool) -> int:
    return given if given is not None else (3 if trained == 3 or offload else 0)
