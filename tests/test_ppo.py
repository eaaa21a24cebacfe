"""The models of step 3 as `create_models` makes them from directories."""

import dataclasses

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, is_sharded
from dschat.engine.distributed import init_runtime
from dschat.errors import UserError
from dschat.models.load import save_model
from dschat.models.scorer import last_token_values, load_score_stats, save_score_stats
from dschat.rlhf.build import ModelsSpec, create_models
from dschat.rlhf.experience import response_values, score_rollout, sequences
from dschat.rlhf.reward_specs import parse_reward
from dschat.rlhf.rewards import Samples
from dschat.rlhf.rollout import Rollout, tokens_of
from tests.families import tiny_model
from tests.ppo_parts import FP32, RATE, SCORES, SIZES, rollout_of, sampling_for, tiny_scorer

import pytest
import torch
import transformers
from torch import nn

SPEC = TrainSpec(RATE, 0.0, "constant", 0, 10, 0.0, 0)


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


@pytest.fixture(scope="module")
def reward_dir(tokenizer, tmp_path_factory):
    """By family: a reward model with statistics of its own."""
    root = tmp_path_factory.mktemp("reward")

    def directory(family: str) -> str:
        path = str(root / family)
        if not (root / family).exists():
            save_model(tiny_scorer(family, tokenizer, 3).model, tokenizer, path)
            save_score_stats(path, -0.7, 1.9)
        return path

    return directory


@pytest.fixture(scope="module")
def build(model_dirs, reward_dir, runtime):
    def models(family: str = "llama", **changes):
        actor = model_dirs(family)
        given = {
            "actor_path": actor,
            "critic_path": None,
            "rewards": (parse_reward(f"full:{reward_dir(family)}"),),
            "actor": SPEC,
            "critic": SPEC,
            "reference_stage": 0,
            "reward_stage": 0,
            "offload_reference": False,
            "offload_reward": False,
            "actor_lora": None,
            "critic_lora": None,
            "share_trunk": False,
            "save_merged": False,
            "quantization": None,
            "normalize_reward": True,
            "use_liger_kernel": False,
            "upcast_layernorm": False,
            "ema_decay": None,
            "micro_batch_size": 4,
            "api_timeout": 1.0,
            "api_retries": 0,
        } | changes
        tokenizer = load_tokenizer(given["actor_path"])
        return create_models(ModelsSpec(**given), tokenizer, dtype=FP32, runtime=runtime)

    return models


def samples_of(rollout: Rollout) -> Samples:
    prompts = tokens_of(rollout.input_ids, rollout.attention_mask)
    answers = tokens_of(rollout.response_ids, rollout.response_mask)
    size = len(prompts)
    ids = [a + b for a, b in zip(prompts, answers, strict=True)]
    lens = [len(prompt) for prompt in prompts]
    return Samples([""] * size, [""] * size, [[]] * size, ids, lens, rollout.finished.tolist(), [{}] * size)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_critic_starts_as_the_reward_model(build, reward_dir, tokenizer, normalize):
    """The value of a whole response is its score, on the scale that step 2 stored for both."""
    engine, rewards = build(normalize_reward=normalize)
    mean, std = load_score_stats(reward_dir("llama"))
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(reward_dir("llama")).eval()
    engine.eval()
    rollout = rollout_of(engine.family, tokenizer, sampling_for(engine, tokenizer))
    with torch.no_grad():
        scores = rewards(samples_of(rollout)).total
        values = last_token_values(engine.critic(*sequences(rollout)), sequences(rollout)[1])  # read as a reward
        for row in range(len(SIZES)):
            prompt = rollout.input_ids[row, rollout.attention_mask[row]]
            alone = torch.cat([prompt, rollout.response_ids[row, rollout.response_mask[row]]])[None]
            raw = plain(input_ids=alone).logits[0, 0].item()
            expected = (raw - mean) / std if normalize else raw
            assert scores[row].item() == pytest.approx(expected, abs=1e-4)
            assert values[row].item() == pytest.approx(expected, abs=1e-4)


def test_only_actor_and_critic_are_trained_and_nothing_is_shared(build):
    engine, rewards = build()
    [(source, weight)] = rewards.sources.values()
    assert weight == 1.0
    assert all(p.requires_grad for m in (engine.actor, engine.critic) for p in m.module.parameters())
    assert not any(p.requires_grad for m in (engine.ref, source.model) for p in m.parameters())
    places = [{p.data_ptr() for p in m.parameters()} for m in (engine.actor, engine.critic, engine.ref, source.model)]
    assert len(set.union(*places)) == sum(map(len, places))
    for one, other in zip(engine.actor.module.parameters(), engine.ref.parameters(), strict=True):
        assert one.equal(other)


def test_dropout_is_off_in_all_of_them(build):
    engine, rewards = build("gpt2")
    for model in (engine.actor, engine.critic, engine.ref, rewards.sources["full"][0].model):
        found = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        assert found == {0.0}


def test_which_model_the_critic_starts_from(build, model_dirs, reward_dir, tokenizer, tmp_path):
    """The one that is named; else the first reward model; else the actor, with values of 0 everywhere."""
    named = str(tmp_path / "critic")
    save_model(tiny_scorer("llama", tokenizer, 8).model, tokenizer, named)
    save_score_stats(named, 0.1, 2.0)
    heads = {}
    for name, changes in {
        "named": {"critic_path": named},
        "reward": {},
        "actor": {"rewards": (parse_reward(f"function:{rule_file(tmp_path)}:score"),)},
        "none": {"critic": None},
    }.items():
        heads[name] = build(**changes)[0]
    assert heads["none"].critic is None
    for name, path in (("named", named), ("reward", reward_dir("llama"))):
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(path)
        scorer = heads[name].critic.module
        assert scorer.model.score.weight.equal(plain.score.weight)
        assert (scorer.mean, scorer.std) == pytest.approx(load_score_stats(path))
    engine = heads["actor"]
    engine.eval()
    rollout = rollout_of(engine.family, tokenizer, sampling_for(engine, tokenizer))
    with torch.no_grad():
        assert (response_values(engine.critic, rollout) == 0).all()
    trunk = engine.critic.module.model.base_model.state_dict()
    assert all(weight.equal(trunk[name]) for name, weight in engine.family.base_model.state_dict().items())


def rule_file(folder) -> str:
    path = folder / "rule.py"
    path.write_text("def score(responses):\n    return [float(len(r)) for r in responses]\n")
    return str(path)


def test_weights_of_sources_and_their_order(build, reward_dir, tokenizer, tmp_path):
    full, rule = f"2*full:{reward_dir('llama')}", f"-0.5*function:{rule_file(tmp_path)}:score"
    engine, rewards = build(rewards=(parse_reward(rule), parse_reward(full)))
    assert [(name, weight) for name, (_, weight) in rewards.sources.items()] == [("function:score", -0.5), ("full", 2)]
    assert engine.critic is not None  # of the full one, though it is not the first


def test_average_stages_and_precision_reach_their_models(build):
    engine, rewards = build(ema_decay=0.75, reference_stage=3, reward_stage=3)
    assert engine.ema.decay == 0.75 and is_sharded(engine.ref) and is_sharded(rewards.sources["full"][0].model)
    assert not is_sharded(engine.actor) and build()[0].ema is None
    sharded, _ = build(actor=dataclasses.replace(SPEC, zero_stage=3), critic=dataclasses.replace(SPEC, zero_stage=2))
    assert is_sharded(sharded.actor) and sharded.critic.zero_optimization_stage() == 2


def test_two_adapters_are_refused(build):
    with pytest.raises(UserError, match="one lora reward at most, found a b") as error:
        build(rewards=(parse_reward("lora:a"), parse_reward("lora:b")))
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused_for_the_critic_and_read_by_text_for_the_reward(
    build, model_dirs, reward_dir, tmp_path
):
    """Ids would mean other words to the critic; a reward model reads the text, and then the critic is the actor's."""
    other = load_tokenizer(model_dirs("llama"))
    other.add_tokens(["quokka"])
    actor = str(tmp_path / "actor")
    save_model(tiny_model("llama", load_tokenizer(model_dirs("llama"))), other, actor)
    engine, rewards = build(actor_path=actor)
    assert rewards.sources["full"][0].reencodes
    assert (engine.critic.module.model.score.weight == 0).all()
    with pytest.raises(UserError, match="different tokenizers"):
        build(actor_path=actor, critic_path=reward_dir("llama"))


def test_a_right_rollout_scores_alike_on_what_was_built(build, tokenizer):
    """Actor and reference are the same model: a KL of 0 on every token."""
    engine, _ = build()
    engine.eval()
    sampling = sampling_for(engine, tokenizer)
    rollout = rollout_of(engine.family, tokenizer, sampling)
    scored = score_rollout(engine, rollout, SCORES, rollout.response_mask, sampling, "full", 4)
    assert scored.kl.abs().max() < 1e-6 and scored.logprobs.equal(scored.ref_logprobs)
