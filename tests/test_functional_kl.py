"""KL divergences against Python floats, float64 autograd and exact enumeration; the adaptive coefficient."""

import math

import dschat.functional.logprobs as logprobs_module
from dschat.functional import adaptive_kl_coef, full_kl, kl_penalty, token_logprobs
from tests.test_functional_logprobs import log_softmax

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
LN2, LN3 = math.log(2), math.log(3)

# ---- full_kl --------------------------------------------------------------------------------------------------------


def test_full_kl_by_hand_and_its_direction():
    policy, reference = torch.tensor([[[0.0, LN3]]]), torch.tensor([[[1.0, 1.0]]])
    # p = (1/4, 3/4), q = (1/2, 1/2): 1/4 ln 1/2 + 3/4 ln 3/2; the other way round 1/2 ln 2 + 1/2 ln 2/3.
    assert full_kl(policy, reference).item() == pytest.approx(0.1308120, rel=1e-5)
    assert full_kl(reference, policy).item() == pytest.approx(0.1438410, rel=1e-5)
    assert_close(full_kl(policy, policy + 7), torch.zeros(1, 1))


def test_full_kl_where_only_one_side_bans():
    free, banning = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, -INF]]])
    assert full_kl(free, banning).item() == INF
    assert full_kl(banning, free).item() == pytest.approx(LN2)


@pytest.mark.parametrize("block", [1, 8, 2**20])
def test_full_kl_and_its_gradient_in_blocks(monkeypatch, block):
    # Blocks of one position, of two and of everything; the slices are not contiguous, as after a prompt.
    monkeypatch.setattr(logprobs_module, "_CPU_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(3, 5, 4, generator=generator).mul_(2).requires_grad_() for _ in range(2))
    upstream = torch.randn(3, 3, generator=generator)
    kl = full_kl(logits[:, 1:-1], reference[:, 1:-1])
    kl.backward(upstream)
    exact = logits.detach().double().requires_grad_()
    logp, logq = exact[:, 1:-1].log_softmax(-1), reference.detach().double()[:, 1:-1].log_softmax(-1)
    expected = (logp.exp() * (logp - logq)).sum(-1)
    expected.backward(upstream.double())
    assert_close(kl, expected.float(), rtol=1e-5, atol=1e-6)
    assert_close(logits.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)
    assert reference.grad is None
    logp, logq = log_softmax(logits[2, 3].tolist()), log_softmax(reference[2, 3].tolist())
    by_hand = math.fsum(math.exp(p) * (p - q) for p, q in zip(logp, logq, strict=True))
    assert kl[2, 2].item() == pytest.approx(by_hand, abs=1e-5)


def test_full_kl_of_a_reference_alone_has_no_graph():
    assert not full_kl(torch.zeros(1, 1, 2), torch.ones(1, 1, 2, requires_grad=True)).requires_grad


def test_full_kl_of_the_same_logits_is_zero_and_flat():
    logits = torch.tensor([[[0.3, -2.0, 5.0]]], requires_grad=True)
    kl = full_kl(logits, logits.detach().clone())
    kl.sum().backward()
    assert kl.item() == 0.0
    assert logits.grad.tolist() == [[[0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_full_kl_keeps_unused_rows_out_of_the_gradient(garbage):
    logits = torch.tensor([[[0.0, LN3], [garbage, 0.0], [0.0, LN3], [0.0, 0.0]]], requires_grad=True)
    reference = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [0.0, garbage], [0.0, -INF]]])
    kept = torch.tensor([[True, False, False, False]])
    torch.where(kept, full_kl(logits, reference), 0.0).sum().backward()
    # p_i (ln p_i - ln q_i - KL) = 1/4 (ln 1/2 - 0.1308120)
    expected = torch.tensor([[[-0.2059898, 0.2059898], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    assert_close(logits.grad, expected, rtol=1e-5, atol=0)


def test_full_kl_of_bfloat16_is_float32_arithmetic():
    logits = torch.tensor([[[0.0, 1.0, 3.0]]], dtype=torch.bfloat16, requires_grad=True)
    reference = torch.tensor([[[2.0, 1.0, 0.0]]], dtype=torch.bfloat16)
    logp, logq = log_softmax([0, 1, 3]), log_softmax([2, 1, 0])
    expected = sum(math.exp(p) * (p - q) for p, q in zip(logp, logq, strict=True))
    kl = full_kl(logits, reference)
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(expected, rel=1e-5)
    kl.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    slopes = [math.exp(p) * (p - q - expected) for p, q in zip(logp, logq, strict=True)]
    assert logits.grad[0, 0].tolist() == pytest.approx(slopes, rel=5e-3)


def test_full_kl_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="reference"):
        full_kl(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4))


# ---- kl_penalty -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [  # for d = 0.5, -0.5 and 0
        ("kl", [0.5, -0.5, 0.0]),
        ("abs", [0.5, 0.5, 0.0]),
        ("mse", [0.125, 0.125, 0.0]),
        ("k3", [0.1065307, 0.1487213, 0.0]),  # e^-0.5 - 1 + 0.5 and e^0.5 - 1 - 0.5
    ],
)
def test_kl_penalty_by_hand(kind, expected):
    penalty = kl_penalty(torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.5, -3.0]]), kind)
    assert penalty[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_kl_penalty_is_exact_for_small_and_not_clamped_for_large_differences():
    # k3 = d^2 / 2 - ... = 5e-9 at d = 1e-4, which exp(-d) - 1 + d in float32 would drown in 6e-8 of rounding.
    assert kl_penalty(torch.tensor([1e-4]), torch.tensor([0.0]), "k3").item() == pytest.approx(5e-9, rel=1e-2)
    assert kl_penalty(torch.tensor([-1.0]), torch.tensor([-101.0]), "kl").item() == 100.0
    assert kl_penalty(torch.tensor([-31.0]), torch.tensor([-1.0]), "k3").item() == pytest.approx(math.exp(30) - 31)


def test_kl_penalty_of_bfloat16_is_float32_arithmetic():
    # 257 / 256 needs nine bits: in bfloat16 the difference would be 1.
    logp, ref = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([-0.00390625], dtype=torch.bfloat16)
    assert kl_penalty(logp, ref, "kl").item() == 1.00390625


def test_kl_penalty_refuses():
    with pytest.raises(ValueError, match="unknown KL penalty 'k2': choose kl, abs, mse or k3"):
        kl_penalty(torch.zeros(1, 2), torch.zeros(1, 2), "k2")
    with pytest.raises(ValueError, match="reference"):
        kl_penalty(torch.zeros(2), torch.zeros(2, 1), "kl")


def test_the_estimators_average_to_the_full_divergence():
    """E under the policy of k1 and of k3 is KL(policy || reference): every token of a vocabulary of 4, weighted."""
    policy, reference = torch.tensor([0.3, -1.0, 2.0, 0.5]), torch.tensor([1.0, 0.0, 0.5, -2.0])
    ids = torch.arange(4)[None]
    logp = token_logprobs(policy.expand(1, 4, 4), ids)
    logq = token_logprobs(reference.expand(1, 4, 4), ids)
    divergence = full_kl(policy.view(1, 1, 4), reference.view(1, 1, 4)).item()
    for kind in ("kl", "k3"):
        weighted = [math.exp(p) * k for p, k in zip(logp[0].tolist(), kl_penalty(logp, logq, kind)[0], strict=True)]
        assert float(sum(weighted)) == pytest.approx(divergence, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "k3"])
def test_the_expected_gradient_of_each_estimator_as_a_loss(kind):
    """Every token of a vocabulary of 4, weighted by the probability with which the policy samples it."""
    policy, reference = [0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 0.5, -2.0]
    logp, logq = log_softmax(policy), log_softmax(reference)
    p, q = [math.exp(x) for x in logp], [math.exp(x) for x in logq]
    kl = math.fsum(a * (x - y) for a, x, y in zip(p, logp, logq, strict=True))
    signs = [1.0 if x > y else -1.0 for x, y in zip(p, q, strict=True)]
    mean_sign = math.fsum(a * s for a, s in zip(p, signs, strict=True))
    slopes = {
        "kl": [0.0] * 4,  # pure noise
        "mse": [a * (x - y - kl) for a, x, y in zip(p, logp, logq, strict=True)],  # of KL(p || q)
        "k3": [a - b for a, b in zip(p, q, strict=True)],  # of KL(q || p)
        "abs": [a * (s - mean_sign) for a, s in zip(p, signs, strict=True)],  # of sum |p - q|
    }
    logits = torch.tensor(policy, requires_grad=True)
    sampled = token_logprobs(logits.expand(1, 4, 4), torch.arange(4)[None])
    (torch.tensor([p]) * kl_penalty(sampled, torch.tensor([logq]), kind)).sum().backward()
    assert logits.grad.tolist() == pytest.approx(slopes[kind], abs=1e-6)
    # The slopes above are those of the divergences that the docstring names, by differences in float64.
    divergences = {
        "kl": lambda p: 0.0,
        "mse": lambda p: math.fsum(a * (math.log(a) - y) for a, y in zip(p, logq, strict=True)),
        "k3": lambda p: math.fsum(b * (y - math.log(a)) for a, b, y in zip(p, q, logq, strict=True)),
        "abs": lambda p: math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)),
    }

    def divergence(v, step):
        moved = [x + step * (i == v) for i, x in enumerate(policy)]
        return divergences[kind]([math.exp(x) for x in log_softmax(moved)])

    differences = [(divergence(v, 1e-5) - divergence(v, -1e-5)) / 2e-5 for v in range(4)]
    assert slopes[kind] == pytest.approx(differences, abs=1e-8)


# ---- adaptive_kl_coef -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl_per_seq", "expected"),
    [  # 0.2 * (1 + e * 100 / 1000), target 6
        (6.0, 0.2),
        (6.6, 0.202),  # e = 0.1
        (5.4, 0.198),
        (7.2, 0.204),  # e = 0.2, the edge
        (60.0, 0.204),  # and beyond it
        (4.8, 0.196),
        (0.0, 0.196),
        (-3.0, 0.196),  # an estimate may be negative
    ],
)
def test_adaptive_kl_coef_by_hand(kl_per_seq, expected):
    assert adaptive_kl_coef(0.2, kl_per_seq, 6.0, 100, 1000) == pytest.approx(expected, rel=1e-12)


def test_adaptive_kl_coef_is_relative_to_target_coefficient_and_horizon():
    assert adaptive_kl_coef(0.2, 11.0, 10.0, 100, 1000) == pytest.approx(0.202)  # e = 1 / 10, not 1
    assert adaptive_kl_coef(0.1, 60.0, 6.0, 100, 1000) == pytest.approx(0.102)
    assert adaptive_kl_coef(0.1, 60.0, 6.0, 512, 10000) == pytest.approx(0.1 * 1.01024)
    assert adaptive_kl_coef(0.0, 60.0, 6.0, 512, 10000) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 1.0, 0.0, 10, 100), "target and horizon"),
        ((0.1, 1.0, -6.0, 10, 100), "target and horizon"),
        ((0.1, 1.0, NAN, 10, 100), "target and horizon"),
        ((0.1, 1.0, 6.0, 10, 0), "target and horizon"),
        ((0.1, 1.0, 6.0, 10, -1), "target and horizon"),
        ((0.1, 0.0, 6.0, 500, 100), "a fifth of the 500 sequences"),  # 1 - 0.2 * 5 = 0
        ((0.1, NAN, 6.0, 10, 100), "a KL of nan"),
        ((0.1, INF, 6.0, 10, 100), "a KL of inf"),
    ],
)
def test_adaptive_kl_coef_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        adaptive_kl_coef(*arguments)
    assert adaptive_kl_coef(0.1, 0.0, 6.0, 499, 100) > 0
