"""What a reward model says of an answer, whole or after each of its tokens."""

import math
import threading
from collections.abc import Sequence
from pathlib import Path

from dschat.data.records import Message
from dschat.data.templates import encode_answers
from dschat.data.tokenizer import load_tokenizer
from dschat.models.load import load_trained_scorer, max_positions, resolve_dtype
from dschat.models.scorer import STATS_FILE, Scorer

import torch
from transformers import PreTrainedTokenizerBase


class AnswerScorer:
    """Scores one answer at a time; may be called from any thread."""

    def __init__(self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        self.scorer, self.tokenizer, self.device = scorer.eval(), tokenizer, device
        self.context = max_positions(scorer.model.config) or math.inf
        self._lock = threading.Lock()

    def score(self, prompt: Sequence[Message], answer: str) -> float | None:
        """The score of the whole answer, its end token included; None where it does not fit the model."""
        values = self.values(prompt, answer)
        return values[-1][1] if values else None

    @torch.no_grad()
    def values(self, prompt: Sequence[Message], answer: str) -> list[tuple[int, float]]:
        """(token, score of the dialogue up to and with it) of the answer's tokens; empty where it does not fit."""
        ((ids, mask),) = encode_answers(self.tokenizer, prompt, [answer])
        if len(ids) > self.context:
            return []
        start = mask[::-1].index(False) if False in mask else len(mask)  # the last answer's tokens come last
        with self._lock:
            input_ids = torch.tensor([ids], device=self.device)
            values = self.scorer(input_ids, torch.ones_like(input_ids, dtype=torch.bool))[0]
        return list(zip(ids[-start:], values[-start:].tolist(), strict=True))


def load_answer_scorer(path: str, dtype: str, device: torch.device) -> AnswerScorer:
    """Of a reward model's directory or hub name; scores have mean 0 and std 1 where its statistics are with it.

    Raises:
        UserError: it is no reward model, or a damaged one.
    """
    tokenizer = load_tokenizer(path)
    scorer = load_trained_scorer(
        path,
        tokenizer,
        dtype=resolve_dtype(dtype, device),
        normalize=(Path(path) / STATS_FILE).is_file(),
        device=device,
    )
    return AnswerScorer(scorer, tokenizer, device)
