"""A rollout as reward sources see it, and what they say of it as tensors."""

import json
import re
from typing import Any

from dschat.data.records import Message
from dschat.rlhf.reward_sources import span_mask
from dschat.rlhf.rewards import Samples, Scores
from dschat.rlhf.rollout import Rollout, tokens_of

import torch
from transformers import PreTrainedTokenizerBase

MASKED_PATTERN = "masked_pattern"  # key of a record: a regular expression of what to leave out of the loss


def describe_rollout(rollout: Rollout, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Samples:
    """The responses of a rollout in text and ids. ``rows`` are the token rows of its prompts, of which each has the
    same number of responses."""
    num_samples = len(rollout.finished) // len(rows)
    rows = [row for row in rows for _ in range(num_samples)]
    prompts = tokens_of(rollout.input_ids, rollout.attention_mask)
    responses = tokens_of(rollout.response_ids, rollout.response_mask)
    return Samples(
        prompts=[prompt_text(row["messages"]) for row in rows],
        responses=decode_responses(tokenizer, responses),
        messages=[row["messages"] for row in rows],
        token_ids=[prompt + response for prompt, response in zip(prompts, responses, strict=True)],
        prompt_lens=[len(prompt) for prompt in prompts],
        finished=rollout.finished.tolist(),
        records=[json.loads(row["record"]) for row in rows],
    )


def learned_tokens(
    rollout: Rollout, samples: Samples, scores: Scores, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """(B, R) bool: the tokens of each response that has a score, but for what a source or a record leaves out."""
    mask = rollout.response_mask & scores.counts.to(rollout.response_mask.device)[:, None]
    for row, record in enumerate(samples.records):
        response = samples.token_ids[row][samples.prompt_lens[row] :]
        kept = [scores.masks[row]]
        if pattern := record.get(MASKED_PATTERN):
            spans = [match.span() for match in re.finditer(pattern, samples.responses[row])]
            kept.append(span_mask(tokenizer, response, spans, samples.responses[row]))
        for columns in kept:
            if columns is not None:
                mask[row, : len(response)] &= torch.tensor(columns, device=mask.device)
    return mask


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]) -> list[str]:
    """The text of each response, without its end token and the white space around it."""
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def prompt_text(messages: list[Message]) -> str:
    """A lone question as it is; a longer dialogue with its roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
