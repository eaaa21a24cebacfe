"""Sampling responses: one decode loop for training, evaluation and chat.

The sampler and the trainer share one distribution, `Sampling.scored`: log-probabilities of a response are those of the
distribution that it was drawn from. Random numbers come from the caller, one per (row, step), so that a response
depends on the seed and its global row and not on the number of ranks or on the batch around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dschat.functional.logprobs import log_softmax
from dschat.models.forward import takes_positions
from dschat.rlhf.specs import Sampling

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


def banned_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[int, ...]:
    """The pad token and the embedding rows beyond the tokenizer."""
    return (tokenizer.pad_token_id, *range(len(tokenizer), vocab_size))


@dataclass
class Rollout:
    """Responses to B prompts. Prompts are left-padded, responses right-padded.

    Example: prompt (5, 6), response (7, EOS, padding): ``input_ids`` [pad, 5, 6], ``attention_mask`` [0, 1, 1],
    ``response_ids`` [7, EOS, pad], ``response_mask`` [1, 1, 0], ``finished`` True.
    """

    input_ids: torch.Tensor  # (B, P) int64
    attention_mask: torch.Tensor  # (B, P) bool
    response_ids: torch.Tensor  # (B, R) int64, as sampled, pad after the end
    response_mask: torch.Tensor  # (B, R) bool, up to and including EOS
    logprobs: torch.Tensor  # (B, R) float32 nats, the sampler's own; 0 outside the mask
    finished: torch.Tensor  # (B,) bool: ended with EOS within max_new_tokens


def tokens_of(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """(B, T), (B, T) -> the tokens of each row, padding left out, on whichever side it is."""
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def row_uniforms(num_rows: int, num_steps: int, seed: int) -> torch.Tensor:
    """(num_rows, num_steps) float32 in [0, 1): the random numbers of a whole global batch, the same on every rank."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(num_rows, num_steps, generator=generator)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sampling: Sampling,
    uniforms: torch.Tensor,
    *,
    eos_token_id: int,
    pad_token_id: int,
) -> Rollout:
    """Sample n responses to each of B / n prompts with a plain Hugging Face model in eval mode.

    ``input_ids``, ``attention_mask`` (B / n, P) left-padded; ``uniforms`` (B, max_new_tokens), where n is B over the
    number of prompts. The responses to one prompt are neighbours in the result, whose prompts are repeated n times.
    """
    num_samples = len(uniforms) // len(input_ids)
    size = (len(uniforms), sampling.max_new_tokens)
    response_ids = torch.full(size, pad_token_id, device=input_ids.device)
    response_mask = torch.zeros(size, dtype=torch.bool, device=input_ids.device)
    logprobs = torch.zeros(size, device=input_ids.device)
    finished = torch.zeros(size[0], dtype=torch.bool, device=input_ids.device)
    steps = decode(model, input_ids, attention_mask, sampling, uniforms.to(input_ids.device), eos_token_id)
    length = 0
    for step, (rows, tokens, token_scores) in enumerate(steps):
        response_ids[rows, step] = tokens
        response_mask[rows, step] = True
        logprobs[rows, step] = token_scores
        finished[rows] = tokens == eos_token_id
        length = step + 1
    return Rollout(
        input_ids.repeat_interleave(num_samples, 0),
        attention_mask.bool().repeat_interleave(num_samples, 0),
        response_ids[:, :length],
        response_mask[:, :length],
        logprobs[:, :length],
        finished,
    )


def generate_in_batches(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sampling: Sampling,
    uniforms: torch.Tensor,
    *,
    batch_size: int,
    eos_token_id: int,
    pad_token_id: int,
) -> Rollout:
    """`generate` for ``batch_size`` prompts at a time, so that the key-value cache of no more than these is held."""
    num_samples = len(uniforms) // len(input_ids)
    parts = [
        generate(
            model,
            input_ids[start : start + batch_size],
            attention_mask[start : start + batch_size],
            sampling,
            uniforms[start * num_samples : (start + batch_size) * num_samples],
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        for start in range(0, len(input_ids), batch_size)
    ]
    length = max(part.response_ids.shape[1] for part in parts)
    joined = {}
    for name, fill in (("response_ids", pad_token_id), ("response_mask", False), ("logprobs", 0.0)):
        rows = [getattr(part, name) for part in parts]
        joined[name] = torch.cat([pad(x, (0, length - x.shape[1]), value=fill) for x in rows])
    for name in ("input_ids", "attention_mask", "finished"):
        joined[name] = torch.cat([getattr(part, name) for part in parts])
    return Rollout(**joined)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    sampling: Sampling,
    uniforms: torch.Tensor,
    eos_token_id: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield per step the rows still running (N,), their next tokens (N,) and those tokens' log-probabilities (N,).

    The prompt is computed once, whatever the number of its responses (a row of ``uniforms`` each). Rows that have
    ended leave the batch and its key-value cache, so they cost nothing more. Ends when none is left or after
    ``max_new_tokens``.
    """
    positioned = takes_positions(model)
    num_samples = len(uniforms) // len(input_ids)
    rows = torch.arange(len(uniforms), device=input_ids.device)
    mask = attention_mask.long()
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    tokens = input_ids
    for step in range(sampling.max_new_tokens):
        inputs = {"position_ids": positions} if positioned else {}
        output = model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs
        )
        logits = output.logits[:, -1]
        if step == 0 and num_samples > 1:
            logits, mask, positions = (x.repeat_interleave(num_samples, 0) for x in (logits, mask, positions))
            cache.batch_repeat_interleave(num_samples)
        chosen, scores = draw(logits, sampling, uniforms[rows, step])
        yield rows, chosen, scores
        running = chosen != eos_token_id
        if not running.all():
            if not running.any():
                return
            keep = running.nonzero().squeeze(1)
            rows, chosen, mask, positions = rows[keep], chosen[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        tokens = chosen[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)


def draw(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V), (N,) -> tokens (N,), their log-probabilities (N,) under ``sampling.scored``.

    By the inverse of the cumulative distribution: several times faster on a CPU than ``torch.multinomial``.
    """
    logp = log_softmax(logits, **sampling.scored)
    if sampling.temperature == 0:
        tokens = logp.argmax(-1)
    else:
        # Without a filter these are probabilities already; top-k and top-p leave something to be divided by.
        cumulative = _filtered(logp, sampling).exp().cumsum(-1)
        total = cumulative[:, -1]
        # Strictly below the total, so that the token found always has a probability above zero.
        target = torch.minimum(uniforms.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def _filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Keep the ``top_k`` likeliest tokens, then the smallest set of at least ``top_p`` probability (Holtzman 2020)."""
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # the likeliest token always stays
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits
