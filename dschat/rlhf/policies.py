"""Several models side by side: what they are called, and the prompts that all of them can be asked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.data.records import Message
from dschat.data.sources import load_evaluation
from dschat.data.stages import SHORTENED, drop_first_turn, tokenize_prompts
from dschat.data.templates import encode_prompt
from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError
from dschat.models.load import POLICY, load_causal_lm, load_config, max_positions, model_role

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 256  # of an answer
NO_LIMIT = 2**31 - 1  # of a prompt's tokens


@dataclass(frozen=True)
class Policy:
    """A language model that is loaded only while it answers."""

    name: str
    path: str
    tokenizer: PreTrainedTokenizerBase
    num_positions: int | None  # None: no limit

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        model: Any = load_causal_lm(self.path, self.tokenizer, dtype=dtype, dropout=0.0)
        return model.to(device).eval()


def open_policies(paths: Sequence[str], chat_template: str) -> list[Policy]:
    """Names, tokenizers and contexts of the models, without their weights.

    Raises:
        UserError: one is missing, is no language model or has no trained weights.
    """
    policies = []
    for name, path in zip(distinct_names(paths), paths, strict=True):
        if path == "toy":
            raise UserError(
                "--model_name_or_path toy: the embedded model has no trained weights; train it with python e2e_rlhf.py"
            )
        config = load_config(path)
        if model_role(path, config) != POLICY:
            raise UserError(f"{path} is a reward model, not a language model; give it as --reward or --judge")
        policies.append(Policy(name, path, load_tokenizer(path, chat_template), max_positions(config)))
    return policies


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path; as many parts as it takes where that would be another model's name too.

    ["a/sft", "b/actor", "c/actor"] -> ["sft", "b/actor", "c/actor"]. What is given twice gets a number: sft, sft#2.
    """
    parts = [(Path(path).resolve() if Path(path).is_dir() else Path(path)).parts for path in paths]
    names: list[str] = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        depth = 1
        while any(other[-depth:] == mine[-depth:] for other in others):
            depth += 1
        names.append("/".join(mine[-depth:]))
    return [f"{name}#{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]


def answer_room(policies: Sequence[Policy], max_new_tokens: int) -> int:
    """Tokens of the longest answer: ``max_new_tokens``, or for 0 256, or half of the smallest context if that is less.

    Raises:
        UserError: a context has no room for a prompt beside it.
    """
    contexts = [policy.num_positions for policy in policies if policy.num_positions is not None]
    if not max_new_tokens:
        return min([DEFAULT_NEW_TOKENS, *(size // 2 for size in contexts)])
    if contexts and max_new_tokens >= min(contexts):
        raise UserError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: the smallest of these models has "
            f"{min(contexts)} positions in all; give a smaller number"
        )
    return max_new_tokens


def load_prompts(
    data_path: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eval_fraction: float,
    seed: int,
    cache_dir: str,
    skip_bad_records: bool,
) -> tuple[datasets.Dataset, Counter[str]]:
    """(rows with ``messages`` and ``record``, what was left out and why): the different prompts of all sources.

    Of each source the part for evaluation where it has one, else all of it, or with an ``eval_fraction`` above 0 the
    rows that the stages hold out with this fraction and seed. ``tokenizer``: any; prompts are not shortened here.

    Raises:
        UserError: a bad file or record, nothing left.
    """
    examples, dropped = load_evaluation(
        data_path,
        "prompt",
        eval_fraction=eval_fraction,
        seed=seed,
        cache_dir=cache_dir,
        skip_bad_records=skip_bad_records,
    )
    rows, seen_before = tokenize_prompts(examples, tokenizer, NO_LIMIT)
    return rows, dropped + seen_before


def spread(num_rows: int, num_chosen: int) -> list[int]:
    """``num_chosen`` of the rows (0: all), evenly from first to last, so that every source has its share."""
    count = min(num_chosen, num_rows) or num_rows
    return [i * num_rows // count for i in range(count)]


def fit_prompts(
    rows: Sequence[dict[str, Any]], policies: Sequence[Policy], max_prompt_seq_len: int, max_new_tokens: int
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows as every one of the models can be asked them, and what had to be done to how many.

    A dialogue that is longer than ``max_prompt_seq_len`` (0: no limit), or than some model's context less
    ``max_new_tokens``, loses its earliest turns, for all of the models; what does not fit even so is left out.

    Raises:
        UserError: a template cannot render a dialogue; nothing is left.
    """
    fitted, counter = [], Counter[str]()
    for row in rows:
        messages, shortened = row["messages"], False
        while messages and not all(_fits(policy, messages, max_prompt_seq_len, max_new_tokens) for policy in policies):
            messages, shortened = drop_first_turn(messages), True
        if messages:
            fitted.append({"messages": messages, "record": row["record"]})
            counter[SHORTENED] += shortened
        else:
            counter["prompt too long for a model"] += 1
    if not fitted:
        raise UserError(
            f"none of the {len(rows)} prompts fits; give a larger --max_prompt_seq_len or a smaller --max_new_tokens"
        )
    return fitted, +counter


def _fits(policy: Policy, messages: Sequence[Message], max_prompt_seq_len: int, max_new_tokens: int) -> bool:
    try:
        size = len(encode_prompt(policy.tokenizer, messages))
    except UserError as error:
        raise UserError(f"{policy.path}: {error}") from None
    room = NO_LIMIT if policy.num_positions is None else policy.num_positions - max_new_tokens
    return size <= min(room, max_prompt_seq_len or NO_LIMIT)
