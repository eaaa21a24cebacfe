"""Losses of log-probabilities per token, SimPO and ORPO: numbers by hand, limits, extremes, refusals."""

import decimal
import math

from dschat.functional import orpo_loss, simpo_loss
from tests.functional_parts import assert_stats

import pytest
import torch
from torch.testing import assert_close

LN2, LN3 = math.log(2), math.log(3)


# ---- simpo_loss -----------------------------------------------------------------------------------------------------


def simpo_example():
    """With beta 2: rewards -1 and -1 - ln 6 (8 and 3 tokens), -ln 2 and -2 ln 2 (4 and 3 tokens)."""
    chosen = torch.tensor([-4.0, -2 * LN2], requires_grad=True)
    rejected = torch.tensor([-1.5 * (1 + math.log(6)), -3 * LN2], requires_grad=True)
    return chosen, rejected, torch.tensor([8, 4]), torch.tensor([3, 3])


@pytest.mark.parametrize(
    ("smoothing", "losses", "slopes"),
    [  # per pair, and d loss / d (difference of the rewards); with gamma = ln 2, h - gamma is ln 3 and 0
        (0.0, [math.log(4 / 3), LN2], [-1 / 4, -1 / 2]),
        # -h - gamma is -ln 12 and -ln 4
        (
            0.25,
            [0.75 * math.log(4 / 3) + 0.25 * math.log(13), 0.75 * LN2 + 0.25 * math.log(5)],
            [-0.75 / 4 + 0.25 * 12 / 13, -0.75 / 2 + 0.25 * 0.8],
        ),
    ],
)
def test_simpo_loss_by_hand(smoothing, losses, slopes):
    chosen, rejected, *lengths = simpo_example()
    loss, stats = simpo_loss(chosen, rejected, *lengths, 2.0, LN2, smoothing)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    # Over two pairs; beta / tokens is 1/4 and 1/2, 2/3 and 2/3.
    assert_close(chosen.grad, torch.tensor(slopes) / 2 * torch.tensor([1 / 4, 1 / 2]), rtol=1e-5, atol=1e-6)
    assert_close(rejected.grad, -torch.tensor(slopes) / 2 * 2 / 3, rtol=1e-5, atol=1e-6)
    rewards = {"chosen_reward": -(1 + LN2) / 2, "rejected_reward": -(1 + math.log(6) + 2 * LN2) / 2}
    assert_stats(stats, **rewards, margin=(math.log(6) + LN2) / 2, accuracy=1, num_pairs=2)


def test_simpo_loss_takes_no_smoothing_by_default():
    chosen, rejected, *lengths = simpo_example()
    loss = simpo_loss(chosen, rejected, *lengths, 2.0, LN2)[0]
    assert loss.item() == pytest.approx(math.log(8 / 3) / 2, rel=1e-5)


def test_simpo_loss_of_equal_rewards_is_log_2():
    chosen, rejected = torch.tensor([-4.0, -6.0]), torch.tensor([-2.0, -12.0])
    loss, stats = simpo_loss(chosen, rejected, torch.tensor([2, 1]), torch.tensor([1, 2]), 2.5, 0.0)
    assert loss.item() == pytest.approx(LN2, rel=1e-6)
    assert_stats(stats, chosen_reward=-10, rejected_reward=-10, margin=0, accuracy=0.5, num_pairs=2)


def test_simpo_loss_of_far_pairs():
    chosen, rejected = torch.tensor([-1e4, 0.0], requires_grad=True), torch.tensor([0.0, -1e4], requires_grad=True)
    ones = torch.ones(2, dtype=torch.long)
    for smoothing, loss, slopes in ((0.0, 5e3, [-0.5, 0.0]), (0.25, 5e3, [-0.375, 0.125])):
        chosen.grad = rejected.grad = None
        result, _ = simpo_loss(chosen, rejected, ones, ones, 1.0, 0.0, smoothing)
        result.backward()
        assert result.item() == loss
        assert chosen.grad.tolist() == slopes
        assert (-rejected.grad).tolist() == slopes


def test_simpo_loss_of_bfloat16_is_float32_arithmetic():
    # Rewards -256 and -0.5.
    inputs = [torch.tensor([x]).bfloat16() for x in (-512.0, -1.0)]
    loss, stats = simpo_loss(*inputs, torch.tensor([2]), torch.tensor([2]), 1.0, 0.25)
    assert loss.dtype == torch.float32
    assert loss.item() == 255.75
    assert_stats(stats, chosen_reward=-256, rejected_reward=-0.5, margin=-255.5, accuracy=0, num_pairs=1)


# ---- orpo_loss ------------------------------------------------------------------------------------------------------


def test_orpo_loss_by_hand():
    # P 1/2 against 1/4 (2 and 3 tokens): odds 1 and 1/3. P 1/4 against 3/4 (4 and 1 tokens): odds 1/3 and 3.
    chosen = torch.tensor([-2 * LN2, -8 * LN2], requires_grad=True)
    rejected = torch.tensor([-6 * LN2, math.log(3 / 4)], requires_grad=True)
    loss, stats = orpo_loss(chosen, rejected, torch.tensor([2, 4]), torch.tensor([3, 1]), 0.5)
    loss.backward()
    # -log sigmoid of ln 3 and -ln 9.
    assert loss.item() == pytest.approx((LN2 + 0.5 * math.log(4 / 3) + 2 * LN2 + 0.5 * math.log(10)) / 2, rel=1e-5)
    # Per token: -1 (SFT), and 0.5 (1 - sigmoid(log odds ratio)) / (1 - P): 0.5 * 1/4 and 0.5 * 9/10 over 1 - P.
    expected_chosen = [(-1 - 0.125 * 2) / 2, (-1 - 0.45 * 4 / 3) / 4]
    expected_rejected = [0.125 * 4 / 3 / 3, 0.45 * 4]
    assert_close(chosen.grad, torch.tensor(expected_chosen) / 2, rtol=1e-5, atol=1e-6)
    assert_close(rejected.grad, torch.tensor(expected_rejected) / 2, rtol=1e-5, atol=1e-6)
    rewards = {"chosen_reward": -1.5 * LN2, "rejected_reward": (math.log(3 / 4) - 2 * LN2) / 2}
    assert_stats(stats, **rewards, margin=-LN3 / 2, accuracy=0.5, num_pairs=2, sft_loss=1.5 * LN2)


def test_orpo_loss_of_equal_answers_is_sft_and_log_2():
    logps, lengths = torch.tensor([-3.0, -0.01]), torch.tensor([2, 1])
    loss, stats = orpo_loss(logps, logps, lengths, lengths, 0.1)
    assert loss.item() == pytest.approx(1.51 / 2 + 0.1 * LN2, rel=1e-6)
    assert stats["accuracy"].item() == 0.5
    assert orpo_loss(logps, logps, lengths, lengths, 0.0)[0].item() == pytest.approx(1.51 / 2, rel=1e-6)


@pytest.mark.parametrize("logp", [-2e-7, -1e-5, -1e-3, -0.1, -LN2, -3.0, -20.0, -90.0, -1e4])
def test_orpo_loss_is_exact_near_certainty_and_near_impossibility(logp):
    with decimal.localcontext(prec=60):
        p = decimal.Decimal(torch.tensor(logp).item()).exp()
        log_odds, certainty = float((p / (1 - p)).ln()), float(1 / (1 - p))
    # Against P = 1/2, whose odds are 1.
    logps, half = torch.tensor([logp], requires_grad=True), torch.tensor([-LN2], requires_grad=True)
    one = torch.ones(1, dtype=torch.long)
    for chosen, rejected, sign in ((logps, half, 1), (half, logps, -1)):
        logps.grad = half.grad = None
        loss, stats = orpo_loss(chosen, rejected, one, one, 1.0)
        loss.backward()
        assert stats["margin"].item() == pytest.approx(sign * log_odds, rel=1e-6, abs=1e-6)
        preference = loss.item() + chosen.item()
        softplus = max(-sign * log_odds, 0) + math.log1p(math.exp(-abs(log_odds)))
        assert preference == pytest.approx(softplus, rel=1e-5, abs=1e-6)
        slope = -sign / (1 + math.exp(sign * log_odds)) if sign * log_odds < 700 else 0.0
        sft = -1.0 if chosen is logps else 0.0
        assert logps.grad.item() == pytest.approx(sft + slope * certainty, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("logps", "slopes"),
    [  # of the chosen one without its -1, and of the rejected one; 1 / (1 - P) ends at 2^23, the odds there too
        ((0.0, 0.0), (-(2**22), 2**22)),
        ((0.0, -1.0), (-1 / (math.e - 1), 0.0)),  # the odds of the rejected one, which is far behind
        ((-1.0, 0.0), (-math.e / (math.e - 1), 2**23)),  # certain, and should not be: pushed, not left alone
        ((0.0, -1e30), (0.0, 0.0)),
        ((-1e30, 0.0), (-1.0, 2**23)),
    ],
)
def test_orpo_loss_of_certain_answers_is_finite_and_still_pushes(logps, slopes):
    chosen, rejected = (torch.tensor([x], requires_grad=True) for x in logps)
    one = torch.ones(1, dtype=torch.long)
    loss, stats = orpo_loss(chosen, rejected, one, one, 0.1)
    loss.backward()
    assert all(map(math.isfinite, (loss.item(), *(value.item() for value in stats.values()))))
    assert chosen.grad.item() + 1 == pytest.approx(0.1 * slopes[0], rel=1e-5, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.1 * slopes[1], rel=1e-5, abs=1e-6)
    assert stats["accuracy"].item() == (0.5 if chosen.item() == rejected.item() else chosen.item() > rejected.item())


def test_orpo_loss_of_a_certain_token_has_a_slope_of_at_most_one_in_the_logits():
    # log softmax is exactly 0 in float32, and its own slope 1 - P is not lost on the way.
    logits = torch.tensor([20.0, 0.0], requires_grad=True)
    rejected = torch.log_softmax(logits, dim=0)[:1]
    assert rejected.item() == 0.0
    one = torch.ones(1, dtype=torch.long)
    orpo_loss(torch.tensor([-LN2]), rejected, one, one, 1.0)[0].backward()
    # exp(-20) / eps on the rival, which gains.
    assert logits.grad[1].item() == pytest.approx(-math.exp(-20) * 2**23, rel=1e-3)


def test_orpo_loss_of_bfloat16_is_float32_arithmetic():
    inputs = [torch.tensor([x]).bfloat16() for x in (-256.0, -0.5)]
    loss, stats = orpo_loss(*inputs, torch.tensor([1]), torch.tensor([1]), 1.0)
    log_odds = -0.5 - math.log(-math.expm1(-0.5))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(512 + log_odds, rel=1e-7)
    assert stats["margin"].item() == pytest.approx(-256 - log_odds, rel=1e-7)


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [lambda *x: simpo_loss(*x, 2.0, 0.5), lambda *x: orpo_loss(*x, 0.1)])
def test_losses_per_token_refuse(loss):
    names = ["chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths"]
    for i, name in enumerate(names):
        inputs = [torch.ones(2) for _ in names]
        inputs[i] = torch.ones(2, 1)
        with pytest.raises(ValueError, match=rf"{name} \(2, 1\)"):
            loss(*inputs)
    for i in (2, 3):
        lengths = [torch.tensor([3, 1]), torch.tensor([2, 5])]
        lengths[i - 2][1] = 0
        with pytest.raises(ValueError, match="at least 1 token; lengths has a 0"):
            loss(-torch.ones(2), -torch.ones(2), *lengths)
