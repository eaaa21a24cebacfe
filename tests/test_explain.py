"""The tracer of PPO: numbers by hand, every fault in a rollout or in a loss found, and a page that shows no markup of
a model's."""

import csv
import dataclasses
import functools
import html.parser
import itertools
import math

from dschat.engine.deepspeed_engine import TrainSpec, create_train_engine
from dschat.engine.distributed import Runtime, init_runtime
from dschat.errors import UserError
from dschat.functional import ppo_policy_loss
from dschat.models.scorer import Scorer
from dschat.report import explain_page
from dschat.rlhf import explain
from dschat.rlhf.collect import Collector
from dschat.rlhf.experience import Experience, Shaping, add_advantages, score_rollout
from dschat.rlhf.explain import explain_update
from dschat.rlhf.explain_oracle import compare, kl_of, recompute
from dschat.rlhf.ppo_trainer import UpdateSpec, train_rlhf
from dschat.rlhf.rewards import CombinedReward
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Sampling, generate, row_uniforms
from dschat.rlhf.specs import ESTIMATORS, KL_KINDS
from tests.families import ragged_prompts, tiny_config, tiny_model

import pytest
import torch
import transformers

SIZES, STEPS = (3, 9, 6, 1), 8  # four prompts, two answers to each
KL_COEF = 0.1
SHAPING = Shaping(
    estimator="gae",
    group_size=2,
    kl_in_reward=True,
    gamma=0.97,
    lam=0.9,
    clip_reward_value=2.0,
    missing_eos="subtract",
    missing_eos_penalty=1.0,
    whiten_rewards=False,
    whiten_advantages=True,
)
UPDATE = UpdateSpec(1, 100, 4, cliprange=0.2, cliprange_value=0.2)
CPU = Runtime(0, 1, torch.device("cpu"))


def tiny_critic(tokenizer) -> Scorer:
    torch.manual_seed(2)
    config = tiny_config("llama", tokenizer)
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim >= 2 else 1)
    return Scorer(model, 0.5, 2.0)


def move(model, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def sampling_for(tokenizer) -> Sampling:
    """Over a dozen tokens, so that answers end at different lengths."""
    kept = {*range(20, 140, 10), tokenizer.eos_token_id}
    return Sampling(STEPS, 3.0, banned_ids=tuple(i for i in range(len(tokenizer)) if i not in kept))


def rolled_out(engine, tokenizer, kl_kind: str) -> Experience:
    """Eight answers; one without a score, one with holes, two large scores of either sign; some cut off."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rows, sampling = 2 * len(SIZES), sampling_for(tokenizer)
    module = getattr(engine.actor, "module", engine.actor)
    uniforms = row_uniforms(rows, STEPS, 7)
    rollout = generate(module, *ragged_prompts(tokenizer, SIZES), sampling, uniforms, **ends)
    scores = torch.tensor([0.5, -3.0, 1.25, 3.5, 0.0, -0.75, 1.0, 0.25])
    mask = rollout.response_mask.clone()
    mask[4] = False  # no score
    longest = int(mask.sum(1).argmax())
    mask[longest, 1:3] = False
    assert 0 < rollout.finished.sum() < rows and (mask.sum(1) < mask.shape[1]).any() and longest != 4
    return score_rollout(engine, rollout, scores, mask, sampling, kl_kind, 4)


@pytest.fixture(scope="module")
def engine(tokenizer):
    """Four different models: plain modules, in the state before the update."""
    actor, ref = tiny_model("llama", tokenizer), tiny_model("llama", tokenizer)
    move(ref, 0.02, 1)
    return RLHFEngine(actor, tiny_critic(tokenizer), ref, actor)


@pytest.fixture(scope="module")
def experiences(engine, tokenizer):
    """By kind of KL; then the actor and the critic are updated."""
    made = {kind: rolled_out(engine, tokenizer, kind) for kind in KL_KINDS}
    move(engine.actor, 0.02, 5)
    move(engine.critic, 0.05, 6)
    return made


def collector_of(engine, tokenizer, kl_kind: str = "kl", runtime: Runtime = CPU) -> Collector:
    return Collector(engine, CombinedReward([]), tokenizer, sampling_for(tokenizer), runtime, 4, 4, kl_kind, 2)


def engine_for(engine, estimator: str):
    return engine if estimator == "gae" else dataclasses.replace(engine, critic=None)


@pytest.fixture
def explained(engine, experiences, tokenizer, tmp_path):
    """Explain with these changes of the settings; returns the folder."""

    def run(kl_kind="kl", num_rows=2, experience=None, update=UPDATE, kl_coef=KL_COEF, **changes):
        shaping = dataclasses.replace(SHAPING, **changes)
        own = engine_for(engine, shaping.estimator)
        if experience is None:
            experience = add_advantages(experiences[kl_kind], shaping, kl_coef)
        collector = collector_of(own, tokenizer, kl_kind)
        explain_update(collector, experience, shaping, update, kl_coef, num_rows, str(tmp_path))
        return tmp_path / "explain"

    return run


def read(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def actions(path) -> list[dict]:
    return [line for line in read(path) if line["is_action"] == "1"]


# --- numbers by hand


def by_hand() -> Experience:
    """Three answers: two actions; a hole, cut off; no score."""
    T, F = True, False
    mask = torch.tensor([[T, T, F], [T, F, T], [F, F, F]])
    logprobs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, -1.5], [0.0, 0.0, 0.0]])
    ref = torch.tensor([[-1.5, -1.0, 0.0], [-0.5, 0.0, -2.5], [0.0, 0.0, 0.0]])
    return Experience(
        input_ids=torch.zeros(3, 1, dtype=torch.long),
        attention_mask=torch.ones(3, 1, dtype=torch.bool),
        response_ids=torch.zeros(3, 3, dtype=torch.long),
        response_mask=torch.tensor([[T, T, F], [T, T, T], [T, T, F]]),
        action_mask=mask,
        finished=torch.tensor([T, F, T]),
        scores=torch.tensor([4.0, 1.0, 9.0]),
        sampler_logprobs=logprobs,
        logprobs=logprobs,
        ref_logprobs=ref,
        entropy=0.5 * mask,
        kl=torch.where(mask, logprobs - ref, 0.0),
        values=torch.tensor([[0.25, 0.5, 0.0], [1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]),
        final_values=torch.tensor([7.0, 4.0, 7.0]),
    )


def numbers_of(column: str, **changes) -> list[list[float]]:
    shaping = dataclasses.replace(SHAPING, gamma=0.5, lam=0.5, whiten_advantages=False, group_size=3, **changes)
    experience = add_advantages(by_hand(), shaping, 0.5)
    return [trace.numbers[column] for trace in recompute(experience, shaping, "kl", 0.5)]


def close(found: list[list[float]], expected: list[list[float]]) -> bool:
    return [len(row) for row in found] == [len(row) for row in expected] and all(
        a == pytest.approx(b, abs=1e-6)
        for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True)
    )


def test_rewards_deltas_and_advantages_by_hand():
    assert close(numbers_of("reward"), [[-0.25, 2.5], [0.0, -0.5], []])  # 2 + 0.5; 1 - 1 - 0.5
    assert close(numbers_of("delta"), [[-0.25, 2.0], [0.0, -2.5], []])
    assert close(numbers_of("advantage"), [[-0.25 + 0.25 * 2, 2.0], [0.25 * -2.5, -2.5], []])
    assert close(numbers_of("return"), [[0.5, 2.5], [0.375, -0.5], []])
    assert close(numbers_of("reward", missing_eos="replace", missing_eos_penalty=3.0)[1:], [[0.0, -3.5], []])
    assert close(numbers_of("reward", missing_eos="bootstrap")[1:], [[0.0, -0.5], []])
    assert close(numbers_of("delta", missing_eos="bootstrap"), [[-0.25, 2.0], [0.0, -0.5 + 0.5 * 4 - 2], []])
    assert close(numbers_of("reward", clip_reward_value=0.0)[:1], [[-0.25, 4.5]])
    assert close(numbers_of("reward", kl_in_reward=False), [[0.0, 2.0], [0.0, 0.0], []])


def test_baselines_without_a_critic_by_hand():
    totals = (2.25, -0.5)
    assert close(numbers_of("advantage", estimator="reinforce_pp"), [[1.0, 2.5], [-0.25, -0.5], []])
    assert close(numbers_of("advantage", estimator="rloo"), [[2.75, 2.75], [-2.75, -2.75], []])
    std = math.sqrt(2 * 1.375**2)
    a = (totals[0] - 0.875) / (std + 1e-6)
    assert close(numbers_of("advantage", estimator="grpo"), [[a, a], [-a, -a], []])


def test_whitening_by_hand():
    rewards = [-0.25, 2.5, 0.0, -0.5]
    mean = sum(rewards) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 4 + 1e-8)
    scaled = [(r - mean) / std + mean for r in rewards]
    assert close(numbers_of("reward", whiten_rewards=True), [scaled[:2], scaled[2:], []])
    shaping = dataclasses.replace(SHAPING, gamma=1.0, lam=1.0, estimator="reinforce_pp", whiten_advantages=True)
    experience = add_advantages(by_hand(), shaping, 0.5)
    found = [trace.numbers["advantage"] for trace in recompute(experience, shaping, "kl", 0.5)]
    sums = [2.25, 2.5, -0.5, -0.5]
    mean = sum(sums) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in sums) / 4 + 1e-8)
    assert close(found, [[(x - mean) / std for x in sums[:2]], [(x - mean) / std for x in sums[2:]], []])


def test_kinds_of_kl_by_hand():
    for kind, expected in {"kl": -0.5, "abs": 0.5, "mse": 0.125, "k3": math.exp(0.5) - 1.5}.items():
        assert kl_of(-0.5, kind) == pytest.approx(expected, abs=1e-12)
    assert kl_of(-1e4, "k3") == math.inf


# --- the run agrees, in every configuration


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whiten", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("missing_eos", ["subtract", "replace", "bootstrap"])
@pytest.mark.parametrize("kl_kind", KL_KINDS)
def test_every_configuration_agrees_with_plain_python(experiences, estimator, whiten, missing_eos, kl_kind):
    changes = {"estimator": estimator, "missing_eos": missing_eos}
    for kl_in_reward in (True, False):
        shaping = dataclasses.replace(
            SHAPING, whiten_rewards=whiten[0], whiten_advantages=whiten[1], kl_in_reward=kl_in_reward, **changes
        )
        experience = add_advantages(experiences[kl_kind], shaping, KL_COEF)
        traces = recompute(experience, shaping, kl_kind, KL_COEF)
        compare(experience, traces, 400, 1e-3)
        if estimator != "grpo":  # which divides by the spread of a group, 0 for two equal answers
            assert max(max(trace.slack.values()) for trace in traces) < 2e-4  # strict enough to find a fault


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_where_all_is_equal_rounding_is_no_fault(estimator):
    """Whitening and groups divide by a spread of 0: what is left is rounding, magnified."""
    same = by_hand()
    ones = torch.ones(4, 3)
    fields = {f.name: getattr(same, f.name) for f in dataclasses.fields(same)}
    repeated = {name: value[:1].repeat_interleave(4, 0) for name, value in fields.items() if len(value)}
    many = Experience(**repeated | {"kl": 0.1 * ones * same.action_mask[:1]})
    many = dataclasses.replace(many, ref_logprobs=many.logprobs - many.kl, values=many.values * 0.1)
    for rewards, advantages in itertools.product((False, True), repeat=2):
        shaping = dataclasses.replace(
            SHAPING, estimator=estimator, whiten_rewards=rewards, whiten_advantages=advantages, group_size=4
        )
        found = add_advantages(many, shaping, 0.07)
        compare(found, recompute(found, shaping, "kl", 0.07), 400, 1e-3)
    nothing = dataclasses.replace(many, **{
        name: torch.zeros_like(getattr(many, name))
        for name in ("action_mask", "logprobs", "sampler_logprobs", "ref_logprobs", "kl", "values", "entropy")
    })  # fmt: skip
    found = add_advantages(nothing, shaping, 0.07)
    compare(found, recompute(found, shaping, "kl", 0.07), 400, 1e-3)


# --- faults in the rollout


def stage(experiences, kl_kind="kl", **changes):
    shaping = dataclasses.replace(SHAPING, **changes)
    return add_advantages(experiences[kl_kind], shaping, KL_COEF), shaping


FAULTS = {
    "sampler_logprobs": 0.01, "logprobs": 0.01, "ref_logprobs": 0.01, "kl": 0.001, "values": 0.01, "rewards": 0.001,
    "advantages": 0.001, "returns": 0.001, "entropy": 9.0,
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_one_wrong_number_in_the_rollout_is_found(experiences, explained, name):
    experience, shaping = stage(experiences)
    row = 6
    t = int(experience.action_mask[row].nonzero()[0, 0])
    wrong = getattr(experience, name).clone()
    wrong[row, t] += FAULTS[name]
    place = f"response {row}, token {t}, "
    expected = {
        "sampler_logprobs": place + "logprob",
        "ref_logprobs": place + "kl",
        "values": "response ., token ., advantage",  # whose mean changes; its own return does not depend on a value
        "advantages": place + "advantage",
    }.get(name, place + name.rstrip("s"))
    with pytest.raises(RuntimeError, match=f"^explain: {expected}"):
        explained(experience=dataclasses.replace(experience, **{name: wrong}))


@pytest.mark.parametrize("name", FAULTS)
def test_a_number_outside_the_action_mask_is_found(experiences, explained, name):
    experience, _ = stage(experiences)
    hole = (experience.response_mask & ~experience.action_mask).nonzero()[0]
    wrong = getattr(experience, name).clone()
    wrong[tuple(hole)] = 1e-6
    with pytest.raises(RuntimeError, match=f"response {hole[0]}, token {hole[1]}, .* outside the action mask"):
        explained(experience=dataclasses.replace(experience, **{name: wrong}))


def test_a_wrong_score_final_value_or_end_is_found(experiences, explained):
    experience, _ = stage(experiences)
    scores = experience.scores.clone()
    scores[0] += 0.01
    with pytest.raises(RuntimeError, match="response 0, token ., reward"):
        explained(experience=dataclasses.replace(experience, scores=scores))
    with pytest.raises(RuntimeError, match="reward"):
        explained(experience=dataclasses.replace(experience, finished=~experience.finished))
    experience, _ = stage(experiences, missing_eos="bootstrap")
    with pytest.raises(RuntimeError, match="return|advantage"):
        wrong = experience.final_values + 0.01
        explained(experience=dataclasses.replace(experience, final_values=wrong), missing_eos="bootstrap")


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_what_is_no_number_is_found(experiences, explained, fault):
    experience, _ = stage(experiences)
    wrong = experience.advantages.clone()
    wrong[0, 0] = fault
    with pytest.raises(RuntimeError, match="response 0, token 0, advantage"):
        explained(experience=dataclasses.replace(experience, advantages=wrong))


def test_impossible_numbers_of_the_exact_kl_are_found(experiences, explained):
    experience = experiences["full"]
    kl = experience.kl.clone()
    kl[0, 0] = -0.001
    shaping = dataclasses.replace(SHAPING, kl_in_reward=False)
    experience = add_advantages(dataclasses.replace(experience, kl=kl), shaping, KL_COEF)
    with pytest.raises(RuntimeError, match="response 0, token 0, kl"):
        explained("full", experience=experience, kl_in_reward=False)


OTHER = {
    "gamma": 0.96, "lam": 0.91, "clip_reward_value": 2.1, "missing_eos": "replace", "missing_eos_penalty": 1.01,
    "kl_in_reward": False, "whiten_rewards": True, "whiten_advantages": False, "estimator": "reinforce_pp",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_advantages_of_another_setting_are_found(experiences, explained, name):
    wrong, _ = stage(experiences, **{name: OTHER[name]})
    with pytest.raises(RuntimeError, match="^explain: response"):
        explained(experience=wrong)


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_another_size_of_groups_is_found(experiences, explained, estimator):
    wrong, _ = stage(experiences, estimator=estimator, group_size=4)
    with pytest.raises(RuntimeError, match="advantage"):
        explained(experience=wrong, estimator=estimator)
    right, _ = stage(experiences, estimator=estimator)
    explained(experience=right, estimator=estimator)


def test_another_kl_coefficient_or_kind_is_found(experiences, explained):
    experience, _ = stage(experiences)
    with pytest.raises(RuntimeError, match="reward"):
        explained(experience=experience, kl_coef=KL_COEF * 1.01)
    for kind in ("abs", "mse", "k3"):
        with pytest.raises(RuntimeError, match=", kl:"):
            explained(kind, experience=experience)


# --- after the update


CRITIC = {"value", "next_value", "delta", "return", "new_value", "clipped_value", "value_loss"}
DUAL = dataclasses.replace(UPDATE, cliprange=0.01, dual_clip=1.02)


def test_the_files_hold_the_whole_computation(experiences, explained):
    folder = explained(num_rows=100, update=DUAL)
    files = ["index.html", *(f"response_{row:03d}.csv" for row in range(8))]
    assert sorted(path.name for path in folder.iterdir()) == files
    experience, _ = stage(experiences)
    clipped = set()
    lines = [(row, t, line) for row in range(8) for t, line in enumerate(read(folder / files[row + 1]))]
    for row, t, line in lines:
        is_action = bool(experience.action_mask[row, t])
        position = (line["position"], line["token_id"], line["in_response"], line["is_action"])
        assert position == (str(t), str(int(experience.response_ids[row, t])), "1", str(int(is_action)))
        numbers = dict(list(line.items())[5:])
        if not is_action:
            assert set(numbers.values()) == {""}
            continue
        x = {name: float(text) for name, text in numbers.items()}
        for name in ("logprob", "ref_logprob", "kl", "reward", "value", "advantage", "return", "entropy"):
            whole = getattr(experience, name if name in ("kl", "entropy") else f"{name}s")
            assert x[name] == pytest.approx(whole[row, t].item(), rel=1e-7), name
        assert x["score_share"] + x["kl_share"] == pytest.approx(x["reward"], abs=1e-6)
        assert x["reward"] + 0.97 * x["next_value"] - x["value"] == pytest.approx(x["delta"], abs=1e-6)
        assert x["advantage_raw"] + x["value"] == pytest.approx(x["return"], abs=1e-5)
        assert math.exp(x["new_logprob"] - x["logprob"]) == pytest.approx(x["ratio"], rel=1e-5)
        assert x["new_logprob"] != x["logprob"] and x["new_value"] != x["value"]
        clipped.add((x["clipped"], x["advantage"] > 0))
        one = experience.rows(slice(row, row + 1))
        new = torch.tensor([[x["new_logprob"]]], requires_grad=True)
        old, advantages, mask = (value[:, t : t + 1] for value in (one.logprobs, one.advantages, one.action_mask))
        loss, _ = ppo_policy_loss(new, old, advantages, mask, 0.01, dual_clip=1.02)
        loss.backward()
        assert bool(new.grad == 0) == bool(x["clipped"])
        assert loss.item() == pytest.approx(x["policy_loss"], rel=1e-5)
    assert clipped == {(0.0, True), (0.0, False), (1.0, True), (1.0, False)}
    assert len(read(folder / "response_003.csv")) == experience.response_mask[3].sum()
    assert not any(line["reward"] for line in read(folder / "response_004.csv"))  # without a score


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kl_loss", [None, "k3"])
def test_columns_without_a_meaning_are_left_out_and_the_page_says_why(explained, estimator, whiten, kl_loss):
    update = dataclasses.replace(UPDATE, kl_loss=kl_loss)
    whitening = {"whiten_rewards": whiten, "whiten_advantages": whiten}
    folder = explained(estimator=estimator, update=update, kl_in_reward=kl_loss is None, num_rows=1, **whitening)
    columns = set(read(folder / "response_000.csv")[0])
    assert columns & CRITIC == (CRITIC if estimator == "gae" else set())
    assert ("kl_loss" in columns) == (kl_loss is not None) and ("reward_raw" in columns) == whiten
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert ("has no critic" in text) == (estimator != "gae")
    assert ("rewards are not whitened" in text) == ("Advantages are not whitened" in text) == (not whiten)
    assert ("the KL is in the rewards, not in the loss" in text) == (kl_loss is None)


@pytest.mark.parametrize("kind", ["mse", "k3", "full"])
def test_the_kl_of_the_loss_is_that_of_the_updated_policy(explained, kind):
    update = dataclasses.replace(UPDATE, kl_loss=kind)
    for line in actions(explained(kind, update=update, kl_in_reward=False) / "response_000.csv"):
        d = float(line["new_logprob"]) - float(line["ref_logprob"])
        loss = float(line["kl_loss"])
        if kind != "full":
            expected = {"mse": d * d / 2, "k3": math.exp(-d) - 1 + d}[kind]
            assert loss == pytest.approx(KL_COEF * expected, abs=1e-6)
        assert loss > 0 and float(line["kl_share"]) == 0
        assert loss != pytest.approx(KL_COEF * float(line["kl"]), rel=1e-3)  # not of the old one


BROKEN = {
    "token_logprobs": "new_logprob",
    "entropy_of": "new_entropy",
    "full_kl": "new_kl",
    "kl_penalty": "new_kl",
    "ppo_policy_loss": "policy_loss",
    "ppo_value_loss": "value_loss",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_function_of_the_update_is_found(explained, monkeypatch, name):
    function = getattr(explain, name)

    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        return (result[0] + 1e-3, result[1]) if isinstance(result, tuple) else result + 1e-3

    monkeypatch.setattr(explain, name, wrong)
    kind = {"full_kl": "full"}.get(name, "k3")
    with pytest.raises(RuntimeError, match=f"^explain: response 0, token 0, {BROKEN[name]}: "):
        explained(kind, update=dataclasses.replace(UPDATE, kl_loss=kind), kl_in_reward=False)


@pytest.mark.parametrize(("statistic", "column"), [("ratio_mean", "ratio"), ("clip_fraction", "clipped")])
def test_a_wrong_statistic_of_the_loss_is_found(explained, monkeypatch, statistic, column):
    def wrong(*args, **kwargs):
        loss, stats = ppo_policy_loss(*args, **kwargs)
        return loss, stats | {statistic: 1 - stats[statistic]}

    monkeypatch.setattr(explain, "ppo_policy_loss", wrong)
    with pytest.raises(RuntimeError, match=f", {column}: "):
        explained(update=DUAL)


def test_the_reference_of_another_model_is_found(experiences, explained):
    """Consistent log-probabilities of a wrong reference: only asking it again tells."""
    experience = experiences["kl"]
    shift = 0.01 * experience.action_mask
    wrong = dataclasses.replace(experience, ref_logprobs=experience.ref_logprobs - shift, kl=experience.kl + shift)
    with pytest.raises(RuntimeError, match="response 0, token 0, ref_logprob"):
        explained(experience=add_advantages(wrong, SHAPING, KL_COEF))


def test_the_budget_bounds_the_sums_over_the_vocabulary(explained, monkeypatch, tokenizer):
    seen: list[int] = []
    sums = explain.vocabulary_sums

    def counted(logits, ref_logits, token):
        seen.append(token)
        return sums(logits, ref_logits, token)

    monkeypatch.setattr(explain, "vocabulary_sums", counted)
    explained(num_rows=2)
    assert len(seen) == 14  # every action of the first two answers
    monkeypatch.setattr(explain, "VOCABULARY_BUDGET", 2 * 3 * len(tokenizer))
    folder = explained(num_rows=2)
    assert len(seen) == 14 + 6
    assert "for the first 3 actions" in (folder / "index.html").read_text(encoding="utf-8")


def test_the_models_answer_in_eval_mode_whatever_the_mode_before(engine, explained):
    modes = []
    models = (engine.actor, engine.critic)
    hooks = [model.register_forward_hook(lambda module, *_: modes.append(module.training)) for model in models]
    engine.train()
    explained(num_rows=1)
    for hook in hooks:
        hook.remove()
    assert modes == [False, False]


def test_far_ratios_are_bounded_as_in_the_run(experiences, explained):
    experience = experiences["kl"]
    far = 25.0 * experience.action_mask
    moved = {name: getattr(experience, name) - far for name in ("logprobs", "sampler_logprobs", "kl")}
    experience = add_advantages(dataclasses.replace(experience, **moved), SHAPING, KL_COEF)
    lines = actions(explained(experience=experience) / "response_000.csv")
    assert all(float(line["ratio"]) == pytest.approx(math.exp(20), rel=1e-5) for line in lines)


def test_a_real_update_is_explained_and_left_as_it_is(tokenizer, tmp_path):
    """Through DeepSpeed: the same two updates with the tracer and without."""
    runtime = init_runtime(0)

    def run(num_rows: int):
        spec = TrainSpec(1e-3, 0.0, "constant", 0, 10, 0.0, 0)
        create = functools.partial(create_train_engine, dtype=torch.float32, runtime=runtime)
        actor, ref = tiny_model("llama", tokenizer), tiny_model("llama", tokenizer)
        critic = create(tiny_critic(tokenizer), spec)
        engine = RLHFEngine(create(actor, spec), critic, ref, actor)
        experience = add_advantages(rolled_out(engine, tokenizer, "k3"), SHAPING, KL_COEF)
        for _ in range(2):
            train_rlhf(engine, experience, sampling_for(tokenizer), UPDATE, 0, runtime)
            state = torch.get_rng_state()
            if num_rows:
                collector = collector_of(engine, tokenizer, "k3")
                explain_update(collector, experience, SHAPING, UPDATE, KL_COEF, num_rows, str(tmp_path))
            assert torch.get_rng_state().equal(state)
        return [p.detach().clone() for m in (actor, critic.module) for p in m.parameters()]

    for one, other in zip(run(0), run(3), strict=True):
        assert one.equal(other)
    ratios = {round(float(line["ratio"]), 6) for line in actions(tmp_path / "explain" / "response_000.csv")}
    assert len(ratios) > 1


# --- files and page


def test_only_rank_0_writes_and_an_earlier_run_leaves_nothing(engine, experiences, tokenizer, tmp_path):
    experience, _ = stage(experiences)

    def run(rank: int, num_rows: int) -> set[str]:
        collector = collector_of(engine, tokenizer, runtime=Runtime(rank, 1, torch.device("cpu")))
        explain_update(collector, experience, SHAPING, UPDATE, KL_COEF, num_rows, str(tmp_path))
        return {path.name for path in tmp_path.glob("explain/*")}

    assert run(1, 2) == set()
    assert run(0, 2) == {"index.html", "response_000.csv", "response_001.csv"}
    assert run(0, 1) == {"index.html", "response_000.csv"}


def test_a_folder_that_cannot_be_written_is_a_users_mistake(explained, tmp_path):
    (tmp_path / "explain").write_text("")
    with pytest.raises(UserError, match=r"explain cannot be written \(.*\); make room there"):
        explained()


class Elements(html.parser.HTMLParser):
    """Names of the elements, and all text; every element is closed."""

    def __init__(self, source: str):
        super().__init__()
        self.names: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_what_a_model_wrote_is_text_and_nothing_is_fetched(explained, tokenizer, monkeypatch):
    evil = "<script>alert('x')</script> & <img src=x onerror=y>"
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids, **options: evil)
    folder = explained(num_rows=2)
    source = (folder / "index.html").read_text(encoding="utf-8")
    page = Elements(source)
    assert not {"script", "img", "link", "iframe"} & set(page.names)
    assert page.text.count(evil) == 4 and explain_page.visible(evil) in page.text
    assert not any(word in source for word in ("http", "@import", "url("))
    assert "prefers-color-scheme:dark" in source and "overflow-x:auto" in source
    assert read(folder / "response_000.csv")[0]["token"] == explain_page.visible(evil)


def test_the_page_says_what_the_numbers_are(experiences, explained):
    experience, _ = stage(experiences)
    folder = explained(num_rows=5)
    source = (folder / "index.html").read_text(encoding="utf-8")
    text = Elements(source).text
    assert "score: -3after clipping: -2after the rule for cut-off answers: -3" in text  # answer 1
    assert f"sum of rewards: {experience.rewards[1].sum().item():.4g}tokens: 8of these learned from: " in text
    assert "Answer (cut off at the length limit)" in text and "Answer (finished)" in text
    assert text.count("nothing of it is learned from") == 1  # answer 4
    last = {name: float(x) for name, x in list(read(folder / "response_000.csv")[-1].items())[5:]}
    in_brackets = {name: f"({x:.4g})" if x < 0 else f"{x:.4g}" for name, x in last.items()}
    assert "{reward} + 0.97 · 0 − {value} = {delta}".format_map(in_brackets) in text
    assert source.count("class=out") == int((experience.response_mask & ~experience.action_mask)[:5].sum())
    assert source.count("class='token'") == int(experience.action_mask[:5].sum())


def test_the_colour_of_a_token_is_its_advantage():
    groups = [explain_page.Group("", ("token",), "", "", "")]
    row = {"token": "a", "is_action": 1}
    assert "rgba(0,150,80,0.60)" in explain_page._row(row | {"advantage": 2.0}, groups, 2.0)
    assert "rgba(215,60,40,0.30)" in explain_page._row(row | {"advantage": -1.0}, groups, 2.0)
    assert "rgba" not in explain_page._row({"token": "a", "is_action": 0}, groups, 2.0)


def test_white_space_and_special_tokens_can_be_seen(explained, tokenizer):
    assert explain_page.visible(" a\n\t\\n\u200b é 中") == "␣a\\n\\t\\\\n\\u200b␣é␣中"
    folder = explained(num_rows=8)
    tokens = [line["token"] for row in range(8) for line in read(folder / f"response_{row:03d}.csv")]
    assert f"⟦{tokenizer.eos_token}⟧" in tokens and not any(" " in token or "\n" in token for token in tokens)
