"""What tensorboard and wandb get of a run."""

import sys
from types import SimpleNamespace

from dschat.errors import UserError
from dschat.report.metrics import MetricsWriter

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_tensorboard_has_a_first_screen_histograms_and_the_flags(tmp_path):
    writer = MetricsWriter(str(tmp_path), "ppo")
    writer.log(1, {"eval/score_mean": 0.5, "eval/kl_per_seq": float("nan")})
    writer.histogram(1, "objective/advantages", torch.arange(5.0))
    writer.hparams({"kl_coef": 0.1, "data_path": ["toy"], "fresh": False})
    writer.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    assert events.Tags()["histograms"] == ["objective/advantages"] and "eval/score_mean" in events.Tags()["scalars"]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"^eval/judge_mean$" in layout and b"what matters" in layout
    raw = file.read_bytes()
    assert b"_hparams_/session_start_info" in raw and b"kl_coef" in raw


class Library:
    """As much of wandb as is used."""

    def __init__(self):
        self.calls: list[tuple] = []

    def init(self, **given):
        self.calls.append(("init", given))
        record = SimpleNamespace(id=given.get("id", "abc"))
        record.log = lambda values, step: self.calls.append(("log", step, values))
        record.config = SimpleNamespace(update=lambda config, **_: self.calls.append(("config", config)))
        record.finish = lambda: self.calls.append(("finish",))
        return record


def test_wandb_gets_the_same_numbers_and_a_stopped_run_goes_on_as_itself(tmp_path, monkeypatch):
    library = Library()
    monkeypatch.setitem(sys.modules, "wandb", library)
    first = MetricsWriter(str(tmp_path / "out"), "sft", report_to="wandb")
    (tmp_path / "out").mkdir()
    first.log(3, {"loss": 1.5, "eval/perplexity": float("inf")})
    second = MetricsWriter(str(tmp_path / "out"), "sft", report_to="wandb")
    second.load_state_dict(first.state_dict())
    second.log(4, {"loss": 1.0})
    second.hparams({"seed": 1})
    second.close()
    name, given = library.calls[0]
    assert name == "init" and given["name"] == "sft out" and "id" not in given
    assert library.calls[1][:2] == ("log", 3) and library.calls[1][2]["loss"] == 1.5
    assert "eval/perplexity" not in library.calls[1][2] and "stage" not in library.calls[1][2]
    assert library.calls[2][1]["id"] == "abc" and library.calls[2][1]["resume"] == "allow"
    assert [call[0] for call in library.calls[3:]] == ["log", "config", "finish"]
    other = MetricsWriter(str(tmp_path), "sft", enabled=False, report_to="wandb")
    other.log(1, {"loss": 1.0})
    assert len(library.calls) == 6, "rank 0 alone writes"


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        MetricsWriter(str(tmp_path), "sft", report_to="wandb")
