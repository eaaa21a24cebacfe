"""The metrics of a rollout by hand."""

import dataclasses
import math

from dschat.rlhf.experience import Experience, add_advantages, distinct_n, experience_metrics
from tests.ppo_parts import PER_ACTION, made_up, shaping

import pytest
import torch
from torch import nn

T, F = True, False


def by_hand() -> Experience:
    return Experience(
        input_ids=torch.tensor([[3], [4]]),
        attention_mask=torch.tensor([[T], [T]]),
        response_ids=torch.tensor([[5, 6, 1], [5, 6, 5]]),  # bigrams 56 | 56 65: two kinds of three
        response_mask=torch.tensor([[T, T, F], [T, T, T]]),
        action_mask=torch.tensor([[T, T, F], [T, T, T]]),
        finished=torch.tensor([T, F]),
        scores=torch.tensor([2.0, -6.0]),
        sampler_logprobs=torch.tensor([[-1.0, -1.75, 0.0], [-1.0, -1.0, -1.125]]),
        logprobs=torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]]),
        ref_logprobs=torch.tensor([[-2.0, -2.5, 0.0], [-1.0, -0.5, -1.5]]),
        entropy=torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]),
        kl=torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.125, 0.125]]),  # of another kind than the KL reported
        values=torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]),
        final_values=torch.zeros(2),
        returns=torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 6.0]]),
    )


def test_metrics_by_hand():
    experience = by_hand()
    found = experience_metrics(experience, 5.0)
    # KL 1, 0.5 | 0, -0.5, 0.5: 1.5 and 0 nats a sequence, 1.5 over five tokens. Returns 2 2 0 0 6: mean 2, variance
    # 24 / 5; errors 1 0 0 -1 3: mean 0.6, variance (11 - 5 * 0.36) / 5 = 9.2 / 5.
    expected = {
        "objective/kl_per_seq": 0.75,
        "objective/kl_per_token": 0.3,
        "objective/kl_penalty_per_seq": 0.5,
        "objective/entropy_per_token": 3.0,
        "objective/score_mean": -2.0,
        "objective/score_std": 4.0,
        "objective/score_clipped_fraction": 0.5,
        "critic/explained_variance": 1 - 9.2 / 24,
        "rollout/response_length": 2.5,
        "rollout/finished_fraction": 0.5,
        "rollout/scored_fraction": 1.0,
        "rollout/masked_fraction": 0.0,
        "rollout/sampler_logprob_diff_max": 0.25,
        "rollout/distinct_2": 2 / 3,
    }
    assert found == pytest.approx(expected)
    assert all(isinstance(value, float) for value in found.values())
    assert "objective/score_clipped_fraction" not in experience_metrics(experience, 0.0)
    wide = dataclasses.replace(experience)
    for name in ("response_ids", "response_mask", "action_mask", *PER_ACTION, "returns"):
        setattr(wide, name, nn.functional.pad(getattr(experience, name), (0, 7)))
    assert experience_metrics(wide, 5.0) == pytest.approx(found)


def test_metrics_leave_out_what_is_not_learned_from():
    """The first row loses its second token, the second row its score: KL 1, entropy 1, score 2 are left; lengths,
    ends and bigrams are those of all answers."""
    experience = by_hand()
    mask = torch.tensor([[T, F, F], [F, F, F]])
    for name in ("action_mask", *PER_ACTION, "returns"):
        value = getattr(experience, name)
        setattr(experience, name, torch.where(mask, value, torch.zeros_like(value)))
    experience.scores = torch.tensor([2.0, 0.0])
    found = experience_metrics(experience, 5.0)
    expected = {
        "objective/kl_per_seq": 1.0,
        "objective/kl_per_token": 1.0,
        "objective/kl_penalty_per_seq": 0.5,
        "objective/entropy_per_token": 1.0,
        "objective/score_mean": 2.0,
        "objective/score_std": 0.0,
        "objective/score_clipped_fraction": 0.0,
        "rollout/response_length": 2.5,
        "rollout/finished_fraction": 0.5,
        "rollout/scored_fraction": 0.5,
        "rollout/masked_fraction": 0.8,
        "rollout/distinct_2": 2 / 3,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_metrics_of_equal_returns_are_finite_and_without_a_critic_there_is_nothing_to_explain():
    given = add_advantages(made_up([2, 2], [T, T]), shaping(), 0.0)
    equal = dataclasses.replace(given, returns=torch.ones(2, 2))
    found = experience_metrics(equal, 5.0)
    assert all(math.isfinite(value) for value in found.values()) and "critic/explained_variance" in found
    without = add_advantages(given, shaping(estimator="reinforce_pp"), 0.0)
    assert "critic/explained_variance" not in experience_metrics(without, 5.0)


def test_distinct_n_by_hand():
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 2) == 2 / 4  # 12 21 12 | 21
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 1) == 2 / 6
    assert distinct_n([[1], []], 2) == 0.0
