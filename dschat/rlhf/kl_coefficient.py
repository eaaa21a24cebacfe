"""The weight of the KL penalty over a run."""

from dschat.functional import adaptive_kl_coef


class KLCoefficient:
    """``value``, in units of score per nat, steered to ``target`` nats per sequence; with a target of 0 it stays."""

    def __init__(self, value: float, target: float, horizon: int):
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl_per_seq: float, num_sequences: int) -> None:
        """After a rollout of ``num_sequences`` responses with this KL. Raises ValueError as `adaptive_kl_coef`."""
        if self.target:
            self.value = adaptive_kl_coef(self.value, kl_per_seq, self.target, num_sequences, self.horizon)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
