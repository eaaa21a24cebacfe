"""Log-probabilities and entropies against Python floats, and their gradients against float64 autograd."""

import math

import dschat.functional.logprobs as logprobs_module
from dschat.functional import entropy, full_kl, token_logprobs

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
LN3 = math.log(3)


def log_softmax(row):
    """The oracle: Python floats, the largest logit taken out first."""
    top = max(row)
    normalizer = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - normalizer for x in row]


@pytest.fixture
def random_logits():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 3


def test_token_logprobs_by_hand():
    # Logits 0 and ln 3: probabilities 1/4 and 3/4.
    logits = torch.tensor([[[0.0, LN3], [0.0, LN3]]], requires_grad=True)
    logps = token_logprobs(logits, torch.tensor([[0, 1]]))
    assert_close(logps, torch.tensor([[math.log(0.25), math.log(0.75)]]))
    (logps * torch.tensor([[1.0, 2.0]])).sum().backward()
    # d log p_token / d logits = one_hot - p, times the incoming 1 and 2.
    assert_close(logits.grad, torch.tensor([[[0.75, -0.75], [-0.5, 0.5]]]))


@pytest.mark.parametrize("block", [1, 8, 2**20])
def test_token_logprobs_of_a_slice_in_blocks(random_logits, monkeypatch, block):
    # Blocks of one position, of two and of everything; the slice is not contiguous, as after a prompt.
    monkeypatch.setattr(logprobs_module, "_CPU_BLOCK", block)
    logits = random_logits.requires_grad_()
    ids = torch.tensor([[0, 1, 2], [3, 3, 3], [2, 0, 1]])
    logps = token_logprobs(logits[:, 1:-1], ids)
    logps.sum().backward()
    for b in range(3):
        for r in range(3):
            oracle = log_softmax(logits[b, r + 1].tolist())
            assert logps[b, r].item() == pytest.approx(oracle[ids[b, r]], rel=1e-5)
            slope = [(1.0 if v == ids[b, r] else 0.0) - math.exp(oracle[v]) for v in range(4)]
            assert logits.grad[b, r + 1].tolist() == pytest.approx(slope, abs=1e-6)
    assert not logits.grad[:, [0, -1]].any()


def test_token_logprobs_takes_flat_rows(random_logits):
    ids = torch.arange(15) % 4
    assert_close(
        token_logprobs(random_logits.view(15, 4), ids), token_logprobs(random_logits, ids.view(3, 5)).view(15)
    )
    assert token_logprobs(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_token_logprobs_of_bfloat16_is_float32_arithmetic():
    logits = torch.tensor([[[1.0, 2.0, 3.0, 10.0]]], dtype=torch.bfloat16, requires_grad=True)
    logps = token_logprobs(logits, torch.tensor([[1]]))
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(log_softmax([1, 2, 3, 10])[1], rel=1e-6)
    logps.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    # 1 - exp(2 - 10 - log(1 + ...)) = 0.99966 for the token itself.
    assert logits.grad[0, 0].tolist() == pytest.approx([-1.234e-4, 0.99966, -9.117e-4, -0.99863], rel=5e-3)


def test_token_logprobs_survives_extreme_logits():
    logits = torch.tensor([[[1e4, 0.0], [0.0, -INF], [0.0, torch.finfo(torch.float32).min]]], requires_grad=True)
    logps = token_logprobs(logits, torch.tensor([[1, 0, 0]]))
    assert logps.tolist() == [[-1e4, 0.0, 0.0]]
    logps.sum().backward()
    assert logits.grad.tolist() == [[[-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]


def test_token_logprobs_keeps_unused_rows_out_of_the_gradient():
    logits = torch.tensor([[[0.0, LN3], [NAN, INF]]], requires_grad=True)
    logps = token_logprobs(logits, torch.tensor([[0, 0]]))
    torch.where(torch.tensor([[True, False]]), logps, 0.0).sum().backward()
    assert_close(logits.grad, torch.tensor([[[0.75, -0.75], [0.0, 0.0]]]))


def test_token_logprobs_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"\(1, 3, 4\) for token ids of shape \(1, 2\)"):
        token_logprobs(torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
def test_entropy_of_a_uniform_distribution_is_log_v(vocab):
    assert_close(entropy(torch.full((2, 3, vocab), 5.0)), torch.full((2, 3), math.log(vocab)))


def test_entropy_and_its_gradient_by_hand():
    logits = torch.tensor([[[0.0, LN3]]], requires_grad=True)
    value = entropy(logits)
    # 1/4 ln 4 + 3/4 ln(4/3) = 0.3465736 + 0.2157616
    assert value.item() == pytest.approx(0.5623351, rel=1e-6)
    value.sum().backward()
    # dH/dx_i = -p_i (ln p_i + H): -1/4 (-1.3862944 + 0.5623351)
    assert logits.grad[0, 0].tolist() == pytest.approx([0.2059898, -0.2059898], rel=1e-5)


@pytest.mark.parametrize("banned", [-INF, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -65504.0])
def test_a_banned_token_contributes_nothing(banned):
    logits = torch.tensor([[[0.0, banned, LN3, banned]]], requires_grad=True)
    reference = torch.tensor([[[0.0, banned, 0.0, banned]]])
    assert entropy(logits).item() == pytest.approx(0.5623351, rel=1e-6)
    assert full_kl(logits, reference).item() == pytest.approx(0.1308120, rel=1e-5)
    (3 * entropy(logits) + full_kl(logits, reference)).sum().backward()
    # Entropy slope 0.2059898 as above, KL slope p_i (ln p_i - ln q_i - KL) = 1/4 (ln 1/2 - 0.1308120) = -0.2059898.
    assert logits.grad[0, 0].tolist() == pytest.approx([0.4119796, 0.0, -0.4119796, 0.0], abs=1e-6)


@pytest.mark.parametrize("block", [1, 8, 2**20])
def test_entropy_and_its_gradient_in_blocks(random_logits, monkeypatch, block):
    # Blocks of one position, of two and of everything; the slice is not contiguous, as after a prompt.
    monkeypatch.setattr(logprobs_module, "_CPU_BLOCK", block)
    logits = random_logits.requires_grad_()
    upstream = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    uncertainty = entropy(logits[:, 1:-1])
    uncertainty.backward(upstream)
    exact = logits.detach().double().requires_grad_()
    logp = exact[:, 1:-1].log_softmax(-1)
    expected = -(logp.exp() * logp).sum(-1)
    expected.backward(upstream.double())
    assert_close(uncertainty, expected.float(), rtol=1e-5, atol=1e-5)
    assert_close(logits.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)
    assert uncertainty[2, 1].item() == pytest.approx(
        -math.fsum(math.exp(p) * p for p in log_softmax(logits[2, 2].tolist())), abs=1e-5
    )


def test_entropy_of_bfloat16_is_float32_arithmetic():
    logits = torch.tensor([[[0.0, 1.0, 3.0]]], dtype=torch.bfloat16, requires_grad=True)
    logp = log_softmax([0, 1, 3])
    uncertainty = entropy(logits)
    assert uncertainty.dtype == torch.float32
    h = -sum(math.exp(p) * p for p in logp)
    assert uncertainty.item() == pytest.approx(h, rel=1e-5)
    uncertainty.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad[0, 0].tolist() == pytest.approx([-math.exp(p) * (p + h) for p in logp], rel=5e-3)


def test_entropy_of_a_certain_distribution_is_zero_and_flat():
    # A probability that underflows to 0 counts as 0, not as 0 * -inf.
    logits = torch.tensor([[[0.0, -1e4, -INF], [3e38, -3e38, 0.0]]], requires_grad=True)
    uncertainty = entropy(logits)
    uncertainty.sum().backward()
    assert uncertainty.tolist() == [[0.0, 0.0]]
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_entropy_keeps_unused_rows_out_of_the_gradient(garbage):
    logits = torch.tensor([[[0.0, LN3], [garbage, 0.0], [garbage, garbage]]], requires_grad=True)
    torch.where(torch.tensor([[True, False, False]]), entropy(logits), 0.0).sum().backward()
    expected = torch.tensor([[[0.2059898, -0.2059898], [0.0, 0.0], [0.0, 0.0]]])
    assert_close(logits.grad, expected, rtol=1e-5, atol=0)


def test_entropy_of_no_positions():
    logits = torch.zeros(2, 0, 4, requires_grad=True)
    entropy(logits).sum().backward()
    assert logits.grad.shape == (2, 0, 4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("banned", [(), (0, 4)])
@pytest.mark.parametrize("name", ["token_logprobs", "entropy", "full_kl"])
def test_temperature_and_banned_tokens_against_float64(name, temperature, banned, monkeypatch):
    """Values and gradients of the definition; the logits that come in stay as they are."""
    monkeypatch.setattr(logprobs_module, "_CPU_BLOCK", 2 * 7)
    generator = torch.Generator().manual_seed(0)
    logits, reference, weight = (3 * torch.randn(2, 3, n, generator=generator) for n in (7, 7, 1))
    ids = torch.tensor([[1, 2, 3], [5, 6, 1]])
    found, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    without = torch.tensor(banned, dtype=torch.long)
    logp, logq = (
        (x / temperature).index_fill(-1, without, -1e300).log_softmax(-1) for x in (exact, reference.double())
    )
    options = {"temperature": temperature, "banned_ids": banned}
    ours, theirs = {
        "token_logprobs": (lambda: token_logprobs(found, ids, **options), logp.gather(-1, ids[..., None])[..., 0]),
        "entropy": (lambda: entropy(found, **options), -(logp.exp() * logp).sum(-1)),
        "full_kl": (lambda: full_kl(found, reference, **options), (logp.exp() * (logp - logq)).sum(-1)),
    }[name]
    value = ours()
    assert_close(value.double(), theirs, atol=1e-5, rtol=1e-5)
    (value * weight[..., 0]).sum().backward()
    (theirs * weight[..., 0].double()).sum().backward()
    assert_close(found.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)
    assert found.detach().equal(logits)


def test_a_temperature_divides_what_has_been_made_float32():
    logits = 8 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids = torch.randint(50, (2, 3), generator=torch.Generator().manual_seed(1))
    exact = (logits.double() / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert_close(token_logprobs(logits, ids, 0.7).double(), exact, atol=1e-5, rtol=1e-5)
