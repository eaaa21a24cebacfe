"""The terms of an update beside the clipped losses: KL, entropy, demonstrations; its limits, warm-up and average."""

from dschat.engine.distributed import init_runtime
from dschat.engine.ema import EMA
from dschat.rlhf import ppo_trainer
from dschat.rlhf.ppo_trainer import mean_of, train_rlhf
from tests.ppo_parts import KL_COEF, experience_of, same, sampling_for, trained_models, update_spec, weights

import pytest
import torch

ON = {"entropy_coef": 0.3, "kl_loss": "k3", "dual_clip": 1.5, "unsup_coef": 0.5, "vf_coef": 0.4}


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


def prepared(tokenizer, runtime, **options):
    """An engine whose reference is another model, its sampling, an experience with holes."""
    engine = trained_models(tokenizer, runtime, drift=0.02, **options)
    sampling = sampling_for(engine, tokenizer)
    return engine, sampling, experience_of(engine, tokenizer, sampling, holes=True)


def demonstrations(sizes=((7, 3), (5, 4))) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of (tokens, of which so many are an answer) with padding on the right."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for length, answer in sizes:
        ids = torch.randint(20, 300, (2, length), generator=generator)
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, length - 2 :] = False
        loss_mask = mask & (torch.arange(length) >= length - answer)
        batches.append({"input_ids": ids, "attention_mask": mask, "loss_mask": loss_mask})
    return batches


def endless(value):
    while True:
        yield value


def gradients_of(engine, experience, sampling, spec, runtime, *, kl_coef=KL_COEF, ptx=None) -> list[torch.Tensor]:
    """Of actor and critic in the first step of an update over all rows."""
    found: dict[str, list[torch.Tensor]] = {}
    for name in ("actor", "critic"):
        model = getattr(engine, name)

        def keep(*_, name=name, model=model):
            found[name] = [p.grad.clone() for p in model.module.parameters()]

        model.optimizer.register_step_pre_hook(keep)
    train_rlhf(engine, experience, sampling, spec, 0, runtime, kl_coef=kl_coef, ptx=ptx)
    return found["actor"], found["critic"]


def close(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 1e-4) -> bool:
    largest = max(float(g.abs().max()) for g in other)
    assert largest > 1e-5
    return all((a - b).abs().max() < tolerance * largest for a, b in zip(one, other, strict=True))


# --- terms


@pytest.mark.parametrize("kind", ["abs", "mse", "k3", "full", "entropy"])
def test_a_term_adds_its_own_gradient(tokenizer, runtime, kind):
    """Ragged rows with holes, whose padding no penalty may reach. The term by plain autograd in float64, each row
    alone and without padding."""
    coef = 0.7

    def gradient(**changes):
        engine, sampling, experience = prepared(tokenizer, runtime)
        spec = update_spec(2, **changes)
        return gradients_of(engine, experience, sampling, spec, runtime, kl_coef=coef)[0]

    changed = {"entropy_coef": coef} if kind == "entropy" else {"kl_loss": kind}
    difference = [a - b for a, b in zip(gradient(**changed), gradient(), strict=True)]
    engine, sampling, experience = prepared(tokenizer, runtime)
    actor, ref = engine.family.double().eval(), engine.ref.double()
    total, count = 0.0, int(experience.action_mask.sum())
    banned = list(sampling.banned_ids)
    for row in range(len(experience)):
        prompt = experience.input_ids[row, experience.attention_mask[row]]
        response = experience.response_ids[row, experience.response_mask[row]]
        ids = torch.cat([prompt, response])[None]
        kept = [i for i in range(actor.config.vocab_size) if i not in banned]
        index = {token: i for i, token in enumerate(kept)}
        logp, logq = (
            torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1, kept] / sampling.temperature, -1)
            for model in (actor, ref)
        )
        for t, token in enumerate(response.tolist()):
            if experience.action_mask[row, t]:
                p, d = logp[t].exp(), logp[t, index[token]] - logq[t, index[token]].detach()
                terms = {
                    "abs": d.abs(),
                    "mse": d**2 / 2,
                    "k3": torch.exp(-d) - 1 + d,
                    "full": (p * (logp[t] - logq[t].detach())).sum(),
                    "entropy": (p * logp[t]).sum(),
                }
                total = total + coef * terms[kind] / count
    expected = torch.autograd.grad(total, list(actor.parameters()))
    assert close(difference, [g.float() for g in expected], 1e-3)


def test_demonstrations_add_the_gradient_of_their_weighted_loss(tokenizer, runtime):
    """unsup_coef times the mean over the answer tokens of all their micro-batches, as plain transformers has it."""
    coef = 0.5

    def gradient(ptx, unsup_coef):
        engine, sampling, experience = prepared(tokenizer, runtime)
        spec = update_spec(2, unsup_coef=unsup_coef)
        return gradients_of(engine, experience, sampling, spec, runtime, ptx=ptx)[0]

    with_ptx, without = gradient(endless(demonstrations()), coef), gradient(None, 0.0)
    engine, *_ = prepared(tokenizer, runtime)
    plain, total, count = engine.family.eval(), 0.0, 0
    for batch in demonstrations():
        for ids, real, answer in zip(batch["input_ids"], batch["attention_mask"], batch["loss_mask"], strict=True):
            logp = plain(input_ids=ids[real][None]).logits[0].log_softmax(-1)
            for t in answer.nonzero().flatten().tolist():
                total, count = total - logp[t - 1, ids[t]], count + 1
    expected = torch.autograd.grad(coef * total / count, list(plain.parameters()))
    assert close([a - b for a, b in zip(with_ptx, without, strict=True)], list(expected), 1e-3)


def test_demonstrations_of_weight_0_change_no_bit(tokenizer, runtime):
    results, stats = [], []
    for ptx in (None, endless(demonstrations())):
        engine, sampling, experience = prepared(tokenizer, runtime)
        spec = update_spec(2, epochs=2, minibatch_size=4)
        stats.append(train_rlhf(engine, experience, sampling, spec, 0, runtime, ptx=ptx))
        results.append(weights(engine.actor, engine.critic))
    assert same(*results)
    assert "policy/ptx_loss" not in stats[0][0] and stats[1][0]["policy/ptx_loss"] > 1


def test_every_optimizer_step_has_fresh_demonstrations(tokenizer, runtime):
    engine, sampling, experience = prepared(tokenizer, runtime)
    given = iter([demonstrations(), demonstrations(((6, 2),)), demonstrations(((9, 5),))])
    spec = update_spec(2, minibatch_size=2, unsup_coef=0.5)
    stats = train_rlhf(engine, experience, sampling, spec, 0, runtime, ptx=given)
    assert len(stats) == 3 and next(given, None) is None
    assert len({round(s["policy/ptx_loss"], 4) for s in stats}) == 3


def test_vf_coef_scales_the_gradient_of_the_critic_alone(tokenizer, runtime):
    found = []
    for coef in (1.0, 0.25):
        engine, sampling, experience = prepared(tokenizer, runtime)
        (stats,) = train_rlhf(engine, experience, sampling, update_spec(2, vf_coef=coef), 0, runtime)
        found.append(stats)
    one, quarter = found
    assert quarter["critic/grad_norm"] == pytest.approx(one["critic/grad_norm"] / 4, rel=1e-5)
    for name in ("critic/loss", "policy/grad_norm", "policy/loss"):  # the loss is reported as it is
        assert quarter[name] == one[name], name


@pytest.mark.parametrize("terms", [{}, ON])
def test_micro_batches_change_nothing(tokenizer, runtime, terms):
    """Rows in portions of one, of two and of all; the last portion ragged; one without a single action."""
    results, stats = [], []
    for size in (1, 4, 6):
        engine, sampling, experience = prepared(tokenizer, runtime)
        spec = update_spec(size, **terms)
        ptx = endless(demonstrations()) if terms else None
        gradients = gradients_of(engine, experience, sampling, spec, runtime, ptx=ptx)
        results.append([*gradients[0], *gradients[1]])
        engine, sampling, experience = prepared(tokenizer, runtime)
        stats.append(train_rlhf(engine, experience, sampling, spec, 0, runtime, kl_coef=KL_COEF, ptx=ptx)[0])
    for other, line in zip(results[1:], stats[1:], strict=True):
        assert close(other, results[0])
        assert line == pytest.approx(stats[0], rel=1e-4, abs=1e-5)


# --- limits


@pytest.mark.parametrize(("name", "first"), [("max_approx_kl", 0.0), ("max_ratio", 1.0)])
def test_an_update_ends_before_the_step_that_is_too_far(tokenizer, runtime, name, first, monkeypatch):
    """The limit lies between what the second and the third minibatch measure. Two steps are made and no more; the
    weights are those after the second, bit for bit."""
    by = {"max_approx_kl": "policy/approx_kl", "max_ratio": "policy/ratio_max"}[name]
    engine, sampling, experience = prepared(tokenizer, runtime, rate=1e-3)
    kept = []
    plain_step = type(engine.actor).step
    monkeypatch.setattr(
        type(engine.actor), "step", lambda model, *a: (plain_step(model, *a), kept.append(weights(model)))[0]
    )
    free = train_rlhf(engine, experience, sampling, update_spec(2, epochs=4), 0, runtime)
    measured = [stats[by] for stats in free]
    assert len(free) == 4 and measured[0] == pytest.approx(first, abs=1e-4) and measured[1] < measured[2]
    after_two = kept[2:4]  # actor and critic, in the second step
    engine, sampling, experience = prepared(tokenizer, runtime, rate=1e-3)
    spec = update_spec(2, epochs=4, **{name: (measured[1] + measured[2]) / 2})
    limited = train_rlhf(engine, experience, sampling, spec, 0, runtime)
    assert limited == free[:2]
    assert same(weights(engine.actor), after_two[0]) and same(weights(engine.critic), after_two[1])
    # Only what exceeds the limit ends an update; the first step is always made.
    for limit, num_steps in ((max(measured) * 1.01 + 1e-6, 4), (first + 1e-9, 1)):
        engine, sampling, experience = prepared(tokenizer, runtime, rate=1e-3)
        spec = update_spec(2, epochs=4, **{name: limit})
        assert len(train_rlhf(engine, experience, sampling, spec, 0, runtime)) == num_steps


def test_what_comes_after_the_step_that_is_too_far_is_left_out_too(tokenizer, runtime, monkeypatch):
    """Though it would be within the limits again: the policy that it would train has left its sampler."""
    answers = iter([False, True, False, False])
    monkeypatch.setattr(ppo_trainer, "too_far", lambda *_: next(answers))
    engine, sampling, experience = prepared(tokenizer, runtime)
    assert len(train_rlhf(engine, experience, sampling, update_spec(2, epochs=4), 0, runtime)) == 2
    assert next(answers) is False


def test_without_limits_no_forward_is_spent_on_them(tokenizer, runtime):
    engine, sampling, experience = prepared(tokenizer, runtime)
    num = []
    engine.family.register_forward_pre_hook(lambda *_: num.append(1))
    train_rlhf(engine, experience, sampling, update_spec(6, epochs=2), 0, runtime)
    assert len(num) == 2
    train_rlhf(engine, experience, sampling, update_spec(6, epochs=2, max_ratio=1e6), 0, runtime)
    assert len(num) == 5  # and two steps


# --- warm-up, average


def test_warm_up_leaves_the_actor_alone_bit_for_bit(tokenizer, runtime):
    engine, sampling, experience = prepared(tokenizer, runtime)
    engine.ema = EMA(engine.actor, 0.5)
    before = weights(engine.actor, engine.critic)
    actor, critic = weights(engine.actor), weights(engine.critic)
    spec = update_spec(2, epochs=2, max_ratio=1.0 + 1e-9, **ON)
    never = iter(())  # a demonstration would be asked for in vain
    updates = train_rlhf(engine, experience, sampling, spec, 0, runtime, train_policy=False, ptx=never)
    assert len(updates) == 2 and all(name.startswith("critic/") for stats in updates for name in stats)
    assert same(actor, weights(engine.actor)) and not same(critic, weights(engine.critic))
    with engine.ema.swapped():
        assert same(actor, weights(engine.actor))
    assert not same(before, weights(engine.actor, engine.critic))


def test_the_critic_warms_up_as_it_would_beside_the_actor(tokenizer, runtime):
    """The two models learn from the same experience: whether the other one steps changes nothing."""
    results = []
    for train_policy in (True, False):
        engine, sampling, experience = prepared(tokenizer, runtime)
        train_rlhf(engine, experience, sampling, update_spec(2), 0, runtime, train_policy=train_policy)
        results.append(weights(engine.critic))
    assert same(*results)


def test_without_a_critic_only_the_actor_is_trained(tokenizer, runtime):
    engine, sampling, experience = prepared(tokenizer, runtime)
    (with_critic,) = train_rlhf(engine, experience, sampling, update_spec(2), 0, runtime)
    trained = weights(engine.actor)
    engine, sampling, experience = prepared(tokenizer, runtime)
    engine.critic = None
    (stats,) = train_rlhf(engine, experience, sampling, update_spec(2), 0, runtime)
    assert stats == {name: value for name, value in with_critic.items() if name.startswith("policy/")}
    assert same(trained, weights(engine.actor))


def test_the_average_takes_in_every_step_of_the_actor_once(tokenizer, runtime):
    """Of six rows in minibatches of three, twice over: four steps, of several micro-batches each."""
    decay = 0.5
    engine, sampling, experience = prepared(tokenizer, runtime, rate=1e-2)
    engine.ema = EMA(engine.actor, decay)
    expected = [w.double() for w in weights(engine.actor)]
    steps = []

    def averaged(*_):
        steps.append(1)
        for i, weight in enumerate(weights(engine.actor)):
            expected[i] = decay * expected[i] + (1 - decay) * weight.double()

    engine.actor.optimizer.register_step_post_hook(averaged)
    train_rlhf(engine, experience, sampling, update_spec(1, epochs=2, minibatch_size=3), 0, runtime)
    assert len(steps) == 4
    now = weights(engine.actor)
    with engine.ema.swapped():
        for weight, value in zip(weights(engine.actor), expected, strict=True):
            assert (weight - value).abs().max() < 1e-6
        assert not same(weights(engine.actor), now)


def test_the_mean_of_updates_and_the_maximum_of_maxima():
    updates = [{"policy/loss": 1.0, "policy/ratio_max": 3.0}, {"policy/loss": 2.0, "policy/ratio_max": 1.0}]
    assert mean_of(updates) == {"policy/loss": 1.5, "policy/ratio_max": 3.0}
    assert mean_of([]) == {}
