"""The reward model and the critic: a Hugging Face sequence classifier with one label, read at every position."""

import json
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dschat.data.templates import encode_answers
from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError
from dschat.models.packed import neighbours, token_values

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

STATS_FILE = "score_stats.safetensors"
NUM_PROBE_PAIRS = 4
PROBE_TOKENS = 64  # of a prompt and of a response: the check at loading stays cheap beside loading itself
PROBE_BATCH_SIZE = 8
NUM_PADDED = 4  # rows that `padding_gap` scores with and without padding


class Scorer(nn.Module):
    """Wraps ``AutoModelForSequenceClassification(num_labels=1)``; its output is (raw - mean) / std.

    With mean 0 and std 1 the value at the last real token is what plain transformers returns. Step 3 sets the
    statistics of step 2, for the reward and for the critic alike, so that values start on the scale of the rewards.
    """

    def __init__(self, model: PreTrainedModel, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, begins_like: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, T), (B, T) -> (B, T) float32: the value of each prefix; what stands at padding means nothing.
        ``begins_like``: see `dschat.models.packed.pack`."""
        return token_values(self._values, self.model, input_ids, attention_mask, begins_like)

    def _values(self, **inputs: Any) -> torch.Tensor:
        return self._read(self.model.score, self.model.base_model(**inputs).last_hidden_state)

    def _read(self, head: Any, hidden: torch.Tensor) -> torch.Tensor:
        """(…, H) -> (…) float32."""
        return (head(hidden).squeeze(-1).float() - self.mean) / self.std

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)

    def rebuild(self) -> "Scorer":
        """A scorer of the same structure with weights of its own."""
        model: Any = self.model
        inner = model.rebuild() if hasattr(model, "rebuild") else type(model)(model.config)
        return Scorer(inner, self.mean, self.std)


def last_token_values(values: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T), (B, T) -> (B,): the value at the last real token of each row, on whichever side the padding is."""
    size = attention_mask.shape[1]
    positions = torch.arange(size, device=values.device)
    last = (positions * attention_mask.bool()).argmax(dim=1, keepdim=True)
    return values.gather(1, last).squeeze(1)


@torch.no_grad()
def score_token_ids(
    model: nn.Module,
    rows: Sequence[list[int]],
    pad_token_id: int,
    micro_batch_size: int,
    device: torch.device,
    prompts: Sequence[Hashable] | None = None,
) -> list[float]:
    """The value at the last token of each row, in eval mode, in which ``model`` stays.

    Rows are taken in order, ``micro_batch_size`` at a time, each micro-batch padded on the right to its own longest
    row: equal micro-batches give equal bits, wherever they are computed.

    Args:
        model: a `Scorer` or a DeepSpeed engine around one. At ZeRO 3 a call is a collective: every rank must bring
            equally many rows.
        rows: token ids without padding, at least one each.
        prompts: of each row; what neighbours with equal ones have in common is computed once in a micro-batch.

    Raises:
        ValueError: a row without tokens, which has no last one.
    """
    if not all(len(row) for row in rows):
        raise ValueError("a row without tokens has no score")
    model.eval()
    parts = []
    for start in range(0, len(rows), micro_batch_size):
        part = [torch.tensor(row, dtype=torch.int64) for row in rows[start : start + micro_batch_size]]
        input_ids = pad_sequence(part, batch_first=True, padding_value=pad_token_id).to(device)
        lengths = torch.tensor([len(row) for row in part], device=device)
        mask = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]
        options = {}
        if prompts is not None:
            of_part = prompts[start : start + micro_batch_size]
            is_same = [one == other for one, other in pairwise(of_part)]
            options["begins_like"] = neighbours(torch.tensor(is_same, dtype=torch.bool, device=device))
        parts.append(last_token_values(model(input_ids, mask, **options), mask))
    return torch.cat(parts).tolist() if parts else []


@torch.no_grad()
def padding_gap(model: nn.Module, rows: Sequence[list[int]], pad_token_id: int, device: torch.device) -> float:
    """By how much four pads or more on either side change the scores of the first few rows: rounding, if the model
    honours its mask. At ZeRO 3 a collective, as `score_token_ids`."""
    rows = rows[:NUM_PADDED]
    alone = torch.tensor(score_token_ids(model, rows, pad_token_id, 1, device), device=device)
    width = max(map(len, rows)) + 8
    input_ids = torch.full((len(rows), width), pad_token_id, device=device)
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        input_ids[i, 4 : 4 + len(row)] = torch.tensor(row, device=device)
        mask[i, 4 : 4 + len(row)] = True
    return (last_token_values(model(input_ids, mask), mask) - alone).abs().max().item()


@dataclass(frozen=True)
class Probes:
    """Dialogues whose scores prove, wherever the model is loaded, that it is still the one that was trained."""

    dialogues: list[dict[str, Any]]  # {"messages": the prompt, "response": text}
    scores: torch.Tensor  # (N,) in the model's precision


def make_probes(scorer: Scorer, rankings: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Probes:
    """The best and the worst answers of the first ``NUM_PROBE_PAIRS`` of ``rankings``, scored by ``scorer``.

    The rows of step 2 hold token ids only. A probe's text is what they decode to, its prompt one user message: it need
    not read well, it has to come out of template and tokenizer as the same ids again. Where a context is as short as
    the probes are, those that do not fit it are left out.

    Args:
        scorer: the whole model, with mean 0 and std 1.
        rankings: rows of step 2, with ``input_ids``, the best first, and ``prompt_len``.
    """
    dialogues, rows = [], []
    for _, row in zip(range(NUM_PROBE_PAIRS), rankings, strict=False):
        for ids in (row["input_ids"][0], row["input_ids"][-1]):
            cut = row["prompt_len"]
            parts = [ids[max(0, cut - PROBE_TOKENS) : cut], ids[cut : cut + PROBE_TOKENS]]
            prompt, response = (text.strip() for text in tokenizer.batch_decode(parts, skip_special_tokens=True))
            dialogue = {"messages": [{"role": "user", "content": prompt}], "response": response}
            [probe] = _probe_rows(tokenizer, [dialogue])
            if _fits(probe, scorer):
                dialogues.append(dialogue)
                rows.append(probe)
    return Probes(dialogues, _scores(scorer, rows, tokenizer).to(scorer.model.dtype))


def _probe_rows(tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]]) -> list[list[int]]:
    return [encode_answers(tokenizer, probe["messages"], [probe["response"]])[0][0] for probe in dialogues]


def _fits(row: list[int], scorer: Any) -> bool:
    """Whether the model has the positions and the embeddings for it."""
    positions = getattr(scorer.model.config, "max_position_embeddings", None)
    num_embeddings = scorer.model.get_input_embeddings().num_embeddings
    return len(row) <= (positions or math.inf) and max(row) < num_embeddings


def _scores(scorer: Any, rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    assert tokenizer.pad_token_id is not None
    return torch.tensor(score_token_ids(scorer, rows, tokenizer.pad_token_id, PROBE_BATCH_SIZE, scorer.model.device))


def save_score_stats(directory: str, mean: float, std: float, probes: Probes | None = None) -> None:
    """Mean and standard deviation of the raw scores over the held-out pairs, beside the weights.

    The scores of the ``probes``, which come raw, are stored as step 3 will use them, (raw - mean) / std: so they also
    tell when mean or std are not the ones they were saved with.
    """
    tensors = {"mean": torch.tensor([mean]), "std": torch.tensor([std])}
    if probes is not None and probes.dialogues:
        text = json.dumps(probes.dialogues, ensure_ascii=False).encode()
        tensors["probes"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        tensors["probe_scores"] = ((probes.scores.float() - mean) / std).to(probes.scores.dtype)
    save_file(tensors, str(Path(directory) / STATS_FILE))


def load_score_stats(directory: str) -> tuple[float, float]:
    """(mean, std) as step 2 stored them.

    Raises:
        UserError: the file is missing or holds a spread that cannot be divided by.
    """
    mean, std = (value.item() for value in _read_stats(directory, "mean", "std"))
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        path = Path(directory) / STATS_FILE
        raise UserError(f"{path}: the scores have no spread (mean {mean}, std {std}); train the reward model again")
    return mean, std


def check_probes(directory: str, scorer: Any) -> None:
    """Prove that ``scorer``, with the statistics of ``directory``, scores the probes there as it did when they were
    stored, the text encoded by the tokenizer and the template of ``directory``. Without probes (a critic): nothing.

    Args:
        scorer: a `Scorer`, or another module with its call and its ``model``, ``mean`` and ``std``.

    Raises:
        UserError: it does not, so that weights, tokenizer, template or statistics are not those of the training.
    """
    text, stored = _read_stats(directory, "probes", "probe_scores", optional=True)
    if text is None and stored is None:
        return
    tokenizer = load_tokenizer(directory)
    try:
        rows = _probe_rows(tokenizer, json.loads(text.numpy().tobytes()))
        if not rows or stored.shape != (len(rows),):
            raise ValueError(f"{len(rows)} probes, scores of shape {tuple(stored.shape)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(directory, error) from None
    gap = math.inf  # of another tokenizer, ids may not even fit the model
    if all(_fits(row, scorer) for row in rows):
        gap = (_scores(scorer, rows, tokenizer) - stored.float()).abs().max().item()
    allowed = probe_tolerance(stored, scorer)
    if not gap <= allowed:  # not a number is no match either
        raise UserError(
            f"{directory}: the model does not score its own probe texts as it did when it was trained (largest "
            f"difference {gap:.3g} standard deviations, rounding explains {allowed:.2g}): weights, tokenizer or "
            "statistics are not of one run; train again or pass --no-normalize_reward"
        )


def probe_tolerance(stored: torch.Tensor, scorer: Any) -> float:
    """What rounding explains, in standard deviations: 1e-3 in float32, 0.1 where either model was of half precision,
    and two steps of its numbers around the largest raw score.

    Over ten families of random models, padding moves a float32 score by at most 1.2e-6 and bf16 by 0.041; other
    weights, ids or statistics move it by the order of 1.
    """
    dtype = max(stored.dtype, scorer.model.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    largest = (stored.float() * scorer.std + scorer.mean).abs().max().item()
    return (1e-3 if dtype == torch.float32 else 0.1) + 2 * torch.finfo(dtype).eps * largest / scorer.std


def _read_stats(directory: str, *names: str, optional: bool = False) -> list[Any]:
    path = Path(directory) / STATS_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: train the reward model with step 2, or pass --no-normalize_reward")
    try:
        stats = load_file(str(path))
        return [stats.get(name) if optional else stats[name] for name in names]
    except (SafetensorError, KeyError, OSError) as error:
        raise _damaged(directory, error) from None


def _damaged(directory: str, error: Exception) -> UserError:
    problem = " ".join(repr(error).split())[:200]
    return UserError(
        f"{Path(directory) / STATS_FILE} is damaged ({problem}); train the reward model with step 2 again"
    )
