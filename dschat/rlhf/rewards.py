"""What a reward source is: asked about a batch of responses, it gives each a score, or none. Several are summed."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dschat.data.records import Message
from dschat.errors import UserError
from dschat.report.metrics import write_whole

import torch


@dataclass
class Samples:
    """B responses as every reward source sees them: text for rules and servers, token ids for models."""

    prompts: list[str]  # a lone question as it is; a longer dialogue with its roles
    responses: list[str]  # without the end token
    messages: list[list[Message]]  # the prompt
    token_ids: list[list[int]]  # prompt and response as sampled, end token included, no padding
    prompt_lens: list[int]  # ids of the prompt in front
    finished: list[bool]  # ended with the end token
    records: list[dict[str, Any]]  # of each prompt: its metadata, and its answers under "responses"

    def __len__(self) -> int:
        return len(self.responses)


@dataclass
class Judged:
    """What a source says of a batch. A score of None: no judgement, the response is left out of the update.

    ``masks`` (optional, per response None or one bool per response token, end token included) is True where a token
    counts; what a tool wrote, say, is False and takes no part in the loss.
    """

    scores: list[float | None]
    masks: list[list[bool] | None] = field(default_factory=list)  # empty: every token of every response counts


class RewardSource(Protocol):
    """A source of scores. ``name`` is its label in metrics: ``rewards/<name>/score_mean``."""

    name: str

    def __call__(self, samples: Samples) -> Judged: ...


@dataclass
class Scores:
    """What all sources together say of B responses."""

    total: torch.Tensor  # (B,) float32: the weighted sum; 0 where a source gave no score
    counts: torch.Tensor  # (B,) bool: every source gave a score
    by_source: dict[str, list[float | None]]  # name -> B scores, without their weight
    masks: list[list[bool] | None]  # per response: True where every source lets the token count; None: all count


class CombinedReward:
    """The weighted sum of several sources, which are asked one after the other, in order, on every rank.

    The second source of a name is called ``name#2``, in `Scores` and in metrics.
    """

    def __init__(self, sources: Sequence[tuple[RewardSource, float]]):
        self.sources: dict[str, tuple[RewardSource, float]] = {}
        number: Counter[str] = Counter()
        for source, weight in sources:
            number[source.name] += 1
            suffix = f"#{number[source.name]}" if number[source.name] > 1 else ""
            self.sources[source.name + suffix] = (source, weight)

    def summary(self) -> str:
        """One line for a person: the sum, and which models read answers through a tokenizer of their own."""
        terms = []
        for name, (source, weight) in self.sources.items():
            own = " (through its own tokenizer)" if getattr(source, "reencodes", False) else ""
            terms.append((f"{weight:g} × " if weight != 1 else "") + name + own)
        return f"reward: {' + '.join(terms)}"

    def __call__(self, samples: Samples) -> Scores:
        """Ask every source. A score that is not finite goes into the sum as it is.

        Raises:
            UserError: a source fails, or does not answer for each response or each of its tokens.
        """
        size = len(samples)
        by_source: dict[str, list[float | None]] = {}
        masks: list[list[bool] | None] = [None] * size
        totals, counts = [0.0] * size, [True] * size
        for name, (source, weight) in self.sources.items():
            judged = source(samples)
            _check_answer(name, judged, samples)
            by_source[name] = judged.scores
            for row, score in enumerate(judged.scores):
                counts[row] &= score is not None
                totals[row] += weight * (score if score is not None else 0.0)
            masks = [_both(mask, new) for mask, new in zip(masks, judged.masks or [None] * size, strict=True)]
        kept = [total if counted else 0.0 for total, counted in zip(totals, counts, strict=True)]
        total = torch.tensor(kept, dtype=torch.float64).float()
        return Scores(total, torch.tensor(counts, dtype=torch.bool), by_source, masks)


def _check_answer(name: str, judged: Judged, samples: Samples) -> None:
    size = len(samples)
    if len(judged.scores) != size:
        raise UserError(f"reward {name} gave {len(judged.scores)} scores for {size} responses; one for each is needed")
    if judged.masks and len(judged.masks) != size:
        raise UserError(f"reward {name} gave {len(judged.masks)} masks for {size} responses; one for each is needed")
    for row, mask in enumerate(judged.masks):
        num_tokens = len(samples.token_ids[row]) - samples.prompt_lens[row]
        if mask is not None and len(mask) != num_tokens:
            raise UserError(
                f"reward {name} gave a mask of {len(mask)} for response {row} of {num_tokens} tokens; one bool for "
                "each is needed, the end token included"
            )


def _both(mask: list[bool] | None, other: list[bool] | None) -> list[bool] | None:
    if mask is None or other is None:
        return mask if other is None else other
    return [a and b for a, b in zip(mask, other, strict=True)]


def reward_metrics(by_source: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Per source over the rows of all ranks: ``rewards/<name>/none_fraction`` of all rows, ``score_mean`` and
    ``score_std`` (population) of the finite scores, before the weight. No finite score: no mean and no std."""
    metrics = {}
    for name, scores in by_source.items():
        given = [score for score in scores if score is not None]
        finite = [score for score in given if math.isfinite(score)]
        metrics[f"rewards/{name}/none_fraction"] = 1 - len(given) / len(scores) if scores else 0.0
        if finite:
            values = torch.tensor(finite, dtype=torch.float64)
            metrics[f"rewards/{name}/score_mean"] = values.mean().item()
            metrics[f"rewards/{name}/score_std"] = values.std(correction=0).item()
    return metrics


def write_repro(output_dir: str, step: int, samples: Samples, scores: Scores) -> Path:
    """Write down the responses with a score that is not finite, so that it can be asked for again:
    ``<output_dir>/repro/step_000012.json``. Scores are text there, for JSON has no nan. The file is whole or absent.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(output_dir) / "repro" / f"step_{step:06d}.json"
    rows = []
    for row, total in enumerate(scores.total.tolist()):
        given = {name: values[row] for name, values in scores.by_source.items()}
        if math.isfinite(total) and all(score is None or math.isfinite(score) for score in given.values()):
            continue
        rows.append(
            {
                "prompt": samples.prompts[row],
                "response": samples.responses[row],
                "messages": samples.messages[row],
                "token_ids": samples.token_ids[row],
                "finished": samples.finished[row],
                "scores": {name: str(score) for name, score in given.items()},
                "total": str(total),
            }
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"step": step, "rows": rows}, indent=1))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make room there or correct --output_dir"
        ) from None
    return path
