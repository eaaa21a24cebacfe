"""From a rollout to advantages: each number row by row without padding, or in Python floats."""

import dataclasses
import math

from dschat.engine.distributed import Runtime, gather_objects, gather_rows
from dschat.models.scorer import Scorer
from dschat.rlhf.experience import (
    Experience,
    Shaping,
    add_advantages,
    distinct_n,
    experience_metrics,
    gather_experience,
    policy_logits,
    response_scores,
    response_values,
    score_rollout,
)
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Sampling, generate, row_uniforms
from tests.families import ragged_prompts, tiny_config, tiny_model

import pytest
import torch
import transformers
from torch import nn

SIZES = (3, 9, 6, 1, 7, 4)
STEPS = 10
T, F = True, False
PER_ACTION = ("sampler_logprobs", "logprobs", "ref_logprobs", "entropy", "values")


def tiny_scorer(family: str, tokenizer, seed: int, mean: float = 0.0, std: float = 1.0) -> Scorer:
    torch.manual_seed(seed)
    config = tiny_config(family, tokenizer)
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return Scorer(model, mean, std)


def four_models(family: str, tokenizer) -> RLHFEngine:
    """Four different models, so that none can stand in for another."""
    actor, ref = tiny_model(family, tokenizer), tiny_model(family, tokenizer)
    with torch.no_grad():
        for parameter in ref.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    critic, reward = tiny_scorer(family, tokenizer, 2, 0.5, 2.0), tiny_scorer(family, tokenizer, 3, -1.0, 0.5)
    return RLHFEngine(actor, critic, ref, reward, actor)


def sample(engine: RLHFEngine, tokenizer):
    """Ragged answers over a dozen tokens, some of them cut off."""
    kept = {*range(20, 140, 10), tokenizer.eos_token_id}
    banned = tuple(i for i in range(engine.family.config.vocab_size) if i not in kept)
    sampling = Sampling(STEPS, 3.0, banned_ids=banned)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids, mask = ragged_prompts(tokenizer, SIZES)
    rollout = generate(engine.actor, ids, mask, sampling, row_uniforms(len(SIZES), STEPS, 5), **ends)
    assert 0 < rollout.finished.sum() < len(SIZES)
    return rollout, sampling


@pytest.fixture(scope="module")
def engine(tokenizer):
    return four_models("llama", tokenizer)


@pytest.fixture(scope="module")
def sampled(engine, tokenizer):
    return sample(engine, tokenizer)


@pytest.fixture(scope="module")
def experience(engine, sampled):
    return score_rollout(engine, *sampled, micro_batch_size=4)


# --- scoring


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_scores_values_and_log_probabilities_are_those_of_each_row_alone(family, tokenizer):
    """Against plain transformers on the unpadded row: no mask, no positions, no shift but the one written here."""
    engine = four_models(family, tokenizer)
    rollout, sampling = sample(engine, tokenizer)
    found = score_rollout(engine, rollout, sampling, micro_batch_size=4)
    for row in range(len(SIZES)):
        prompt = rollout.input_ids[row, rollout.attention_mask[row]].tolist()
        response = rollout.response_ids[row, rollout.action_mask[row]].tolist()
        alone = torch.tensor([prompt + response])
        with torch.no_grad():
            for name, model in (("logprobs", engine.actor), ("ref_logprobs", engine.ref)):
                logits = model(input_ids=alone).logits[0].double() / 3.0
                logits[:, list(sampling.banned_ids)] = float("-inf")
                for t, token in enumerate(response):
                    state = torch.distributions.Categorical(logits=logits[len(prompt) + t - 1])
                    assert getattr(found, name)[row, t].item() == pytest.approx(state.logits[token].item(), abs=1e-4)
                    if name == "logprobs":
                        p = [x for x in state.probs.tolist() if x > 0]
                        expected = -math.fsum(x * math.log(x) for x in p)
                        assert found.entropy[row, t].item() == pytest.approx(expected, abs=1e-4)
            # The critic of the state before each action: the prompt and the actions already taken, each prefix alone.
            for t in range(len(response)):
                prefix = torch.tensor([prompt + response[:t]])
                value = engine.critic.model(input_ids=prefix).logits[0, 0].item()
                assert found.values[row, t].item() == pytest.approx((value - 0.5) / 2.0, abs=1e-4)
            score = engine.reward.model(input_ids=alone).logits[0, 0].item()
            assert found.scores[row].item() == pytest.approx((score + 1.0) / 0.5, abs=1e-4)
    assert found.logprobs.equal(found.logprobs * found.action_mask)
    assert (found.logprobs - found.ref_logprobs).abs().max() > 0.01  # two models, not one twice


def test_the_size_of_micro_batches_changes_nothing_and_nothing_needs_a_gradient(engine, sampled, experience):
    for size in (1, 100):
        other = score_rollout(engine, *sampled, micro_batch_size=size)
        for name in (*PER_ACTION, "scores"):
            assert (getattr(other, name) - getattr(experience, name)).abs().max() < 1e-5, name
    for name in (*PER_ACTION, "scores"):
        value = getattr(experience, name)
        assert not value.requires_grad and value.dtype == torch.float32, name
    for name in PER_ACTION:
        assert (getattr(experience, name)[~experience.action_mask] == 0).all(), name
    rollout, _ = sampled
    for name in ("input_ids", "attention_mask", "response_ids", "action_mask", "finished"):
        assert getattr(experience, name).equal(getattr(rollout, name))
    assert experience.sampler_logprobs.equal(rollout.logprobs) and len(experience) == len(SIZES)


def test_scoring_is_in_eval_mode_whatever_the_mode_before(tokenizer):
    engine = four_models("gpt2", tokenizer)
    rollout, sampling = sample(engine, tokenizer)
    expected = score_rollout(engine, rollout, sampling, micro_batch_size=4)
    for module in (*engine.actor.modules(), *engine.critic.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    engine.train()
    assert engine.actor.training and engine.critic.training
    found = score_rollout(engine, rollout, sampling, micro_batch_size=4)
    assert found.logprobs.equal(expected.logprobs) and found.values.equal(expected.values)


def test_what_stands_at_padding_changes_no_score(engine, sampled, experience, tokenizer):
    rollout, sampling = sampled
    generator = torch.Generator().manual_seed(9)

    def garbage(ids, mask):
        return torch.where(mask, ids, torch.randint(0, len(tokenizer), ids.shape, generator=generator))

    dirty = dataclasses.replace(
        rollout,
        input_ids=garbage(rollout.input_ids, rollout.attention_mask),
        response_ids=garbage(rollout.response_ids, rollout.action_mask),
    )
    assert not dirty.response_ids.equal(rollout.response_ids)
    found = score_rollout(engine, dirty, sampling, micro_batch_size=4)
    for name in (*PER_ACTION, "scores"):
        assert (getattr(found, name) - getattr(experience, name)).abs().max() < 1e-5, name


# --- rows


@pytest.mark.parametrize("index", [[0], [3, 0], [3, 1, 5], [2, 4], [5, 4, 3, 2, 1, 0]])
def test_rows_drops_columns_of_padding_and_changes_no_number(engine, sampled, experience, index):
    _, sampling = sampled
    shaping = Shaping(0.1, 1.0, 0.9, 5.0, 1.0, True)
    for whole in (experience, add_advantages(experience, shaping)):
        part = whole.rows(torch.tensor(index))
        prompt = max(SIZES[row] for row in index)
        response = int(whole.action_mask[index].sum(1).max())
        assert part.input_ids.shape == part.attention_mask.shape == (len(index), prompt)
        for name in ("response_ids", "action_mask", *PER_ACTION):
            assert getattr(part, name).shape == (len(index), response), name
        for k, row in enumerate(index):
            real, actions = whole.attention_mask[row], whole.action_mask[row]
            assert part.input_ids[k, part.attention_mask[k]].equal(whole.input_ids[row, real])
            for name in ("response_ids", *PER_ACTION, "kl", "rewards", "advantages", "returns"):
                value = getattr(whole, name)
                if len(value):
                    assert getattr(part, name)[k, part.action_mask[k]].equal(value[row, actions]), name
            assert part.scores[k] == whole.scores[row] and part.finished[k] == whole.finished[row]
            assert part.action_mask[k].sum() == actions.sum()
    with torch.no_grad():
        mask = part.action_mask
        pairs = [[policy_logits(engine.actor, engine, batch, sampling) for batch in (part, whole)]]
        pairs += [[response_values(engine.critic, batch) for batch in (part, whole)]]
        for narrow, wide in pairs:
            assert (narrow - wide[index][:, : mask.shape[1]])[mask].abs().max() < 1e-4
        scores = response_scores(engine.reward, part)
    assert (scores - whole.scores[index]).abs().max() < 1e-5


def test_rows_takes_slices(experience):
    part = experience.rows(slice(3, 4))
    assert part.input_ids.shape == (1, 1) and len(part) == 1 and part.scores.equal(experience.scores[3:4])


def test_one_rank_gathers_what_it_has(experience, tokenizer):
    runtime = Runtime(0, 1, torch.device("cpu"))
    gathered = gather_experience(experience, runtime, tokenizer.pad_token_id)
    for field in dataclasses.fields(experience):
        assert getattr(gathered, field.name).equal(getattr(experience, field.name)), field.name
    assert gather_rows(experience.scores, runtime).equal(experience.scores)
    assert gather_objects([1, "a"], runtime) == [1, "a"]


# --- advantages


def made_up(lengths, finished, seed=0, size=None) -> Experience:
    """Random numbers in the shape of an experience; 0 outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    size = size or max(lengths)
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]

    def numbers(scale=1.0):
        return torch.where(mask, scale * torch.randn(mask.shape, generator=generator), 0.0)

    logprobs = -numbers().abs()
    return Experience(
        input_ids=torch.ones(len(lengths), 2, dtype=torch.int64),
        attention_mask=torch.ones(len(lengths), 2, dtype=torch.bool),
        response_ids=torch.where(mask, torch.randint(2, 6, mask.shape, generator=generator), 0),
        action_mask=mask,
        finished=torch.tensor(finished),
        sampler_logprobs=logprobs,
        logprobs=logprobs,
        ref_logprobs=-numbers().abs(),
        entropy=numbers().abs(),
        values=numbers(),
        scores=4 * torch.randn(len(lengths), generator=generator),
    )


def oracle(experience: Experience, shaping: Shaping):
    """Ragged lists of Python floats: rewards, advantages as the double sum of GAE, returns."""
    rewards, advantages, returns = [], [], []
    for row, size in enumerate(experience.action_mask.sum(1).tolist()):
        logprobs, ref, values = (
            getattr(experience, name)[row, :size].double().tolist() for name in ("logprobs", "ref_logprobs", "values")
        )
        score = float(experience.scores[row])
        if shaping.clip_reward_value:
            score = min(max(score, -shaping.clip_reward_value), shaping.clip_reward_value)
        if not experience.finished[row]:
            score -= shaping.missing_eos_penalty
        r = [-shaping.kl_coef * (p - q) for p, q in zip(logprobs, ref, strict=True)]
        r[-1] += score
        after = [*values[1:], 0.0]
        a = [
            math.fsum(
                (shaping.gamma * shaping.lam) ** (k - t) * (r[k] + shaping.gamma * after[k] - values[k])
                for k in range(t, size)
            )
            for t in range(size)
        ]
        rewards.append(r)
        advantages.append(a)
        returns.append([x + v for x, v in zip(a, values, strict=True)])
    if shaping.whiten_advantages:
        flat = [x for row in advantages for x in row]
        mean = math.fsum(flat) / len(flat)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / len(flat))
        advantages = [[(x - mean) / std for x in row] for row in advantages]
    return rewards, advantages, returns


def ragged(x: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    return [row[: int(size)].tolist() for row, size in zip(x, mask.sum(1), strict=True)]


LENGTHS, FINISHED = (5, 1, 8, 3, 8, 2), (T, T, F, T, T, F)
SHAPINGS = [
    Shaping(0.1, 1.0, 0.95, 5.0, 1.0, True),
    Shaping(0.3, 0.9, 0.8, 2.0, 0.7, False),
    Shaping(0.0, 1.0, 1.0, 0.0, 0.0, False),
    Shaping(1.0, 1.0, 0.0, 0.5, 3.0, True),
]


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_advantages_against_python_floats_on_ragged_rows(shaping):
    for seed in range(5):
        given = made_up(LENGTHS, FINISHED, seed)
        assert (given.scores.abs() > 2).any()  # clipping has something to clip
        found = add_advantages(given, shaping)
        for name, expected in zip(("rewards", "advantages", "returns"), oracle(given, shaping), strict=True):
            value = getattr(found, name)
            for one, other in zip(ragged(value, given.action_mask), expected, strict=True):
                assert one == pytest.approx(other, abs=2e-5), name
            assert (value[~given.action_mask] == 0).all(), name
        kl = (given.logprobs.double() - given.ref_logprobs.double()).float()
        assert (found.kl - kl).abs().max() < 1e-6
        assert found.scores.equal(given.scores) and found.values.equal(given.values)  # reported as they are


def test_the_reward_of_one_row_by_hand():
    given = made_up([3], [F], size=4)
    given.logprobs = torch.tensor([[-1.0, -2.0, -0.5, 0.0]])
    given.ref_logprobs = torch.tensor([[-1.5, -1.0, -0.5, 0.0]])
    given.scores, given.values = torch.tensor([9.0]), torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    # KL 0.5, -1, 0 nats: where the policy likes a token more than the reference does, it pays. Score 5 - 2 at the end.
    found = add_advantages(given, Shaping(0.1, 1.0, 1.0, 5.0, 2.0, False))
    assert found.rewards[0].tolist() == pytest.approx([-0.05, 0.1, 3.0, 0.0])
    assert found.returns[0].tolist() == pytest.approx([3.05, 3.1, 3.0, 0.0])
    assert found.advantages[0].tolist() == pytest.approx([2.05, 1.1, 0.0, 0.0], abs=1e-6)


def test_only_an_unfinished_answer_pays_for_its_missing_end():
    given = made_up(LENGTHS, FINISHED)
    free, paid = (add_advantages(given, Shaping(0.1, 1.0, 0.95, 5.0, cost, False)) for cost in (0.0, 4.0))
    difference = (free.rewards - paid.rewards).sum(1)
    assert difference.tolist() == pytest.approx([0.0, 0.0, 4.0, 0.0, 0.0, 4.0], abs=1e-5)


def test_a_reward_model_shifted_after_normalisation_shifts_returns_but_not_whitened_advantages_much():
    """With gamma = lam = 1 and values 0, a constant added to every score is removed by whitening altogether."""
    given = made_up([6, 6, 6, 6], [T] * 4)
    given.values = torch.zeros(4, 6)
    shifted = dataclasses.replace(given, scores=given.scores + 100)
    shaping = Shaping(0.1, 1.0, 1.0, 0.0, 1.0, True)
    one, other = add_advantages(given, shaping), add_advantages(shifted, shaping)
    assert (one.advantages - other.advantages).abs().max() < 1e-4
    assert (other.returns - one.returns).mean().item() == pytest.approx(100, rel=1e-4)


def test_whitening_is_over_actions_only():
    for size in (8, 40):  # more padding changes nothing
        mask = made_up(LENGTHS, FINISHED, size=size).action_mask
        found = add_advantages(made_up(LENGTHS, FINISHED, size=size), SHAPINGS[0])
        actions = found.advantages[mask].double()
        assert actions.mean().item() == pytest.approx(0, abs=1e-6)
        assert actions.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_garbage_at_padding_reaches_neither_rewards_nor_advantages():
    clean = made_up(LENGTHS, FINISHED)
    expected = add_advantages(clean, SHAPINGS[0])
    for garbage in (1e6, math.nan, -math.inf):
        dirty = dataclasses.replace(clean)
        for name in ("logprobs", "ref_logprobs", "values", "sampler_logprobs", "entropy"):
            setattr(dirty, name, torch.where(clean.action_mask, getattr(clean, name), garbage))
        found = add_advantages(dirty, SHAPINGS[0])
        for name in ("rewards", "advantages", "returns"):
            assert getattr(found, name).equal(getattr(expected, name)), (name, garbage)


# --- metrics


def test_metrics_by_hand():
    mask = torch.tensor([[T, T, F], [T, T, T]])
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -1.0]])
    ref_logprobs = torch.tensor([[-2.0, -2.5, 0.0], [-1.0, -0.5, -1.5]])
    experience = Experience(
        input_ids=torch.tensor([[3], [4]]),
        attention_mask=torch.tensor([[T], [T]]),
        response_ids=torch.tensor([[5, 6, 1], [5, 6, 5]]),  # bigrams 56 | 56 65: two kinds of three
        action_mask=mask,
        finished=torch.tensor([T, F]),
        sampler_logprobs=logprobs + torch.tensor([[0.0, 0.25, 0.0], [0.0, 0.0, -0.125]]),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        entropy=torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]]),
        values=torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]),
        scores=torch.tensor([2.0, -6.0]),
        returns=torch.tensor([[2.0, 2.0, 0.0], [0.0, 0.0, 6.0]]),
    )
    found = experience_metrics(experience, 5.0)
    # KL 1, 0.5 | 0, -0.5, 0.5: 1.5 and 0 nats a sequence, 1.5 over five tokens. Returns 2 2 0 0 6: mean 2, variance
    # 24 / 5; errors 1 0 0 -1 3: mean 0.6, variance (11 - 5 * 0.36) / 5 = 9.2 / 5.
    assert found == pytest.approx(
        {
            "objective/kl_per_seq": 0.75,
            "objective/kl_per_token": 0.3,
            "objective/entropy_per_token": 3.0,
            "objective/score_mean": -2.0,
            "objective/score_std": 4.0,
            "objective/score_clipped_fraction": 0.5,
            "critic/explained_variance": 1 - 9.2 / 24,
            "rollout/response_length": 2.5,
            "rollout/finished_fraction": 0.5,
            "rollout/sampler_logprob_diff_max": 0.25,
            "rollout/distinct_2": 2 / 3,
        }
    )
    assert all(isinstance(value, float) for value in found.values())
    assert "objective/score_clipped_fraction" not in experience_metrics(experience, 0.0)
    wide = dataclasses.replace(experience)
    for name in ("response_ids", "action_mask", *PER_ACTION, "returns"):
        setattr(wide, name, nn.functional.pad(getattr(experience, name), (0, 7)))
    assert experience_metrics(wide, 5.0) == pytest.approx(found)


def test_metrics_of_equal_returns_are_finite():
    """Nothing to explain: a number all the same, not NaN."""
    given = add_advantages(made_up([2, 2], [T, T]), Shaping(0.0, 1.0, 1.0, 1.0, 0.0, False))
    given = dataclasses.replace(given, returns=torch.ones(2, 2))
    assert all(math.isfinite(value) for value in experience_metrics(given, 5.0).values())


def test_distinct_n_by_hand():
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 2) == 2 / 4  # 12 21 12 | 21
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 1) == 2 / 6
    assert distinct_n([[1], []], 2) == 0.0
