"""Scores of ranked answers: a row for each prompt, a column for each of its answers."""

from functools import partial

from dschat.data.loader import Batch, collate_rankings, epoch_batches, num_rows, rows_at, take_rows
from dschat.engine.distributed import gather_rows
from dschat.engine.micro_batches import MicroBatches
from dschat.models.scorer import last_token_values
from dschat.report.progress import Console

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn.functional import pad


def ranking_scores(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(B, K) float32 scores of a batch of `collate_rankings`, from one forward in which a prompt is computed once for
    all of its answers; 0 where there is no answer.

    ``model`` is a `Scorer` or a DeepSpeed engine around one.
    """
    num_answers = batch["answer_mask"].sum(1)
    first = num_answers.cumsum(0) - num_answers  # sequence of each row
    begins_like = first.repeat_interleave(num_answers, output_size=len(batch["input_ids"]))
    values = model(batch["input_ids"], batch["attention_mask"], begins_like)
    scores = last_token_values(values, batch["attention_mask"])
    return scores.new_zeros(batch["ranks"].shape).masked_scatter(batch["answer_mask"], scores)


@torch.no_grad()
def score_rankings(
    model: nn.Module,
    rows: datasets.Dataset,
    batch_size: int,
    pad_token_id: int,
    memory: MicroBatches,
    console: Console,
) -> np.ndarray:
    """(N, K) float64: the scores of all rows, the same on every rank; nan where a row has fewer answers. A collective.

    The model is put into eval mode. ``memory`` halves the batches where it runs out.
    """
    model.eval()
    runtime = memory.runtime
    num_answers = max(map(len, rows["ranks"][:]))
    batches = epoch_batches(len(rows), batch_size, 1, *runtime.place, seed=0, epoch=0, shuffle=False)

    def ask(batch: Batch) -> torch.Tensor:
        return torch.cat([ranking_scores(model, part) for part in memory.cut([batch], num_rows, take_rows)])

    parts = []
    for (micro_batch,) in console.track(batches, len(batches), "evaluate"):
        batch = collate_rankings(rows_at(rows, micro_batch.indices), micro_batch.num_real, pad_token_id)
        batch = {name: tensor.to(runtime.device) for name, tensor in batch.items()}
        scores = torch.where(batch["ranks"] > 0, memory.ask(partial(ask, batch)), torch.nan)
        parts.append(gather_rows(pad(scores, (0, num_answers - scores.shape[1]), value=torch.nan), runtime))
    # The rows that only fill up come last.
    return torch.cat(parts)[: len(rows)].double().cpu().numpy()


def ranking_facts(rows: datasets.Dataset) -> list[dict]:
    """What the quality report tells pairs apart by: ranks, lengths of the answers in tokens, source, user turns,
    margin, and which prompt it is: a number, the same for rows with the same dialogue."""
    prompts: dict[str, int] = {}
    facts = []
    for row in rows:
        users = sum(message["role"] == "user" for message in row["messages"])
        facts.append(
            {
                "ranks": row["ranks"],
                "lengths": [len(ids) - row["prompt_len"] for ids in row["input_ids"]],
                "source": row["source"],
                "num_turns": users,
                "margin": row["margin"],
                "prompt": prompts.setdefault(str(row["messages"]), len(prompts)),
            }
        )
    return facts
