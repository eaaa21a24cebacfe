"""benchmarks/kill_fuzz.py: it finds no difference where there is none, and one where there is."""

import json
import sys

from tests.conftest import ROOT
from tests.programs import STEPS, arguments

import pytest

sys.path.append(str(ROOT / "benchmarks"))

import kill_fuzz  # noqa: E402


@pytest.mark.long
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_five_kills_leave_no_trace(stage, model_dirs, data_file, cache_dir, tmp_path):
    flags = {"max_steps": 8, "num_train_epochs": 4, "checkpoint_interval": 2, "eval_interval": 3}
    if stage == "ppo":
        rule = tmp_path / "rule.py"
        rule.write_text("def score(responses):\n    return [len(response) / 10 for response in responses]\n")
        flags |= {"actor_model_name_or_path": model_dirs("llama"), "reward": f"function:{rule}:score"}
    else:
        flags |= {"model_name_or_path": model_dirs("llama"), "dropout": 0.2}
    argv = arguments(stage, data_file, cache_dir, tmp_path / "unused", **flags)
    place = argv.index("--output_dir")
    command = [str(ROOT / "training" / STEPS[stage] / "main.py"), *argv[:place], *argv[place + 2 :]]
    report = kill_fuzz.fuzz(command, tmp_path, kills=5, ranks=1, seed=1)
    assert sum(report.kills.values()) == 5 and report.starts > 5 and report.runs >= 1
    assert report.differences == []


def outputs(folder, loss=0.5, seconds=1.0, weights=b"weights", text="an answer"):
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "model.safetensors").write_bytes(weights)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": seconds, "loss": loss}) + "\n")
    (folder / "run.json").write_text(json.dumps({"metrics": {"loss": loss, "perf/seq_per_s": seconds}}))
    (folder / "samples.jsonl").write_text(text)
    return kill_fuzz.results(folder)


def test_everything_but_the_clock_is_compared(tmp_path):
    same = outputs(tmp_path / "a")
    assert outputs(tmp_path / "b", seconds=2.0) == same
    for number, change in enumerate(({"loss": 0.25}, {"weights": b"others"}, {"text": "another"})):
        assert outputs(tmp_path / str(number), **change) != same
