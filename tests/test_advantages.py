"""From scores to advantages in Python floats, for every estimator and rule."""

import dataclasses
import itertools
import math

from dschat.rlhf.experience import Experience, add_advantages
from dschat.rlhf.specs import ESTIMATORS
from tests.ppo_parts import PER_ACTION, made_up, shaping

import pytest
import torch

T, F = True, False


def std(numbers: list[float]) -> float:
    mean = math.fsum(numbers) / len(numbers)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / len(numbers))


def rescaled(rows: list[list[float]], keep_mean: bool) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean, spread = math.fsum(flat) / len(flat), std(flat)
    return [[(x - mean) / spread + (mean if keep_mean else 0.0) for x in row] for row in rows]


def final_score(experience: Experience, row: int, how) -> float:
    score = float(experience.scores[row])
    if how.clip_reward_value:
        score = min(max(score, -how.clip_reward_value), how.clip_reward_value)
    if experience.finished[row]:
        return score
    return {"subtract": score - how.missing_eos_penalty, "replace": -how.missing_eos_penalty, "bootstrap": 0.0}[
        how.missing_eos
    ]


def gae_row(rewards, values, after_last, how) -> list[float]:
    """As the double sum."""
    after = [*values[1:], after_last]
    return [
        math.fsum(
            (how.gamma * how.lam) ** (k - t) * (rewards[k] + how.gamma * after[k] - values[k])
            for k in range(t, len(rewards))
        )
        for t in range(len(rewards))
    ]


def of_group(totals: list[float], scored: list[bool], how) -> list[float]:
    """RLOO and GRPO, one answer after the other."""
    result = []
    for i, total in enumerate(totals):
        first = i // how.group_size * how.group_size
        group = [j for j in range(first, first + how.group_size) if scored[j]]
        others = [totals[j] for j in group if j != i]
        if not scored[i] or not others:
            result.append(0.0)
        elif how.estimator == "rloo":
            result.append(total - math.fsum(others) / len(others))
        else:
            mean = math.fsum(totals[j] for j in group) / len(group)
            variance = math.fsum((totals[j] - mean) ** 2 for j in group) / (len(group) - 1)
            result.append((total - mean) / (math.sqrt(variance) + 1e-6))
    return result


def oracle(experience: Experience, how, kl_coef: float):
    """Ragged lists of the actions alone, in Python floats: rewards, advantages, returns (None without a critic)."""
    masks = experience.action_mask
    kls, values = ([row[m].double().tolist() for row, m in zip(x, masks, strict=True)]
                   for x in (experience.kl, experience.values))  # fmt: skip
    rewards = [[-kl_coef * x if how.kl_in_reward else 0.0 for x in row] for row in kls]
    for row, reward in enumerate(rewards):
        if reward:
            reward[-1] += final_score(experience, row, how)
    if how.whiten_rewards:
        rewards = rescaled(rewards, keep_mean=True)
    returns = None
    if how.estimator == "gae":
        ends = [
            float(experience.final_values[row]) if how.missing_eos == "bootstrap" and not finished else 0.0
            for row, finished in enumerate(experience.finished.tolist())
        ]
        advantages = [gae_row(r, v, end, how) for r, v, end in zip(rewards, values, ends, strict=True)]
        returns = [[a + v for a, v in zip(*both, strict=True)] for both in zip(advantages, values, strict=True)]
    elif how.estimator == "reinforce_pp":
        advantages = [
            [math.fsum(how.gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))] for r in rewards
        ]
    else:
        per_row = of_group([math.fsum(r) for r in rewards], [bool(r) for r in rewards], how)
        advantages = [[a] * len(r) for a, r in zip(per_row, rewards, strict=True)]
    if how.whiten_advantages:
        advantages = rescaled(advantages, keep_mean=False)
    return rewards, advantages, returns


def actions_of(x: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    return [row[m].tolist() for row, m in zip(x, mask, strict=True)]


LENGTHS, FINISHED = (5, 1, 8, 3, 8, 2), (T, T, F, T, T, F)
RULES = [
    (estimator, rule, *whiten)
    for estimator, rule, *whiten in itertools.product(ESTIMATORS, ("subtract", "replace", "bootstrap"), (F, T), (F, T))
    if rule != "bootstrap" or estimator == "gae"  # the others have no critic to ask
]


@pytest.mark.parametrize(("estimator", "rule", "whiten_rewards", "whiten_advantages"), RULES)
@pytest.mark.parametrize("holes", [F, T])
def test_advantages_against_python_floats_on_ragged_rows(estimator, rule, whiten_rewards, whiten_advantages, holes):
    changes = {"estimator": estimator, "missing_eos": rule, "group_size": 3}
    changes |= {"whiten_rewards": whiten_rewards, "whiten_advantages": whiten_advantages}
    numbers = [  # gamma, lam, clip, penalty, KL coefficient, KL in the reward
        (1.0, 0.95, 5.0, 1.0, 0.1, T),
        (0.9, 0.8, 2.0, 0.7, 0.3, T),
        (1.0, 1.0, 0.0, 0.0, 0.0, T),
        (0.8, 0.0, 0.5, 3.0, 1.0, F),
    ]
    for seed, (gamma, lam, clip, penalty, kl_coef, in_reward) in enumerate(numbers):
        changes |= {"gamma": gamma, "lam": lam, "clip_reward_value": clip, "missing_eos_penalty": penalty}
        how = shaping(kl_in_reward=in_reward, **changes)
        given = made_up(LENGTHS, FINISHED, seed, holes=holes)
        assert (given.scores.abs() > 2).any()  # clipping has something to clip
        found = add_advantages(given, how, kl_coef)
        for name, expected in zip(("rewards", "advantages", "returns"), oracle(given, how, kl_coef), strict=True):
            value = getattr(found, name)
            if expected is None:
                assert value.shape == given.values.shape and (value == 0).all()
                continue
            for one, other in zip(actions_of(value, given.action_mask), expected, strict=True):
                assert one == pytest.approx(other, abs=3e-5), name
            assert (value[~given.action_mask] == 0).all(), name
        for name in ("scores", "values", "kl", "action_mask", "final_values"):
            assert getattr(found, name).equal(getattr(given, name)), name  # reported as they are


def test_the_reward_of_one_row_by_hand():
    given = made_up([3], [F], size=4)
    given.kl = torch.tensor([[0.5, -1.0, 0.0, 0.0]])
    given.scores, given.values = torch.tensor([9.0]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    # Where the policy likes a token more than the reference does, it pays. Score 5 - 2 at the end.
    how = shaping(lam=1.0, missing_eos_penalty=2.0, whiten_advantages=False)
    found = add_advantages(given, how, 0.1)
    assert found.rewards[0].tolist() == pytest.approx([-0.05, 0.1, 3.0, 0.0])
    assert found.returns[0].tolist() == pytest.approx([3.05, 3.1, 3.0, 0.0])
    assert found.advantages[0].tolist() == pytest.approx([2.05, 1.1, 0.0, 0.0], abs=1e-6)
    # Cut off and bootstrapped: no score and no penalty, the value of what follows instead.
    given.final_values = torch.tensor([4.0])
    found = add_advantages(given, dataclasses.replace(how, missing_eos="bootstrap"), 0.1)
    assert found.rewards[0].tolist() == pytest.approx([-0.05, 0.1, 0.0, 0.0])
    assert found.returns[0].tolist() == pytest.approx([4.05, 4.1, 4.0, 0.0])
    given.finished = torch.tensor([T])  # and of an answer that ended nothing follows
    found = add_advantages(given, dataclasses.replace(how, missing_eos="bootstrap"), 0.1)
    assert found.returns[0].tolist() == pytest.approx([5.05, 5.1, 5.0, 0.0])


def test_only_an_unfinished_answer_pays_for_its_missing_end():
    given = made_up(LENGTHS, FINISHED)
    free, paid = (
        add_advantages(given, shaping(missing_eos_penalty=cost, whiten_advantages=False), 0.1) for cost in (0.0, 4.0)
    )
    difference = (free.rewards - paid.rewards).sum(1)
    assert difference.tolist() == pytest.approx([0.0, 0.0, 4.0, 0.0, 0.0, 4.0], abs=1e-5)


def test_a_constant_added_to_every_score_shifts_returns_but_not_whitened_advantages():
    """With gamma = lam = 1 and values 0 it is removed by whitening altogether."""
    given = made_up([6, 6, 6, 6], [T] * 4)
    given.values = torch.zeros(4, 6)
    shifted = dataclasses.replace(given, scores=given.scores + 100)
    how = shaping(lam=1.0, clip_reward_value=0.0)
    one, other = add_advantages(given, how, 0.1), add_advantages(shifted, how, 0.1)
    assert (one.advantages - other.advantages).abs().max() < 1e-4
    assert (other.returns - one.returns).mean().item() == pytest.approx(100, rel=1e-4)


def test_whitening_is_over_actions_only():
    for size in (8, 40):  # more padding changes nothing
        given = made_up(LENGTHS, FINISHED, size=size, holes=True)
        found = add_advantages(given, shaping(), 0.1)
        actions = found.advantages[given.action_mask].double()
        assert actions.mean().item() == pytest.approx(0, abs=1e-6)
        assert actions.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_garbage_outside_the_actions_reaches_neither_rewards_nor_advantages(estimator):
    clean = made_up(LENGTHS, FINISHED, holes=True)
    how = shaping(estimator=estimator, group_size=3, whiten_rewards=True)
    expected = add_advantages(clean, how, 0.1)
    for garbage in (1e6, math.nan, -math.inf):
        dirty = dataclasses.replace(clean)
        for name in PER_ACTION:
            setattr(dirty, name, torch.where(clean.action_mask, getattr(clean, name), garbage))
        dirty.scores = torch.where(clean.scored, clean.scores, garbage)
        dirty.final_values = torch.full((len(clean),), garbage)
        found = add_advantages(dirty, how, 0.1)
        for name in ("rewards", "advantages", "returns"):
            assert getattr(found, name).equal(getattr(expected, name)), (name, garbage)
