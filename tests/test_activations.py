"""GELU's tanh form in one kernel: what float64 says of the formula, and which layers of which families have it."""

from dschat.engine.deepspeed_engine import gather_copy
from dschat.models.activations import use_fused_gelu
from dschat.models.forward import model_inputs
from dschat.models.load import load_causal_lm, load_scorer
from dschat.models.shapes import build
from tests.families import FAMILIES, ragged_prompts, save_tiny_model, tiny_config, tiny_model

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu

KINDS = [NewGELUActivation, FastGELUActivation, AccurateGELUActivation, BloomGelu]
WRITTEN_OUT = {"gpt2", "bloom", "phi"}


def exact(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def fused(model: nn.Module) -> nn.Module:
    use_fused_gelu(model)
    return model


def num_saved(model: nn.Module, x: torch.Tensor) -> int:
    kept = []
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    return len({t.data_ptr() for t in kept if t.numel() > 1})


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_float64(kind):
    x = torch.linspace(-8, 8, 999, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(-1, 2, 999, dtype=torch.float64)
    expected = exact(x)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    model = fused(nn.Sequential(kind()))
    single = x.detach().float().requires_grad_()
    result = model(single)
    result.backward(upstream.float())
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), gradient, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(kind()(single), result, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_rounded_once(kind):
    x = torch.linspace(-4, 4, 999).bfloat16()
    with torch.no_grad():
        result, plain = fused(nn.Sequential(kind()))(x), kind()(x)
    expected = exact(x.double())
    allowed = expected.abs() * 2**-8 + 1e-6  # half of a bf16's last place, and where 1 + tanh cancels
    assert ((result - expected).abs() <= allowed).all()
    assert ((plain - expected).abs() > allowed).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_keeps_the_input_alone(kind):
    x = torch.randn(64, 8, requires_grad=True)
    assert num_saved(fused(nn.Sequential(kind())), x) == 1


class Doubled(NewGELUActivation):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("kind", [nn.GELU, nn.ReLU, nn.Tanh, Doubled])
def test_other_activations_are_left_alone(kind):
    model = fused(nn.Sequential(kind()))
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_computes_what_transformers_does(family, tokenizer, tmp_path):
    save_tiny_model(family, tokenizer, str(tmp_path))
    model = load_causal_lm(str(tmp_path), tokenizer, dtype=torch.float32)
    plain = tiny_model(family, tokenizer)
    layers = [layer for layer in model.modules() if isinstance(layer, tuple(KINDS))]
    assert len(layers) == (2 if family in WRITTEN_OUT else 0)
    assert all("forward" in vars(layer) for layer in layers)
    ids, mask = ragged_prompts(tokenizer)
    with torch.no_grad():
        logits = [m.eval()(**model_inputs(m, ids, mask)).logits[mask] for m in (model, plain)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_scorers_plans_and_copies_have_it_too(tokenizer, tmp_path):
    save_tiny_model("gpt2", tokenizer, str(tmp_path))
    config = tiny_config("gpt2", tokenizer)
    scorer = load_scorer(str(tmp_path), tokenizer, dtype=torch.float32)
    planned = [build(config, torch.float32, is_scorer=is_scorer) for is_scorer in (False, True)]
    engine = nn.Module()
    engine.module = load_causal_lm(str(tmp_path), tokenizer, dtype=torch.float32)
    copy = gather_copy(engine, torch.device("cpu"), on_this_rank=True)
    for model in (scorer, *planned, copy):
        layers = [layer for layer in model.modules() if isinstance(layer, NewGELUActivation)]
        assert len(layers) == 2
        for layer in layers:
            x = torch.randn(3, 4, requires_grad=True)
            assert num_saved(layer, x) == 1
