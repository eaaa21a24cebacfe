"""A whole PPO update against tests/ppo_oracle.py: ragged answers, cut-off ones, holes, a row without a score."""

import dataclasses
import inspect
from types import SimpleNamespace

from dschat.engine.deepspeed_engine import TrainSpec, create_frozen_model, create_train_engine
from dschat.engine.distributed import init_runtime
from dschat.rlhf.experience import Shaping, add_advantages, score_rollout
from dschat.rlhf.ppo_trainer import UpdateSpec, train_rlhf
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Rollout, Sampling
from tests import ppo_oracle
from tests.ppo_oracle import Row, Settings

import numpy as np
import pytest
import torch
from torch import nn

VOCAB, WIDTH, PAD, BANNED = 11, 4, 0, [0, 9]
EPOCHS, MINIBATCH, SEED = 2, 4, 3  # of eight rows: two minibatches an epoch


class Policy(nn.Module):
    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__()
        self.embed, self.head = (
            nn.Parameter(torch.tensor(weights[n], dtype=torch.float32)) for n in ("embed", "head")
        )

    def forward(self, input_ids, attention_mask, use_cache=False, logits_to_keep=0):
        return SimpleNamespace(logits=(torch.tanh(self.embed[input_ids]) @ self.head)[:, -logits_to_keep:])


class Critic(Policy):
    def forward(self, input_ids, attention_mask, begins_like=None):
        return (torch.tanh(self.embed[input_ids]) @ self.head)[..., 0]


def made_weights() -> list[dict[str, np.ndarray]]:
    """Of actor, reference and critic; float32 numbers, so that both sides start from the same."""
    random = np.random.default_rng(1)

    def weights(outputs: int) -> dict[str, np.ndarray]:
        shapes = {"embed": (VOCAB, WIDTH), "head": (WIDTH, outputs)}
        return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    return [weights(VOCAB), weights(VOCAB), weights(1)]


def made_rows() -> list[Row]:
    """Eight answers of two to seven tokens; row 1 has holes, row 4 one at its end, row 6 has no score."""
    random = np.random.default_rng(2)
    rows = []
    for i, (prompt, response) in enumerate([(3, 5), (1, 7), (4, 2), (2, 6), (5, 7), (3, 4), (1, 3), (2, 7)]):
        ids = random.choice([i for i in range(VOCAB) if i not in BANNED], prompt + response).tolist()
        acts = [i != 6 and not (i == 1 and t in (1, 2)) and not (i == 4 and t == 6) for t in range(response)]
        score = float(np.float32(random.normal() * 2.5)) if any(acts) else 0.0
        rows.append(Row(ids[:prompt], ids[prompt:], acts, finished=response < 7, score=score))
    return rows


def as_rollout(rows: list[Row]) -> tuple[Rollout, torch.Tensor]:
    """And the action mask."""
    num_prompt, num_response = (max(len(getattr(row, name)) for row in rows) for name in ("prompt", "response"))
    left = [[0] * (num_prompt - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
    right = [[1] * len(row.response) + [0] * (num_response - len(row.response)) for row in rows]
    acts = [[*row.acts, *[False] * (num_response - len(row.acts))] for row in rows]
    rollout = Rollout(
        torch.tensor([[PAD] * (num_prompt - len(row.prompt)) + row.prompt for row in rows]),
        torch.tensor(left).bool(),
        torch.tensor([row.response + [PAD] * (num_response - len(row.response)) for row in rows]),
        torch.tensor(right).bool(),
        torch.zeros(len(rows), num_response),
        torch.tensor([row.finished for row in rows]),
    )
    return rollout, torch.tensor(acts)


def trainer_run(how: Settings, micro_batch_size: int):
    """The experience, the statistics of every minibatch, and the engine after it."""
    runtime = init_runtime(0)
    actor, ref, critic = made_weights()
    specs = [
        TrainSpec(rate, 0.0, "constant", 0, 9, how.max_grad_norm, 0) for rate in (how.actor_rate, how.critic_rate)
    ]
    policy = Policy(actor)
    options = {"dtype": torch.float32, "runtime": runtime}
    with_critic = how.estimator == "gae"
    engine = RLHFEngine(
        create_train_engine(policy, specs[0], **options),
        create_train_engine(Critic(critic), specs[1], **options) if with_critic else None,
        create_frozen_model(Policy(ref), zero_stage=0, dtype=torch.float32, device=runtime.device),
        policy,
    )
    rows = made_rows()
    rollout, mask = as_rollout(rows)
    sampling = Sampling(7, how.temperature, banned_ids=tuple(BANNED))
    scores = torch.tensor([row.score for row in rows])
    shaping = Shaping(
        how.estimator, how.group_size, not how.kl_in_loss, how.gamma, how.lam, how.clip_score, how.missing_eos,
        how.penalty, how.whiten_rewards, how.whiten_advantages,
    )  # fmt: skip
    experience = score_rollout(engine, rollout, scores, mask, sampling, how.kl_kind, micro_batch_size)
    experience = add_advantages(experience, shaping, how.kl_coef)
    spec = UpdateSpec(
        EPOCHS, MINIBATCH, micro_batch_size, how.cliprange, how.cliprange_value, how.dual_clip, how.vf_coef,
        how.entropy_coef, how.kl_kind if how.kl_in_loss else None,
    )  # fmt: skip
    updates = train_rlhf(engine, experience, sampling, spec, SEED, runtime, kl_coef=how.kl_coef)
    return experience, updates, engine


def oracle_run(how: Settings):
    actor, ref, critic = (ppo_oracle.Bigram(weights) for weights in made_weights())
    rows = made_rows()
    ppo_oracle.score(rows, actor, ref, critic, how, BANNED)
    ppo_oracle.advantages(rows, how)
    generator = torch.Generator().manual_seed(SEED)  # the order of the rows is the one thing that is shared
    updates = []
    for _ in range(EPOCHS):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows), MINIBATCH):
            part = [rows[i] for i in order[start : start + MINIBATCH]]
            policy = ppo_oracle.policy_step(part, actor, ref, how, BANNED)
            stats = {f"policy/{name}": value for name, value in policy.items()}
            if how.estimator == "gae":
                value = ppo_oracle.value_step(part, critic, how)
                stats |= {f"critic/{name}": number for name, number in value.items()}
            updates.append(stats)
    return rows, updates, actor, critic


CASES = {
    "plain": Settings(),
    "bootstrap, dual clip, entropy, mse loss": Settings(
        missing_eos="bootstrap",
        dual_clip=1.05,
        entropy_coef=0.3,
        kl_kind="mse",
        kl_in_loss=True,
        vf_coef=0.4,
        actor_rate=0.06,
    ),
    "replace, k3, whitened rewards": Settings(
        missing_eos="replace", kl_kind="k3", whiten_rewards=True, whiten_advantages=False, gamma=1.0
    ),
    "full KL in the reward": Settings(kl_kind="full", entropy_coef=-0.1),
    "rloo, full KL in the loss": Settings(estimator="rloo", kl_kind="full", kl_in_loss=True, whiten_advantages=False),
    "k3 loss": Settings(kl_kind="k3", kl_in_loss=True, temperature=0.7),
}


@pytest.mark.parametrize("micro_batch_size", [4, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_whole_update_is_that_of_the_oracle(name, micro_batch_size):
    """Two epochs of two minibatches with clipped gradients: the experience, the statistics of every step, the
    weights after the last."""
    how = CASES[name]
    rows, expected, actor, critic = oracle_run(how)
    experience, updates, engine = trainer_run(how, micro_batch_size)
    for i, row in enumerate(rows):
        tokens, acts = experience.response_mask[i], np.array(row.acts)
        for field in ("logprobs", "ref_logprobs", "entropy", "kl", "rewards", "advantages", "values", "returns"):
            if field in ("values", "returns") and engine.critic is None:
                continue
            found = getattr(experience, field)[i, tokens].double().numpy()
            assert found == pytest.approx(np.where(acts, row.numbers[field], 0.0), rel=1e-5, abs=3e-6), (i, field)
        if engine.critic is not None:
            assert experience.final_values[i].item() == pytest.approx(float(row.numbers["final"][0]), rel=1e-5)

    assert len(updates) == len(expected) == 4
    for step, (found, wanted) in enumerate(zip(updates, expected, strict=True)):
        compared = set(found) & set(wanted)
        assert set(found) == compared, set(found) - compared  # no statistic is left out
        for key in compared:
            # A mean of advantages times ratios near 1 cancels: its rounding is that of its terms, which are near 1.
            assert found[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-6), (step, key)
    at_work(how, expected)

    pairs = [(engine.actor, actor)] + ([(engine.critic, critic)] if engine.critic is not None else [])
    for trained, net in pairs:
        for key, parameter in trained.module.named_parameters():
            assert parameter.detach().numpy() == pytest.approx(net.weights[key], rel=1e-4, abs=1e-5), key


def at_work(how: Settings, steps: list[dict[str, float]]) -> None:
    """Whatever is compared was active: ratios away from 1, both clips, gradients above their limit."""
    assert (
        steps[0]["policy/log_ratio_abs_max"] < 1e-12 and min(s["policy/log_ratio_abs_max"] for s in steps[1:]) > 0.05
    )
    assert max(s["policy/clip_fraction"] for s in steps) > 0.1
    assert min(s["policy/grad_norm"] for s in steps) > how.max_grad_norm
    if how.estimator == "gae":
        assert max(s["critic/clip_fraction"] for s in steps) > 0.1
        assert min(s["critic/grad_norm"] for s in steps) > how.max_grad_norm
    if how.dual_clip:
        assert max(s["policy/dual_clip_fraction"] for s in steps) > 0
    if how.kl_in_loss:
        assert max(s["policy/kl_loss"] for s in steps) > 0.1


def test_the_oracle_holds_no_torch_and_nothing_of_ours():
    source = inspect.getsource(ppo_oracle)
    imports = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert imports == ["import math", "from dataclasses import dataclass, field", "import numpy as np"]


@pytest.mark.parametrize("changed", ["entropy_coef", "kl_coef", "vf_coef", "dual_clip"])
def test_the_gradients_of_the_oracle_are_those_of_its_losses(changed):
    """By differences of the losses themselves, so that the oracle's own calculus is proven too."""
    how = Settings(
        missing_eos="bootstrap", dual_clip=1.2, entropy_coef=0.3, kl_kind="full", kl_in_loss=True, vf_coef=0.4
    )
    how = dataclasses.replace(how, **{changed: {"dual_clip": None}.get(changed, 2.0)})
    rows = made_rows()
    actor, ref, critic = (ppo_oracle.Bigram(weights) for weights in made_weights())
    ppo_oracle.score(rows, actor, ref, critic, how, BANNED)
    ppo_oracle.advantages(rows, how)
    random = np.random.default_rng(5)
    for row in rows:  # off policy, so that the clips are at work
        row.numbers["logprobs"] = row.numbers["logprobs"] + 0.3 * random.normal(size=len(row.response))
        row.numbers["values"] = row.numbers["values"] + 0.3 * random.normal(size=len(row.response))

    class Stopped(ppo_oracle.Bigram):
        def step(self, *_):
            return 0.0

    def policy_loss(weights) -> tuple[float, Stopped]:
        net = Stopped(weights)
        stats = ppo_oracle.policy_step(rows, net, ref, how, BANNED)
        return stats["loss"] - how.entropy_coef * stats["entropy_per_token"] + how.kl_coef * stats["kl_loss"], net

    def value_loss(weights) -> tuple[float, Stopped]:
        net = Stopped(weights)
        return how.vf_coef * ppo_oracle.value_step(rows, net, how)["loss"], net

    for loss, weights in ((policy_loss, actor.weights), (value_loss, critic.weights)):
        _, net = loss(weights)
        for name, value in weights.items():
            for index in np.ndindex(value.shape):
                sides = []
                for by in (1e-6, -1e-6):
                    other = {n: v.copy() for n, v in weights.items()}
                    other[name][index] += by
                    sides.append(loss(other)[0])
                assert net.gradient[name][index] == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-6)
