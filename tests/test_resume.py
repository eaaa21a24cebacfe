"""Programs that are stopped and go on: bit for bit the run that was never stopped, or a refusal that says why."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from dschat.engine.checkpoint import list_checkpoints
from dschat.errors import Stopped, UserError
from tests.conftest import ROOT
from tests.programs import STEPS, arguments, run, stop_at

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.append(str(ROOT / "benchmarks"))

import kill_fuzz  # noqa: E402

# Everything of a run that can move: dropout draws from torch's generator, the rest is named by its flag.
SUPERVISED = {"max_steps": 5, "num_train_epochs": 3, "eval_interval": 2, "checkpoint_interval": 2, "dropout": 0.2}
PPO = {
    "max_steps": 4,
    "eval_interval": 2,
    "checkpoint_interval": 2,
    "ppo_epochs": 2,
    "num_samples_per_prompt": 2,
    "kl_target": 0.5,
    "kl_horizon": 100,
    "enable_ema": True,
    "ema_decay": 0.9,
    "best_metric": "score",
    "best_of_n": 2,
    "unsup_coef": 0.5,
    "actor_learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def flags(model_dirs, data_file, cache_dir, tmp_path_factory):
    """By stage, what `run` takes."""
    llama = model_dirs("llama")
    reward = run("reward", data_file, cache_dir, tmp_path_factory.mktemp("reward"), model_name_or_path=llama)
    models = {"actor_model_name_or_path": llama, "critic_model_name_or_path": reward}
    adapter = run(
        "reward", data_file, cache_dir, tmp_path_factory.mktemp("lora"), model_name_or_path=llama, lora_dim=4
    )
    shared = {"actor_lora_dim": 4, "critic_lora_dim": 4, "share_trunk": True}
    shared |= {"actor_lora_learning_rate": 1e-2, "critic_model_name_or_path": adapter}
    return {stage: SUPERVISED | {"model_name_or_path": llama} for stage in ("sft", "reward", "dpo")} | {
        "ppo": PPO | models | {"ptx_data_path": [data_file]},
        "ppo, LoRA": PPO | models | shared | {"max_steps": 3, "best_of_n": 0, "ppo_epochs": 1},
    }


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if not name.startswith(("time", "perf"))]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


@pytest.mark.parametrize(("stage", "every"), [("sft", 3), ("reward", 2), ("dpo", 3), ("ppo", 5), ("ppo, LoRA", 6)])
def test_a_run_stopped_every_few_points_ends_as_one_that_never_was(
    stage, every, flags, data_file, cache_dir, tmp_path, monkeypatch, capsys
):
    run(stage.split(",")[0], data_file, cache_dir, tmp_path / "whole", **flags[stage])
    stop_at(monkeypatch, every)
    restarts = 0
    while restarts < 20:
        try:
            run(stage.split(",")[0], data_file, cache_dir, tmp_path / "stopped", **flags[stage])
            break
        except Stopped as stop:
            assert stop.signal_number == signal.SIGTERM
            assert "the same command continues it" in str(stop)
            restarts += 1
            stop_at(monkeypatch, every)
    assert restarts >= {"sft": 1, "reward": 2, "dpo": 1, "ppo": 4, "ppo, LoRA": 1}[stage]
    assert capsys.readouterr().out.count("continuing from") == restarts
    expected, found = kill_fuzz.results(tmp_path / "whole"), kill_fuzz.results(tmp_path / "stopped")
    assert len(expected) > 6 and found == expected
    assert scalars(tmp_path / "stopped") == scalars(tmp_path / "whole")
    seconds = [json.loads((tmp_path / name / "run.json").read_text())["seconds"] for name in ("whole", "stopped")]
    assert seconds[1] > seconds[0] * 0.5
    assert not list_checkpoints(tmp_path / "stopped" / "checkpoints")


@pytest.mark.parametrize("rounded", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=["", "4bit", "8bit"])
def test_a_checkpoint_under_adapters_holds_what_is_trained_alone(
    rounded, flags, model_dirs, data_file, cache_dir, tmp_path, monkeypatch
):
    """Of a model whose embeddings have a second name; and the run goes on exactly."""
    base = model_dirs("gpt2")
    lora = {"model_name_or_path": base, "lora_dim": 1, "lora_learning_rate": 1e-2} | rounded
    lora = flags["sft"] | lora
    run("sft", data_file, cache_dir, tmp_path / "whole", **lora)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            run("sft", data_file, cache_dir, tmp_path / "stopped", **lora)
    [newest, *_] = list_checkpoints(tmp_path / "stopped" / "checkpoints")
    saved = torch.load(newest / "model/state/mp_rank_00_model_states.pt", weights_only=True)
    assert len(saved["module"]) == 2 * 2 * 4 and all(".lora_" in name for name in saved["module"])
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    assert size < (Path(base) / "model.safetensors").stat().st_size
    run("sft", data_file, cache_dir, tmp_path / "stopped", **lora)
    assert kill_fuzz.results(tmp_path / "stopped") == kill_fuzz.results(tmp_path / "whole")


def test_a_real_sigterm_ends_a_process_with_143_and_one_line(flags, data_file, cache_dir, tmp_path):
    """The signal comes from inside: from a reward function, in its third rollout."""
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import os, signal\n"
        "calls = 0\n"
        "def score(responses):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 4:\n"  # the first is that of the evaluation before training
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [float(len(response)) for response in responses]\n"
    )
    given = {"actor_model_name_or_path": flags["ppo"]["actor_model_name_or_path"], "max_steps": 6}
    argv = arguments("ppo", data_file, cache_dir, tmp_path / "out", **given, reward=[f"function:{rule}:score"])
    program = ROOT / "training" / STEPS["ppo"] / "main.py"
    done = subprocess.run([sys.executable, str(program), *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr[-2000:]
    saved = tmp_path / "out" / "checkpoints" / "step_00000002_00001"
    assert done.stderr.splitlines()[-1] == (
        f"stopped after step 2 and 1 minibatches: the run is saved in {saved}; the same command continues it"
    )
    assert saved.is_dir()


# What is on the disk


@pytest.fixture
def interrupted(flags, data_file, cache_dir, tmp_path, monkeypatch):
    """An SFT run stopped after step 4 of 5 with checkpoints of steps 2 and 4; call it to go on, with other flags."""

    def again(**changes) -> str:
        return run("sft", data_file, cache_dir, tmp_path / "out", **(flags["sft"] | changes))

    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            again()
    assert [path.name for path in list_checkpoints(tmp_path / "out/checkpoints")] == ["step_00000004", "step_00000002"]
    return again


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in paths}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(interrupted, flags, data_file, cache_dir, tmp_path, capsys):
    files = [path for path in (tmp_path / "out/checkpoints/step_00000004").rglob("*") if path.is_file()]
    assert len(files) == 5
    flip(max(files, key=lambda path: path.stat().st_size))
    interrupted()
    text = capsys.readouterr().out
    assert "step_00000004 is damaged (model/state/mp_rank_00_model_states.pt); going on from the one before" in text
    run("sft", data_file, cache_dir, tmp_path / "whole", **flags["sft"])
    assert kill_fuzz.results(tmp_path / "out") == kill_fuzz.results(tmp_path / "whole")
    assert scalars(tmp_path / "out") == scalars(tmp_path / "whole")


def test_when_all_are_damaged_nothing_is_touched(interrupted, tmp_path):
    for path in list_checkpoints(tmp_path / "out/checkpoints"):
        flip(path / "shared.pt")
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"step_00000004 is damaged.*step_00000002 is damaged.*--fresh"):
        interrupted()
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, "--learning_rate was 0.001 and is 0.002"),
        ({"max_steps": 6}, "--max_steps was 5 and is 6"),
        ({"per_device_train_batch_size": 8}, "rows of an optimizer step, of all ranks, was 4 and is 8"),
        ({"eval_fraction": 0.3}, "--eval_fraction was 0.2 and is 0.3"),
    ],
)
def test_another_configuration_is_refused_by_name(changes, named, interrupted, tmp_path):
    before = tree(tmp_path / "out")
    with pytest.raises(UserError) as error:
        interrupted(**changes)
    assert named in str(error.value) and "--fresh" in str(error.value) and "\n" not in str(error.value)
    assert tree(tmp_path / "out") == before


def test_other_data_and_another_model_are_refused(interrupted, data_file, model_dirs, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(Path(data_file).read_text(encoding="utf-8").replace("birds", "bards"), encoding="utf-8")
    with pytest.raises(UserError, match="data: train_fingerprint was"):
        interrupted(data_path=str(other))
    with pytest.raises(UserError, match="the content of --model_name_or_path was"):
        interrupted(model_name_or_path=model_dirs("gpt2"), dropout=0.2)


def test_flags_without_effect_may_change_and_smaller_micro_batches_say_so(interrupted, data_file, tmp_path, capsys):
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(Path(data_file).read_bytes())
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    interrupted(**sizes, checkpoint_interval=1, keep_checkpoints=1, log_interval=2, resume="required")
    text = capsys.readouterr().out
    assert "--per_device_train_batch_size was 4 and is 2: the run goes on equal up to rounding" in text
    assert "continuing from" in text


def test_fresh_starts_over_and_required_never_starts(interrupted, flags, data_file, cache_dir, tmp_path, capsys):
    interrupted(fresh=True, learning_rate=2e-3)
    text = capsys.readouterr().out
    assert "--fresh: 2 checkpoints of an earlier run are removed" in text and "continuing" not in text
    with pytest.raises(UserError, match="no checkpoint to continue from"):
        run("sft", data_file, cache_dir, tmp_path / "new", **flags["sft"], resume="required")
    with pytest.raises(UserError, match="drop one"):
        interrupted(fresh=True, resume="required")


def test_a_finished_run_is_not_repeated_nor_replaced_by_another(interrupted, tmp_path, capsys):
    interrupted()
    record = tmp_path / "out" / "run.json"
    os.utime(record, (0, 0))
    before = tree(tmp_path / "out")
    interrupted()
    assert "holds this run, finished" in capsys.readouterr().out
    assert tree(tmp_path / "out") == before and record.stat().st_mtime > 0
    with pytest.raises(UserError, match="finished run of another kind: --seed was 7 and is 8"):
        interrupted(seed=8)
    interrupted(seed=8, fresh=True)
    assert json.loads(record.read_text())["seed"] == 8
    record.unlink()
    interrupted(seed=9)  # what is not there cannot be lost
    assert json.loads(record.read_text())["seed"] == 9


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    flags, data_file, cache_dir, tmp_path, monkeypatch, capsys
):
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    run("sft", data_file, cache_dir, tmp_path / "out", **flags["sft"])
    assert "no checkpoint after step 2: [Errno 28] No space left on device; free some room" in capsys.readouterr().out
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped, match="could not be saved; the same command continues from the beginning"):
        run("sft", data_file, cache_dir, tmp_path / "stopped", **flags["sft"])
    assert not list((tmp_path / "stopped" / "checkpoints").iterdir())
    monkeypatch.setattr(torch, "save", save)


def test_two_runs_in_one_directory(interrupted, tmp_path):
    from dschat.engine.output_lock import lock_output_dir

    held = lock_output_dir(str(tmp_path / "out"))
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is at work there"):
        interrupted()
    assert held is not None and tree(tmp_path / "out") == before
    held.close()
    interrupted()


def test_an_output_folder_whose_checkpoints_cannot_be_written(flags, data_file, cache_dir, tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="make it writable, or choose another"):
        run("sft", data_file, cache_dir, tmp_path, **flags["sft"])
