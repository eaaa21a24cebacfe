"""The update of PPO against one plain computation in torch: gradients, losses, weights; minibatches and epochs."""

import copy
import dataclasses
import math

from dschat.engine.deepspeed_engine import grad_norm
from dschat.engine.distributed import Runtime, init_runtime
from dschat.rlhf import ppo_trainer
from dschat.rlhf.experience import Experience, add_advantages, score_rollout
from dschat.rlhf.ppo_trainer import UpdateSpec, train_rlhf
from dschat.rlhf.rlhf_engine import RLHFEngine
from tests.ppo_parts import (
    CLIP,
    CLIP_VALUE,
    CPU,
    KL_COEF,
    RATE,
    SCORES,
    TEMPERATURE,
    experience_of,
    made_up,
    rollout_of,
    same,
    sampling_for,
    shaping,
    trained_models,
    update_spec,
    weights,
    with_few_prompts,
)

import pytest
import torch


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


def train_minibatch(engine, experience, sampling, spec, runtime) -> dict[str, float]:
    """All rows in one optimizer step of each model."""
    (stats,) = train_rlhf(engine, experience, sampling, spec, 0, runtime)
    return stats


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
        response = data.response_ids[row, data.response_mask[row]].tolist()
        sequence = torch.tensor([prompt + response])
        logits = actor(input_ids=sequence).logits[0] / temperature
        keep = [i for i in range(logits.shape[-1]) if i not in set(banned)]
        hidden = critic.model.base_model(input_ids=sequence).last_hidden_state
        raw = critic.model.score(hidden)[0, :, 0]
        for t, token in enumerate(response):
            if not data.action_mask[row, t]:
                continue
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
@pytest.mark.parametrize("kind", ["on policy", "off policy", "holes", "few prompts"])
def test_an_update_is_that_of_one_plain_batch(tokenizer, runtime, micro_batch_size, kind):
    """Gradients, losses, and the weights after a step of AdamW; ragged rows, ragged last micro-batch."""
    engine = trained_models(tokenizer, runtime)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling, holes=kind == "holes")
    if kind != "on policy":
        experience = off_policy(with_few_prompts(experience) if kind == "few prompts" else experience)
    expected, policy_loss, value_loss, clip_fraction, k3 = naive_step(
        engine, experience, TEMPERATURE, list(sampling.banned_ids)
    )
    before = [{n: p.detach().clone() for n, p in m.module.named_parameters()} for m in (engine.actor, engine.critic)]
    found = capture_gradients(engine)
    stats = train_minibatch(engine, experience, sampling, update_spec(micro_batch_size), runtime)

    assert stats["policy/loss"] == pytest.approx(policy_loss, abs=1e-5)
    assert stats["critic/loss"] == pytest.approx(value_loss, rel=1e-4)
    assert stats["policy/clip_fraction"] == pytest.approx(clip_fraction, abs=1e-6)
    assert stats["policy/approx_kl"] == pytest.approx(k3, abs=1e-5)
    assert (clip_fraction > 0.1) == (kind != "on policy")
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


def test_zero_stages_make_the_same_update(tokenizer, runtime):
    """Actor and critic at every stage, the reference at 0 and 3: the statistics of two minibatches."""
    results = []
    for stage in (0, 1, 2, 3):
        engine = trained_models(tokenizer, runtime, stage=stage, rate=1e-2)
        sampling = sampling_for(engine, tokenizer)
        if stage == 0:
            engine.eval()
            rollout = rollout_of(engine.family, tokenizer, sampling)
        scored = score_rollout(engine, rollout, SCORES, rollout.response_mask, sampling, "kl", 4)
        experience = add_advantages(scored, shaping(), KL_COEF)
        results.append([train_minibatch(engine, experience, sampling, update_spec(), runtime) for _ in range(2)])
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            assert one == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert results[0][0]["policy/loss"] != pytest.approx(results[0][1]["policy/loss"], abs=1e-2)


def test_micro_batches_by_tokens_are_the_rows_of_a_rank_with_equally_many_on_each():
    experience = made_up([2, 9, 3, 4, 8, 1, 6], [True] * 7, holes=True)  # prompts of 2 tokens
    spec = dataclasses.replace(update_spec(3), max_tokens=12)
    of_ranks = [list(ppo_trainer.micro_batches(experience, spec, Runtime(rank, 2, CPU))) for rank in (0, 1)]
    found = [[(part.scores.tolist(), bool(part.action_mask.any())) for part in parts] for parts in of_ranks]
    rows = experience.scores.tolist()
    expected = [
        [([rows[0], rows[2]], True), ([rows[6]], True), ([rows[4]], True)],
        [([rows[5], rows[3]], True), ([rows[1]], False), ([rows[0]], False)],
    ]
    assert found == expected  # row 1 is without a score, row 0 only fills up
    assert of_ranks[1][2].response_mask.sum() == 2 and experience.action_mask[0].any()


def test_a_part_that_only_fills_up_changes_no_update(tokenizer, runtime, monkeypatch):
    """A rank with fewer parts than another makes such passes; every term of the loss is there, and the limits."""
    results, plain = [], ppo_trainer.micro_batches

    def filled(minibatch, *rest):
        yield from plain(minibatch, *rest)
        filler = minibatch.rows([0])
        filler.action_mask = filler.action_mask & False
        yield filler

    for parts in (plain, filled):
        monkeypatch.setattr(ppo_trainer, "micro_batches", parts)
        engine = trained_models(tokenizer, runtime)
        sampling = sampling_for(engine, tokenizer)
        experience = off_policy(experience_of(engine, tokenizer, sampling))
        limits = {"kl_loss": "k3", "entropy_coef": 0.1, "dual_clip": 3.0, "max_approx_kl": 1e3, "max_ratio": 1e3}
        spec = update_spec(4, epochs=2, **limits)
        updates = train_rlhf(engine, experience, sampling, spec, 0, runtime, kl_coef=0.1)
        results.append((updates, weights(engine.actor, engine.critic)))
    assert len(results[0][0]) == 2
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7)
    assert all((a - b).abs().max() < 1e-7 for a, b in zip(results[0][1], results[1][1], strict=True))


def test_micro_batches_by_tokens_make_the_same_update(tokenizer, runtime):
    results = []
    for limit in (0, 1, 30):
        engine = trained_models(tokenizer, runtime)
        sampling = sampling_for(engine, tokenizer)
        experience = off_policy(experience_of(engine, tokenizer, sampling))
        spec = dataclasses.replace(update_spec(4), max_tokens=limit)
        gradients = capture_gradients(engine)
        results.append((train_minibatch(engine, experience, sampling, spec, runtime), gradients))
    for stats, gradients in results[1:]:
        assert stats == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        for ours, plain in zip(gradients, results[0][1], strict=True):
            assert ours.keys() == plain.keys()
            assert all((ours[name] - plain[name]).abs().max() < 1e-5 for name in plain)


def test_an_update_that_memory_does_not_suffice_for_is_the_same(tokenizer, runtime, monkeypatch, capsys):
    """Actor, critic and the demonstrations of a step, each where two rows are too many."""
    plain = {name: getattr(ppo_trainer, name) for name in ("policy_logits", "response_values", "demonstrations_loss")}
    ids = torch.arange(24).view(4, 6) + 20
    demonstrations = [{"input_ids": ids, "attention_mask": ids > 0, "loss_mask": ids % 6 > 3}]

    def limited(name, rows):
        def call(*given):
            batch = given[2 if name == "policy_logits" else 1]
            if len(batch["input_ids"] if isinstance(batch, dict) else batch) > rows:
                raise torch.OutOfMemoryError(name)
            return plain[name](*given)

        return call

    results = []
    for failing in ("", *plain):
        for name, function in plain.items():
            monkeypatch.setattr(ppo_trainer, name, limited(name, 1) if name == failing else function)
        engine = trained_models(tokenizer, runtime)
        sampling = sampling_for(engine, tokenizer)
        experience = off_policy(experience_of(engine, tokenizer, sampling))
        gradients = capture_gradients(engine)
        spec = dataclasses.replace(update_spec(4), unsup_coef=0.5)
        stats = train_rlhf(engine, experience, sampling, spec, 0, runtime, ptx=iter([demonstrations]))
        results.append((stats, gradients))
        said = capsys.readouterr().out
        assert said.count("out of memory on a micro-batch of") == (2 if failing else 0)
    for (stats,), gradients in results[1:]:
        assert stats == pytest.approx(results[0][0][0], rel=1e-4, abs=1e-6)
        for ours, expected in zip(gradients, results[0][1], strict=True):
            assert all((ours[name] - expected[name]).abs().max() < 1e-5 for name in expected)


def test_every_row_is_trained_on_once_an_epoch_in_a_fresh_order(tokenizer, runtime, monkeypatch):
    engine = trained_models(tokenizer, runtime)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    seen, plain = [], ppo_trainer.micro_batches

    def record(minibatch, *rest):
        seen.append(minibatch.scores.tolist())
        return plain(minibatch, *rest)

    monkeypatch.setattr(ppo_trainer, "micro_batches", record)
    spec = update_spec(2, epochs=3, minibatch_size=4)
    train_rlhf(engine, experience, sampling, spec, 5, runtime)
    first = list(seen)
    policy, critic = first[::2], first[1::2]
    assert policy == critic and [len(part) for part in policy] == [4, 2] * 3
    epochs = [policy[i] + policy[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == sorted(experience.scores.tolist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    seen.clear()
    train_rlhf(engine, experience, sampling, spec, 5, runtime)
    assert seen == first


def test_a_minibatch_without_a_single_action_makes_no_step(tokenizer, runtime):
    """The one row without a score, alone: Adam would move the weights even on a gradient of 0."""
    engine = trained_models(tokenizer, runtime)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling, holes=True)
    updates = train_rlhf(engine, experience, sampling, update_spec(1, minibatch_size=1), 0, runtime)
    assert len(updates) == 5 and int((~experience.scored).sum()) == 1
    before = weights(engine.actor, engine.critic)
    unscored = experience.rows(~experience.scored)
    assert train_rlhf(engine, unscored, sampling, update_spec(1), 0, runtime) == []
    assert same(before, weights(engine.actor, engine.critic))


def test_updates_make_the_better_answers_likelier(tokenizer, runtime):
    """The sign of it all: after a few updates the policy prefers the rows with positive advantages, the critic is
    nearer to its targets."""
    engine = trained_models(tokenizer, runtime, rate=1e-3)
    sampling = sampling_for(engine, tokenizer)
    engine.eval()
    rollout = rollout_of(engine.family, tokenizer, sampling)

    def scored():
        return score_rollout(engine, rollout, SCORES, rollout.response_mask, sampling, "kl", 4)

    experience = add_advantages(scored(), shaping(), 0.0)
    updates = train_rlhf(engine, experience, sampling, UpdateSpec(8, 6, 6, 10.0, 10.0), 0, runtime)
    after = scored()
    mask = experience.action_mask
    gain = ((after.logprobs - experience.logprobs) * experience.advantages)[mask].sum()
    assert gain > 0.1
    errors = [((x.values - experience.returns)[mask] ** 2).mean().item() for x in (experience, after)]
    assert errors[1] < 0.9 * errors[0]
    assert updates[-1]["critic/loss"] < updates[0]["critic/loss"]
    assert after.ref_logprobs.equal(experience.ref_logprobs)


@pytest.mark.parametrize("name", ["advantages", "returns", "logprobs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(tokenizer, runtime, name, bad):
    """Those of both models, whichever loss it is: both are checked before either steps."""
    engine = trained_models(tokenizer, runtime)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    value = getattr(experience, name).clone()
    value[1, 0] = -bad if name == "logprobs" else bad  # an infinite ratio, not the ratio 0
    setattr(experience, name, value)
    before = weights(engine.actor, engine.critic)
    with pytest.raises(RuntimeError, match="not finite"):
        train_rlhf(engine, experience, sampling, update_spec(), 0, runtime)
    assert same(before, weights(engine.actor, engine.critic))


@pytest.mark.parametrize("kl_loss", [None, "k3"])
def test_garbage_outside_the_actions_changes_no_update(tokenizer, runtime, kl_loss):
    results = []
    for garbage in (0.0, 1e6, math.nan):
        engine = trained_models(tokenizer, runtime)
        sampling = sampling_for(engine, tokenizer)
        experience = experience_of(engine, tokenizer, sampling, holes=True)
        for name in ("logprobs", "ref_logprobs", "advantages", "values", "returns"):
            value = torch.where(experience.action_mask, getattr(experience, name), garbage)
            setattr(experience, name, value)
        spec = update_spec(kl_loss=kl_loss, entropy_coef=0.1)
        (stats,) = train_rlhf(engine, experience, sampling, spec, 0, runtime, kl_coef=0.1)
        results.append(weights(engine.actor, engine.critic))
        assert stats["policy/log_ratio_abs_max"] < 1e-5
    assert all(torch.isfinite(weight).all() for weight in results[0])
    for other in results[1:]:
        assert same(results[0], other)
