"""An exponential moving average of trained weights, often a better model than the last step's."""

from collections.abc import Iterator
from contextlib import contextmanager

from dschat.engine.deepspeed_engine import is_sharded, unwrap

import deepspeed
import torch
from torch import Tensor


class EMA:
    """The moving average of an engine's trained weights in float32: 4 bytes for each, at ZeRO 3 of this rank's shard.

    shadow = decay * shadow + (1 - decay) * weight, from the weights at the start (Polyak and Juditsky 1992;
    DeepSpeed-Chat and OpenRLHF with decay 0.992). In half precision, as DeepSpeed-Chat keeps it, the steps of the
    shadow round away. Adapters are averaged factor by factor.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float):
        """
        Raises:
            ValueError: ``decay`` is not in [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} is not at least 0 and below 1")
        self.decay = decay
        self._sharded = is_sharded(engine)
        self._parameters = [parameter for parameter in unwrap(engine).parameters() if parameter.requires_grad]
        self._shadows = [weight.to(torch.float32, copy=True) for weight in self._weights()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the average; call it once after each optimizer step. No collective."""
        for shadow, weight in zip(self._shadows, self._weights(), strict=True):
            shadow.lerp_(weight.to(shadow), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the engine's module holds the average, rounded to its dtype; after it the trained weights again, bit
        for bit. All ranks enter together; no optimizer step inside."""
        trained = [weight.clone() for weight in self._weights()]
        try:
            self._write(self._shadows)
            yield
        finally:
            self._write(trained)

    @property
    def of_each_rank(self) -> bool:
        """Whether each rank has a state of its own."""
        return self._sharded

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The average, of this rank's weights."""
        return {"shadows": self._shadows}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Of a run with as many ranks and the same ZeRO stage."""
        self.load_shards([state])

    @torch.no_grad()
    def load_shards(self, states: list[dict[str, list[Tensor]]]) -> None:
        """From the states of each rank of any layout, the first rank's first; one where they are all equal."""
        for shadow, parameter, *saved in zip(
            self._shadows, self._parameters, *(state["shadows"] for state in states), strict=True
        ):
            values = torch.cat([part.view(-1) for part in saved])
            if values.numel() != shadow.numel():
                numel = parameter.ds_numel if self._sharded else shadow.numel()
                values = values[:numel]  # the last shard may end in padding
                if self._sharded:
                    shard = values[shadow.numel() * deepspeed.comm.get_rank() :][: shadow.numel()]
                    values = torch.cat([shard, shard.new_zeros(shadow.numel() - shard.numel())])
            shadow.view(-1).copy_(values)

    def _weights(self) -> list[Tensor]:
        """What this rank holds of each trained parameter: all of it, or at stage 3 its shard."""
        return [(p.ds_tensor if self._sharded else p).detach() for p in self._parameters]  # type: ignore[attr-defined]

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, weight, value in zip(self._parameters, self._weights(), values, strict=True):
            weight.copy_(value)
            if self._sharded:
                parameter.partition()  # type: ignore[attr-defined]  # small ones stay gathered: drop that stale copy
