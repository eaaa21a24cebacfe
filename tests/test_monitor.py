"""The monitor of step 3: when its alarms are raised and when not; it changes nothing, and it survives a stop."""

import json
import math
from pathlib import Path

from dschat.report import overoptimisation
from dschat.report.overoptimisation import Measured, alarm, tail
from dschat.rlhf.evaluate import repetition
from dschat.rlhf.monitor import Monitor
from tests.ppo_parts import ALONE
from tests.programs import run

import numpy as np
import pytest
from safetensors.torch import load_file

RULES = """
def length(responses):
    return [len(text) / 5 for text in responses]

def opposite(responses):
    return [-len(text) / 5 for text in responses]
"""


def course(means: list[tuple[float, float, float]], num_prompts: int = 200, seed: int = 0) -> list[Measured]:
    """Evaluations of these means of reward, judge and length; prompts differ more than evaluations do."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 1, (3, num_prompts))
    found = []
    for step, (score, judge, length) in enumerate(means):
        noise = rng.normal(0, 0.5, (3, num_prompts))
        columns = (base[0] + noise[0] + score, base[1] + noise[1] + judge, base[2] * 3 + noise[2] + length)
        found.append(Measured(step, *columns))
    return found


def raised(history: list[Measured]) -> list[str]:
    found = (alarm(history[: i + 1]) for i in range(len(history)))
    return [finding.kind for finding in found if finding is not None]


def test_a_reward_that_rises_while_the_judge_turns_is_over_optimised():
    turning = course([(0, 0, 10), (0.5, 0.5, 10), (1.0, 0.6, 10), (1.5, 0.2, 10)])
    assert alarm(turning[:3]) is None
    found = alarm(turning)
    assert found is not None and found.kind == "overoptimised" and "since rollout 2" in found.text


@pytest.mark.parametrize(
    "means",
    [
        [(0, 0, 10), (0.5, 0.5, 10), (1.0, 0.7, 10), (1.2, 0.7, 10)],  # both rise, then flatten
        [(0, 0, 10), (0.5, 0.5, 10), (0.2, 0.1, 10)],  # both fall: no exploit, only a bad step
        [(0, 0, 10), (0.5, 1.5, 10), (1.0, 1.35, 10)],  # the judge wavers by a tenth of what it had gained
        [(0, 0, 10), (0.0, -0.5, 10)],  # the judge falls and nothing is gained by it
        [(0, 0, 10), (1.0, math.nan, 10)],  # no judge
        [(0, 0, 10), (1.0, 1.0, 20)],  # longer and better, says the judge too
    ],
)
def test_no_alarm_where_nothing_is_exploited(means):
    assert raised(course(means)) == []


def test_false_alarms_are_rare_where_reward_and_judge_flatten_after_a_rise(monkeypatch):
    """Twenty-five runs of eleven evaluations; the best by chance is among those compared with."""
    monkeypatch.setattr(overoptimisation, "NUM_DRAWS", 2000)
    means = [(0, 0, 10), (0.5, 0.5, 10), *[(1.0, 0.8, 10)] * 9]
    false = sum(bool(raised(course(means, num_prompts=100, seed=seed))) for seed in range(25))
    assert false <= 1, f"{false} of 25 runs"


def test_length_explains_a_gain_that_is_one_of_length():
    rng = np.random.default_rng(1)
    score, length = rng.normal(0, 1, 200), rng.normal(20, 4, 200)
    grown = rng.normal(8, 5, 200)
    nothing = np.full(200, np.nan)
    first = Measured(0, score, nothing, length)
    paid = Measured(1, score + 0.1 * grown + rng.normal(0, 0.1, 200), nothing, length + grown)
    better = Measured(1, score + 0.8 + rng.normal(0, 0.1, 200), nothing, length + grown)
    shorter = Measured(1, score + 0.1 * grown, nothing, length - grown)
    found = alarm([first, paid])
    assert found is not None and found.kind == "length"
    assert alarm([first, better]) is None and alarm([first, shorter]) is None
    flat = Measured(0, score, score, length), Measured(1, paid.score, score + rng.normal(0, 0.1, 200), paid.length)
    judged_better = Measured(1, paid.score, score + 0.5 + rng.normal(0, 0.1, 200), paid.length)
    assert alarm(list(flat)) is not None and alarm([flat[0], judged_better]) is None


def test_answers_without_a_score_do_not_count():
    history = course([(0, 0, 10), (1.0, 0.6, 10), (1.5, 0.0, 10)])
    for measured in history:
        measured.score[:20], measured.judge[20:40] = math.nan, math.nan
    assert raised(history) == ["overoptimised"]


def test_the_level_of_one_test_of_many():
    assert tail(1) == pytest.approx(0.01) and tail(10) == pytest.approx(0.001)
    assert tail(1000) == pytest.approx(5 / 10_000)  # no finer than ten thousand draws can tell


def test_repetition_by_hand():
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)  # (1, 2, 3, 4) comes twice of five
    assert repetition([[1, 1, 1, 1, 1, 1], [5]]) == pytest.approx(2 / 3) and repetition([[1, 2]]) == 0.0


def test_what_it_remembers_comes_back(tmp_path):
    """After a resume the same evaluation raises the same alarm, compared with the same best."""

    def observe(monitor: Monitor, measured: Measured) -> list[str]:
        columns = zip(measured.score.tolist(), measured.judge.tolist(), measured.length.tolist(), strict=True)
        rows = [{"score": s, "judge": j, "length": n, "response": str(measured.step)} for s, j, n in columns]
        values = {"eval/finished_fraction": 1.0, "eval/kl_per_seq": 1.0, "eval/response_length": 10.0}
        values |= {"eval/distinct_2": 0.2, "eval/repetition": 0.0, "eval/judge_mean": measured.judge_mean}
        found = monitor.observe(measured.step, values, rows)
        return [finding.text for finding in found]

    class Place:
        runtime = ALONE

    def monitor() -> Monitor:
        return Monitor(Place(), None, None, None, tmp_path, True)

    history = course([(0, 0, 10), (0.5, 0.5, 10), (1.0, 0.6, 10), (1.5, 0.2, 10), (1.6, 0.2, 10)])
    whole, first, second = monitor(), monitor(), monitor()
    expected = [observe(whole, measured) for measured in history]
    assert [len(texts) for texts in expected] == [0, 0, 0, 1, 0]  # said once
    for measured in history[:2]:
        observe(first, measured)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [observe(second, measured) for measured in history[2:]] == expected[2:]
    assert second.state_dict() == whole.state_dict() and second.is_over
    assert whole.best == 2 and {row["response"] for row in whole.best_rows} == {"2"}
    alarms = json.loads((tmp_path / "alarms.json").read_text())
    assert [row["step"] for row in alarms] == [3, 4] and {row["kind"] for row in alarms} == {"overoptimised"}


@pytest.fixture(scope="module")
def models(model_dirs, tmp_path_factory):
    rule = tmp_path_factory.mktemp("rules") / "rules.py"
    rule.write_text(RULES)
    return {"actor": model_dirs("llama"), "rule": f"function:{rule}"}


def flags(models: dict[str, str], **given) -> dict:
    """A policy that learns to write longer tokens; no critic, so that it does so in a few rollouts."""
    found = {"actor_model_name_or_path": models["actor"], "reward": [f"{models['rule']}:length"], "eval_interval": 2}
    found |= {"advantage_estimator": "reinforce_pp", "actor_learning_rate": 1e-2, "kl_coef": 0.0, "max_steps": 8}
    found |= {"missing_eos_penalty": 0.0, "clip_reward_value": 0.0, "per_device_generation_batch_size": 16}
    return found | {"eval_fraction": 0.5, "data_split": "0,0,1", "max_answer_seq_len": 8} | given


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_over_optimised_run_stops_and_the_best_actor_is_back(models, data_file, cache_dir, tmp_path, capsys):
    """The judge wants the opposite of the reward: the best policy is the untrained one."""
    judge = {"judge": f"{models['rule']}:opposite", "preference_data_path": [data_file]}
    out = Path(run("ppo", data_file, cache_dir, tmp_path / "stops",
                   **flags(models, stop_on_overoptimisation=True, best_of_n=2, **judge)))  # fmt: skip
    text, found = capsys.readouterr().out, lines(out)
    assert "ALARM: over-optimised" in text and "stopped at step" in text
    alarms = json.loads((out / "alarms.json").read_text())
    assert [row for row in alarms if row["kind"] == "overoptimised"]
    stopped = max(line["step"] for line in found)
    assert 0 < stopped < 8
    actor, untrained = (
        load_file(str(Path(where) / "model.safetensors")) for where in (out / "actor", models["actor"])
    )
    assert all(actor[name].equal(untrained[name]) for name in actor)
    # The record is that of what was kept: metrics, samples, and the report's answers.
    assert json.loads((out / "run.json").read_text())["metrics"]["eval/kl_per_seq"] == pytest.approx(0, abs=1e-5)
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    first = [row["response"] for row in rows if row["kind"] == "policy" and row["step"] == 0]
    assert [row["response"] for row in rows if row["kind"] == "restored"] == first
    assert all("judge" in row for row in rows)
    evaluated = [line for line in found if "eval/judge_mean" in line]
    for line in evaluated:  # reward and judge never agree on two answers of different length
        assert line["eval/judge_mean"] == pytest.approx(-line["eval/score_mean"], abs=1e-3)
        assert line["eval/judge_agreement"] == 0.0 and 0 <= line["eval/preference_accuracy"] <= 1
    assert evaluated[-2]["eval/preference_accuracy"] != evaluated[0]["eval/preference_accuracy"]
    kept = [json.loads(line) for line in (out / "tokens.jsonl").read_text().splitlines()]
    assert len(kept) == 20 and all(len(row["kl"]) == len(row["tokens"]) for row in kept)
    last = {row["prompt"]: row["response"] for row in rows if row["kind"] == "policy" and row["step"] == stopped}
    assert {row["prompt"]: row["response"] for row in kept} == last


def test_the_monitor_changes_nothing_of_the_training(models, data_file, cache_dir, tmp_path):
    watched = {"judge": f"{models['rule']}:opposite", "preference_data_path": [data_file], "preflight": "warn"}
    saved = []
    for name, given in (("on", watched), ("off", {"preflight": "off"})):
        out = run("ppo", data_file, cache_dir, tmp_path / name, **flags(models, max_steps=3, eval_interval=1, **given))
        saved.append((Path(out) / "actor/model.safetensors").read_bytes())
    assert saved[0] == saved[1]
