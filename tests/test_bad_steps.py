"""A loss or a gradient that is no finite number: no weight changes, it is counted and noted, three end the run."""

import json
import math

from dschat.engine.deepspeed_engine import TrainSpec, backward, create_train_engine, grad_norm
from dschat.engine.distributed import init_runtime
from dschat.report.bad_steps import BadSteps
from dschat.rlhf.ppo_trainer import train_rlhf
from tests.ppo_parts import experience_of, sampling_for, trained_models, update_spec, weights
from tests.programs import arguments, program, run_stages

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from torch import nn


def test_three_in_a_row_end_the_run_and_each_leaves_its_rows(tmp_path):
    said = []
    bad = BadSteps(str(tmp_path), 0, said.append)
    rows = [{"row": 3}]
    assert not bad.found("step 1", {"loss": 1.0, "grad_norm": 2.0}, lambda: 1 / 0)
    assert bad.found("step 2, minibatch 0", {"loss": math.nan, "grad_norm": 2.0}, lambda: rows)
    assert bad.found("step 3", {"loss": 1.0, "grad_norm": math.inf}, lambda: rows)
    assert not bad.found("step 4", {"loss": 1.0}, lambda: rows) and bad.in_a_row == 0
    again = BadSteps(str(tmp_path), 1, said.append)
    again.load_state_dict(bad.state_dict())
    assert again.number == 2
    for step in (5, 6):
        assert again.found(f"step {step}", {"loss": -math.inf}, lambda: rows)
    with pytest.raises(RuntimeError, match="3 steps in a row are not finite, the last one step 7; look at .*rank1"):
        again.found("step 7", {"loss": math.nan}, lambda: rows)
    record = json.loads((tmp_path / "repro" / "step_2_minibatch_0.json").read_text())
    assert record == {"step": "step 2, minibatch 0", "values": {"loss": "nan", "grad_norm": "2.0"}, "rows": rows}
    assert sorted(p.name for p in (tmp_path / "rank1" / "repro").iterdir()) == [f"step_{n}.json" for n in (5, 6, 7)]
    where = tmp_path / "repro" / "step_2_minibatch_0.json"
    assert said[0] == f"step 2, minibatch 0 left out: loss not finite; its rows are in {where}"
    assert "grad_norm not finite" in said[1] and len(said) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["gradient", "loss"])
def test_the_engine_leaves_such_a_step_out_at_every_stage(stage, dtype, kind):
    """A loss that is infinite while its gradient is finite, too; the steps around it are made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(dtype)
    spec = TrainSpec(1e-2, 0.0, "constant", 0, 10, 1.0, stage)
    engine = create_train_engine(model, spec, dtype=dtype, runtime=init_runtime(0))

    def now():
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            return [parameter.detach().clone() for parameter in engine.module.parameters()]

    changed = []
    for step in range(3):
        before = now()
        for part in range(2):
            loss = engine(torch.randn(3, 4).to(dtype)).float().mean()
            if step == 1 and part == 0:
                loss = loss + math.inf if kind == "loss" else loss * math.nan
            backward(engine, loss)
        engine.step()
        changed.append(not all(a.equal(b) for a, b in zip(before, now(), strict=True)))
        assert math.isfinite(grad_norm(engine)) == (step != 1)
    assert changed == [True, False, True]
    assert all(torch.isfinite(weight).all() for weight in now())


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_one_bad_step_of_a_program(stage, model_dirs, data_file, cache_dir, tmp_path, monkeypatch):
    """The run goes on, says so, counts it in metrics.jsonl and names the rows; the weights are finite."""
    module = program(stage)
    called, plain = [], module.backward

    def injected(engine, loss):
        called.append(1)
        plain(engine, loss * math.nan if len(called) == 2 else loss)

    monkeypatch.setattr(module, "backward", injected)
    flags = {"model_name_or_path": model_dirs("llama"), "max_steps": 4, "num_train_epochs": 4}
    module.main(arguments(stage, data_file, cache_dir, tmp_path, **flags))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = [line["num_bad_steps"] for line in lines if "num_bad_steps" in line]
    assert counts == [0, 1, 1, 1]
    record = json.loads((tmp_path / "repro" / "step_2.json").read_text())
    assert 2 <= len(record["rows"]) <= 4 and all(row["sequences"][0]["text"] for row in record["rows"])
    assert len(record["rows"][0]["sequences"]) == (1 if stage == "sft" else 2)
    assert all(torch.isfinite(weight).all() for weight in load_file(tmp_path / "model.safetensors").values())


def test_a_bad_minibatch_of_ppo_steps_neither_model_and_the_next_one_is_made(tokenizer):
    runtime = init_runtime(0)
    engine = trained_models(tokenizer, runtime)
    sampling = sampling_for(engine, tokenizer)
    experience = experience_of(engine, tokenizer, sampling)
    experience.advantages[1, 0] = math.nan
    seen, states = [], [weights(engine.actor, engine.critic)]

    def is_bad(position, stats, minibatch):
        states.append(weights(engine.actor, engine.critic))
        seen.append((position, not all(map(math.isfinite, stats.values())), len(minibatch)))
        return seen[-1][1]

    updates = train_rlhf(engine, experience, sampling, update_spec(1, minibatch_size=2), 0, runtime, is_bad=is_bad)
    assert sum(bad for _, bad, _ in seen) == 1 and len(seen) == 3 and len(updates) == 2
    for (_, bad, _), before, after in zip(seen, states, states[1:], strict=False):
        same = [a.equal(b) for a, b in zip(before, after, strict=True)]
        assert all(same) if bad else not any(same[:1])
    assert all(math.isfinite(value) for stats in updates for value in stats.values())


def test_a_bad_minibatch_of_the_program(model_dirs, data_file, cache_dir, tmp_path, monkeypatch):
    """A log-probability of the reference that is no number spoils the minibatches of its rollout, and no other."""
    out = run_stages(model_dirs("llama"), data_file, cache_dir, tmp_path / "before")
    module, collected = program("ppo"), []

    def spoiled(*given):
        experience, by_source = plain(*given)
        collected.append(1)
        if len(collected) == 2:
            experience.ref_logprobs[0, 0] = experience.kl[0, 0] = math.nan
        return experience, by_source

    plain = module.collect
    monkeypatch.setattr(module, "collect", spoiled)
    paths = {"actor_model_name_or_path": out["sft"], "critic_model_name_or_path": out["reward"]}
    output = tmp_path / "ppo"
    module.main(arguments("ppo", data_file, cache_dir, output, max_steps=3, **paths))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    counts = [line["num_bad_steps"] for line in lines if "num_bad_steps" in line]
    assert counts == [0, 2, 2]
    row = json.loads((output / "repro" / "step_2_minibatch_0.json").read_text())["rows"][0]
    assert row["response"] and "nan" in row["advantages"] and len(row["token_ids"]) > len(row["advantages"])
    actor = load_file(output / "actor" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in actor.values())
