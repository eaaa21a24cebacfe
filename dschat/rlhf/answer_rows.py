"""The rows of the DPO program as batches: pairs, or for KTO judged answers, with what the reference says of them."""

from collections.abc import Iterator

from dschat.data.collate_answers import collate_feedback, collate_pairs, mismatched_rows
from dschat.data.loader import Batch, MicroBatch, epoch_batches, rows_at
from dschat.engine.distributed import Runtime
from dschat.errors import UserError

import datasets
from torch import Tensor


class AnswerRows:
    """One part of the data, training or held-out; `ref_logps` (N, 2) goes with its batches as soon as it is set.

    Args:
        rows: of `tokenize_preferences`, or of `tokenize_feedback` where ``is_paired`` is False.
        pad_token_id: fills up what is masked.
        max_len: cuts mismatched answers, in tokens.
        seed: of the draw of mismatched answers.
        batch_size: rows per rank of `in_order`.
        runtime: this rank.

    Raises:
        UserError: no rows; for judged answers, no good or no bad one.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        is_paired: bool,
        *,
        pad_token_id: int,
        max_len: int,
        seed: int,
        batch_size: int,
        runtime: Runtime,
    ):
        _require_both_sides(rows, is_paired)
        self.rows, self.is_paired, self.pad_token_id, self.max_len = rows, is_paired, pad_token_id, max_len
        self.others = [] if is_paired else mismatched_rows(len(rows), seed)
        self.ref_logps: Tensor | None = None
        self.runtime = runtime
        self.steps = epoch_batches(len(rows), batch_size, 1, *runtime.place, seed=0, epoch=0, shuffle=False)
        # All that shapes a log-probability but the model; on the last line, what shapes its last bits.
        self.key = [None if is_paired else seed, max_len, rows._fingerprint]
        self.key += [batch_size, runtime.world_size, runtime.device.type]

    def collate(self, micro_batch: MicroBatch) -> Batch:
        """See `dschat.data.collate_answers`; on the rank's device."""
        indices, num_real = micro_batch
        rows = rows_at(self.rows, indices)
        if self.is_paired:
            batch = collate_pairs(rows, num_real, self.pad_token_id)
        else:
            others = rows_at(self.rows, [self.others[i] for i in indices])
            batch = collate_feedback(rows, others, num_real, self.pad_token_id, self.max_len)
        if self.ref_logps is not None:
            batch["ref_logps"] = self.ref_logps[indices]
        return {name: tensor.to(self.runtime.device) for name, tensor in batch.items()}

    def in_order(self) -> Iterator[Batch]:
        """This rank's share of all rows, once, `len(steps)` batches: the same for reference and evaluation."""
        return (self.collate(micro_batch) for (micro_batch,) in self.steps)


def _require_both_sides(rows: datasets.Dataset, is_paired: bool) -> None:
    mend = "give more --data_path, or --eval_data_path to evaluate on"
    if not len(rows):
        raise UserError(f"no rows are left to train or to evaluate on; {mend}")
    if not is_paired and len(kinds := set(rows["good"][:])) == 1:
        only = "good" if kinds.pop() else "bad"
        raise UserError(
            f"--loss_type kto needs good and bad answers to train and to evaluate on, not {only} ones only; {mend}"
        )
