"""Normalisation in float32 inside bfloat16 models, for every family, under DeepSpeed, and on disk."""

import copy
import json
from pathlib import Path

from dschat.engine.deepspeed_engine import TrainSpec, backward, create_train_engine, grad_norm, unwrap
from dschat.engine.distributed import init_runtime
from dschat.errors import UserError
from dschat.models.load import save_model
from dschat.models.precision import upcast_layernorm
from tests.families import FAMILIES, ragged_prompts, tiny_model

import pytest
import torch
import transformers
from torch import nn

# Layers of the two-layer models: two in each block and the last one; Qwen3 also norms queries and keys, BLOOM its
# embeddings; Phi has one in each block.
NUM_LAYERS = dict.fromkeys(FAMILIES, 5) | {"qwen3": 9, "bloom": 6, "phi": 3}
ROUNDS_TWICE = ("llama", "mistral", "qwen2", "qwen3")  # without the upcast; the others round once as they are


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}


def bfloat16_model(family, tokenizer):
    """As transformers loads it: rotary frequencies stay float32. The norms' weights are odd numbers, to round."""
    model = tiny_model(family, tokenizer)
    with torch.no_grad():
        for layer in norms(model).values():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def inputs_of(tokenizer) -> dict:
    ids, mask = ragged_prompts(tokenizer)
    return {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_its_float32_computation_rounded_once(family, tokenizer):
    """Exactly; and its error against the same layer in float64 shrinks where there were two roundings."""
    model = bfloat16_model(family, tokenizer)
    plain = norms(copy.deepcopy(model))
    assert upcast_layernorm(model) == NUM_LAYERS[family] == len(norms(model))
    for name, layer in norms(model).items():
        weight = next(layer.parameters())
        hidden = (3 * torch.randn(50, len(weight)) + 1).bfloat16()
        found = layer(hidden)
        assert found.dtype == weight.dtype == torch.bfloat16
        exact = copy.deepcopy(plain[name]).float()(hidden.float())
        assert found.equal(exact.bfloat16()), name
        reference = float64_norm(plain[name], hidden)
        assert (exact.double() - reference).abs().max() < 1e-5, "the float32 computation is right"
        errors = [(y.double() - reference).square().mean().sqrt().item() for y in (plain[name](hidden), found)]
        assert errors[1] < (0.9 if family in ROUNDS_TWICE else 1.001) * errors[0], name


def float64_norm(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Ba et al. 2016, or Zhang and Sennrich 2019, from their formulas."""
    x, weight = hidden.double(), layer.weight.detach().double()
    if isinstance(layer, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * weight
        return scaled if layer.bias is None else scaled + layer.bias.detach().double()
    eps = layer.variance_epsilon if hasattr(layer, "variance_epsilon") else layer.eps
    weight = 1 + weight if type(layer).__name__ == "GemmaRMSNorm" else weight
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_model_gives_the_same_bits_and_gradients(family, tokenizer):
    results = []
    for upcast in (False, True):
        model = tiny_model(family, tokenizer)
        kind, classes = type(model), {name: type(layer) for name, layer in norms(model).items()}
        if upcast:
            upcast_layernorm(model)
        logits = model(**inputs_of(tokenizer)).logits
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
        assert type(model) is kind and {name: type(layer) for name, layer in norms(model).items()} == classes
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_in_bfloat16(family, tokenizer):
    """Other results where there were two roundings, near those of float32; every norm's weight has a gradient."""
    model = bfloat16_model(family, tokenizer)
    inputs = inputs_of(tokenizer)
    exact = copy.deepcopy(model).float()(**inputs).logits
    before = model(**inputs).logits
    upcast_layernorm(model)
    logits = model(**inputs).logits
    assert not before.equal(logits) or family not in ROUNDS_TWICE
    mask = inputs["attention_mask"].bool()
    assert (logits - exact)[mask].abs().max() < 0.05 * exact[mask].abs().max()
    logits.float().square().mean().backward()
    for name, layer in norms(model).items():
        for parameter in layer.parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16, name
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_it_stays_through_a_change_of_type_a_copy_and_a_second_call(tokenizer):
    model = bfloat16_model("llama", tokenizer).bfloat16()
    inputs = inputs_of(tokenizer)
    plain = model(**inputs).logits
    upcast_layernorm(model)
    expected = model(**inputs).logits
    assert upcast_layernorm(model) == 5 and model(**inputs).logits.equal(expected)
    model.to(torch.float32)
    model.to(torch.bfloat16)
    inner = copy.deepcopy(model)
    with torch.no_grad():
        for layer in norms(model).values():
            layer.weight.zero_()
    assert not expected.equal(plain) and inner(**inputs).logits.equal(expected), "a copy has weights of its own"


def test_float64_stays_float64():
    layer = nn.LayerNorm(8).double()
    hidden = torch.randn(3, 8, dtype=torch.float64)
    expected = layer(hidden)
    upcast_layernorm(layer)
    assert layer(hidden).equal(expected)


def test_gradient_checkpointing_changes_nothing(tokenizer):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = bfloat16_model("llama", tokenizer).train()
        upcast_layernorm(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits = model(**inputs_of(tokenizer)).logits
        logits.float().square().mean().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_engines_compute_and_train_the_same(family, stage, dtype, tokenizer, runtime):
    torch.manual_seed(0)
    model = bfloat16_model(family, tokenizer).to(dtype)
    upcast_layernorm(model)
    inputs = inputs_of(tokenizer)
    expected = model(**inputs).logits
    gradients = torch.autograd.grad(expected.float().square().mean(), list(model.parameters()))
    norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm().item()
    spec = TrainSpec(1e-2, 0.0, "constant", 0, 9, 0.0, stage, gradient_checkpointing=True)
    engine = create_train_engine(model, spec, dtype=dtype, runtime=runtime)
    assert {parameter.dtype for parameter in unwrap(engine).parameters()} == {dtype}
    engine.eval()  # without the dropout of GPT-2
    found = engine(**inputs).logits
    assert found.equal(expected)
    backward(engine, found.float().square().mean())
    engine.step()
    assert grad_norm(engine) == pytest.approx(norm, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert not engine(**inputs).logits.equal(expected)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma"])
def test_what_is_saved_is_what_is_saved_without_it(family, tokenizer, tmp_path):
    model = bfloat16_model(family, tokenizer)
    save_model(model, tokenizer, str(tmp_path / "plain"))
    expected = model(**inputs_of(tokenizer)).logits
    upcast_layernorm(model)
    save_model(model, tokenizer, str(tmp_path / "upcast"))
    files = {path.name: path.read_bytes() for path in Path(tmp_path / "plain").iterdir()}
    assert files == {path.name: path.read_bytes() for path in Path(tmp_path / "upcast").iterdir()}
    assert json.loads(files["config.json"])["dtype"] == "bfloat16"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "upcast", dtype=torch.bfloat16)
    assert type(loaded) is type(model) and loaded(**inputs_of(tokenizer)).logits.equal(expected)


def test_a_model_without_normalisation_is_refused():
    with pytest.raises(UserError, match="--upcast_layernorm: Sequential has no LayerNorm or RMSNorm.*leave the flag"):
        upcast_layernorm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert upcast_layernorm(nn.Sequential(nn.LayerNorm(2, elementwise_affine=False), nn.RMSNorm(2))) == 2
