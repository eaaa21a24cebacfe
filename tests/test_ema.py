"""The average of trained weights against a float64 loop, through real engines at ZeRO 0 to 3, one rank and two."""

import copy

from dschat.engine.deepspeed_engine import TrainSpec, backward, create_train_engine, is_sharded, save_weights, unwrap
from dschat.engine.distributed import init_runtime
from dschat.engine.ema import EMA
from dschat.errors import run_program
from tests.ranks import launch

import deepspeed
import pytest
import torch
from torch import nn

DECAY = 0.9
CASES = [(0, torch.float32), (1, torch.bfloat16), (2, torch.float32), (3, torch.float32), (3, torch.bfloat16)]


@pytest.fixture(scope="module")
def runtime():
    return init_runtime(0)


class Net(nn.Module):
    """`big` is above the size under which stage 3 keeps a parameter gathered; the odd sizes leave ragged shards."""

    def __init__(self) -> None:
        super().__init__()
        self.big = nn.Parameter(torch.randn(401, 257) / 20)
        self.odd = nn.Parameter(torch.randn(257, 3) / 16)
        self.bias = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((3,), 0.7), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.big).tanh() @ self.odd + self.bias) * self.frozen

    def rebuild(self) -> "Net":
        return Net()


def engine_of(stage, dtype, runtime, rate=3e-2):
    torch.manual_seed(0)
    model = Net().to(dtype)
    return create_train_engine(model, TrainSpec(rate, 0.0, "constant", 0, 9, 0.0, stage), dtype=dtype, runtime=runtime)


def train_step(engine, number):
    x = torch.randn(4, 401, generator=torch.Generator().manual_seed(number))
    backward(engine, engine(x.to(unwrap(engine).bias.dtype)).float().square().sum())
    engine.step()


def weights(engine) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_sharded(engine)):
            found[name] = parameter.detach().clone()
    return found


def saved(engine, runtime) -> dict[str, torch.Tensor]:
    """What `save_weights` writes; {} on ranks other than the first."""
    found = {}
    save_weights(engine, lambda model: found.update({k: v.clone() for k, v in model.state_dict().items()}), runtime)
    return found


def averaged(engine, ema, num_steps) -> dict[str, torch.Tensor]:
    """The definition in float64 over the weights of `num_steps` steps, with an update of `ema` after each."""
    mean = {name: weight.double() for name, weight in weights(engine).items()}
    for number in range(num_steps):
        train_step(engine, number)
        ema.update()
        for name, weight in weights(engine).items():
            mean[name] = ema.decay * mean[name] + (1 - ema.decay) * weight.double()
    return mean


def check_average(stage, dtype, runtime) -> None:
    """What is saved inside is the mean, rounded once to its dtype, and neither the start nor the last step."""
    engine = engine_of(stage, dtype, runtime)
    ema = EMA(engine, DECAY)
    mean = averaged(engine, ema, 4)
    train_step(engine, 4)  # at stage 3 it leaves the small parameters gathered, and so does the forward below
    ema.update()
    with ema.swapped():
        average = saved(engine, runtime)
        assert bool(average) == runtime.is_main
        x = torch.randn(4, 401, generator=torch.Generator().manual_seed(50)).to(dtype)
        with torch.no_grad():
            found = engine(x)
    current = weights(engine)
    assert all(weight.equal(current[name]) for name, weight in saved(engine, runtime).items())
    mean = {name: DECAY * mean[name] + (1 - DECAY) * weight.double() for name, weight in current.items()}
    for name, weight in average.items():
        assert weight.dtype == dtype
        tolerance = 2**-8 * mean[name].abs() if dtype == torch.bfloat16 else 0.0
        assert ((weight.double() - mean[name]).abs() <= tolerance + 1e-6).all(), name
        assert weight.equal(current[name]) == (name == "frozen")
    plain = Net().to(dtype)
    plain.load_state_dict({name: weight.to(dtype) for name, weight in mean.items()})
    assert (found - plain(x)).abs().max() < (0.02 if dtype == torch.bfloat16 else 1e-5), "the engine has the average"
    with ema.swapped():
        assert not any(weight.equal(current[name]) for name, weight in weights(engine).items() if name != "frozen")
    assert all(weight.equal(current[name]) for name, weight in weights(engine).items()), "back bit for bit"


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_the_saved_average_is_that_of_a_float64_loop(stage, dtype, runtime):
    check_average(stage, dtype, runtime)


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_a_swap_even_one_that_fails_changes_no_later_step(stage, dtype, runtime):
    ends = []
    for swap in (False, True):
        engine = engine_of(stage, dtype, runtime)
        ema = EMA(engine, DECAY)
        averaged(engine, ema, 2)
        if swap:
            with pytest.raises(OSError, match="disk full"), ema.swapped():
                raise OSError("disk full")
        mean = averaged(engine, ema, 2)
        with ema.swapped():
            ends.append((mean, weights(engine)))
        ends[-1] += (weights(engine),)
    for one, other in zip(*ends, strict=True):
        assert all(one[name].equal(other[name]) for name in one)


def test_a_swap_that_fails_half_way_is_undone(runtime):
    engine = engine_of(0, torch.float32, runtime)
    ema = EMA(engine, DECAY)
    averaged(engine, ema, 2)
    before = weights(engine)
    ema._shadows[1] = torch.zeros(7)  # of no use for its parameter
    with pytest.raises(RuntimeError, match="size"), ema.swapped():
        pytest.fail("unreachable")
    assert all(weight.equal(before[name]) for name, weight in weights(engine).items())


def test_steps_below_the_resolution_of_bfloat16_are_averaged(runtime):
    """Weights of 1 move by one unit in the last place (2^-8 below 1) now and then; 0.008 of it is lost in bfloat16."""
    engine = engine_of(1, torch.bfloat16, runtime, rate=2e-3)
    ema = EMA(engine, 0.992)
    start = weights(engine)["bias"]
    mean, half = start.double(), start.clone()
    for number in range(8):
        before = weights(engine)["bias"]
        train_step(engine, number)
        ema.update()
        bias = weights(engine)["bias"]
        assert (bias - before).abs().max() <= 2**-7
        mean = 0.992 * mean + 0.008 * bias.double()
        half = 0.992 * half + 0.008 * bias
    assert half.dtype == torch.bfloat16 and half.equal(start), "kept in bfloat16 it never leaves the start"
    assert (mean - start.double()).abs().min() > 1e-4
    [shadow] = [shadow for shadow in ema._shadows if shadow.shape == (3,)]
    assert shadow.dtype == torch.float32 and (shadow.double() - mean).abs().max() < 1e-6


@pytest.mark.parametrize("stage", [0, 3])
def test_frozen_weights_have_no_shadow_and_nothing_is_gathered(stage, runtime, monkeypatch):
    engine = engine_of(stage, torch.float32, runtime)
    ema = EMA(engine, DECAY)
    assert sorted(shadow.numel() for shadow in ema._shadows) == [3, 257 * 3, 401 * 257]
    train_step(engine, 0)

    def refuse(*_, **__):
        pytest.fail("update() gathers")

    monkeypatch.setattr(deepspeed.comm, "all_gather_into_tensor", refuse)
    monkeypatch.setattr(deepspeed.zero.GatheredParameters, "__enter__", refuse)
    ema.update()
    if stage == 3:
        assert not engine.module.big.numel() and engine.module.big.ds_tensor.numel() == 401 * 257


def test_decay_at_its_limits(runtime):
    engine = engine_of(0, torch.float32, runtime)
    ema = EMA(engine, 0.0)
    train_step(engine, 0)
    ema.update()
    current = weights(engine)
    with ema.swapped():
        assert all(weight.equal(current[name]) for name, weight in weights(engine).items())
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay"):
            EMA(engine, decay)


def test_tied_weights_are_averaged_once(runtime):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    start = copy.deepcopy(model[0].weight.detach())
    engine = create_train_engine(
        model, TrainSpec(1e-2, 0.0, "constant", 0, 9, 0.0, 0), dtype=torch.float32, runtime=runtime
    )
    ema = EMA(engine, 0.5)
    backward(engine, engine(torch.ones(1, 3)).sum())
    engine.step()
    ema.update()
    expected = (start + model[0].weight.detach()) / 2
    with ema.swapped():
        assert model[1].weight is model[0].weight
        assert (model[0].weight - expected).abs().max() < 1e-7


@pytest.mark.long
def test_two_ranks_at_stage_3_average_their_shards():
    """This file as a program, once per rank; see `main`."""
    outputs = launch("tests.test_ema", 2, seconds=120)
    assert all("averaged on rank" in output for output in outputs)


def main() -> None:
    runtime = init_runtime(0)
    ema = EMA(engine_of(3, torch.float32, runtime), DECAY)
    assert max(shadow.numel() for shadow in ema._shadows) == -(-401 * 257 // 2), "half of it on each rank"
    for dtype in (torch.float32, torch.bfloat16):
        check_average(3, dtype, runtime)
    print(f"averaged on rank {runtime.rank}")


if __name__ == "__main__":
    run_program(main)
