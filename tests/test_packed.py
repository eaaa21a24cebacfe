"""Rows laid end to end: the numbers and gradients of padded rows, from real tokens alone."""

import dschat.models.packed as module
from dschat.data.collate_answers import collate_pairs
from dschat.data.loader import collate_rankings
from dschat.functional import token_logprobs
from dschat.models.attention import use_fast_attention
from dschat.models.forward import model_inputs
from dschat.models.load import disable_dropout
from dschat.models.packed import _groups, can_pack, on_tokens, pack, token_logits
from dschat.models.rankings import ranking_scores
from dschat.models.scorer import Scorer
from dschat.rlhf.answer_logprobs import score_answers
from tests.families import FAMILIES, count_tokens, tiny_config, tiny_model

import numpy as np
import pytest
import torch
import transformers

PACKED = [family for family in FAMILIES if family != "bloom"]
PROMPTS, CHOSEN, REJECTED = (9, 4, 7, 1), (3, 8, 1, 5), (6, 2, 4, 1)


def fast(model):
    use_fast_attention(model)
    return model


@pytest.fixture(params=[1, 3])
def num_groups(request, monkeypatch):
    """Of the four rows of `ragged`."""
    monkeypatch.setattr(module, "_GROUP_ON_CPU", {1: 2.0**14, 3: 46.0}[request.param])
    return request.param


def ragged(tokenizer, gaps: bool = False):
    """ids, mask, wanted of rows of 7, 12, 1 and 10 tokens, padded on either side or, with ``gaps``, anywhere."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, len(tokenizer), (4, 12), generator=generator)
    mask = torch.ones(4, 12, dtype=torch.bool)
    mask[0, :5] = mask[2, 1:] = mask[3, 0] = mask[3, 11] = False
    if gaps:
        mask[1, 4:6] = mask[3, 5] = False
    wanted = mask & (torch.rand(4, 12, generator=generator) < 0.6)
    first = mask.int().argmax(1)
    wanted[torch.arange(4), first] = False  # nothing predicts the first token
    return ids, mask, wanted


def plain_logits(model, ids, mask, wanted):
    """Of a model in Hugging Face's own attention, on padded rows."""
    return model(**model_inputs(model, ids, mask)).logits[:, :-1][wanted[:, 1:]]


def gradients(model, loss) -> list[torch.Tensor]:
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def assert_gradients_equal(found, expected) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 + 1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_padded_rows(tokenizer, family, checkpointing, num_groups):
    ids, mask, wanted = ragged(tokenizer)
    assert len(pack(ids, mask).rows.shapes) == num_groups
    plain, packed = tiny_model(family, tokenizer), fast(tiny_model(family, tokenizer))
    if checkpointing:
        disable_dropout(packed)
        packed.train().gradient_checkpointing_enable({"use_reentrant": False})
    sizes = count_tokens(packed)
    expected = plain_logits(plain, ids, mask, wanted)
    found = token_logits(packed, packed, ids, mask, wanted)
    assert sizes == [mask.numel() if family == "bloom" else mask.sum()]
    torch.testing.assert_close(found, expected[None], rtol=1e-4, atol=1e-4)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    assert_gradients_equal(gradients(packed, (found[0] * weights).sum()), gradients(plain, (expected * weights).sum()))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_in_bf16_rounding_is_all_that_differs(tokenizer, family):
    ids, mask, wanted = ragged(tokenizer)
    exact = plain_logits(tiny_model(family, tokenizer, scale=2.0), ids, mask, wanted)
    model = tiny_model(family, tokenizer, scale=2.0).bfloat16()
    padded = plain_logits(model, ids, mask, wanted).float()
    packed = token_logits(fast(model), model, ids, mask, wanted)[0].float()
    assert (packed - exact).norm() < 1.5 * (padded - exact).norm() < 0.1 * exact.norm()


def test_padding_in_the_middle_of_a_row_is_left_out_too(tokenizer):
    ids, mask, _ = ragged(tokenizer, gaps=True)
    model = fast(tiny_model("llama", tokenizer))
    values = on_tokens(torch.arange(1.0, int(mask.sum()) + 1)[None], mask)
    packed = pack(ids, mask)
    assert packed.input_ids[0].tolist() == ids[mask].tolist()
    torch.testing.assert_close(packed.at_tokens(values[mask][None])[mask], values[mask])
    squeezed = torch.cat([ids[1, mask[1]], ids.new_zeros(2)])[None]
    alone = model(**model_inputs(model, squeezed, torch.arange(12)[None] < 10)).logits[0, :10]
    together = packed.run(model, model).logits[0, packed.columns[1][mask[1]]]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_rows_do_not_see_each_other_nor_what_is_at_padding(tokenizer):
    ids, mask, _ = ragged(tokenizer)
    model = fast(tiny_model("llama", tokenizer))
    wanted = mask & (torch.arange(4) == 3)[:, None] & (mask.cumsum(1) > 1)
    before = token_logits(model, model, ids, mask, wanted)
    changed = torch.where(mask & wanted.any(1, keepdim=True), ids, 7)
    assert not torch.equal(changed, ids)
    assert torch.equal(token_logits(model, model, changed, mask, wanted), before)


def test_nothing_wanted_is_a_gradient_of_zero(tokenizer):
    ids, mask, _ = ragged(tokenizer)
    for family in ("llama", "bloom"):
        model = fast(tiny_model(family, tokenizer))
        logits = token_logits(model, model, ids, mask, torch.zeros_like(mask))
        assert logits.shape == (1, 0, len(tokenizer))
        loss = token_logprobs(logits, ids[:0].view(1, 0)).sum()
        assert loss == 0 and all(not gradient.any() for gradient in gradients(model, loss))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_padded_rows(tokenizer, family, num_groups):
    ids, mask, _ = ragged(tokenizer)
    config = tiny_config(family, tokenizer)
    config.num_labels = 1
    found = []
    for attention in (lambda model: model, fast):
        torch.manual_seed(0)
        scorer = Scorer(attention(transformers.AutoModelForSequenceClassification.from_config(config)), 0.5, 2.0)
        values = scorer.eval()(ids, mask)
        assert values.shape == mask.shape
        found.append((values[mask], gradients(scorer, (values * mask)[:, ::2].square().sum())))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    assert_gradients_equal(found[1][1], found[0][1])


def test_a_row_without_tokens_is_none_to_any_other(tokenizer, num_groups):
    ids, mask, _ = ragged(tokenizer)
    model = fast(tiny_model("llama", tokenizer))
    wanted = mask & (mask.cumsum(1) > 1) & (torch.arange(4) != 1)[:, None]
    expected = token_logits(model, model, ids[[0, 2, 3]], mask[[0, 2, 3]], wanted[[0, 2, 3]])
    mask[1] = False
    torch.testing.assert_close(token_logits(model, model, ids, mask, wanted), expected, rtol=1e-4, atol=1e-4)


def test_groups_are_those_at_which_attention_has_least_to_do():
    generator = np.random.default_rng(0)
    for _ in range(40):
        lengths, cost = generator.integers(1, 12, size=7), float(generator.integers(0, 120))

        def work(groups, lengths=lengths, cost=cost):
            return sum(len(group) * int(lengths[group].max()) ** 2 + cost for group in groups)

        found = _groups(lengths, cost)
        assert sorted(torch.cat(found).tolist()) == list(range(7))
        runs = np.argsort(lengths)
        cuts = [[i + 1 for i in range(6) if bits >> i & 1] for bits in range(2**6)]
        assert work(found) == min(work(np.split(runs, cut)) for cut in cuts)


# A prompt that two rows share


@pytest.fixture
def ids(tokenizer):
    generator = torch.Generator().manual_seed(1)
    return lambda size: torch.randint(4, len(tokenizer), (size,), generator=generator).tolist()


@pytest.fixture
def batch(tokenizer, ids):
    rows = []
    for prompt_len, chosen, rejected in zip(PROMPTS, CHOSEN, REJECTED, strict=True):
        prompt = ids(prompt_len)
        rows.append(
            {"chosen_ids": prompt + ids(chosen), "rejected_ids": prompt + ids(rejected), "prompt_len": prompt_len}
        )
    return collate_pairs(rows, 3, tokenizer.pad_token_id)  # the last one only fills up


@pytest.mark.parametrize("family", PACKED)
def test_a_prompt_of_two_answers_is_computed_once(tokenizer, batch, family, num_groups):
    found = []
    for attention in (lambda model: model, fast):
        model = attention(tiny_model(family, tokenizer))
        sizes = count_tokens(model)
        rows = score_answers(model, model, batch)
        weights = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7]])
        found.append((rows.real().logps.detach(), gradients(model, (rows.real().logps * weights).sum()), sizes))
    (plain, plain_gradients, plain_sizes), (shared, shared_gradients, shared_sizes) = found
    real = sum(PROMPTS[:3]) + sum(CHOSEN[:3]) + sum(REJECTED[:3])
    filler = PROMPTS[3] + CHOSEN[3] + REJECTED[3]
    assert plain_sizes == [2 * 4 * 15] and shared_sizes == [real + filler]
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)
    assert_gradients_equal(shared_gradients, plain_gradients)


def test_answers_to_one_prompt_do_not_see_each_other(tokenizer, batch):
    model = fast(tiny_model("llama", tokenizer))
    before = score_answers(model, model, batch).logps
    for changed, same in ((0, 1), (1, 0)):
        ids = batch["input_ids"].clone()
        width, size = ids.shape[1], batch["response_mask"].shape[1]
        half = slice(4 * changed, 4 * changed + 3)
        ids[half, width - size :] = ids[half, width - size :].where(~batch["response_mask"][half], 7)
        after = score_answers(model, model, batch | {"input_ids": ids}).logps
        assert torch.equal(after[:3, same], before[:3, same])
        assert not torch.equal(after[:3, changed], before[:3, changed])


RANKED = ((5, 3, 1), (4,), (2, 6))  # tokens of the answers to each prompt


@pytest.fixture
def rankings(tokenizer, ids):
    rows = []
    for prompt_len, sizes in zip(PROMPTS, RANKED, strict=False):
        prompt, ranks = ids(prompt_len), list(range(1, len(sizes) + 1))
        answers = [prompt + ids(size) for size in sizes]
        rows.append({"input_ids": answers, "ranks": ranks, "prompt_len": prompt_len, "margin": 0.0})
    rows[2]["input_ids"][1][7] = rows[2]["input_ids"][0][7]  # and both answers begin alike
    return collate_rankings(rows, 3, tokenizer.pad_token_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_ranked_answers_is_computed_once(tokenizer, rankings, family, num_groups):
    config = tiny_config(family, tokenizer)
    config.num_labels = 1
    weights = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.0, 0.0], [-1.0, 0.7, 0.0]])
    found = []
    for attention in (lambda model: model, fast):
        torch.manual_seed(0)
        scorer = Scorer(attention(transformers.AutoModelForSequenceClassification.from_config(config))).eval()
        sizes = count_tokens(scorer.model.base_model)
        scores = ranking_scores(scorer, rankings)
        assert (scores != 0).tolist() == rankings["answer_mask"].tolist()
        found.append((scores.detach(), gradients(scorer, (scores * weights).sum()), sizes))
    (plain, plain_gradients, plain_sizes), (shared, shared_gradients, shared_sizes) = found
    padded, real = 6 * (9 + 5), sum(PROMPTS[:3]) + sum(map(sum, RANKED)) - 1
    assert plain_sizes == [padded] and shared_sizes == [padded if family == "bloom" else real]
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-5)
    assert_gradients_equal(shared_gradients, plain_gradients)


def test_only_tokens_that_are_the_same_from_the_start_on_are_shared():
    ids = torch.tensor([[5, 6, 7, 8], [0, 5, 6, 9], [4, 6, 7, 8], [5, 6, 0, 0], [5, 6, 7, 8], [0, 0, 0, 5]])
    mask = ids != 0
    packed = pack(ids, mask, torch.zeros(6, dtype=torch.int64))
    assert packed.input_ids[0].tolist() == [5, 6, 7, 8, 9, 4, 6, 7, 8]
    assert packed.position_ids[0].tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 3]
    assert torch.equal(packed.at_tokens(packed.input_ids)[mask], ids[mask])
    values = torch.arange(9.0).view(1, 1, 9, 1).requires_grad_()
    torch.cat([part.flatten() for part in packed.rows.spread(values)]).sum().backward()
    assert values.grad.flatten().tolist() == [5, 4, 2, 2, 1, 1, 1, 1, 1]  # the rows that have each token


def test_a_row_like_one_that_is_like_another_is_computed_by_itself():
    ids = torch.tensor([[5, 6], [5, 7], [5, 7]])
    packed = pack(ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor([0, 0, 1]))
    assert packed.input_ids[0].tolist() == [5, 6, 7, 5, 7]
    assert torch.equal(packed.at_tokens(packed.input_ids), ids)


def test_what_stands_at_padding_is_not_shared():
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    for mask in ([[1, 1, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 0]]):
        mask = torch.tensor(mask).bool()
        packed = pack(ids, mask, torch.tensor([0, 0]))
        assert packed.input_ids[0].tolist() == [5, 6, 7]
        assert torch.equal(packed.at_tokens(packed.input_ids)[mask], ids[mask])


# Who is packed


def test_what_would_not_be_exact_is_padded(tokenizer):
    assert can_pack(fast(tiny_model("llama", tokenizer)))
    assert not can_pack(fast(tiny_model("bloom", tokenizer)))
    assert not can_pack(tiny_model("llama", tokenizer))  # its attention may not take any mask
    sliding = tiny_config("mistral", tokenizer)
    sliding.sliding_window = 4
    assert not can_pack(fast(transformers.AutoModelForCausalLM.from_config(sliding)))

    class FromTheHub(transformers.LlamaForCausalLM):
        pass

    assert not can_pack(fast(FromTheHub(tiny_config("llama", tokenizer))))


def test_a_layer_that_keeps_the_rows_from_its_attention_is_found_out(tokenizer):
    ids, mask, wanted = ragged(tokenizer)
    model = fast(tiny_model("llama", tokenizer))
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, options: (args, options | {"attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(RuntimeError, match="LlamaForCausalLM does not take packed rows"):
        token_logits(model, model, ids, mask, wanted)
