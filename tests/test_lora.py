"""Adapters on policies, critics and one trunk of four models: what is trained, saved, merged and kept as it was."""

import json
import shutil
from pathlib import Path

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, backward
from dschat.engine.distributed import init_runtime
from dschat.errors import UserError
from dschat.functional import listwise_ranking_loss, sft_loss
from dschat.models.adapter_files import BASE_RECORD
from dschat.models.forward import model_inputs
from dschat.models.load import load_causal_lm, load_scorer, load_trained_scorer, save_model
from dschat.models.lora import NAME, LoraSpec, add_lora, merged_copy, read_adapter
from dschat.models.packed import token_logits
from dschat.models.scorer import Scorer, last_token_values
from dschat.models.trunk import shared_copy
from dschat.rlhf.build import ModelsSpec, create_models
from dschat.rlhf.reward_specs import RewardSpec
from dschat.rlhf.rollout import Sampling, banned_token_ids
from dschat.rlhf.rollout_engine import create_decoder
from inference.chatbot import load_chatbot
from tests.families import FAMILIES, ragged_prompts
from tests.programs import run

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

FP32 = torch.float32
DIM = 4


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


def adapted(model, seed: int = 1, dim: int = DIM):
    """With adapters that have an effect."""
    add_lora(model, LoraSpec(dim))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def logits_of(model, tokenizer) -> torch.Tensor:
    ids, mask = ragged_prompts(tokenizer)
    with torch.no_grad():
        return model(**model_inputs(model, ids, mask)).logits[mask]


# What is trained


def gradients(model, loss) -> dict[str, float]:
    model.zero_grad()
    loss.backward()
    return {n: 0.0 if p.grad is None else p.grad.abs().max().item() for n, p in model.named_parameters()}


def loss_of(module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of step 1 or of step 2; the latter with its term for the mean of scores, for pairs see differences alone."""
    if not isinstance(module, Scorer):
        scored = mask & (mask.cumsum(1) > 2)
        return sft_loss(token_logits(module, module, ids, mask, scored), ids[scored][None])[0]
    values = last_token_values(module(ids, mask), mask).view(2, 2)
    return listwise_ranking_loss(values, torch.tensor([[1, 2], [2, 1]]), center_coef=0.1)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dim", [0, DIM], ids=["full", "lora"])
def test_every_trained_tensor_has_a_gradient_and_no_other(dim, family, model_dirs, tokenizer):
    """With and without recomputed activations, of the policy and of the scorer. Of an adapter it is B's: while B is 0
    that of A is 0 too, by the product rule, so A is looked at with another B."""
    ids, mask = ragged_prompts(tokenizer, (9, 12, 6, 10))
    for load in (load_causal_lm, load_scorer):
        model = load(model_dirs(family), tokenizer, dtype=FP32, dropout=0.0)
        if dim:
            add_lora(model, LoraSpec(dim))
        module = model if load is load_causal_lm else Scorer(model)

        for checkpointing in (False, True):
            if checkpointing:
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            module.train()
            first = gradients(module, loss_of(module, ids, mask))
            trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
            # The bias of keys moves all scores of a query alike, which softmax does not see: its gradient is 0.
            blind = {name for name in trained if name.endswith(".k_proj.bias") and family == "opt"}
            expected = {name for name in trained - blind if "lora_A" not in name}
            assert expected and {name for name, size in first.items() if size > 0} - blind == expected, checkpointing
            assert all("lora_" in name or ".score." in name or name.startswith("score.") for name in trained) == (
                dim > 0
            )
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        second = gradients(module, loss_of(module, ids, mask))
        assert all(second[name] > 0 for name in trained - blind)


def test_without_only_all_but_the_adapted_weights_is_trained(model_dirs, tokenizer):
    model = load_causal_lm(model_dirs("gpt2"), tokenizer, dtype=FP32)
    add_lora(model, LoraSpec(DIM, only=False))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) == 2 * 4 and all(name.endswith(".base_layer.weight") for name in frozen)


def test_adapters_have_a_learning_rate_of_their_own(model_dirs, data_file, cache_dir, tmp_path):
    """The adapters do not move where theirs is next to nothing; the head does, by its own."""
    flags = {"model_name_or_path": model_dirs("llama"), "lora_dim": DIM, "max_steps": 1}
    out = run("reward", data_file, cache_dir, tmp_path, **flags, learning_rate=1e-2, lora_learning_rate=1e-12)
    weights = load_file(f"{out}/adapter_model.safetensors")
    assert max(w.abs().max().item() for name, w in weights.items() if "lora_B" in name) < 1e-9
    other = run("reward", data_file, cache_dir, tmp_path / "2", **flags, learning_rate=1e-12, lora_learning_rate=1e-2)
    moved = load_file(f"{other}/adapter_model.safetensors")
    assert min(w.abs().max().item() for name, w in moved.items() if "lora_B" in name) > 1e-3
    head = "base_model.model.score.weight"
    assert (weights[head] - moved[head]).abs().max() == pytest.approx(1e-2, rel=0.01)  # Adam's first step


# Saving and loading


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_unmerged_and_what_plain_peft_loads(family, model_dirs, tokenizer, tmp_path):
    base, adapter, whole = model_dirs(family), str(tmp_path / "adapter"), str(tmp_path / "merged")
    model = adapted(load_causal_lm(base, tokenizer, dtype=FP32, dropout=0.0))
    expected = logits_of(model, tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_model(model, tokenizer, adapter, base)
    save_model(model, tokenizer, whole)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not (Path(adapter) / "config.json").exists() and not (Path(whole) / "adapter_config.json").exists()
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert (logits_of(plain.eval(), tokenizer) - expected).abs().max() > 0.1
    ours = [load_causal_lm(path, load_tokenizer(path), dtype=FP32).eval() for path in (adapter, whole)]
    theirs = [peft.PeftModel.from_pretrained(plain, adapter).get_base_model(), merged_copy(model)]
    theirs[1] = transformers.AutoModelForCausalLM.from_pretrained(whole)
    for other in (*ours, *theirs):
        assert (logits_of(other.eval(), tokenizer) - expected).abs().max() < 2e-4, type(other)


def test_an_adapter_on_an_adapter_and_the_scorer_on_it(model_dirs, tokenizer, tmp_path):
    """Step 1, then DPO or step 2 on its output, all with adapters: each finds the model under it."""
    base, first, second, reward = model_dirs("llama"), *(str(tmp_path / name) for name in ("first", "second", "rm"))
    save_model(adapted(load_causal_lm(base, tokenizer, dtype=FP32)), tokenizer, first, base)
    policy = adapted(load_causal_lm(first, tokenizer, dtype=FP32), seed=2)
    save_model(policy, tokenizer, second, first)
    again = load_causal_lm(second, tokenizer, dtype=FP32)
    assert (logits_of(again.eval(), tokenizer) - logits_of(policy, tokenizer)).abs().max() < 1e-4
    classifier = load_scorer(first, tokenizer, dtype=FP32)
    trunk = dict(load_causal_lm(first, tokenizer, dtype=FP32).base_model.named_parameters())
    assert all(torch.equal(weight, trunk[name]) for name, weight in classifier.base_model.named_parameters())
    scorer = Scorer(adapted(classifier, seed=3))
    save_model(scorer.model, tokenizer, reward, first)
    ids, mask = ragged_prompts(tokenizer)
    loaded = load_trained_scorer(reward, tokenizer, dtype=FP32, normalize=False)
    with torch.no_grad():
        assert (loaded(ids, mask) - scorer(ids, mask))[mask].abs().max() < 1e-4
    with pytest.raises(UserError, match="is a reward model, not a language model"):
        load_causal_lm(reward, tokenizer, dtype=FP32)
    with pytest.raises(UserError, match="is a language model, not a reward model"):
        load_trained_scorer(first, tokenizer, dtype=FP32, normalize=False)


def test_a_base_that_is_gone_is_told(model_dirs, tokenizer, tmp_path):
    save_model(adapted(load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32)), tokenizer, str(tmp_path), "gone")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match="which is not there; put it back, or correct base_model_name_or_path"):
        load_causal_lm(str(tmp_path), tokenizer, dtype=FP32)


def test_a_base_that_was_changed_in_place_is_told(model_dirs, tokenizer, tmp_path):
    """By whoever loads the adapter; what is no weight may change, and so may the place."""
    base, adapter, upper = (tmp_path / name for name in ("base", "adapter", "upper"))
    shutil.copytree(model_dirs("llama"), base)
    save_model(adapted(load_causal_lm(str(base), tokenizer, dtype=FP32)), tokenizer, str(adapter), str(base))
    save_model(adapted(load_causal_lm(str(adapter), tokenizer, dtype=FP32)), tokenizer, str(upper), str(adapter))
    expected = logits_of(load_causal_lm(str(upper), tokenizer, dtype=FP32), tokenizer)
    (base / "generation_config.json").write_text("{}")
    assert torch.equal(logits_of(load_causal_lm(str(upper), tokenizer, dtype=FP32), tokenizer), expected)
    shutil.copytree(base, tmp_path / "copy")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for load, path in ((load_causal_lm, adapter), (load_causal_lm, upper), (load_scorer, adapter)):
        with pytest.raises(UserError, match=rf"{adapter} is a LoRA adapter on {base}, whose weights are no longer th"):
            load(str(path), tokenizer, dtype=FP32)
    config = adapter / "adapter_config.json"
    moved = {"base_model_name_or_path": str(tmp_path / "copy")}
    config.write_text(json.dumps(json.loads(config.read_text()) | moved))
    assert torch.equal(logits_of(load_causal_lm(str(upper), tokenizer, dtype=FP32), tokenizer), expected)


@pytest.mark.parametrize("has_files", [False, True])
def test_of_a_hub_name_only_files_that_are_here_are_looked_at(has_files, model_dirs, tokenizer, tmp_path, monkeypatch):
    """The cache of the hub as its own library lays it out, with weights and without."""
    root = tmp_path / "hub" / "models--some--model"
    snapshot = root / "snapshots" / ("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if has_files:
        shutil.copytree(model_dirs("llama"), snapshot)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("0" * 40)
    adapter = str(tmp_path / "adapter")
    model = adapted(load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32))
    save_model(model, tokenizer, adapter, "some/model")
    assert Path(adapter, BASE_RECORD).exists() == has_files
    read_adapter(adapter)
    if has_files:
        (snapshot / "model.safetensors").write_bytes(b"other")
        with pytest.raises(UserError, match="on some/model, whose weights are no longer those"):
            read_adapter(adapter)


def test_new_rows_of_the_embeddings_are_the_same_every_time(model_dirs, tokenizer):
    """An adapter is trained on a trunk whose vocabulary may have grown; loaded again, it must find the same one."""
    larger = load_tokenizer(model_dirs("llama"))
    larger.add_tokens([f"<{i}>" for i in range(40)])
    models = [load_causal_lm(model_dirs("llama"), larger, dtype=FP32) for _ in range(2)]
    rows = [model.get_input_embeddings().weight[len(tokenizer) :] for model in models]
    assert len(rows[0]) >= 40 and torch.equal(*rows) and rows[0].abs().max() > 0


@pytest.mark.parametrize(("kind", "most"), [("4bit", 0.35), ("8bit", 0.05)])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_adapters_train_on_rounded_weights(family, kind, most, model_dirs, tokenizer, tmp_path):
    """QLoRA (Dettmers et al. 2023): the blocks' weights are integers, near the whole ones; the rest is as it was."""
    plain = load_causal_lm(model_dirs(family), tokenizer, dtype=FP32, dropout=0.0).eval()
    model = load_causal_lm(model_dirs(family), tokenizer, dtype=FP32, dropout=0.0, quantization=kind).eval()
    rounded = {name for name, p in model.named_parameters() if not p.is_floating_point()}
    assert len(rounded) == {"gpt2": 2 * 4, "qwen2": 2 * 7}[family] and not any("head" in name for name in rounded)
    expected, found = logits_of(plain, tokenizer), logits_of(model, tokenizer)
    assert 0 < (found - expected).std() / expected.std() < most
    add_lora(model, LoraSpec(DIM))
    assert torch.equal(logits_of(model, tokenizer), found)
    ids, mask = ragged_prompts(tokenizer)
    sizes = gradients(model, loss_of(model, ids, mask))
    assert all((size > 0) == ("lora_B" in name) for name, size in sizes.items())
    save_model(model, tokenizer, str(tmp_path), model_dirs(family))
    assert torch.equal(logits_of(load_causal_lm(str(tmp_path), tokenizer, dtype=FP32).eval(), tokenizer), expected)
    with pytest.raises(UserError, match=f"--load_in_{kind}: .* is an adapter"):
        load_causal_lm(str(tmp_path), tokenizer, dtype=FP32, quantization=kind)


def test_without_bitsandbytes_nothing_is_rounded_silently(model_dirs, tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32, quantization="4bit")


# Step 3


def models_spec(base: str, reward: str | None, dim: int = DIM, **changes) -> ModelsSpec:
    given = {"weight_decay": 0.0, "lr_scheduler_type": "constant", "num_warmup_steps": 0, "num_steps": 9}
    train = TrainSpec(1e-2, **given, max_grad_norm=0.0, zero_stage=0, lora_learning_rate=1e-2)
    fields = dict.fromkeys(ModelsSpec.__dataclass_fields__)
    fields |= {"actor_path": base, "rewards": (RewardSpec("lora", reward),) if reward else (), "actor": train}
    fields |= {"critic": train, "reference_stage": 0, "reward_stage": 0, "normalize_reward": False}
    fields |= {"actor_lora": LoraSpec(dim), "critic_lora": LoraSpec(dim), "share_trunk": True, "micro_batch_size": 4}
    return ModelsSpec(**(fields | changes))


@pytest.fixture(scope="module")
def reward_dir(model_dirs, tokenizer, tmp_path_factory):
    """A reward adapter on the gpt2 of the tests."""
    out = str(tmp_path_factory.mktemp("reward"))
    classifier = adapted(load_scorer(model_dirs("gpt2"), tokenizer, dtype=FP32), seed=5, dim=1)
    save_model(classifier, tokenizer, out, model_dirs("gpt2"))
    return out


def test_four_models_on_one_trunk_hold_its_weights_once_and_leave_it_alone(reward_dir, model_dirs, tokenizer, runtime):
    base = model_dirs("gpt2")
    engine, rewards = create_models(models_spec(base, reward_dir, 1), tokenizer, dtype=FP32, runtime=runtime)
    plain = load_causal_lm(base, tokenizer, dtype=FP32, dropout=0.0).eval()
    models = [engine.actor, engine.critic, engine.ref, *engine.adapters.values()]
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    size = sum(parameter.nbytes for parameter in plain.parameters())
    assert size < sum(held.values()) < 1.3 * size
    before, ids, mask = logits_of(plain, tokenizer), *ragged_prompts(tokenizer)
    assert torch.equal(logits_of(engine.ref, tokenizer), before)
    assert torch.equal(logits_of(engine.actor.module.eval(), tokenizer), before)  # KL at step 0 is 0, exactly
    reward = load_trained_scorer(reward_dir, tokenizer, dtype=FP32, normalize=False)
    with torch.no_grad():
        assert (engine.critic(ids, mask) - reward(ids, mask))[mask].abs().max() < 1e-4  # it starts from the reward
        scores = engine.adapters[reward_dir](ids, mask)
    for _ in range(3):
        engine.train()
        backward(engine.actor, engine.actor(**model_inputs(engine.family, ids, mask)).logits[mask].square().mean())
        backward(engine.critic, engine.critic(ids, mask)[mask].square().mean())
        engine.actor.step()
        engine.critic.step()
    engine.eval()
    assert torch.equal(logits_of(engine.ref, tokenizer), before)
    assert (logits_of(engine.actor.module, tokenizer) - before).abs().max() > 0.1
    with torch.no_grad():
        assert torch.equal(engine.adapters[reward_dir](ids, mask), scores)
        assert (engine.critic(ids, mask) - reward(ids, mask))[mask].abs().max() > 0.1


def test_a_critic_of_another_shape_than_the_adapter_it_starts_from_is_refused(
    reward_dir, model_dirs, tokenizer, runtime
):
    for changes, expected in (
        ({"critic_lora": LoraSpec(8)}, "give --critic_lora_dim 1"),
        ({"critic_lora": LoraSpec(1, 8)}, "give --critic_lora_alpha 2"),
        ({"critic_path": model_dirs("gpt2")}, "is a whole model with a trunk of its own"),
    ):
        spec = models_spec(model_dirs("gpt2"), reward_dir, 1, **changes)
        with pytest.raises(UserError, match=expected):
            create_models(spec, tokenizer, dtype=FP32, runtime=runtime)


def test_the_rollout_engine_samples_the_policy_with_its_adapter(model_dirs, tokenizer):
    model = adapted(load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32, dropout=0.0))
    sampling = Sampling(8, banned_ids=banned_token_ids(tokenizer, model.config.vocab_size))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    decoder, line = create_decoder("slots", model, sampling, limit=1e-4, **ends)
    assert decoder is not None and line is None  # its log-probabilities are those of a forward of this model
    plain = load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32, dropout=0.0).eval()
    assert (logits_of(model, tokenizer) - logits_of(plain, tokenizer)).abs().max() > 0.1


def test_a_shared_copy_has_the_very_weights_and_nothing_else_in_common(model_dirs, tokenizer):
    model = load_causal_lm(model_dirs("llama"), tokenizer, dtype=FP32)
    twin = shared_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    adapted(model)
    assert not any("lora" in name for name, _ in twin.named_parameters())
    assert twin.config is not model.config and NAME in model.peft_config and not hasattr(twin, "peft_config")


def test_programs_with_adapters_one_after_the_other(model_dirs, data_file, cache_dir, tmp_path):
    """SFT, reward and PPO: each starts from the adapter before it; the base is never written; then merged."""
    given = {"lora_dim": DIM, "lora_learning_rate": 1e-2}
    sft = run("sft", data_file, cache_dir, tmp_path / "sft", model_name_or_path=model_dirs("llama"), **given)
    reward = run("reward", data_file, cache_dir, tmp_path / "rm", model_name_or_path=sft, **given)
    shared = {"actor_lora_dim": DIM, "critic_lora_dim": DIM, "share_trunk": True, "max_steps": 1}
    models = {"actor_model_name_or_path": sft, "critic_model_name_or_path": reward}
    ppo = Path(run("ppo", data_file, cache_dir, tmp_path / "ppo", **models, **shared))
    lines = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/kl_per_seq"] == 0 == lines[1]["objective/kl_per_seq"]
    tokenizer = load_tokenizer(sft)
    for folder, load in (("actor", load_causal_lm), ("critic", load_scorer)):
        config = json.loads((ppo / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == sft
        load(str(ppo / folder), tokenizer, dtype=FP32)
    bot = load_chatbot(str(ppo / "actor"), Sampling(5, temperature=0.0))
    assert isinstance("".join(bot.reply([{"role": "user", "content": "hello"}])), str)
    with pytest.raises(UserError, match="did you mean .*/actor"):
        load_chatbot(str(ppo), Sampling(5, temperature=0.0))
    with pytest.raises(UserError, match="a model of another kind is here"):
        run("ppo", data_file, cache_dir, ppo, **models, fresh=True)
    merged = run("ppo", data_file, cache_dir, tmp_path / "m", **models, **shared, lora_save_merged=True)
    both = [load_causal_lm(f"{out}/actor", tokenizer, dtype=FP32).eval() for out in (merged, ppo)]
    assert (Path(merged) / "actor" / "config.json").is_file()
    assert (logits_of(both[0], tokenizer) - logits_of(both[1], tokenizer)).abs().max() < 1e-4
