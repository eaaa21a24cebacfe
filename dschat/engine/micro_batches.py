"""Micro-batches that memory can hold: where it runs out they are cut in two, and the optimizer step stays the same."""

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

from dschat.engine.deepspeed_engine import has_collectives
from dschat.engine.distributed import Runtime
from dschat.errors import StartAgain, UserError

import deepspeed
import torch
from torch import nn

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
Rows = TypeVar("Rows")
Result = TypeVar("Result")


class MicroBatches:
    """How often the micro-batches of a run are halved: never, until memory does not suffice."""

    def __init__(
        self,
        runtime: Runtime,
        models: Sequence[nn.Module | None] = (),
        remember: Callable[[], None] | None = None,
        say: Callable[[str], None] = print,
        unit: str = "a micro-batch of {} rows",
    ):
        """
        Args:
            models: that are asked in them, all of them, as a rank must not make more passes than another in one whose
                passes are collectives.
            remember: lets the same command, started again, make them half as large from its beginning.
            unit: what a micro-batch is called.
        """
        self.runtime, self.models, self.say, self.remember, self.unit = runtime, models, say, remember, unit
        self.halvings = 0
        self._most_rows = 0  # of a micro-batch of the pass that is under way

    def rows(self, number: int) -> int:
        """Of a micro-batch that was to have ``number``; one at least."""
        rows = -(-number // 2**self.halvings)
        self._most_rows = max(self._most_rows, rows)
        return rows

    def cut(
        self, batches: Sequence[Rows], size: Callable[[Rows], int], take: Callable[[Rows, slice], Rows]
    ) -> list[Rows]:
        """The micro-batches, each in at most 2 ** halvings parts of similar size; of one row at least.

        Args:
            size: of a micro-batch, in rows.
            take: the given rows of one.
        """
        parts = []
        for batch in batches:
            rows = self.rows(size(batch))
            parts += (
                [take(batch, slice(at, at + rows)) for at in range(0, size(batch), rows)] if self.halvings else [batch]
            )
        return parts

    def run(self, engine: deepspeed.DeepSpeedEngine, accumulate: Callable[[], Result]) -> Result:
        """What ``accumulate`` gives: forward and backward passes of ``engine`` over micro-batches that it gets from
        `cut`. When memory runs out in it, its gradient is dropped and it is called anew, with micro-batches of half
        the size from here on. No gradient may be there before, and no optimizer step or collective may be in it.

        Raises:
            StartAgain: there are several ranks and a model at ZeRO 2 or 3, where the others wait in a pass that this
                one cannot finish; or the optimizer's state is in the CPU's memory, where the gradient goes with the
                pass.
            UserError: memory does not suffice for one row.
        """

        def ends() -> bool:
            return self._waits() or any(
                getattr(engine.optimizer, name, False) for name in ("cpu_offload", "offload_optimizer")
            )

        mend = "shorten them, turn gradient checkpointing on, or shard the model with a higher ZeRO stage"
        return self._until_it_fits(accumulate, ends, mend, lambda: drop_gradient(engine))

    def ask(self, compute: Callable[[], Result]) -> Result:
        """The same without a gradient: ``compute`` works in portions that it gets from `cut` or `rows`.

        Raises:
            StartAgain: there are several ranks and a model at ZeRO 2 or 3.
            UserError: memory does not suffice for one row.
        """
        return self._until_it_fits(compute, self._waits, "shorten them")

    def _waits(self) -> bool:
        return self.runtime.world_size > 1 and any(map(has_collectives, self.models))

    def _until_it_fits(
        self,
        compute: Callable[[], Result],
        ends: Callable[[], bool],
        mend: str,
        clean: Callable[[], None] = lambda: None,
    ) -> Result:
        while True:
            self._most_rows = 0
            try:
                return compute()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                said = f"rank {self.runtime.rank}: out of memory on {self.unit.format(self._most_rows)}"
                if self._most_rows < 2:
                    raise UserError(f"{said}; {mend}") from error
                if ends():
                    if self.remember is None:
                        raise
                    self.remember()
                    raise StartAgain(
                        f"{said}; start the same command again: it goes on from the last checkpoint with half of that "
                        "and the same optimizer steps"
                    ) from error
            # Only here, where the error's traceback no longer holds the activations, is their memory free.
            clean()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.halvings += 1
            self.say(f"{said}: they are halved from here on, the optimizer steps stay the same")


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device; or as the CPU's allocator and CUDA's libraries tell it, with a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def drop_gradient(engine: deepspeed.DeepSpeedEngine) -> None:
    """Forget what backward passes have accumulated since the last step, the last of them broken off in the middle."""
    stage = engine.zero_optimization_stage()
    zero = engine.optimizer
    if stage == 0:
        engine.module.zero_grad(set_to_none=True)
        return
    zero._backward_hook_state.backward_active_depth = 0  # a pass that breaks does not leave
    if stage == 2:
        zero.setup_buckets()
    if stage > 1:
        zero.independent_gradient_partition_epilogue()  # reduces what hangs in its buckets
    if stage == 3:
        coordinator = zero.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():  # the order of modules that the pass would have gone on in
            coordinator._invalidate_trace()
        coordinator.release_and_reset_all(engine.module)
    else:
        zero.all_grad_tensors = {}
    zero.zero_grad(set_to_none=True)
