"""From a rollout to an experience: each number row by row without padding; rows; what all ranks gather."""

import dataclasses
import math

from dschat.engine import distributed
from dschat.engine.distributed import gather_objects, gather_rows
from dschat.rlhf.experience import (
    SAMPLER,
    Experience,
    add_advantages,
    gather_experience,
    parts_of,
    policy_logits,
    response_values,
    same_prompts,
    score_rollout,
    sizes_of,
)
from dschat.rlhf.rollout import Sampling
from tests.families import count_tokens
from tests.ppo_parts import (
    ALONE,
    PER_ACTION,
    SCORES,
    SIZES,
    TwoRanks,
    few_tokens,
    made_up,
    plain_models,
    rollout_of,
    shaping,
    with_few_prompts,
    with_holes,
)

import pytest
import torch
from torch import nn

STEPS, TEMPERATURE = 10, 3.0
T, F = True, False
SCORED = (*PER_ACTION, "final_values", "scores")


def sample(engine, tokenizer):
    """Ragged answers over a dozen tokens, some of them cut off."""
    sampling = Sampling(STEPS, TEMPERATURE, banned_ids=few_tokens(tokenizer, engine.family.config.vocab_size))
    rollout = rollout_of(engine.actor, tokenizer, sampling, seed=5)
    assert 0 < rollout.finished.sum() < len(SIZES)
    return rollout, sampling


def scored(engine, rollout, sampling, kl_kind: str = "kl", micro_batch_size: int = 4, mask=None) -> Experience:
    mask = rollout.response_mask if mask is None else mask
    return score_rollout(engine, rollout, SCORES, mask, sampling, kl_kind, micro_batch_size)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return plain_models("llama", tokenizer)


@pytest.fixture(scope="module")
def sampled(engine, tokenizer):
    return sample(engine, tokenizer)


@pytest.fixture(scope="module")
def experience(engine, sampled):
    return scored(engine, *sampled)


# --- scoring

# d: log p - log q of the token; p and q: the distributions at its place.
KL_OF = {
    "kl": lambda d, p, q: d,
    "abs": lambda d, p, q: abs(d),
    "mse": lambda d, p, q: d * d / 2,
    "k3": lambda d, p, q: math.exp(-d) - 1 + d,
    "full": lambda d, p, q: math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0),
}


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "kl"), ("llama", "abs"), ("gpt2", "mse"), ("bloom", "k3"), ("gpt2", "full")]
)
def test_everything_is_that_of_each_row_alone(family, kind, tokenizer):
    """Against plain transformers on the unpadded row: no mask, no positions, no shift but the one written here."""
    engine = plain_models(family, tokenizer)
    rollout, sampling = sample(engine, tokenizer)
    found = scored(engine, rollout, sampling, kind)
    for row in range(len(SIZES)):
        prompt = rollout.input_ids[row, rollout.attention_mask[row]].tolist()
        response = rollout.response_ids[row, rollout.response_mask[row]].tolist()
        alone = torch.tensor([prompt + response])
        with torch.no_grad():
            states = []
            for model in (engine.actor, engine.ref):
                logits = model(input_ids=alone).logits[0].double() / TEMPERATURE
                logits[:, list(sampling.banned_ids)] = float("-inf")
                states.append(logits.softmax(-1)[len(prompt) - 1 : -1].tolist())
            for t, token in enumerate(response):
                p, q = states[0][t], states[1][t]
                expected = {
                    "logprobs": math.log(p[token]),
                    "ref_logprobs": math.log(q[token]),
                    "entropy": -math.fsum(x * math.log(x) for x in p if x > 0),
                    "kl": KL_OF[kind](math.log(p[token] / q[token]), p, q),
                }
                for name, value in expected.items():
                    assert getattr(found, name)[row, t].item() == pytest.approx(value, abs=1e-4), name
            # The critic of the state before each action: the prompt and the actions already taken, each prefix alone.
            # After the last one of a row, whatever its length: the whole.
            for t in range(len(response) + 1):
                prefix = torch.tensor([prompt + response[:t]])
                value = (engine.critic.model(input_ids=prefix).logits[0, 0].item() - 0.5) / 2.0
                ours = found.values[row, t] if t < len(response) else found.final_values[row]
                assert ours.item() == pytest.approx(value, abs=1e-4)
    assert found.logprobs.equal(found.logprobs * found.response_mask)
    assert (found.logprobs - found.ref_logprobs).abs().max() > 0.01  # two models, not one twice


def test_the_samplers_log_probabilities_save_the_forward_of_the_actor(engine, sampled, experience):
    rollout, sampling = sampled
    calls = []
    hook = engine.actor.register_forward_pre_hook(lambda *_: calls.append(1))
    given = (engine, rollout, SCORES, rollout.response_mask, sampling)
    found = score_rollout(*given, "k3", 4, old_logprobs=SAMPLER)
    hook.remove()
    assert not calls and found.logprobs.equal(rollout.logprobs) and found.entropy.equal(-rollout.logprobs)
    assert found.ref_logprobs.equal(experience.ref_logprobs) and found.values.equal(experience.values)
    assert (found.kl - score_rollout(*given, "k3", 4).kl).abs().max() < 1e-4


def test_the_size_of_micro_batches_changes_nothing_and_nothing_needs_a_gradient(engine, sampled, experience):
    for size in (1, 100):
        other = scored(engine, *sampled, micro_batch_size=size)
        for name in SCORED:
            assert (getattr(other, name) - getattr(experience, name)).abs().max() < 1e-5, name
    counts = []
    hook = engine.ref.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for limit in (1, 20, 30):
        rollout, sampling = sampled
        other = score_rollout(engine, rollout, SCORES, rollout.response_mask, sampling, "kl", 4, max_tokens=limit)
        for name in SCORED:
            assert (getattr(other, name) - getattr(experience, name)).abs().max() < 1e-5, name
        assert limit == 1 or max(counts) <= limit
        real = int(rollout.attention_mask.sum() + rollout.response_mask.sum())
        assert sum(counts) == real or limit > 1  # rows alone have no padding
        counts.clear()
    hook.remove()
    for name in SCORED:
        value = getattr(experience, name)
        assert not value.requires_grad and value.dtype == torch.float32, name
    for name in PER_ACTION:
        assert (getattr(experience, name)[~experience.action_mask] == 0).all(), name
    rollout, _ = sampled
    for name in ("input_ids", "attention_mask", "response_ids", "response_mask", "finished"):
        assert getattr(experience, name).equal(getattr(rollout, name))
    assert experience.action_mask.equal(rollout.response_mask) and experience.scored.all()
    assert experience.scores.equal(SCORES)
    assert experience.sampler_logprobs.equal(rollout.logprobs) and len(experience) == len(SIZES)


def test_a_prompt_is_computed_once_for_its_answers_in_a_micro_batch(tokenizer, sampled):
    engine = plain_models("llama", tokenizer)
    rollout, sampling = with_few_prompts(sampled[0]), sampled[1]
    expected = scored(engine, rollout, sampling, micro_batch_size=1)
    sizes = [count_tokens(model) for model in (engine.actor, engine.ref, engine.critic.model.base_model)]
    found = scored(engine, rollout, sampling, micro_batch_size=6)
    assert sizes == [[9 + 6 + 6 + int(rollout.response_mask.sum())]] * 3
    for name in SCORED:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_answers_to_one_prompt_are_neighbours_in_micro_batches():
    """Prompts by their longest answer; a prompt's answers in their order; where there is one each, by length."""
    sizes = [[2, 9, 0], [3, 1, 1], [2, 1, 0], [3, 4, 1], [5, 3, 2], [3, 5, 3], [3, 1, 1]]
    assert parts_of(sizes, range(7), 7, 0) == [[1, 3, 6, 4, 5, 0, 2]]
    assert parts_of(sizes, [6, 3, 5, 2], 2, 0) == [[2, 6], [3, 5]]
    alone = [[2, size, number] for number, size in enumerate([5, 2, 9, 2, 1])]
    assert parts_of(alone, [3, 1, 2, 4, 0], 5, 0) == [[4, 3, 1, 0, 2]]


def test_prompts_are_told_apart_by_all_of_their_tokens():
    experience = made_up([1, 1, 1, 1, 1], [True] * 5)
    experience.input_ids = torch.tensor([[7, 7], [7, 7], [8, 7], [7, 8], [7, 7]])
    assert same_prompts(experience).tolist() == [0, 0, 2, 3, 4]  # of neighbours only
    prompts = [row[2] for row in sizes_of(experience)]
    assert prompts[0] == prompts[1] == prompts[4] and len(set(prompts)) == 3
    experience.attention_mask = torch.tensor([[False, True]] + [[True, True]] * 4)  # pads may be tokens elsewhere
    assert same_prompts(experience).tolist() == [0, 1, 2, 3, 4]
    assert len({row[2] for row in sizes_of(experience)}) == 4


def test_holes_and_a_row_without_a_score(engine, sampled, experience):
    """What is left out of the loss is still read: the other numbers are those without holes, bit for bit."""
    rollout, sampling = sampled
    mask = with_holes(rollout)
    assert (rollout.response_mask & ~mask).sum() > 2
    found = scored(engine, rollout, sampling, mask=mask)
    assert found.action_mask.equal(mask) and found.response_mask.equal(rollout.response_mask)
    assert found.scored.tolist() == [T] * 5 + [F]
    for name in PER_ACTION:
        value = getattr(found, name)
        assert value[mask].equal(getattr(experience, name)[mask]) and (value[~mask] == 0).all(), name
    assert found.final_values.equal(experience.final_values)


def test_without_a_critic_values_are_0(engine, sampled, experience):
    found = scored(dataclasses.replace(engine, critic=None), *sampled)
    assert found.values.shape == experience.values.shape and found.final_values.shape == (len(SIZES),)
    assert (found.values == 0).all() and (found.final_values == 0).all()
    assert found.logprobs.equal(experience.logprobs)


def test_scoring_is_in_eval_mode_whatever_the_mode_before(tokenizer):
    engine = plain_models("gpt2", tokenizer)
    rollout, sampling = sample(engine, tokenizer)
    expected = scored(engine, rollout, sampling)
    for module in (*engine.actor.modules(), *engine.critic.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    engine.train()
    assert engine.actor.training and engine.critic.training
    found = scored(engine, rollout, sampling)
    assert found.logprobs.equal(expected.logprobs) and found.values.equal(expected.values)


def test_what_stands_at_padding_changes_no_number(engine, sampled, experience, tokenizer):
    rollout, sampling = sampled
    generator = torch.Generator().manual_seed(9)

    def garbage(ids, mask):
        return torch.where(mask, ids, torch.randint(0, len(tokenizer), ids.shape, generator=generator))

    dirty = dataclasses.replace(
        rollout,
        input_ids=garbage(rollout.input_ids, rollout.attention_mask),
        response_ids=garbage(rollout.response_ids, rollout.response_mask),
    )
    assert not dirty.response_ids.equal(rollout.response_ids)
    found = scored(engine, dirty, sampling)
    for name in SCORED:
        assert (getattr(found, name) - getattr(experience, name)).abs().max() < 1e-5, name


# --- rows


@pytest.mark.parametrize("index", [[0], [3, 0], [3, 1, 5], [2, 4], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("holes", [False, True])
def test_rows_drops_columns_of_padding_and_changes_no_number(engine, sampled, experience, index, holes):
    rollout, sampling = sampled
    if holes:
        experience = scored(engine, rollout, sampling, mask=with_holes(rollout))
    for whole in (experience, add_advantages(experience, shaping(), 0.1)):
        part = whole.rows(torch.tensor(index))
        prompt = max(SIZES[row] for row in index)
        response = int(whole.response_mask[index].sum(1).max())  # not of the actions: the models read every token
        assert part.input_ids.shape == part.attention_mask.shape == (len(index), prompt)
        for name in ("response_ids", "response_mask", "action_mask", *PER_ACTION):
            assert getattr(part, name).shape == (len(index), response), name
        for k, row in enumerate(index):
            real, tokens = whole.attention_mask[row], whole.response_mask[row]
            assert part.input_ids[k, part.attention_mask[k]].equal(whole.input_ids[row, real])
            for name in ("response_ids", "action_mask", *PER_ACTION, "rewards", "advantages", "returns"):
                value = getattr(whole, name)
                if len(value):
                    assert getattr(part, name)[k, part.response_mask[k]].equal(value[row, tokens]), name
            for name in ("scores", "finished", "final_values", "scored"):
                assert getattr(part, name)[k] == getattr(whole, name)[row], name
            assert part.response_mask[k].sum() == tokens.sum()
    with torch.no_grad():
        mask = part.response_mask
        narrow, wide = (policy_logits(engine.actor, engine, batch)[0] for batch in (part, whole))
        by_token = wide.new_zeros(*whole.response_mask.shape, wide.shape[-1])
        by_token[whole.response_mask] = wide
        assert (narrow - by_token[index][:, : mask.shape[1]][mask]).abs().max() < 1e-4
        narrow, wide = (response_values(engine.critic, batch)[:, :-1] for batch in (part, whole))
        assert (narrow - wide[index][:, : mask.shape[1]])[mask].abs().max() < 1e-4


def test_rows_takes_slices(experience):
    part = experience.rows(slice(3, 4))
    assert part.input_ids.shape == (1, 1) and len(part) == 1 and part.scores.equal(experience.scores[3:4])


# --- ranks


def test_one_rank_gathers_what_it_has(experience, tokenizer):
    gathered = gather_experience(experience, ALONE, tokenizer.pad_token_id)
    for field in dataclasses.fields(experience):
        assert getattr(gathered, field.name).equal(getattr(experience, field.name)), field.name
    assert gather_rows(experience.scores, ALONE, 3).equal(experience.scores)
    assert gather_objects([1, "a"], ALONE, 2) == [1, "a"]


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_two_ranks_gather_their_groups_in_global_order(group_size, monkeypatch):
    """Global group g is on rank g % 2; its rows stay neighbours, in tensors of any shape and in lists."""
    monkeypatch.setattr(distributed, "dist", ranks := TwoRanks())
    whole = torch.arange(4 * group_size * 5).reshape(4 * group_size, 5)

    def on(runtime):
        mine = whole.unflatten(0, (-1, group_size))[runtime.rank :: 2].flatten(0, 1)
        items = [str(row) for row in mine.tolist()]
        return [
            gather_rows(mine, runtime, group_size),
            gather_rows(mine[:, 0], runtime, group_size),
            gather_objects(items, runtime, group_size),
        ]

    for rows, column, items in ranks.run(on):
        assert rows.equal(whole) and column.equal(whole[:, 0])
        assert items == [str(row) for row in whole.tolist()]


@pytest.mark.parametrize("group_size", [1, 3])
def test_two_ranks_of_unequal_width_gather_one_experience(experience, tokenizer, monkeypatch, group_size):
    """Each rank pads to its own rows; together they have what one rank would have of all rows."""
    monkeypatch.setattr(distributed, "dist", ranks := TwoRanks())
    whole = add_advantages(experience, shaping(), 0.1)
    rows = torch.arange(len(SIZES)).reshape(-1, group_size)
    parts = [whole.rows(rows[rank::2].flatten()) for rank in range(2)]
    assert parts[0].input_ids.shape != parts[1].input_ids.shape
    gathered = ranks.run(lambda r: gather_experience(parts[r.rank], r, tokenizer.pad_token_id, group_size))
    for found in gathered:
        for field in dataclasses.fields(whole):
            one, other = getattr(found, field.name), getattr(whole, field.name)
            assert one.dtype == other.dtype and one.equal(other), field.name
