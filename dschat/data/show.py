"""Show what a batch teaches: its text, with the tokens in the loss marked."""

import os
import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from dschat.data.loader import MicroBatch

import datasets
import torch
from transformers import PreTrainedTokenizerBase

GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def show_batch(
    tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor
) -> str:
    """The first two rows of a batch, all (B, T), without padding: what is in the loss (mask) is green, the rest dim.

    Where colour is not wanted (no terminal, or NO_COLOR is set) brackets stand around what is in the loss.
    """
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = []
    for row in range(min(2, len(input_ids))):
        real = [(int(i), bool(m)) for i, a, m in zip(input_ids[row], attention_mask[row], mask[row], strict=True) if a]
        pieces = []
        for learned, group in groupby(real, key=lambda token: token[1]):
            text = _printable(str(tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False)))
            if colour:
                pieces.append(f"{GREEN if learned else DIM}{text}{RESET}")
            else:
                pieces.append(f"[{text}]" if learned else text)
        num_learned = sum(learned for _, learned in real)
        lines.append(f"row {row}: {len(real)} tokens, {num_learned} in the loss\n{''.join(pieces)}")
    return "\n\n".join(lines)


def repro_rows(
    rows: datasets.Dataset, step: Iterable[MicroBatch], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The token rows of an optimizer step, for a file that lets it be looked at: the number of each in the data of its
    stage, and of each of its sequences the ids and the text."""
    found = []
    for index in (i for micro_batch in step for i in micro_batch.indices[: micro_batch.num_real]):
        row = rows[index]
        sequences: list[list[int]] = []
        for name in ("input_ids", "chosen_ids", "rejected_ids"):
            ids = row.get(name) or []
            sequences += ids if ids and isinstance(ids[0], list) else [ids] if ids else []
        texts = [{"token_ids": ids, "text": tokenizer.decode(ids)} for ids in sequences]
        found.append({"row": index, "source": row.get("source"), "sequences": texts})
    return found


def _printable(text: str) -> str:
    """Control characters of the data must not reach the terminal as commands."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
