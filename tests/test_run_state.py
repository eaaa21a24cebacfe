"""Each part of the run state comes back as it was, through a file that holds no pickle; and when it is written."""

import io
import os
import random
import signal
from pathlib import Path

from dschat.data.loader import PromptStream
from dschat.engine.checkpoint import list_checkpoints
from dschat.engine.distributed import Runtime, init_runtime
from dschat.engine.random_state import random_state, set_random_state
from dschat.engine.run_identity import RunIdentity, content_key
from dschat.engine.run_state import CheckpointSpec, RunState
from dschat.errors import Stopped
from dschat.report.metrics import MetricsWriter
from dschat.report.progress import Console
from dschat.report.samples import SampleWriter
from dschat.report.stage_record import DONE, STARTED
from dschat.rlhf.collect import BadScores
from dschat.rlhf.evaluate import BestSoFar
from dschat.rlhf.experience import Experience
from dschat.rlhf.kl_coefficient import KLCoefficient
from dschat.rlhf.ppo_trainer import UpdateProgress
from dschat.rlhf.update_state import CurrentUpdate, Update

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
ALONE = Runtime(0, 1, CPU)


@pytest.fixture(scope="module", autouse=True)
def runtime():
    return init_runtime(0)


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_every_generator_goes_on_where_it_was():
    def draws():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(3).tolist()

    random.gauss(0, 1), np.random.normal()  # leaves one of a pair behind
    state = through_a_file(random_state())
    expected = draws()
    assert draws() != expected
    set_random_state(state)
    assert draws() == expected


def test_small_parts_come_back(tmp_path):
    bad, best, kl = BadScores(str(tmp_path), ALONE), BestSoFar("score", 3), KLCoefficient(0.1, 1.0, 100)
    bad.number, bad.in_a_row = 4, 2
    best.improves(5, {"eval/score_mean": 1.5})
    best.improves(6, {"eval/score_mean": 1.0})
    kl.update(3.0, 10)
    fresh = (BadScores(str(tmp_path), ALONE), BestSoFar("score", 3), KLCoefficient(0.1, 1.0, 100))
    for part, other in zip((bad, best, kl), fresh, strict=True):
        assert vars(part) != vars(other)
        other.load_state_dict(through_a_file(part.state_dict()))
        assert vars(part) == vars(other)


def test_an_update_under_way_comes_back_and_none_does_too():
    tensors = {name: torch.rand(2, 3) for name in Experience.__dataclass_fields__}
    current, other = CurrentUpdate(CPU), CurrentUpdate(CPU)
    progress = UpdateProgress(3, [{"policy/loss": 0.5}])
    current.update = Update(Experience(**tensors), {"rule": [1.0, None]}, 1e-3, [2.0, 1.0], progress)
    state = through_a_file(current.state_dict())
    other.load_state_dict(state)
    assert other.update is not None
    for name, tensor in tensors.items():
        assert getattr(other.update.experience, name).equal(tensor)
    assert other.update.progress == progress and other.update.by_source == {"rule": [1.0, None]}
    assert (other.update.learning_rate, other.update.seconds) == (1e-3, [2.0, 1.0])
    other.load_state_dict(through_a_file(CurrentUpdate(CPU).state_dict()))
    assert other.update is None


def test_a_stream_goes_on_from_any_position():
    whole = PromptStream(7, 3, 5)
    batches = [next(whole) for _ in range(12)]
    for position in range(12):
        assert next(PromptStream(7, 3, 5, position)) == batches[position]


def test_the_files_of_a_run_are_cut_back_to_where_the_state_ends(tmp_path, capsys):
    def writers():
        metrics = MetricsWriter(str(tmp_path), "ppo")
        return metrics, SampleWriter(str(tmp_path), Console(True), metrics)

    def row(text: str) -> dict:
        return {"prompt": "p", "response": text, "score": 1.0}

    metrics, samples = writers()
    metrics.log(1, {"loss": 2.0})
    samples.add(1, "policy", [row("first")])
    states = through_a_file([metrics.state_dict(), samples.state_dict()])
    kept = [(tmp_path / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")]
    metrics.log(2, {"loss": 1.0})
    samples.add(2, "policy", [row("lost")])
    metrics, samples = writers()
    metrics.load_state_dict(states[0])
    samples.load_state_dict(states[1])
    assert metrics.last == {"loss": 2.0}
    metrics.log(2, {"other": 3.0})
    samples.add(2, "policy", [row("second")])
    text = capsys.readouterr().out
    assert "step 0 [+1.00] first" in text.splitlines()[-2] and "second" in text.splitlines()[-1]
    found = [(tmp_path / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")]
    assert all(now.startswith(before) and now.count("\n") == 2 for now, before in zip(found, kept, strict=True))
    assert "lost" not in found[1] and '"other": 3.0' in found[0]
    metrics.close()
    samples.close()


# When


class Counter:
    """A part that counts; ``during`` is called while its state is taken."""

    def __init__(self, during=lambda: None):
        self.value, self.during = 0, during

    def state_dict(self):
        self.during()
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def run_state(folder: Path, said: list[str], part: Counter, **spec) -> RunState:
    given = {"checkpoint_interval": 2, "keep_checkpoints": 2, "resume": "auto", "fresh": False} | spec
    state = RunState(str(folder), CheckpointSpec(**given), ALONE, said.append)
    assert not state.is_finished(lambda: RunIdentity({"a": 1}, {}))
    state.restore({}, {"part": part})
    return state


def work(state: RunState, part: Counter, steps: int) -> None:
    with state:
        for step in state.steps(steps):
            part.value += step
    state._lock.close()  # type: ignore[union-attr]  # as the end of the process does


def test_a_signal_while_a_checkpoint_is_written_lets_it_become_whole(tmp_path):
    part = Counter(lambda: os.kill(os.getpid(), signal.SIGINT) if part.value == 3 else None)
    state = run_state(tmp_path, [], part)
    with pytest.raises(Stopped, match="step_00000002; the same command") as stop:
        work(state, part, 9)
    assert stop.value.signal_number == signal.SIGINT
    state._lock.close()
    said, other = [], Counter()
    state = run_state(tmp_path, said, other)
    assert other.value == 3 and state.step == 2 and not state.is_new
    assert said == [f"continuing from {tmp_path}/checkpoints/step_00000002, after step 2"]
    work(state, other, 5)
    assert other.value == 15


def test_an_interval_of_0_writes_only_on_a_signal(tmp_path):
    part = Counter()
    work(run_state(tmp_path, [], part, checkpoint_interval=0), part, 5)
    assert part.value == 15 and list_checkpoints(tmp_path / "checkpoints") == []
    state = run_state(tmp_path, [], part, checkpoint_interval=0)
    with pytest.raises(Stopped), state:
        for step in state.steps(5):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000003"]


def test_the_seconds_of_all_parts_of_a_run_count(tmp_path, monkeypatch):
    part = Counter()
    state = run_state(tmp_path, [], part)
    state._start -= 1000
    work(state, part, 2)
    assert 1000 <= run_state(tmp_path, [], part).seconds < 1100


def test_a_model_is_told_by_what_it_is_and_not_by_the_records_of_its_making(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    key = content_key(str(tmp_path))
    for name in ("run.json", DONE, STARTED, "metrics.jsonl"):
        (tmp_path / name).write_text("{}")
    assert content_key(str(tmp_path)) == key
    (tmp_path / "config.json").write_text("{ }")
    assert content_key(str(tmp_path)) != key
