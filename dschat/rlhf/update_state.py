"""The update that is under way, so that a run which is stopped inside a long one loses nothing of it."""

from dataclasses import dataclass, field
from typing import Any

from dschat.rlhf.experience import Experience
from dschat.rlhf.ppo_trainer import UpdateProgress

import torch


@dataclass
class Update:
    """A rollout, scored, and how far the training on it has come."""

    experience: Experience
    by_source: dict[str, list[float | None]]  # scores
    learning_rate: float  # the actor's, of the first minibatch
    seconds: list[float]  # of the phases before the training
    progress: UpdateProgress = field(default_factory=UpdateProgress)


class CurrentUpdate:
    """Holds the `Update` between the scoring of a rollout and the end of the training on it; else None."""

    def __init__(self, device: torch.device):
        self.device = device
        self.update: Update | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.update is None:
            return {}
        inner = {"experience": vars(self.update.experience), "progress": vars(self.update.progress)}
        return vars(self.update) | inner

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update = None
        if state:
            tensors = {name: tensor.to(self.device) for name, tensor in state["experience"].items()}
            given = {"experience": Experience(**tensors), "progress": UpdateProgress(**state["progress"])}
            self.update = Update(**(state | given))
