"""Log-probabilities, entropies and divergences against Python floats and exact enumeration."""

import math

import dschat.functional.logprobs as logprobs_module
from dschat.functional import entropy, full_kl, kl_penalty, token_logprobs

import pytest
import torch
from torch.testing import assert_close

NAN, INF = math.nan, math.inf
LN2, LN3 = math.log(2), math.log(3)


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


def test_full_kl_and_entropy_in_blocks(random_logits, monkeypatch):
    reference = random_logits.flip(0)
    monkeypatch.setattr(logprobs_module, "_CPU_BLOCK", 8)
    kl, uncertainty = full_kl(random_logits, reference), entropy(random_logits)
    for b in range(3):
        for r in range(5):
            logp, logq = log_softmax(random_logits[b, r].tolist()), log_softmax(reference[b, r].tolist())
            expected = math.fsum(math.exp(p) * (p - q) for p, q in zip(logp, logq, strict=True))
            assert kl[b, r].item() == pytest.approx(expected, abs=1e-5)
            assert uncertainty[b, r].item() == pytest.approx(-math.fsum(math.exp(p) * p for p in logp), abs=1e-5)


def test_entropy_and_full_kl_of_bfloat16_are_float32_arithmetic():
    logits = torch.tensor([[[0.0, 1.0, 3.0]]], dtype=torch.bfloat16)
    reference = torch.tensor([[[2.0, 1.0, 0.0]]], dtype=torch.bfloat16)
    logp, logq = log_softmax([0, 1, 3]), log_softmax([2, 1, 0])
    assert entropy(logits).dtype == full_kl(logits, reference).dtype == torch.float32
    assert entropy(logits).item() == pytest.approx(-sum(math.exp(p) * p for p in logp), rel=1e-5)
    expected = sum(math.exp(p) * (p - q) for p, q in zip(logp, logq, strict=True))
    assert full_kl(logits, reference).item() == pytest.approx(expected, rel=1e-5)


def test_full_kl_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match="reference"):
        full_kl(torch.zeros(1, 2, 4), torch.zeros(1, 1, 4))


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
