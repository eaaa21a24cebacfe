"""Checks of the flags about adapters, offload and quantization, which all training programs have."""

from typing import Any

from dschat.config import require_not_negative, require_positive
from dschat.errors import UserError


def check_lora(config: Any, *roles: str) -> None:
    """Refuse flags about adapters that have no effect. A role is in front of their names: "actor_", "critic_", "".

    Raises:
        UserError: naming the flag.
    """
    for role in roles:
        dim, names = f"{role}lora_dim", ("lora_alpha", "lora_module_name", "lora_learning_rate")
        require_not_negative(config, dim)
        require_positive(config, f"{role}lora_learning_rate")
        if getattr(config, f"{role}lora_alpha") is not None:
            require_positive(config, f"{role}lora_alpha")
        _require_without_effect(config, [f"{role}{name}" for name in names], [dim])
    dims = [f"{role}lora_dim" for role in roles]
    _require_without_effect(config, ["only_optimize_lora", "lora_save_merged"], dims)
    _require_without_effect(config, ["load_in_4bit", "load_in_8bit"], dims[:1])
    if config.load_in_4bit and config.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other; give one")
    if not config.only_optimize_lora and not config.lora_save_merged:
        raise UserError(
            "--no-only_optimize_lora trains weights that an adapter file does not hold; add --lora_save_merged"
        )
    if (config.load_in_4bit or config.load_in_8bit) and config.lora_save_merged:
        raise UserError("--lora_save_merged would write rounded weights; drop it, the adapter loads on the whole ones")


def _require_without_effect(config: Any, names: list[str], dims: list[str]) -> None:
    """Where all of ``dims`` are 0, ``names`` must have their defaults."""
    given = [name for name in names if getattr(config, name) != getattr(type(config), name)]
    if given and not any(getattr(config, dim) for dim in dims):
        needed = " or ".join(f"--{dim}" for dim in dims)
        raise UserError(f"--{given[0]} has no effect without {needed} above 0; give that, or drop the flag")


def check_quantized(config: Any, stage_name: str) -> None:
    """
    Raises:
        UserError: ZeRO 3 would shard weights of 4 or 8 bits, which it cannot.
    """
    if (config.load_in_4bit or config.load_in_8bit) and getattr(config, stage_name) == 3:
        raise UserError(f"--load_in_4bit and --load_in_8bit: ZeRO 3 cannot shard such weights; lower --{stage_name}")


def check_offload(flag_name: str, offload: bool, stage_name: str, stage: int) -> None:
    """
    Raises:
        UserError: DeepSpeed keeps nothing of such a stage in the CPU's memory.
    """
    if offload and stage == 0:
        raise UserError(f"{flag_name}: DeepSpeed offloads what ZeRO shards, at 0 nothing; give {stage_name} 1, 2 or 3")
