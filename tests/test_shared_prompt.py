"""A prompt with two answers in one row: the numbers and gradients of two rows."""

from dschat.data.collate_answers import collate_pairs
from dschat.functional import sequence_logprobs
from dschat.models.attention import use_fast_attention
from dschat.models.shared_prompt import can_share_prompts, make_tree, tree_logprobs
from dschat.rlhf import answer_logprobs
from dschat.rlhf.answer_logprobs import score_answers
from tests.families import FAMILIES, tiny_config, tiny_model

import pytest
import torch
import transformers

PROMPTS, CHOSEN, REJECTED = (9, 4, 7, 1), (3, 8, 1, 5), (6, 2, 4, 1)


@pytest.fixture
def batch(tokenizer):
    generator = torch.Generator().manual_seed(1)

    def ids(size):
        return torch.randint(4, len(tokenizer), (size,), generator=generator).tolist()

    rows = []
    for prompt_len, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        prompt = ids(prompt_len)
        rows.append(
            {"chosen_ids": prompt + ids(chosen), "rejected_ids": prompt + ids(rejected), "prompt_len": prompt_len}
        )
    return collate_pairs(rows, 3, tokenizer.pad_token_id)  # the last one only fills up


def fast(model):
    use_fast_attention(model)
    return model


def count_tokens(model):
    """The numbers of tokens that each forward of the model gets."""
    sizes = []
    model.register_forward_pre_hook(
        lambda _, args, options: sizes.append(options["input_ids"].numel()), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_log_probabilities_and_gradients_are_those_of_two_rows(tokenizer, batch, family, monkeypatch):
    found = []
    for share_below in (0.0, 2.0):
        monkeypatch.setattr(answer_logprobs, "SHARE_BELOW", share_below)
        model = fast(tiny_model(family, tokenizer))
        sizes = count_tokens(model)
        rows = score_answers(model, model, batch)
        weights = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7]])
        (rows.real().logps * weights).sum().backward()
        found.append((rows.real().logps.detach(), [p.grad for p in model.parameters() if p.grad is not None], sizes))
    (plain, plain_gradients, plain_sizes), (tree, tree_gradients, tree_sizes) = found
    assert plain_sizes == [2 * 4 * 15] and tree_sizes == [4 * (9 + 8 + 6)]
    torch.testing.assert_close(tree, plain, rtol=1e-4, atol=1e-5)
    assert len(tree_gradients) == len(plain_gradients)
    for one, other in zip(tree_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 + 1e-4 * float(other.abs().max()))


def test_answers_do_not_see_each_other(tokenizer, batch):
    """Nor does either end of the padding: other tokens there change nothing."""
    model = fast(tiny_model("llama", tokenizer))
    tree = make_tree(batch["input_ids"], batch["attention_mask"], batch["response_mask"])
    prompt, first, _ = tree.sizes
    before = [sequence_logprobs(*x) for x in zip(tree_logprobs(model, tree), tree.answer_masks, strict=True)]
    changed = tree.input_ids.clone()
    changed[:, prompt : prompt + first] = 7
    after = tree_logprobs(model, tree._replace(input_ids=changed))
    assert torch.equal(sequence_logprobs(after[1], tree.answer_masks[1]), before[1])
    real = tree.attention_mask[:, 0].diagonal(dim1=1, dim2=2)
    garbage = torch.where(real, tree.input_ids, 11)
    after = tree_logprobs(model, tree._replace(input_ids=garbage))
    for logprobs, mask, expected in zip(after, tree.answer_masks, before, strict=True):
        assert torch.equal(sequence_logprobs(logprobs, mask), expected)


def test_rows_stay_apart_where_sharing_saves_nothing_or_is_not_exact(tokenizer):
    assert not can_share_prompts(fast(tiny_model("bloom", tokenizer)))
    assert not can_share_prompts(tiny_model("llama", tokenizer))  # its attention may not take any mask
    sliding = tiny_config("mistral", tokenizer)
    sliding.sliding_window = 4
    assert not can_share_prompts(fast(transformers.AutoModelForCausalLM.from_config(sliding)))
    model = fast(tiny_model("llama", tokenizer))
    sizes = count_tokens(model)
    rows = [{"chosen_ids": [5] + [6] * 9, "rejected_ids": [5] + [7] * 9, "prompt_len": 1}]
    score_answers(model, model, collate_pairs(rows, 1, tokenizer.pad_token_id))
    assert sizes == [2 * 10]  # 1 + 9 + 9 tokens of 20 are no gain
