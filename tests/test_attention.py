"""Attention in bf16 on a CPU: what float64 says, and where torch's own takes over."""

from types import SimpleNamespace

import dschat.models.attention as module
from dschat.models.attention import NAME, attention, use_fast_attention
from dschat.models.forward import model_inputs
from tests.families import FAMILIES, ragged_prompts, tiny_model

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention

BF16 = torch.bfloat16
LAYER = SimpleNamespace(is_causal=True, num_key_value_groups=1)


def inputs(rows, heads, queries, size, groups=1, keys=None, dtype=BF16):
    """As a model makes them: (B, T, H, D) in memory."""
    generator = torch.Generator().manual_seed(0)

    def one(number, length):
        x = torch.randn(rows, length, number, size, generator=generator).to(dtype)
        return x.transpose(1, 2).requires_grad_()

    keys = keys or queries
    return one(heads, queries), one(heads // groups, keys), one(heads // groups, keys)


def left_padded(rows: int, length: int, step: int) -> torch.Tensor:
    """(B, 1, T, T): row r begins with r * step pads."""
    real = torch.arange(length) >= torch.arange(rows)[:, None] * step
    return (torch.ones(length, length, dtype=torch.bool).tril() & real[:, None])[:, None]


def exact(query, key, value, mask, scaling):
    """The definition, in float64. (B, Q, H, D)."""
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    scores = scaling * q @ k.repeat_interleave(groups, 1).transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    result = scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(groups, 1)
    return result.transpose(1, 2), (q, k, v)


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [1, 7, 130, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_result_and_gradients_are_those_of_float64(groups, length, masked, monkeypatch):
    """Lengths of one block of queries, of two, and of those whose probabilities are computed again; few rows each."""
    monkeypatch.setattr(module, "_SCORES", 4 * min(length, 128) * length * 2)
    query, key, value = inputs(3, 4, length, 16, groups)
    mask = left_padded(3, length, length // 3) if masked else None
    causal = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
    expected, leaves = exact(query, key, value, causal, 0.3)
    result, weights = attention(LAYER, query, key, value, mask, scaling=0.3)
    assert weights is None and result.shape == (3, length, 4, 16) and result.dtype == BF16
    attending = causal.any(-1).expand(3, 1, length).transpose(1, 2)[..., None]
    assert far(result * attending, expected * attending) < 0.01
    with torch.no_grad():
        assert attention(LAYER, query, key, value, mask, scaling=0.3)[0].equal(result)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(BF16) * attending
    result.backward(upstream)
    expected.backward(upstream.double())
    for ours, theirs in zip((query, key, value), leaves, strict=True):
        assert ours.grad.dtype == BF16
        if theirs.grad.any():  # with one key, or none, the scores have no gradient
            assert far(ours.grad, theirs.grad) < 0.015
        else:
            assert ours.grad.abs().max() < 0.01


def test_one_query_sees_the_cache_that_the_mask_shows():
    query, key, value = inputs(5, 4, 1, 16, 2, keys=33)
    mask = (torch.arange(33) <= torch.tensor([0, 5, 32, 7, 20])[:, None])[:, None, None]
    expected, _ = exact(query, key, value, mask, 0.25)
    assert far(attention(LAYER, query, key, value, mask)[0], expected) < 0.01
    everything, _ = exact(query, key, value, None, 0.25)
    assert far(attention(LAYER, query, key, value, None)[0], everything) < 0.01


@pytest.mark.parametrize(("layer", "given"), [(True, False), (False, None), (False, True)])
def test_without_a_mask_the_layer_says_whether_it_is_causal_and_the_call_outweighs_it(layer, given):
    query, key, value = inputs(2, 2, 9, 8)
    result, _ = attention(SimpleNamespace(is_causal=layer), query, key, value, None, is_causal=given)
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if given else None
    expected, _ = exact(query, key, value, mask, 8**-0.5)
    assert far(result, expected) < 0.01


def test_what_attends_to_nothing_is_finite():
    query, key, value = inputs(2, 2, 200, 8)
    result, _ = attention(LAYER, query, key, value, torch.zeros(2, 1, 200, 200, dtype=torch.bool))
    result.sum().backward()
    assert all(torch.isfinite(x).all() for x in (result, query.grad, key.grad, value.grad))


def test_elsewhere_it_is_torchs_own(monkeypatch):
    monkeypatch.setattr(module, "_forward", None)
    query, key, value = inputs(2, 4, 9, 8, 2, dtype=torch.float32)
    mask = left_padded(2, 9, 2)
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    own = scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask)
    assert attention(layer, query, key, value, mask)[0].equal(own.transpose(1, 2))
    half = inputs(2, 4, 9, 8)
    torch.manual_seed(0)
    dropped = attention(LAYER, *half, None, dropout=0.5)[0]
    torch.manual_seed(0)
    again = scaled_dot_product_attention(*half, dropout_p=0.5, is_causal=True)
    assert dropped.equal(again.transpose(1, 2))
    with pytest.raises(ValueError, match="softcap"):
        attention(LAYER, *half, None, softcap=30.0)


@pytest.mark.parametrize(("length", "keeps"), [(256, True), (257, False)])
def test_memory_of_long_sequences_grows_with_their_tokens(length, keeps):
    saved = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attention(LAYER, *inputs(1, 2, length, 4), None)
    probabilities = [x for x in saved if x.dtype == BF16 and x.shape[-1] > 4]  # not query, key, value, mask
    assert bool(probabilities) == keeps


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same_with_either(family, tokenizer, tmp_path):
    model = tiny_model(family, tokenizer, scale=2.0).to(BF16)
    ids, mask = ragged_prompts(tokenizer)
    both = []
    for fast in (False, True):
        if fast:
            before = model.config._attn_implementation
            use_fast_attention(model)
            assert model.config._attn_implementation == (NAME if before == "sdpa" else before)
        with torch.no_grad():
            both.append(model(**model_inputs(model, ids, mask)).logits[mask].float())
    assert (both[0] - both[1]).abs().max() < 0.05 * both[0].abs().max()
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert type(model).from_pretrained(tmp_path).config._attn_implementation != NAME
