"""DeepSpeed engines against plain torch: the same steps at every ZeRO stage, whole copies, buffers, start-up."""

import copy
import json
import math
import os
import subprocess
import sys

from dschat.engine.deepspeed_config import engine_config
from dschat.engine.deepspeed_engine import (
    TrainSpec,
    backward,
    create_frozen_model,
    create_train_engine,
    gather_copy,
    grad_norm,
    is_sharded,
    learning_rate,
    save_weights,
    unwrap,
    whole_model,
)
from dschat.engine.distributed import init_runtime
from dschat.engine.optimizer import create_optimizer, create_scheduler
from dschat.errors import UserError
from dschat.flags import SCHEDULES
from dschat.models.load import resolve_dtype
from dschat.models.scorer import Scorer
from tests.conftest import ROOT
from tests.families import FAMILIES, ragged_prompts, tiny_config, tiny_model

import deepspeed
import pytest
import torch
import transformers
from torch import nn

STAGES = (0, 1, 2, 3)
RATE, DECAY, NUM_STEPS = 1e-2, 0.5, 3


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


def spec(stage: int, *, max_grad_norm: float = 0.0, rate: float = RATE, decay: float = DECAY, **options) -> TrainSpec:
    return TrainSpec(rate, decay, "linear", 0, 2 * NUM_STEPS, max_grad_norm, stage, **options)


class Small(nn.Module):
    """A network whose parameters all have gradients of a healthy size: Adam's first steps are signs, and the sign of
    rounding noise is noise."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(5, generator=generator))
        self.b = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.scale = nn.Parameter(1 + torch.rand(3, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.a + self.bias).tanh() @ self.b) * self.scale


def micro_batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two of unequal size; both count by their rows."""
    generator = torch.Generator().manual_seed(100 + step)
    return [(torch.randn(n, 6, generator=generator), torch.randn(n, 3, generator=generator)) for n in (5, 2)]


def loss_of(model, x: torch.Tensor, y: torch.Tensor, num_rows: int) -> torch.Tensor:
    dtype = next(unwrap(model).parameters()).dtype
    return (model(x.to(dtype)).float() - y).square().sum() / num_rows


class PlainAdamW:
    """Loshchilov and Hutter 2019, algorithm 2, as written, in float64; clipping by the whole norm before it."""

    def __init__(self, model: nn.Module, max_grad_norm: float, decay: float = DECAY):
        self.weights = {name: p.detach().double() for name, p in model.named_parameters()}
        self.m = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.max_grad_norm, self.decay, self.t = max_grad_norm, decay, 0

    def step(self, gradients: dict[str, torch.Tensor], rate: float) -> float:
        self.t += 1
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        factor = min(1.0, self.max_grad_norm / norm) if self.max_grad_norm else 1.0
        for name, w in self.weights.items():
            g = gradients[name].double() * factor
            self.m[name] = 0.9 * self.m[name] + 0.1 * g
            self.v[name] = 0.95 * self.v[name] + 0.05 * g * g
            m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.95**self.t)
            decay = self.decay if w.ndim >= 2 else 0.0
            self.weights[name] = w - rate * (m / (v.sqrt() + 1e-8) + decay * w)
        return norm


def whole_weights(engine, device) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded(engine)):
            found[name] = parameter.detach().clone()
    return found


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("stage", STAGES)
def test_three_accumulated_steps_are_those_of_plain_adamw(stage, max_grad_norm, runtime):
    """Clipping off, on, and on without effect; decay on matrices only; the norm is the one before clipping."""
    model = Small()
    reference = copy.deepcopy(model)
    oracle = PlainAdamW(model, max_grad_norm)
    engine = create_train_engine(model, spec(stage, max_grad_norm=max_grad_norm), dtype=torch.float32, runtime=runtime)
    for step in range(NUM_STEPS):
        rate = RATE * (1 - step / (2 * NUM_STEPS))  # the linear schedule
        assert learning_rate(engine) == pytest.approx(rate)
        batches = micro_batches(step)
        for x, y in batches:
            backward(engine, loss_of(engine, x, y, 7))
        engine.step()

        for name, parameter in reference.named_parameters():
            parameter.data.copy_(oracle.weights[name])
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        total = loss_of(reference, x, y, 7)
        names, parameters = zip(*reference.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
        norm = oracle.step(gradients, rate)
        assert norm > 0.6  # so that 0.5 clips
        assert grad_norm(engine) == pytest.approx(norm, rel=1e-5)
        for name, value in whole_weights(engine, runtime.device).items():
            assert (value - oracle.weights[name]).abs().max() < 1e-6, (step, name)


def bfloat16_updates(engine, reference: nn.Module, rate: float) -> list[float]:
    """Per step: the size of the engine's update over that of AdamW on float32 master weights.

    The gradient comes from the engine's own bfloat16 weights, so that only the optimizer is compared.
    """
    oracle = PlainAdamW(reference.float(), 0.0, decay=0.0)
    plain = copy.deepcopy(reference).bfloat16()
    ratios = []
    for step in range(NUM_STEPS):
        before = whole_weights(engine, None)
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(before[name])
        x, y = micro_batches(step)[0]
        names, parameters = zip(*plain.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss_of(plain, x, y, 5), parameters), strict=True))
        master = {name: value.clone() for name, value in oracle.weights.items()}
        oracle.step(gradients, rate * (1 - step / (2 * NUM_STEPS)))
        backward(engine, loss_of(engine, x, y, 5))
        engine.step()
        after = whole_weights(engine, None)
        moved = sum(float((after[name].double() - before[name].double()).abs().sum()) for name in after)
        ratios.append(moved / sum(float((oracle.weights[name] - master[name]).abs().sum()) for name in after))
    return ratios


@pytest.mark.parametrize("stage", STAGES)
def test_updates_in_bfloat16_have_their_full_size_from_the_first_one_on(stage, runtime):
    rate = 0.1  # far above the rounding of weights near 1
    model = Small().bfloat16()
    reference = copy.deepcopy(model)
    engine = create_train_engine(model, spec(stage, rate=rate, decay=0.0), dtype=torch.bfloat16, runtime=runtime)
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    assert bfloat16_updates(engine, reference, rate) == pytest.approx([1.0] * NUM_STEPS, abs=0.03)
    assert engine.zero_optimization_stage() == max(stage, 1)


def test_deepspeed_itself_shrinks_the_first_update_in_bfloat16_at_stage_0(runtime):
    """Why `create_train_engine` makes it stage 1; proves that the test above can fail. Once DeepSpeed has mended it,
    this test and the detour can go."""
    model = Small().bfloat16()
    reference = copy.deepcopy(model)
    optimizer = create_optimizer(model, 0.1, 0.0, lora_learning_rate=0.1)
    config = engine_config(0, torch.bfloat16) | {"gradient_clipping": 0.0}
    scheduler = create_scheduler(optimizer, "linear", 0, 2 * NUM_STEPS)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    first, *_ = bfloat16_updates(engine, reference, 0.1)
    assert first == pytest.approx(0.735, abs=0.03)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_weights_agree_with_torch_over_master_weights(stage, runtime):
    """After three updates of two micro-batches each, to the rounding of bfloat16."""
    model = Small().bfloat16()
    plain = copy.deepcopy(model)
    engine = create_train_engine(model, spec(stage, max_grad_norm=1.0), dtype=torch.bfloat16, runtime=runtime)
    oracle = PlainAdamW(plain, 1.0)
    for step in range(NUM_STEPS):
        names, parameters = zip(*plain.named_parameters(), strict=True)
        gradients = {name: torch.zeros(parameter.shape) for name, parameter in plain.named_parameters()}
        for x, y in micro_batches(step):
            backward(engine, loss_of(engine, x, y, 7))
            parts = torch.autograd.grad(loss_of(plain, x, y, 7), parameters)
            for name, part in zip(names, parts, strict=True):
                gradients[name] += part.float()
        engine.step()
        norm = oracle.step(gradients, RATE * (1 - step / (2 * NUM_STEPS)))
        assert grad_norm(engine) == pytest.approx(norm, rel=2e-2)
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(oracle.weights[name])
    for name, value in whole_weights(engine, runtime.device).items():
        # Half a unit in the last place of bfloat16, and as much again for gradients that were rounded on the way.
        assert ((value.double() - oracle.weights[name]).abs() <= 2**-7 * oracle.weights[name].abs() + 1e-3).all(), name


def test_gradient_checkpointing_changes_no_gradient(tokenizer, runtime):
    norms = []
    ids, mask = ragged_prompts(tokenizer)
    for checkpointing in (False, True):
        model = tiny_model("llama", tokenizer)
        engine = create_train_engine(
            model, spec(0, gradient_checkpointing=checkpointing), dtype=torch.float32, runtime=runtime
        )
        assert model.is_gradient_checkpointing == checkpointing
        engine.train()
        backward(engine, engine(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.square().mean())
        engine.step()
        norms.append(grad_norm(engine))
    assert norms[0] > 0 and norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_models_have_no_gradients_and_the_same_results(stage, tokenizer, runtime):
    model = tiny_model("llama", tokenizer)
    ids, mask = ragged_prompts(tokenizer)
    expected = model(input_ids=ids, attention_mask=mask.long()).logits.detach()
    frozen = create_frozen_model(model.train(), zero_stage=stage, dtype=torch.float32, device=runtime.device)
    assert is_sharded(frozen) == (stage == 3)
    assert not unwrap(frozen).training and not any(p.requires_grad for p in unwrap(frozen).parameters())
    assert (frozen(input_ids=ids, attention_mask=mask.long()).logits - expected)[mask].abs().max() < 1e-5


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("frozen", [False, True])
def test_rotary_frequencies_stay_in_float32(stage, frozen, tokenizer, runtime):
    model = tiny_model("llama", tokenizer)
    expected = {name: value.clone() for name, value in model.named_buffers() if "inv_freq" in name}
    assert expected and all(value.dtype == torch.float32 for value in expected.values())
    model.to(torch.bfloat16)
    for name, value in expected.items():  # as transformers loads a model in bfloat16: frequencies in float32
        *path, key = name.split(".")
        model.get_submodule(".".join(path))._buffers[key] = value.clone()
    if frozen:
        engine = create_frozen_model(model, zero_stage=stage, dtype=torch.bfloat16, device=runtime.device)
    else:
        engine = create_train_engine(model, spec(stage), dtype=torch.bfloat16, runtime=runtime)
    assert {p.dtype for p in unwrap(engine).parameters()} == {torch.bfloat16}
    models = [unwrap(engine)]
    if is_sharded(engine):
        models.append(gather_copy(engine, runtime.device, on_this_rank=True))
    for module in models:
        found = dict(module.named_buffers())
        for name, value in expected.items():
            assert found[name].dtype == torch.float32 and found[name].equal(value), name


# --- whole models


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gathered_copy_is_the_model(family, tokenizer, runtime):
    """At stage 3, after a step, so that only the current weights can agree."""
    model = tiny_model(family, tokenizer)
    ids, mask = ragged_prompts(tokenizer)
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    tied = model.config.tie_word_embeddings
    before = model(**inputs).logits.detach()
    engine = create_train_engine(model, spec(3), dtype=torch.float32, runtime=runtime)
    engine.train()
    backward(engine, engine(**inputs).logits.square().mean())
    engine.step()
    engine.eval()
    with torch.no_grad():
        sharded = engine(**inputs).logits
        with whole_model(engine, runtime.device) as whole:
            logits = whole(**inputs).logits
            assert not whole.training and not any(p.requires_grad for p in whole.parameters())
            assert not any(hasattr(p, "ds_id") for p in whole.parameters())  # ordinary tensors
            shared = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
            assert shared == tied
    assert (logits - sharded)[mask].abs().max() < 1e-5 < (logits - before)[mask].abs().max()
    assert whole.state_dict().keys() == tiny_model(family, tokenizer).state_dict().keys()
    assert gather_copy(engine, runtime.device, on_this_rank=False) is None


def test_tied_weights_occur_among_the_families(tokenizer):
    tied = {family: tiny_config(family, tokenizer).tie_word_embeddings for family in FAMILIES}
    assert set(tied.values()) == {True, False}  # so that the test above sees both


def test_a_gathered_scorer_is_the_scorer(tokenizer, runtime):
    torch.manual_seed(0)
    config = tiny_config("llama", tokenizer)
    config.num_labels = 1
    scorer = Scorer(transformers.AutoModelForSequenceClassification.from_config(config), mean=0.3, std=2.0)
    ids, mask = ragged_prompts(tokenizer)
    expected = scorer(ids, mask).detach()
    engine = create_train_engine(scorer, spec(3), dtype=torch.float32, runtime=runtime)
    with whole_model(engine, runtime.device) as whole:
        assert isinstance(whole, Scorer)
        assert (whole(ids, mask) - expected)[mask].abs().max() < 1e-6


@pytest.mark.parametrize("stage", (0, 1, 2))
def test_below_stage_3_the_whole_model_is_the_module_itself(stage, tokenizer, runtime):
    engine = create_train_engine(tiny_model("llama", tokenizer), spec(stage), dtype=torch.float32, runtime=runtime)
    for training in (True, False):
        engine.train(training)
        with whole_model(engine, runtime.device) as whole:
            assert whole is engine.module and not whole.training
        assert engine.module.training == training


@pytest.mark.parametrize("stage", STAGES)
def test_save_weights_hands_over_the_whole_model(stage, tokenizer, runtime):
    model = tiny_model("llama", tokenizer)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    engine = create_train_engine(model, spec(stage), dtype=torch.float32, runtime=runtime)
    saved = []
    save_weights(engine, lambda whole: saved.append({k: v.clone() for k, v in whole.state_dict().items()}), runtime)
    assert len(saved) == 1 and saved[0].keys() == expected.keys()
    assert all(saved[0][name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers(name):
    """Bit for bit, with warm-up and without, beyond the last step too, for parameters of another rate as well."""
    for num_warmup_steps, num_steps in ((0, 7), (3, 7), (0, 1), (7, 8), (2, 500)):
        rates = []
        for make in ("ours", "theirs"):
            groups = [
                {"params": [nn.Parameter(torch.zeros(2))]},
                {"params": [nn.Parameter(torch.zeros(2))], "lr": 5e-4},
            ]
            optimizer = torch.optim.AdamW(groups, lr=3e-5)
            if make == "ours":
                schedule = create_scheduler(optimizer, name, num_warmup_steps, num_steps)
            else:
                given = {"num_warmup_steps": num_warmup_steps, "num_training_steps": num_steps}
                schedule = transformers.get_scheduler(name, optimizer, **given)
            found = []
            for _ in range(num_steps + 3):
                found.append(schedule.get_last_lr())
                optimizer.step()
                schedule.step()
            rates.append(found)
        assert rates[0] == rates[1], (num_warmup_steps, num_steps)


# --- start-up


def test_dtypes():
    cpu = torch.device("cpu")
    assert [resolve_dtype(name, cpu) for name in ("auto", "fp32", "bf16")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]
    with pytest.raises(UserError, match="fp16 needs a GPU") as error:
        resolve_dtype("fp16", cpu)
    assert "\n" not in str(error.value)


def test_one_process_needs_no_launcher(tokenizer):
    """None of the launcher's variables: a world of one, on which a step can be made; starting twice does no harm."""
    script = """
import json
from dschat.engine.deepspeed_engine import TrainSpec, backward, create_train_engine
from dschat.engine.distributed import init_runtime
import torch
first = init_runtime(3)
one = torch.rand(1).item()
runtime = init_runtime(3)
two = torch.rand(1).item()
engine = create_train_engine(torch.nn.Linear(2, 1), TrainSpec(1e-3, 0.0, "constant", 0, 1, 1.0, 1),
                             dtype=torch.float32, runtime=runtime)
backward(engine, engine(torch.ones(1, 2)).sum())
engine.step()
print(json.dumps([runtime.rank, runtime.world_size, runtime.device.type, runtime.is_main, runtime.place, one == two]))
"""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 1, "cpu", True, [0, 1], True]


class NotANumber(torch.autograd.Function):
    """A finite value with a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_no_number_changes_no_weight(stage, max_grad_norm, dtype, runtime):
    torch.manual_seed(0)
    engine = create_train_engine(
        nn.Linear(3, 3).to(dtype), spec(stage, max_grad_norm=max_grad_norm), dtype=dtype, runtime=runtime
    )
    inputs = torch.ones(2, 3, dtype=dtype)
    before = engine(inputs).detach().clone()
    backward(engine, NotANumber.apply(engine(inputs)).float().sum())
    engine.step()
    assert engine(inputs).equal(before) and not math.isfinite(grad_norm(engine))
    backward(engine, engine(inputs).float().sum())
    engine.step()
    assert math.isfinite(grad_norm(engine)) and not engine(inputs).equal(before)
