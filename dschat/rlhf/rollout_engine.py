"""Which engine samples: answers in slots (`slots.py`) where the model is fit for it, else the plain loop."""

from dataclasses import replace
from typing import Any

from dschat.functional import token_logprobs
from dschat.models.attention import NAME
from dschat.models.forward import attends_to_all, takes_positions
from dschat.models.packed import token_logits
from dschat.rlhf.rollout import Rollout, generate, row_uniforms
from dschat.rlhf.slots import SlotDecoder
from dschat.rlhf.specs import SLOTS, Sampling

import torch
from transformers import PreTrainedModel


def why_not_slots(model: PreTrainedModel) -> str | None:
    """The reason for which a model cannot be decoded in slots; None where it can."""
    if model.config._attn_implementation != NAME:
        return f"its attention is {model.config._attn_implementation}"
    if not takes_positions(model):
        return "it counts positions from the mask"
    if not attends_to_all(model):
        return "some of its layers do not attend to all that came before"
    return None


def create_decoder(
    name: str,
    model: PreTrainedModel,
    sampling: Sampling,
    *,
    eos_token_id: int,
    pad_token_id: int,
    limit: float,
) -> tuple[SlotDecoder | None, str | None]:
    """The rollout engine of that name; None is the plain loop. And a line to print where it is not the one asked for.

    Either must agree with a forward of the model, which is in eval mode: a few answers to made-up prompts of different
    lengths are sampled at temperature 1, and their log-probabilities may differ from those of the forward by ``limit``
    nats. On several ranks all call it.

    Raises:
        RuntimeError: even the plain loop does not agree.
    """
    embeddings: Any = model.get_input_embeddings()
    left_out = {*sampling.banned_ids, eos_token_id}
    vocabulary = [i for i in range(embeddings.num_embeddings) if i not in left_out]
    size = min(8, sampling.max_new_tokens)
    ids = torch.tensor(vocabulary, device=model.device)[torch.arange(24, device=model.device) * 7 % len(vocabulary)]
    mask = torch.arange(8, device=ids.device) >= torch.tensor([[0], [5], [3]], device=ids.device)
    few = replace(sampling, max_new_tokens=size, temperature=1.0)
    uniforms = row_uniforms(6, size, 0)
    ends: Any = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    prompts = ids.view(3, 8).masked_fill(~mask, pad_token_id), mask

    def gap(rollout: Rollout) -> float:
        both = torch.cat([rollout.input_ids, rollout.response_ids], 1)
        both_mask = torch.cat([rollout.attention_mask, rollout.response_mask], 1)
        with torch.no_grad():
            answers = both_mask.clone()
            answers[:, : rollout.input_ids.shape[1]] = False
            logits = token_logits(model, model, both, both_mask, answers)
        logprobs = token_logprobs(logits, both[answers][None], **few.scored)
        return (logprobs[0] - rollout.logprobs[rollout.response_mask]).abs().max().item()

    reason = why_not_slots(model) if name == SLOTS else ""
    if reason is None:
        decoder = SlotDecoder()
        try:
            found = gap(decoder.generate(model, *prompts, few, uniforms, batch_size=2, **ends))
            if found <= limit:
                return decoder, f"decoding without CUDA graphs: {decoder.problem}" if decoder.problem else None
            reason = f"it is {found:.1e} nats away from a forward of the model"
        except Exception as error:  # whatever a family's code does with our cache, the plain loop can do
            reason = " ".join(str(error).split())[:200]
    found = gap(generate(model, *prompts, few, uniforms, **ends))
    if not found <= limit:
        raise RuntimeError(f"sampled log-probabilities are {found:.1e} nats away from a forward of the model")
    return None, f"rollout engine hf in place of slots: {reason}" if name == SLOTS else None
