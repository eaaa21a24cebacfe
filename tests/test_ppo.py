"""The update of PPO against one plain computation in torch, and the self-check against every fault that it is for."""

import copy
import dataclasses
import math

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, grad_norm
from dschat.engine.distributed import init_runtime
from dschat.errors import UserError
from dschat.models.load import save_model
from dschat.models.scorer import load_score_stats
from dschat.rlhf.experience import Experience, Shaping, add_advantages, response_scores, score_rollout
from dschat.rlhf.ppo_trainer import (
    UpdateSpec,
    check_experience,
    check_first_update,
    check_reward_padding,
    tolerance,
    train_minibatch,
    train_rlhf,
)
from dschat.rlhf.rlhf_engine import RLHFEngine, create_rlhf_engine
from dschat.rlhf.rollout import Sampling, generate, row_uniforms
from tests import programs
from tests.families import ragged_prompts

import pytest
import torch
import transformers
from torch import nn

SIZES = (3, 9, 6, 1, 7, 4)
STEPS, TEMPERATURE = 8, 2.0
CLIP, CLIP_VALUE, RATE = 0.2, 0.3, 1e-4
SHAPING = Shaping(
    kl_coef=0.1, gamma=1.0, lam=0.9, clip_reward_value=5.0, missing_eos_penalty=1.0, whiten_advantages=True
)
FP32 = torch.float32


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


@pytest.fixture(scope="module")
def reward_dir(model_dirs, data_file, cache_dir, tmp_path_factory):
    """By family: a reward model of two training steps."""
    root = tmp_path_factory.mktemp("reward")
    made: dict[str, str] = {}

    def directory(family: str) -> str:
        if family not in made:
            flags = {"model_name_or_path": model_dirs(family), "learning_rate": 1e-2}
            made[family] = programs.run("reward", data_file, cache_dir, root / family, **flags)
        return made[family]

    return directory


@pytest.fixture(scope="module")
def build(model_dirs, reward_dir, runtime):
    """The four models as step 3 makes them, from directories."""

    def engine(family: str = "llama", *, stage: int = 0, rate: float = RATE, **options) -> RLHFEngine:
        actor = model_dirs(family)
        spec = TrainSpec(rate, 0.0, "constant", 0, 10, 0.0, stage)
        given = {"dtype": FP32, "runtime": runtime, "normalize_reward": True} | options
        frozen = 3 if stage == 3 else 0
        return create_rlhf_engine(
            actor, reward_dir(family), load_tokenizer(actor), (spec, spec), (frozen, frozen), **given
        )

    return engine


def sampling_for(engine: RLHFEngine, tokenizer, temperature: float = TEMPERATURE) -> Sampling:
    """Over eight tokens, so that answers end at different lengths."""
    kept = {*range(20, 300, 40), tokenizer.eos_token_id}
    banned = tuple(i for i in range(engine.family.config.vocab_size) if i not in kept)
    return Sampling(STEPS, temperature, banned_ids=banned)


def first_rollout(engine: RLHFEngine, tokenizer, sampling: Sampling):
    engine.eval()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    prompts = ragged_prompts(tokenizer, SIZES)
    uniforms = row_uniforms(len(SIZES), STEPS, 4)
    return generate(engine.actor.module, *prompts, sampling, uniforms, **ends)


def experience_of(engine: RLHFEngine, tokenizer, sampling: Sampling) -> Experience:
    rollout = first_rollout(engine, tokenizer, sampling)
    assert len(set(rollout.action_mask.sum(1).tolist())) >= 3  # ragged
    return add_advantages(score_rollout(engine, rollout, sampling, 4), SHAPING)


@pytest.fixture(scope="module")
def fresh(build, tokenizer):
    """An engine that is never trained, its sampling and the experience of its first rollout."""
    engine = build()
    sampling = sampling_for(engine, tokenizer)
    return engine, sampling, experience_of(engine, tokenizer, sampling)


def update(micro_batch_size: int = 2, epochs: int = 1, minibatch_size: int = 100) -> UpdateSpec:
    return UpdateSpec(epochs, minibatch_size, micro_batch_size, CLIP, CLIP_VALUE)


def checked(experience: Experience) -> None:
    check_experience(experience, SHAPING.kl_coef, FP32)


# --- the four models


@pytest.mark.parametrize("normalize", [True, False])
def test_the_critic_starts_as_the_reward_model(build, reward_dir, tokenizer, normalize):
    """The value of a whole response is its score, on the scale that step 2 stored for both."""
    engine = build(normalize_reward=normalize)
    mean, std = load_score_stats(reward_dir("llama"))
    assert std > 0 and (mean, std) != (0.0, 1.0)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(reward_dir("llama")).eval()
    rollout = first_rollout(engine, tokenizer, sampling_for(engine, tokenizer))
    with torch.no_grad():
        scores = response_scores(engine.reward, rollout)
        values = response_scores(engine.critic, rollout)  # the critic, read where the reward is read
        for row in range(len(SIZES)):
            prompt = rollout.input_ids[row, rollout.attention_mask[row]]
            alone = torch.cat([prompt, rollout.response_ids[row, rollout.action_mask[row]]])[None]
            raw = plain(input_ids=alone).logits[0, 0].item()
            expected = (raw - mean) / std if normalize else raw
            assert scores[row].item() == pytest.approx(expected, abs=1e-4)
            assert values[row].item() == pytest.approx(expected, abs=1e-4)
    assert engine.critic.module.model is not engine.reward.model


def test_only_actor_and_critic_are_trained_and_nothing_is_shared(fresh):
    engine, *_ = fresh
    assert all(p.requires_grad for m in (engine.actor, engine.critic) for p in m.module.parameters())
    assert not any(p.requires_grad for m in (engine.ref, engine.reward) for p in m.parameters())
    places = [{p.data_ptr() for p in m.parameters()} for m in (engine.actor, engine.critic, engine.ref, engine.reward)]
    assert len(set.union(*places)) == sum(map(len, places))
    for one, other in zip(engine.actor.module.parameters(), engine.ref.parameters(), strict=True):
        assert one.equal(other)


def test_dropout_is_off_in_all_four(build):
    engine = build("gpt2")
    for model in (engine.actor, engine.critic, engine.ref, engine.reward):
        found = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        assert found == {0.0}


def test_another_tokenizer_is_refused(model_dirs, reward_dir, build, tmp_path, runtime):
    """Ids would mean other words to the reward model."""
    other = load_tokenizer(model_dirs("llama"))
    other.add_tokens(["quokka"])
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dirs("llama"))
    save_model(model, other, str(tmp_path))
    spec = TrainSpec(RATE, 0.0, "constant", 0, 10, 0.0, 0)
    with pytest.raises(UserError, match="different tokenizers"):
        create_rlhf_engine(
            str(tmp_path),
            reward_dir("llama"),
            load_tokenizer(str(tmp_path)),
            (spec, spec),
            (0, 0),
            dtype=FP32,
            runtime=runtime,
            normalize_reward=True,
        )


# --- the update


def naive_step(engine: RLHFEngine, data: Experience, temperature: float, banned: list[int]):
    """Gradients of both losses and their values, from one batch, row by row without padding, in float64.

    The surrogate of Schulman et al. 2017 and the value loss of Ziegler et al. 2019, averaged over all actions.
    """
    actor, critic = copy.deepcopy(engine.family).double(), copy.deepcopy(engine.critic.module).double()
    actor.eval()
    critic.eval()
    total = int(data.action_mask.sum())
    policy_loss, value_loss, clipped, k3 = 0.0, 0.0, 0, 0.0
    for row in range(len(data)):
        prompt = data.input_ids[row, data.attention_mask[row]].tolist()
        response = data.response_ids[row, data.action_mask[row]].tolist()
        sequence = torch.tensor([prompt + response])
        logits = actor(input_ids=sequence).logits[0] / temperature
        keep = [i for i in range(logits.shape[-1]) if i not in set(banned)]
        hidden = critic.model.base_model(input_ids=sequence).last_hidden_state
        raw = critic.model.score(hidden)[0, :, 0]
        for t, token in enumerate(response):
            state = logits[len(prompt) + t - 1]
            logprob = state[token] - torch.logsumexp(state[keep], 0)
            ratio = torch.exp(logprob - data.logprobs[row, t].item())
            advantage = data.advantages[row, t].item()
            low, high = 1 - CLIP, 1 + CLIP
            bounded = low if ratio.item() < low else high if ratio.item() > high else ratio
            gain, bounded_gain = ratio * advantage, torch.as_tensor(bounded).double() * advantage
            policy_loss = policy_loss - (gain if gain.item() <= bounded_gain.item() else bounded_gain) / total
            clipped += bounded_gain.item() < gain.item()
            k3 += (ratio.item() - 1 - math.log(ratio.item())) / total

            value = (raw[len(prompt) + t - 1] - critic.mean) / critic.std
            target, old = data.returns[row, t].item(), data.values[row, t].item()
            near = min(max(value.item(), old - CLIP_VALUE), old + CLIP_VALUE)
            near = value if near == value.item() else torch.tensor(near).double()
            losses = [(v - target) ** 2 / 2 for v in (value, near)]
            value_loss = value_loss + max(losses, key=torch.Tensor.item) / total
    policy_loss.backward()
    value_loss.backward()
    gradients = [{n: p.grad.float() for n, p in m.named_parameters()} for m in (actor, critic)]
    return gradients, policy_loss.item(), value_loss.item(), clipped / total, k3


def capture_gradients(engine: RLHFEngine) -> list[dict[str, torch.Tensor]]:
    """Filled by the next optimizer step with the gradients that it is given (stage 0 only)."""
    found: list[dict[str, torch.Tensor]] = [{}, {}]
    for part, model in zip(found, (engine.actor, engine.critic), strict=True):

        def keep(*_, part=part, model=model):
            part.update({name: p.grad.clone() for name, p in model.module.named_parameters()})

        model.optimizer.register_step_pre_hook(keep)
    return found


def off_policy(experience: Experience) -> Experience:
    """Old log-probabilities and values as of another policy and critic, so that both clips are at work."""
    generator = torch.Generator().manual_seed(3)
    mask = experience.action_mask

    def moved(x, by):
        return torch.where(mask, x + by * torch.randn(x.shape, generator=generator), 0.0)

    return dataclasses.replace(
        experience, logprobs=moved(experience.logprobs, 0.3), values=moved(experience.values, 0.5)
    )


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 6])
@pytest.mark.parametrize("on_policy", [True, False])
def test_an_update_is_that_of_one_plain_batch(build, tokenizer, runtime, micro_batch_size, on_policy):
    """Gradients, losses, and the weights after a step of AdamW; ragged rows, ragged last micro-batch."""
    engine = build()
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    if not on_policy:
        experience = off_policy(experience)
    expected, policy_loss, value_loss, clip_fraction, k3 = naive_step(
        engine, experience, TEMPERATURE, list(sampling.banned_ids)
    )
    before = [{n: p.detach().clone() for n, p in m.module.named_parameters()} for m in (engine.actor, engine.critic)]
    found = capture_gradients(engine)
    stats = train_minibatch(engine, experience, sampling, update(micro_batch_size), runtime)

    assert stats["policy/loss"] == pytest.approx(policy_loss, abs=1e-5)
    assert stats["critic/loss"] == pytest.approx(value_loss, rel=1e-4)
    assert stats["policy/clip_fraction"] == pytest.approx(clip_fraction, abs=1e-6)
    assert stats["policy/approx_kl"] == pytest.approx(k3, abs=1e-5)
    assert (clip_fraction > 0.1) != on_policy
    for i, model in enumerate((engine.actor, engine.critic)):
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected[i].values()))
        largest = max(float(g.abs().max()) for g in expected[i].values())
        assert grad_norm(model) == pytest.approx(norm, rel=1e-4) and norm > 1e-3
        for name, parameter in model.module.named_parameters():
            gradient = expected[i][name]
            assert (found[i][name] - gradient).abs().max() < 1e-4 * largest, name
            # The first step of AdamW without decay: rate * g / (|g| + eps).
            weight = before[i][name] - RATE * gradient / (gradient.abs() + 1e-8)
            certain = gradient.abs() > 1e-3 * largest  # of smaller ones rounding decides the sign
            assert (parameter - weight)[certain].abs().max() < 1e-5 if certain.any() else True, name


def test_zero_stages_make_the_same_update(build, tokenizer, runtime):
    """Actor and critic at every stage, reference and reward at 0 and 3: the statistics of two minibatches."""
    results = []
    for stage in (0, 1, 2, 3):
        engine = build(stage=stage, rate=1e-2)
        sampling = sampling_for(engine, tokenizer)
        if stage == 0:
            rollout = first_rollout(engine, tokenizer, sampling)
        experience = add_advantages(score_rollout(engine, rollout, sampling, 4), SHAPING)
        results.append([train_minibatch(engine, experience, sampling, update(), runtime) for _ in range(2)])
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            assert one == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert results[0][0]["policy/loss"] != pytest.approx(results[0][1]["policy/loss"], abs=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_before_the_first_update_every_ratio_is_1_and_the_self_check_passes(build, tokenizer, runtime, family):
    engine = build(family)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    checked(experience)
    check_reward_padding(engine.reward, experience, tokenizer.pad_token_id, FP32)
    first, *later = train_rlhf(engine, experience, sampling, update(2, epochs=2, minibatch_size=3), 0, runtime)
    check_first_update(first, FP32)
    assert first["policy/log_ratio_abs_max"] < 1e-5 and first["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert first["policy/approx_kl"] == pytest.approx(0, abs=1e-9) and first["policy/clip_fraction"] == 0
    assert len(later) == 3
    assert later[-1]["policy/log_ratio_abs_max"] > 1e-5  # or the ratio is of the old policy for ever


def test_every_row_is_trained_on_once_an_epoch_in_a_fresh_order(fresh, runtime, monkeypatch):
    engine, sampling, experience = fresh
    seen = []
    monkeypatch.setattr(
        "dschat.rlhf.ppo_trainer.train_minibatch",
        lambda engine, minibatch, *_: seen.append(minibatch.scores.tolist()) or {},
    )
    train_rlhf(engine, experience, sampling, update(2, epochs=3, minibatch_size=4), 5, runtime)
    assert [len(part) for part in seen] == [4, 2] * 3
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == sorted(experience.scores.tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = list(seen)
    seen.clear()
    train_rlhf(engine, experience, sampling, update(2, epochs=3, minibatch_size=4), 5, runtime)
    assert seen == again


def test_updates_make_the_better_answers_likelier(build, tokenizer, runtime):
    """The sign of it all: after a few updates the policy prefers the rows with positive advantages, the critic is
    nearer to its targets."""
    engine = build(rate=1e-3)
    sampling = sampling_for(engine, tokenizer)
    rollout = first_rollout(engine, tokenizer, sampling)
    shaping = dataclasses.replace(SHAPING, kl_coef=0.0)
    experience = add_advantages(score_rollout(engine, rollout, sampling, 4), shaping)
    updates = train_rlhf(engine, experience, sampling, UpdateSpec(8, 6, 6, 10.0, 10.0), 0, runtime)
    after = score_rollout(engine, rollout, sampling, 4)
    mask = experience.action_mask
    gain = ((after.logprobs - experience.logprobs) * experience.advantages)[mask].sum()
    assert gain > 0.1
    errors = [((x.values - experience.returns)[mask] ** 2).mean().item() for x in (experience, after)]
    assert errors[1] < 0.9 * errors[0]
    assert updates[-1]["critic/loss"] < updates[0]["critic/loss"]
    assert after.ref_logprobs.equal(experience.ref_logprobs) and after.scores.equal(experience.scores)


@pytest.mark.parametrize("name", ["advantages", "returns", "logprobs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(build, tokenizer, runtime, name, bad):
    engine = build()
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    value = getattr(experience, name).clone()
    value[1, 0] = -bad if name == "logprobs" else bad  # an infinite ratio, not the ratio 0
    setattr(experience, name, value)
    before = [p.clone() for m in (engine.actor, engine.critic) for p in m.module.parameters()]
    if name == "logprobs" and bad == math.inf:
        # The ratio is bounded, so the loss is finite; the statistics say what happened.
        stats = train_minibatch(engine, experience, sampling, update(), runtime)
        assert stats["policy/log_ratio_abs_max"] == math.inf
        with pytest.raises(RuntimeError, match="ratio before the first update"):
            check_first_update(stats, FP32)
        return
    with pytest.raises(RuntimeError, match="not finite"):
        train_minibatch(engine, experience, sampling, update(), runtime)
    after = [p for m in (engine.actor, engine.critic) for p in m.module.parameters()]
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))


def test_garbage_at_padding_changes_no_update(build, tokenizer, runtime):
    norms = []
    for garbage in (0.0, 1e6, math.nan):
        engine = build()
        sampling = sampling_for(engine, tokenizer)
        experience = experience_of(engine, tokenizer, sampling)
        for name in ("logprobs", "advantages", "values", "returns"):
            value = torch.where(experience.action_mask, getattr(experience, name), garbage)
            setattr(experience, name, value)
        stats = train_minibatch(engine, experience, sampling, update(), runtime)
        norms.append([p.detach().clone() for m in (engine.actor, engine.critic) for p in m.module.parameters()])
        assert stats["policy/log_ratio_abs_max"] < 1e-5
    for other in norms[1:]:
        assert all(one.equal(two) for one, two in zip(norms[0], other, strict=True))


# --- the self-check: each fault that it is for


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_self_check_finds_dropout_in_the_update(build, tokenizer, runtime, family):
    engine = build(family)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    switch_dropout_on(engine.actor.module)
    first, *_ = train_rlhf(engine, experience, sampling, update(), 0, runtime)
    with pytest.raises(RuntimeError, match="ratio before the first update"):
        check_first_update(first, FP32)


def switch_dropout_on(model: nn.Module) -> None:
    found = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, found = 0.1, found + 1
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout, found = 0.1, found + 1
    assert found


@pytest.mark.parametrize("scorer_temperature", [1.0, 2.2])
def test_self_check_finds_another_temperature(fresh, tokenizer, scorer_temperature):
    engine, sampling, _ = fresh
    rollout = first_rollout(engine, tokenizer, sampling)
    other = dataclasses.replace(sampling, temperature=scorer_temperature)
    experience = add_advantages(score_rollout(engine, rollout, other, 4), SHAPING)
    with pytest.raises(RuntimeError, match="sampler and trainer differ by .* nats"):
        checked(experience)


def test_self_check_finds_other_banned_tokens(fresh, tokenizer):
    engine, sampling, _ = fresh
    rollout = first_rollout(engine, tokenizer, sampling)
    other = dataclasses.replace(sampling, banned_ids=(tokenizer.pad_token_id,))
    with pytest.raises(RuntimeError, match="sampler and trainer differ"):
        checked(add_advantages(score_rollout(engine, rollout, other, 4), SHAPING))


def test_self_check_finds_positions_that_start_elsewhere(fresh, tokenizer):
    """A mask that takes one pad for a token: the classic of `ids != pad`."""
    engine, sampling, _ = fresh
    rollout = first_rollout(engine, tokenizer, sampling)
    mask = rollout.attention_mask.clone()
    mask[0, (~mask[0]).nonzero()[-1]] = True
    experience = score_rollout(engine, dataclasses.replace(rollout, attention_mask=mask), sampling, 4)
    with pytest.raises(RuntimeError, match="sampler and trainer differ"):
        checked(add_advantages(experience, SHAPING))


def test_self_check_finds_a_reference_that_is_not_the_actor(build, tokenizer):
    engine = build()
    with torch.no_grad():
        for parameter in engine.ref.parameters():
            parameter.mul_(1.05)
    sampling = sampling_for(engine, tokenizer)
    with pytest.raises(RuntimeError, match="actor and reference differ by .* before training"):
        checked(experience_of(engine, tokenizer, sampling))


def test_self_check_finds_a_reward_on_two_actions_and_one_on_padding(fresh):
    _, _, experience = fresh
    row = int(experience.action_mask.sum(1).argmax())
    rewards = experience.rewards.clone()
    rewards[row, 0] += 0.5
    with pytest.raises(RuntimeError, match="not on the last action"):
        checked(dataclasses.replace(experience, rewards=rewards))
    row = int(experience.action_mask.sum(1).argmin())
    for stray in (0.5, math.nan):
        rewards = experience.rewards.clone()
        rewards[row, -1] = stray
        assert not experience.action_mask[row, -1]
        with pytest.raises(RuntimeError, match="not on the last action"):
            checked(dataclasses.replace(experience, rewards=rewards))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_self_check_finds_a_score_that_is_not_finite(fresh, bad):
    _, _, experience = fresh
    scores = experience.scores.clone()
    scores[2] = bad
    for shaping in (SHAPING, dataclasses.replace(SHAPING, clip_reward_value=0.0)):
        with pytest.raises(RuntimeError, match="score"):
            checked(add_advantages(dataclasses.replace(experience, scores=scores), shaping))


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "sampler_logprobs"])
def test_self_check_finds_log_probabilities_that_are_not_numbers(fresh, name):
    _, _, experience = fresh
    value = getattr(experience, name).clone()
    value[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="differ by"):
        checked(dataclasses.replace(experience, **{name: value}))


class WithoutMask(nn.Module):
    """A reward model that takes padding for text."""

    def __init__(self, scorer: nn.Module):
        super().__init__()
        self.scorer = scorer

    def forward(self, input_ids, attention_mask):
        return self.scorer(input_ids, torch.ones_like(attention_mask))


def test_self_check_finds_a_reward_model_that_ignores_its_mask(fresh, tokenizer):
    engine, _, experience = fresh
    check_reward_padding(engine.reward, experience, tokenizer.pad_token_id, FP32)
    with pytest.raises(RuntimeError, match="padding changes a reward by .* does not honour its mask"):
        check_reward_padding(WithoutMask(engine.reward), experience, tokenizer.pad_token_id, FP32)
    with pytest.raises(RuntimeError, match="padding changes a reward"):
        check_reward_padding(lambda ids, mask: engine.reward(ids, mask) * math.nan, experience, 1, FP32)


@pytest.mark.parametrize("drift", [math.nan, math.inf, 2e-3])
def test_self_check_finds_a_first_ratio_other_than_1(drift):
    check_first_update({"policy/log_ratio_abs_max": 0.0}, FP32)
    with pytest.raises(RuntimeError, match="self-check: the ratio before the first update"):
        check_first_update({"policy/log_ratio_abs_max": drift}, FP32)


def test_half_precision_may_round_more():
    assert tolerance(FP32) < tolerance(torch.bfloat16) < 1
