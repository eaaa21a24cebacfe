"""Two answers to one prompt in one row, so that the prompt is computed once: a tree of tokens with two branches."""

from typing import NamedTuple

from dschat.functional import token_logprobs
from dschat.models.attention import NAME
from dschat.models.forward import attends_to_all, takes_positions

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Tree(NamedTuple):
    """B rows of a prompt, padded on the left to P columns, and two answers, padded on the right to C and R columns.

    Neither answer sees the other, and both stand where they would behind the prompt alone.
    """

    input_ids: Tensor  # (B, W), W = P + C + R
    position_ids: Tensor  # (B, W)
    attention_mask: Tensor  # (B, 1, W, W) bool: row query, column key, True where attended to
    answer_masks: tuple[Tensor, Tensor]  # (B, C), (B, R) bool
    sizes: tuple[int, int, int]  # P, C, R


def can_share_prompts(family: PreTrainedModel) -> bool:
    """Whether positions and masks may be given freely: not with BLOOM's ALiBi, nor with sliding windows."""
    return family.config._attn_implementation == NAME and takes_positions(family) and attends_to_all(family)


def make_tree(input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tree:
    """From 2B sequences padded on the left, the first answers above the second ones, each behind its prompt.

    Args:
        input_ids, attention_mask: (2B, T).
        response_mask: (2B, S): over the last S columns, True on the answer. A row without an answer is all prompt.
    """
    num_rows, width = len(input_ids) // 2, input_ids.shape[1]
    answer_sizes = response_mask.sum(1).view(2, num_rows)
    prompt_sizes = attention_mask[:num_rows].sum(1) - answer_sizes[0]
    sizes = (int(prompt_sizes.max()), *answer_sizes.amax(1).tolist())
    device = input_ids.device

    def columns(size: int, starts: Tensor, half: int) -> Tensor:
        """(B, size): the ids from column ``starts`` (B,) on."""
        index = starts[:, None] + torch.arange(size, device=device)
        return input_ids[half * num_rows :][:num_rows].gather(1, index.clamp(0, width - 1))

    prompts = columns(sizes[0], width - answer_sizes[0] - sizes[0], 0)
    answers = [columns(size, width - answer_sizes[half], half) for half, size in enumerate(sizes[1:])]
    prompt_mask = torch.arange(sizes[0], device=device) >= sizes[0] - prompt_sizes[:, None]
    masks = [torch.arange(size, device=device) < answer_sizes[half][:, None] for half, size in enumerate(sizes[1:])]

    places = [torch.arange(size, device=device).expand(num_rows, -1) for size in sizes]
    positions = [places[0] - (sizes[0] - prompt_sizes[:, None]), *(p + prompt_sizes[:, None] for p in places[1:])]
    position_ids = torch.cat(positions, 1).clamp(min=0)
    real = torch.cat([prompt_mask, *masks], 1)
    branch = torch.arange(3, device=device).repeat_interleave(torch.tensor(sizes, device=device))
    visible = torch.ones(len(branch), len(branch), dtype=torch.bool, device=device).tril()
    visible &= ~((branch[:, None] == 2) & (branch == 1))
    mask = (visible & real[:, None, :])[:, None]
    return Tree(torch.cat([prompts, *answers], 1), position_ids, mask, (masks[0], masks[1]), sizes)


def tree_logprobs(model: nn.Module, tree: Tree) -> tuple[Tensor, Tensor]:
    """(B, C), (B, R) float32: the log-probabilities of the tokens of the first and of the second answers.

    ``model`` is the module or its engine.
    """
    prompt, first, second = tree.sizes
    inputs = {"input_ids": tree.input_ids, "attention_mask": tree.attention_mask, "position_ids": tree.position_ids}
    logits = model(**inputs, use_cache=False, logits_to_keep=first + second + 1).logits[:, :-1]
    logprobs = token_logprobs(logits, tree.input_ids[:, prompt:])
    # The second answers' first tokens follow the prompt, not the end of the first answers.
    start = token_logprobs(logits[:, :1], tree.input_ids[:, prompt + first :][:, :1])
    return logprobs[:, :first], torch.cat([start, logprobs[:, first + 1 :]], 1)
