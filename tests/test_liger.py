"""Liger's kernels, of which a stand-in package takes the place: what is patched, how, and what is refused."""

import copy
import sys
from types import MethodType, SimpleNamespace

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import create_frozen_model, gather_copy, unwrap
from dschat.engine.distributed import init_runtime
from dschat.engine.specs import TrainSpec
from dschat.errors import UserError
from dschat.models import liger
from dschat.models.activations import use_fused_gelu
from dschat.models.attention import use_fast_attention
from dschat.models.liger import Fused, apply_liger, require_liger
from dschat.models.packed import token_logits
from dschat.models.specs import LoraSpec
from dschat.rlhf.build import create_models
from dschat.rlhf.reward_specs import RewardSpec
from dschat.rlhf.specs import ModelsSpec
from tests.families import ragged_prompts, tiny_config, tiny_model
from tests.programs import STEPS, program, run

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

CPU = torch.device("cpu")
SWITCHES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.fixture
def package(monkeypatch):
    """liger_kernel as far as it is used. Its kernels write into what they read, need attributes that it sets, and
    count; ``factor`` makes them wrong."""
    found = SimpleNamespace(patched=[], norms=0, rotations=0, factor=1.0, error=None)
    own = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", own)  # to be put back at the end

    def norm(layer, hidden):
        found.norms += 1
        rounded = hidden.float() * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + layer.own_epsilon)
        return found.factor * layer.weight * rounded.to(hidden.dtype)

    def rotate(q, k, cos, sin):
        found.rotations += 1
        half = q.shape[-1] // 2
        turned = [x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None] for x in (q, k)]
        for x in (q, k):
            x.data.zero_()
        return tuple(turned)

    def apply(model, **switches):
        found.patched.append((type(model).__name__, switches))
        if found.error:
            raise found.error
        modeling_llama.apply_rotary_pos_emb = rotate
        modeling_llama.LlamaRMSNorm = type("LigerRMSNorm", (torch.nn.Module,), {})
        for layer in model.modules():
            if type(layer).__name__ == "LlamaRMSNorm":
                layer.own_epsilon, layer.forward = layer.variance_epsilon, MethodType(norm, layer)

    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    parts = SimpleNamespace(_apply_liger_kernel_to_instance=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", parts)
    patch = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    for place in ("transformers.utils", "transformers.integrations.liger"):
        monkeypatch.setattr(f"{place}.is_liger_kernel_available", lambda: True)
    return found


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(liger, "_on_gpu", lambda args: True)


def forward_and_backward(model, tokenizer) -> list[torch.Tensor]:
    ids, mask = ragged_prompts(tokenizer)
    wanted = mask & (mask.cumsum(1) > 1)
    logits = token_logits(model, model, ids, mask, wanted)
    return [logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))]


def models_of(tokenizer):
    """One with the kernels and one without, which are otherwise the same."""
    plain = tiny_model("llama", tokenizer)
    use_fast_attention(plain)
    model = copy.deepcopy(plain)
    apply_liger(model)
    return model, plain


def kernels(model) -> int:
    return sum(isinstance(getattr(layer.forward, "__func__", None), Fused) for layer in unwrap(model).modules())


# Refused


@pytest.mark.parametrize("stage", STEPS)
def test_without_a_gpu_the_flag_is_refused_before_any_work(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(program(stage), "init_runtime", lambda *_: SimpleNamespace(device=CPU))
    names = ("actor_model_name_or_path", "critic_model_name_or_path") if stage == "ppo" else ("model_name_or_path",)
    with pytest.raises(UserError, match=r"^--use_liger_kernel: .* a GPU only; leave the flag out$"):
        run(stage, "none", "none", tmp_path / "out", use_liger_kernel=True, **dict.fromkeys(names, "none"))
    assert not (tmp_path / "out").exists()


def test_the_package_is_asked_for_by_the_flag_alone(monkeypatch, package):
    require_liger(torch.device("cuda"))
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    with pytest.raises(UserError, match=r"^--use_liger_kernel needs liger-kernel, .*: pip install liger-kernel$"):
        require_liger(torch.device("cuda", 1))


@pytest.mark.parametrize("family", ["opt", "gpt2", "mistral"])
def test_a_family_without_kernels_is_refused_by_name(family, package, tokenizer):
    with pytest.raises(UserError, match=rf"for the family {family} \(toy\); leave the flag out$"):
        apply_liger(tiny_model(family, tokenizer))
    assert not package.patched


def test_code_from_the_hub_is_not_what_its_family_is(package, tokenizer):
    """Liger goes by the name of the family; what such code calls a norm may be anything."""
    kind = type("LlamaModel", (transformers.LlamaModel,), {"__module__": __name__})
    with pytest.raises(UserError, match="no kernels for the family llama"):
        apply_liger(kind(tiny_config("llama", tokenizer)))


def test_a_family_that_liger_itself_refuses(package, tokenizer):
    package.error = TypeError("not\nthis class")
    with pytest.raises(UserError, match=r"this version of transformers \(not this class\); leave the flag out$"):
        apply_liger(tiny_model("llama", tokenizer))


@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_kernel_with_other_numbers_is_refused(factor, package, tokenizer, on_gpu):
    model, _ = models_of(tokenizer)
    package.factor = factor
    with pytest.raises(UserError, match=r"Liger's kernel for LlamaRMSNorm gives other numbers .*(2\.0|nan)%"):
        forward_and_backward(model, tokenizer)


# Computed


def test_the_losses_stay_ours_in_models_and_scorers(package, tokenizer):
    model, scorer = (
        models_of(tokenizer)[0],
        transformers.LlamaForSequenceClassification(tiny_config("llama", tokenizer)),
    )
    apply_liger(scorer)
    assert package.patched == [("LlamaModel", SWITCHES)] * 2
    for whole in (model, scorer):
        assert kernels(whole) == 5
        assert "forward" not in vars(whole) and "forward" not in vars(whole.base_model)


def test_on_a_gpu_the_kernels_compute_and_elsewhere_the_model_does(package, tokenizer, monkeypatch):
    model, plain = models_of(tokenizer)
    expected = forward_and_backward(plain, tokenizer)
    found = forward_and_backward(model, tokenizer)
    assert all(x.equal(y) for x, y in zip(found, expected, strict=True))
    assert (package.norms, package.rotations) == (0, 0)
    monkeypatch.setattr(liger, "_on_gpu", lambda args: True)
    for _ in range(2):  # compared with the model's own in the first
        found = forward_and_backward(model, tokenizer)
        assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(found, expected, strict=True))
    assert (package.norms, package.rotations) == (10, 4)


def test_a_forward_that_liger_did_not_set_stays(package, tokenizer):
    config = tiny_config("llama", tokenizer)
    config.hidden_act = "gelu_new"
    model = transformers.AutoModelForCausalLM.from_config(config)
    use_fused_gelu(model)
    layers = [layer.mlp.act_fn for layer in model.model.layers]
    before = [layer.forward.__func__ for layer in layers]
    apply_liger(model)
    assert kernels(model) == 5  # the norms
    assert [layer.forward.__func__ for layer in layers] == before


def test_a_second_model_of_the_family_and_one_that_is_made_later(package, tokenizer, on_gpu):
    """What Liger put in place of the rotary embedding is not taken for the model's own."""
    models_of(tokenizer)
    model, plain = models_of(tokenizer)
    assert not isinstance(modeling_llama.apply_rotary_pos_emb.plain, Fused)
    later = type(plain)(plain.config)
    assert {type(layer) for layer in later.modules()} == {type(layer) for layer in plain.modules()}
    found, rotations = forward_and_backward(model, tokenizer), package.rotations
    assert rotations == 2 and all(gradient.isfinite().all() for gradient in found)


def test_a_copy_has_the_kernels_and_weights_of_its_own(package, tokenizer, on_gpu):
    model, _ = models_of(tokenizer)
    expected, inner = forward_and_backward(model, tokenizer)[0], copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    package.norms = 0
    assert forward_and_backward(inner, tokenizer)[0].equal(expected) and package.norms == 5


def test_the_copy_of_a_sharded_model_has_them_too(package, tokenizer, on_gpu):
    """It is built anew, from classes that know nothing of what Liger sets."""
    model, _ = models_of(tokenizer)
    runtime = init_runtime(0)
    engine = create_frozen_model(model, zero_stage=3, dtype=torch.float32, device=runtime.device)
    whole = gather_copy(engine, runtime.device, on_this_rank=True)
    ids, mask = ragged_prompts(tokenizer)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    expected, package.norms = engine(**inputs).logits, 0
    assert torch.allclose(whole(**inputs).logits, expected, rtol=1e-5, atol=1e-5) and package.norms == 5


# The programs


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_steps_1_and_2_patch_their_model_before_its_adapters(
    stage, model_dirs, data_file, cache_dir, tmp_path, monkeypatch
):
    patched, devices = [], []

    def patch(model):
        patched.append((type(model).__name__, hasattr(model, "peft_config")))
        if len(patched) == 1 + (stage == "dpo"):
            raise Stopped

    monkeypatch.setattr(program(stage), "require_liger", devices.append)
    monkeypatch.setattr(program(stage), "apply_liger", patch)
    monkeypatch.setattr("dschat.rlhf.reference_logprobs.apply_liger", patch)
    given = {"use_liger_kernel": True, "lora_dim": 2, "model_name_or_path": model_dirs("llama")}
    given |= {"reference_model_name_or_path": model_dirs("llama")} if stage == "dpo" else {}
    given |= {"data_split": {"sft": "1,0,0"}.get(stage, "0,1,0")}
    with pytest.raises(Stopped):
        run(stage, data_file, cache_dir, tmp_path, **given)
    kind = "LlamaForSequenceClassification" if stage == "reward" else "LlamaForCausalLM"
    assert patched == [(kind, False)] * (1 + (stage == "dpo")) and devices == [init_runtime(0).device]


@pytest.fixture
def build(model_dirs, tokenizer, tmp_path):
    config = tiny_config("llama", tokenizer)
    config.num_labels = 1
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    train = TrainSpec(1e-2, 0.0, "constant", 0, 9, 0.0, 0)

    def models(**changes):
        given = dict.fromkeys(ModelsSpec.__dataclass_fields__)
        given |= {"actor_path": model_dirs("llama"), "actor": train, "critic": train, "reference_stage": 0}
        given |= {"rewards": (RewardSpec("full", str(tmp_path)),), "reward_stage": 0, "normalize_reward": False}
        given |= {"micro_batch_size": 4, "use_liger_kernel": True}
        spec = ModelsSpec(**(given | changes))
        return create_models(spec, load_tokenizer(model_dirs("llama")), dtype=torch.float32, runtime=init_runtime(0))

    return models


def test_step_3_patches_every_model(package, build):
    engine, rewards = build()
    [(reward, _)] = rewards.sources.values()
    assert [kernels(model) for model in (engine.actor, engine.critic, engine.ref, reward.model)] == [5] * 4
    assert package.patched == [("LlamaModel", SWITCHES)] * 4
    engine, _ = build(use_liger_kernel=False, rewards=())
    assert kernels(engine.actor) == kernels(engine.critic) == 0


def test_models_on_one_trunk_have_its_kernels(package, build):
    lora = LoraSpec(2)
    engine, _ = build(actor_lora=lora, critic_lora=lora, share_trunk=True, rewards=())
    assert [kernels(model) for model in (engine.actor, engine.critic, engine.ref)] == [5] * 3
    assert len(package.patched) == 1


def test_norms_that_are_upcast_stay_so(package, build):
    engine, _ = build(upcast_layernorm=True)
    assert (kernels(engine.actor), kernels(engine.ref), kernels(engine.critic)) == (0, 0, 5)


def test_the_real_package_has_what_is_used(monkeypatch):
    """Where it is installed."""
    pytest.importorskip("triton")
    patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma"} <= patch.MODEL_TYPE_TO_APPLY_LIGER_FN.keys()
    assert not {"opt", "gpt2", "gpt_neox", "bloom", "phi"} & patch.MODEL_TYPE_TO_APPLY_LIGER_FN.keys()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    config = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = transformers.LlamaForCausalLM(config)
    apply_liger(model)
    assert kernels(model) == 4


def test_it_changes_rounding_alone():
    """A run may go on with it or without it."""
    given = {"model_name_or_path": "toy", "data_path": ["toy"], "output_dir": "out"}
    one, other = (
        program("sft").Config(**given, use_liger_kernel=fused).identity({}, torch.float32, 1)
        for fused in (False, True)
    )
    assert one.result == other.result and one.rounding != other.rounding
