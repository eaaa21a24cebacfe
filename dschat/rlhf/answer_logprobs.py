"""What a policy and its reference say of the answers of a data set, in nats: what DPO and its relatives train on."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dschat.data.loader import Batch, num_rows, take_rows
from dschat.engine.distributed import Runtime, all_reduce_max, all_reduce_sum, gather_rows
from dschat.engine.micro_batches import MicroBatches
from dschat.functional import sequence_logprobs, token_logprobs
from dschat.models.packed import on_tokens, token_logits

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class AnswerLogprobs:
    """B rows of two answers: chosen and rejected; for KTO the row's own and the mismatched one that z0 needs."""

    logps: Tensor  # (B, 2) float32: summed over the tokens of the answer, under the policy
    lengths: Tensor  # (B, 2) tokens
    row_mask: Tensor  # (B,) bool: False where a row only fills up a batch
    ref_logps: Tensor | None  # (B, 2) under the reference; None where the loss has none
    good: Tensor | None  # (B,) bool, for KTO: what was said of the row's own answer

    def each(self, change: Callable[[Tensor], Tensor]) -> "AnswerLogprobs":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in values.items()}
        return AnswerLogprobs(**changed)

    def real(self) -> "AnswerLogprobs":
        """Without the rows that only fill up."""
        return self.each(lambda values: values[self.row_mask])


def score_answers(model: nn.Module, family: PreTrainedModel, batch: Batch) -> AnswerLogprobs:
    """One forward over a batch of `dschat.data.collate_answers`, with `ref_logps` (B, 2) in it where there are any.

    Where `with_mismatched_logps` has put in those of the second half, only the first half is run.
    """
    if (mismatched := batch.get("mismatched_logps")) is None:
        logps = _pair_logps(model, family, batch)
    else:
        logps = torch.stack([_sequence_logps(model, family, _half(batch, 0)), mismatched], dim=1)
    lengths = batch["response_mask"].sum(1).view(2, -1).T
    return AnswerLogprobs(logps, lengths, batch["row_mask"], batch.get("ref_logps"), batch.get("good"))


@torch.no_grad()
def ask_answers(
    model: nn.Module, family: PreTrainedModel, batches: Iterable[Batch], memory: MicroBatches
) -> AnswerLogprobs:
    """What ``model``, put into eval mode, says of the real rows of all batches and ranks. A collective. ``memory``
    halves the batches where it runs out."""
    model.eval()

    def ask(batch: Batch) -> list[AnswerLogprobs]:
        return [score_answers(model, family, part) for part in memory.cut([batch], num_rows, take_rows)]

    return gather_answers([part for batch in batches for part in memory.ask(partial(ask, batch))], memory.runtime)


@torch.no_grad()
def gather_answers(parts: Sequence[AnswerLogprobs], runtime: Runtime) -> AnswerLogprobs:
    """The real rows of all micro-batches and ranks, without gradients, in the order of the global batches where every
    rank brings as many rows (micro-batches by length may differ). A collective."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in dataclasses.fields(AnswerLogprobs)}
    whole: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
    rows = AnswerLogprobs(**whole)
    missing = int(all_reduce_max(len(rows.logps), runtime)) - len(rows.logps)  # filled up with rows that do not count
    filled = rows.each(lambda values: torch.cat([values.detach(), values.new_zeros(missing, *values.shape[1:])]))
    return filled.each(lambda values: gather_rows(values, runtime)).real()


@torch.no_grad()
def with_mismatched_logps(
    engine: deepspeed.DeepSpeedEngine, family: PreTrainedModel, batches: Sequence[Batch], runtime: Runtime
) -> tuple[list[Batch], Tensor]:
    """The batches with `mismatched_logps` (B,), the policy's log-probabilities of the mismatched answers, without
    dropout; and the mean of policy - reference over them, a scalar over all batches and ranks: KTO's estimate of the
    KL (Ethayarajh et al. 2024, there over a micro-batch). Leaves the engine in eval mode."""
    engine.eval()
    logps = [_sequence_logps(engine, family, _half(batch, 1)) for batch in batches]
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for values, batch in zip(logps, batches, strict=True):
        log_ratio = (values - batch["ref_logps"][:, 1])[batch["row_mask"]]
        sums += torch.stack([log_ratio.double().sum(), batch["row_mask"].sum()])
    total, num_rows = all_reduce_sum(sums, runtime)
    known = [batch | {"mismatched_logps": values} for values, batch in zip(logps, batches, strict=True)]
    return known, (total / num_rows).float()


def _half(batch: Batch, number: int) -> Batch:
    return {name: batch[name].chunk(2)[number] for name in ("input_ids", "attention_mask", "response_mask")}


def _pair_logps(model: nn.Module, family: PreTrainedModel, batch: Batch) -> Tensor:
    """(B, 2): the log-probabilities of both answers of each row, behind a prompt that is computed once."""
    chosen = torch.arange(len(batch["input_ids"]) // 2, device=batch["input_ids"].device)
    return _sequence_logps(model, family, batch, chosen.repeat(2)).view(2, -1).T


def _sequence_logps(
    model: nn.Module, family: PreTrainedModel, batch: Batch, begins_like: Tensor | None = None
) -> Tensor:
    """(M,): the log-probability of each sequence's answer, 0 where its response_mask is empty."""
    ids, attended, response_mask = (batch[name] for name in ("input_ids", "attention_mask", "response_mask"))
    size = response_mask.shape[1]
    wanted = nn.functional.pad(response_mask, (ids.shape[1] - size, 0))
    logprobs = token_logprobs(token_logits(model, family, ids, attended, wanted, begins_like), ids[wanted][None])
    return sequence_logprobs(on_tokens(logprobs, response_mask), response_mask)
