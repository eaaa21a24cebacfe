"""What the flags say of models. Plain values: flags are read before any library is loaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSpec:
    """Which adapters a model gets; see the flags of the same names."""

    dim: int
    alpha: int | None = None  # None: twice dim
    module_name: str = "auto"
    only: bool = True  # train nothing but them and the head
