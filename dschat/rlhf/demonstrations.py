"""Demonstrations that are mixed into the policy's loss (PPO-ptx)."""

from collections.abc import Iterator

from dschat.data.loader import Batch, PromptStream, collate_sft, rows_at
from dschat.engine.distributed import Runtime

import datasets


class Demonstrations:
    """This rank's micro-batches of demonstrations for one optimizer step after the other, without end.

    Args:
        rows: token rows of step 1.
        minibatch_size: rows of all ranks in a step.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        minibatch_size: int,
        micro_batch_size: int,
        pad_token_id: int,
        seed: int,
        runtime: Runtime,
    ):
        self.rows, self.micro_batch_size = rows, micro_batch_size
        self.pad_token_id, self.runtime = pad_token_id, runtime
        self.stream = PromptStream(len(rows), minibatch_size, seed)

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        size, device = self.micro_batch_size, self.runtime.device
        mine = rows_at(self.rows, next(self.stream)[self.runtime.rank :: self.runtime.world_size])
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        batches = [collate_sft(part, len(part), self.pad_token_id) for part in parts]
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.stream.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.position = state["position"]
