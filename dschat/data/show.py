"""Show what a batch teaches: its text, with the tokens in the loss marked."""

import os
import sys
from itertools import groupby

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


def _printable(text: str) -> str:
    """Control characters of the data must not reach the terminal as commands."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)
