"""Answers of one model to many dialogues, as reward sources and judges take them."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dschat.data.loader import collate_prompts
from dschat.data.records import Message
from dschat.data.templates import encode_prompt
from dschat.models.precision import tolerance
from dschat.rlhf.rewards import Samples
from dschat.rlhf.rollout import Rollout, banned_token_ids, generate, row_uniforms
from dschat.rlhf.rollout_engine import create_decoder
from dschat.rlhf.samples import describe_rollout
from dschat.rlhf.specs import BEAM, BEST_OF_N, GREEDY, SLOTS, AnswerSpec, Sampling

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
Track = Callable[[Sequence[Rows]], Iterable[Rows]]  # shows how far the batches are


def prompt_rows(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Sequence[Message]], records: Sequence[str] | None = None
) -> Rows:
    """Dialogues as the rows of prompts that the functions below take.

    ``records``: JSON text of each, for judges, as in the rows of `dschat.data.stages.tokenize_prompts`.
    """
    given = records if records is not None else ["{}"] * len(dialogues)
    return [
        {"prompt_ids": encode_prompt(tokenizer, messages), "messages": messages, "record": record}
        for messages, record in zip(dialogues, given, strict=True)
    ]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    decoding: str,
    spec: AnswerSpec,
    track: Track = iter,
) -> Samples:
    """One answer to each of ``rows`` by one of DECODINGS; for best_of_n those to choose from, for `best_of`."""
    options: Any = {"batch_size": spec.batch_size, "track": track}
    if decoding == BEAM:
        return beam_answers(model, tokenizer, rows, spec.sampling.max_new_tokens, spec.num_beams, **options)
    greedy = dataclasses.replace(spec.sampling, temperature=0.0)
    options["num_samples"] = spec.best_of_n if decoding == BEST_OF_N else 1
    sampling = greedy if decoding == GREEDY else spec.sampling
    return sample_answers(model, tokenizer, rows, sampling, spec.seed, **options)


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    sampling: Sampling,
    seed: int,
    *,
    num_samples: int = 1,
    batch_size: int = 16,
    track: Track = iter,
) -> Samples:
    """``num_samples`` answers to each of ``rows``, neighbours in the result; at temperature 0 the greedy ones.

    The random numbers are those of the seed and of the answer's place. So the same seed gives the same answers at any
    ``batch_size`` (answers sampled at once, though never less than those to one prompt), and the answers of two models
    differ by the models alone. Not checked: that a prompt and its answer fit the model's context.

    ``track`` goes through the batches and may show how far it is.
    """
    sampling = dataclasses.replace(sampling, banned_ids=sampling.banned_ids + _banned(model, tokenizer))
    uniforms = row_uniforms(len(rows) * num_samples, sampling.max_new_tokens, seed)
    drawn = iter(uniforms.split(num_samples))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.eval()
    decoder, _ = create_decoder(SLOTS, model, sampling, limit=tolerance(model.dtype), **ends)

    def draw(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Rollout:
        given = (model, input_ids, attention_mask, sampling, torch.cat([next(drawn) for _ in input_ids]))
        if decoder is None:
            return generate(*given, **ends)
        return decoder.generate(*given, batch_size=len(input_ids), **ends)

    return _in_batches(model, tokenizer, rows, max(1, batch_size // num_samples), track, draw)


def beam_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    max_new_tokens: int,
    num_beams: int,
    *,
    batch_size: int = 16,
    track: Track = iter,
) -> Samples:
    """The answer to each of ``rows`` that Hugging Face's beam search finds: of the ``num_beams`` best the one with the
    highest mean log-probability of its tokens. ``batch_size`` counts beams; the rest as in `sample_answers`."""
    search: Any = model.generate
    options = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        suppress_tokens=list(_banned(model, tokenizer)),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def find(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Rollout:
        with _no_defaults(model):
            whole = search(input_ids, attention_mask=attention_mask.long(), generation_config=options)
        response_ids = whole[:, input_ids.shape[1] :]
        ends = response_ids == tokenizer.eos_token_id
        # A row that never ends has all the tokens there are.
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, response_ids.shape[1])
        response_mask = torch.arange(response_ids.shape[1], device=lengths.device) < lengths[:, None]
        logprobs = torch.zeros(response_ids.shape)  # nothing was drawn
        return Rollout(input_ids, attention_mask, response_ids, response_mask, logprobs, ends.any(1))

    return _in_batches(model, tokenizer, rows, max(1, batch_size // num_beams), track, find)


def best_of(samples: Samples, scores: Sequence[float | None], n: int) -> tuple[Samples, list[float | None]]:
    """Of every ``n`` neighbours the one with the highest score, and that score: the first of equals, one without a
    score only where none has any."""
    order = [-math.inf if score is None else score for score in scores]
    kept = [max(range(start, start + n), key=order.__getitem__) for start in range(0, len(samples), n)]
    chosen = {name: [values[i] for i in kept] for name, values in vars(samples).items()}
    return Samples(**chosen), [scores[i] for i in kept]


def num_tokens(samples: Samples) -> list[int]:
    """Of each response, end token included."""
    return [len(ids) - size for ids, size in zip(samples.token_ids, samples.prompt_lens, strict=True)]


def _in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    num_prompts: int,
    track: Track,
    answer: Callable[[torch.Tensor, torch.Tensor], Rollout],
) -> Samples:
    """``answer`` for the left-padded ids and mask of ``num_prompts`` rows at a time, in eval mode."""
    assert tokenizer.pad_token_id is not None
    model.eval()
    parts = []
    for batch in track([rows[start : start + num_prompts] for start in range(0, len(rows), num_prompts)]):
        prompts = collate_prompts(batch, tokenizer.pad_token_id)
        rollout = answer(prompts["input_ids"].to(model.device), prompts["attention_mask"].to(model.device))
        parts.append(describe_rollout(rollout, batch, tokenizer))
    names = [field.name for field in dataclasses.fields(Samples)]
    return Samples(**{name: [value for part in parts for value in getattr(part, name)] for name in names})


def _banned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    embeddings: Any = model.get_input_embeddings()
    return banned_token_ids(tokenizer, embeddings.num_embeddings)


@contextmanager
def _no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `generate` does what it is told: many models bring a temperature or a penalty of their own."""
    own: Any = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
