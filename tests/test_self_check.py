"""The self-check of the first rollout and of every first minibatch, against each fault that it is for."""

import dataclasses
import math

from dschat.engine.distributed import init_runtime
from dschat.rlhf.experience import add_advantages, response_values, score_rollout
from dschat.rlhf.ppo_trainer import train_rlhf
from dschat.rlhf.reward_sources import FullReward
from dschat.rlhf.rewards import CombinedReward, Samples
from dschat.rlhf.self_check import (
    check_critic_padding,
    check_experience,
    check_first_minibatch,
    check_reward_padding,
    tolerance,
)
from tests.ppo_parts import (
    FP32,
    KL_COEF,
    SCORES,
    experience_of,
    moved,
    rollout_of,
    sampling_for,
    shaping,
    trained_models,
    update_spec,
    with_holes,
)

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


@pytest.fixture(scope="module")
def fresh(tokenizer, runtime):
    """An engine that is never trained, its sampling and the experience of its first rollout."""
    engine = trained_models(tokenizer, runtime)
    sampling = sampling_for(engine, tokenizer)
    return engine, sampling, experience_of(engine, tokenizer, sampling)


def checked(experience, **changes) -> None:
    check_experience(experience, shaping(**changes), KL_COEF, FP32)


def scored_anew(fresh, tokenizer, *, sampling=None, change=lambda rollout: rollout):
    """What the trainer makes of the sampler's rollout."""
    engine, own, _ = fresh
    rollout = change(rollout_of(engine.family, tokenizer, own))
    scored = score_rollout(engine, rollout, SCORES, rollout.response_mask, sampling or own, "kl", 4)
    return add_advantages(scored, shaping(), KL_COEF)


# --- what is right passes


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_right_run_passes_and_before_the_first_update_every_ratio_is_1(tokenizer, runtime, family):
    engine = trained_models(tokenizer, runtime, family)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    checked(experience)
    check_critic_padding(engine.critic, experience, tokenizer.pad_token_id, FP32)
    first, *later = train_rlhf(engine, experience, sampling, update_spec(2, epochs=2, minibatch_size=3), 0, runtime)
    check_first_minibatch(first, FP32)
    assert first["policy/log_ratio_abs_max"] < 1e-5 and first["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert first["policy/approx_kl"] == pytest.approx(0, abs=1e-9) and first["policy/clip_fraction"] == 0
    assert len(later) == 3
    assert later[-1]["policy/log_ratio_abs_max"] > 1e-5  # or the ratio is of the old policy for ever


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"whiten_rewards": True},
        {"kl_in_reward": False},
        {"missing_eos": "bootstrap"},
        {"missing_eos": "replace", "clip_reward_value": 0.0},
        {"estimator": "rloo", "group_size": 3},
        {"estimator": "reinforce_pp"},
    ],
)
@pytest.mark.parametrize("kl_kind", ["kl", "full"])
def test_holes_and_a_row_without_a_score_pass_with_every_way_of_shaping(fresh, tokenizer, changes, kl_kind):
    engine, sampling, _ = fresh
    experience = experience_of(engine, tokenizer, sampling, holes=True, kl_kind=kl_kind, **changes)
    checked(experience, **changes)
    check_critic_padding(engine.critic, experience, tokenizer.pad_token_id, FP32)


@pytest.mark.parametrize("kl_in_reward", [True, False])
def test_what_rounding_leaves_of_the_kl_is_no_score(fresh, kl_in_reward):
    """A difference within the tolerance is penalised in every reward where the penalty is part of the rewards."""
    _, _, experience = fresh
    given = dataclasses.replace(experience, kl=experience.action_mask * 5e-4)
    checked(add_advantages(given, shaping(kl_in_reward=kl_in_reward), KL_COEF), kl_in_reward=kl_in_reward)


# --- each fault


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_in_the_update(tokenizer, runtime, family):
    engine = trained_models(tokenizer, runtime, family)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    switch_dropout_on(engine.actor.module)
    first, *_ = train_rlhf(engine, experience, sampling, update_spec(), 0, runtime)
    with pytest.raises(RuntimeError, match="ratio before an update"):
        check_first_minibatch(first, FP32)


def switch_dropout_on(model: nn.Module) -> None:
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, found = 0.1, found + 1
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout, found = 0.1, found + 1
    assert found


@pytest.mark.parametrize("scorer_temperature", [1.0, 2.2])
def test_another_temperature(fresh, tokenizer, scorer_temperature):
    other = dataclasses.replace(fresh[1], temperature=scorer_temperature)
    with pytest.raises(RuntimeError, match="sampler and trainer differ by .* nats"):
        checked(scored_anew(fresh, tokenizer, sampling=other))


def test_other_banned_tokens(fresh, tokenizer):
    other = dataclasses.replace(fresh[1], banned_ids=(tokenizer.pad_token_id,))
    with pytest.raises(RuntimeError, match="sampler and trainer differ"):
        checked(scored_anew(fresh, tokenizer, sampling=other))


def test_positions_that_start_elsewhere(fresh, tokenizer):
    """A mask that takes one pad for a token: the classic of `ids != pad`."""

    def one_more(rollout):
        mask = rollout.attention_mask.clone()
        mask[0, (~mask[0]).nonzero()[-1]] = True
        return dataclasses.replace(rollout, attention_mask=mask)

    with pytest.raises(RuntimeError, match="sampler and trainer differ"):
        checked(scored_anew(fresh, tokenizer, change=one_more))


def test_holes_that_the_models_do_not_read(fresh, tokenizer):
    """What is left out of the loss left out of the context as well."""

    def blind(rollout):
        return dataclasses.replace(rollout, response_mask=with_holes(rollout))

    with pytest.raises(RuntimeError, match="sampler and trainer differ"):
        checked(scored_anew(fresh, tokenizer, change=blind))


def test_a_reference_that_is_not_the_actor(fresh, tokenizer):
    engine, sampling, _ = fresh
    for reference in (moved(trained_models(tokenizer, init_runtime(0)).ref, 0.02), engine.ref):
        other = dataclasses.replace(engine, ref=reference)
        experience = experience_of(other, tokenizer, sampling)
        if reference is engine.ref:
            checked(experience)
        else:
            with pytest.raises(RuntimeError, match="actor and reference differ by .* before training"):
                checked(experience)


@pytest.mark.parametrize("kl_in_reward", [True, False])
def test_a_reward_on_two_actions_and_one_where_there_is_no_action(fresh, tokenizer, kl_in_reward):
    engine, sampling, _ = fresh
    experience = experience_of(engine, tokenizer, sampling, holes=True, kl_in_reward=kl_in_reward)
    mask = experience.action_mask
    row = int(mask.sum(1).argmax())

    def with_reward(row: int, column: int, reward: float):
        rewards = experience.rewards.clone()
        rewards[row, column] += reward
        return dataclasses.replace(experience, rewards=rewards)

    checked(experience, kl_in_reward=kl_in_reward)
    with pytest.raises(RuntimeError, match="not on the last action"):
        checked(with_reward(row, int(mask[row].nonzero()[0]), 0.5), kl_in_reward=kl_in_reward)
    holes = (experience.response_mask & ~mask & experience.scored[:, None]).nonzero().tolist()
    places = [tuple(hole) for hole in holes] + [(int((~experience.scored).nonzero()[0]), 0)]
    assert len(holes) == 2
    places.append((int(experience.response_mask.sum(1).argmin()), -1))
    for stray in (0.5, math.nan):
        for place in places:
            with pytest.raises(RuntimeError, match="reward where there is no action"):
                checked(with_reward(*place, stray), kl_in_reward=kl_in_reward)


def test_a_score_on_another_action_than_the_last(fresh):
    """And an action whose reward is not a number."""
    _, _, experience = fresh
    row = int(experience.action_mask.sum(1).argmax())
    last = int(experience.action_mask[row].sum()) - 1
    rewards = experience.rewards.clone()
    rewards[row, last - 1], rewards[row, last] = rewards[row, last].item(), rewards[row, last - 1].item()
    with pytest.raises(RuntimeError, match="not on the last action"):
        checked(dataclasses.replace(experience, rewards=rewards))
    rewards = experience.rewards.clone()
    rewards[row, 0] = math.nan
    with pytest.raises(RuntimeError, match="not on the last action"):
        checked(dataclasses.replace(experience, rewards=rewards))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite(fresh, bad):
    _, _, experience = fresh
    scores = experience.scores.clone()
    scores[2] = bad
    for changes in ({}, {"clip_reward_value": 0.0}, {"whiten_rewards": True}):
        given = add_advantages(dataclasses.replace(experience, scores=scores), shaping(**changes), KL_COEF)
        with pytest.raises(RuntimeError, match="score"):
            checked(given, **changes)


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "sampler_logprobs"])
def test_log_probabilities_that_are_not_numbers(fresh, name):
    _, _, experience = fresh
    value = getattr(experience, name).clone()
    value[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="differ by"):
        checked(dataclasses.replace(experience, **{name: value}))


class WithoutMask(nn.Module):
    """A critic that takes padding for text."""

    def __init__(self, scorer: nn.Module):
        super().__init__()
        self.scorer = scorer

    def forward(self, input_ids, attention_mask, begins_like=None):
        return self.scorer(input_ids, torch.ones_like(attention_mask))


def test_a_critic_that_ignores_its_mask(fresh, tokenizer):
    engine, _, experience = fresh
    pad = tokenizer.pad_token_id
    check_critic_padding(engine.critic, experience, pad, FP32)
    with pytest.raises(RuntimeError, match="padding changes a value by .* does not honour its mask"):
        check_critic_padding(WithoutMask(engine.critic), experience, pad, FP32)
    with pytest.raises(RuntimeError, match="padding changes a value"):
        check_critic_padding(lambda ids, mask, *_: engine.critic(ids, mask) * math.nan, experience, pad, FP32)


def test_a_reward_model_that_ignores_its_mask(fresh, tokenizer):
    """Whichever of several it is; what is no model in this process is not asked."""
    engine, _, experience = fresh
    rows = [[9, 30, 40, tokenizer.eos_token_id], [9, 50, tokenizer.eos_token_id]]
    samples = Samples(["", ""], ["", ""], [[], []], rows, [1, 1], [True, True], [{}, {}])

    def refuse(_):
        pytest.fail("asked")

    refuse.name = "rule"
    source = FullReward(engine.critic, tokenizer, tokenizer, micro_batch_size=2, device=torch.device("cpu"))
    rewards = CombinedReward([(refuse, 1.0), (source, 1.0)])
    check_reward_padding(rewards, samples, FP32)
    source.model = WithoutMask(engine.critic)
    with pytest.raises(RuntimeError, match="padding changes a score of full by .* does not honour its mask"):
        check_reward_padding(rewards, samples, FP32)


def test_only_values_of_real_states_are_compared(fresh, tokenizer):
    """At padding a critic may say what it likes."""
    engine, _, experience = fresh

    def careless(ids, mask, *_):
        return torch.where(mask.bool(), engine.critic(ids, mask), float(ids.shape[1]))

    few = experience.rows(slice(0, 4))
    assert (response_values(careless, few) == careless(*both(few)).shape[1]).any()
    check_critic_padding(careless, experience, tokenizer.pad_token_id, FP32)


def both(batch):
    ids = torch.cat([batch.input_ids, batch.response_ids], 1)
    return ids, torch.cat([batch.attention_mask, batch.response_mask], 1)


@pytest.mark.parametrize("drift", [math.nan, math.inf, 2e-3])
def test_a_first_ratio_other_than_1(drift):
    check_first_minibatch({"policy/log_ratio_abs_max": 0.0}, FP32)
    check_first_minibatch({"critic/loss": 1.0}, FP32)  # the critic warms up: no policy, no ratio
    with pytest.raises(RuntimeError, match="self-check: the ratio before an update"):
        check_first_minibatch({"policy/log_ratio_abs_max": drift}, FP32)


def test_half_precision_may_round_more():
    assert tolerance(FP32) < tolerance(torch.bfloat16) < 1
