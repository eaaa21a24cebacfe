"""A second start of e2e_rlhf.py runs what is not done, says why, and ends as the first did; over stand-in stages."""

import json
import os
import shutil
from pathlib import Path

from dschat.report import stage_record
from dschat.report.stage_record import Hashes, MadeFrom, StageRecord, named_paths
from tests.fake_stages import ROOT, stand_ins

import pytest

DIRECTORIES = [f"output/{kind}/toy" for kind in ("actor-models", "reward-models", "step3-models")]


@pytest.fixture
def run(tmp_path):
    return stand_ins(tmp_path)


@pytest.fixture
def done(run):
    """A whole run on two files of data; returns what prints the steps of the next start."""
    for name in ("mine.jsonl", "held.jsonl"):
        (run.folder / name).write_text('{"prompt": "a", "response": "b"}\n')
    data = ("--data-path", "mine.jsonl:0.5", "--eval_data_path", "held.jsonl")

    def again(*flags, fake="", code=0, data=data):
        (run.folder / "calls.jsonl").unlink(missing_ok=True)
        result = run(*data, *flags, fake=fake)
        assert result.returncode == code, result.stderr
        calls = run.folder / "calls.jsonl"
        ran = [json.loads(line)[0] for line in calls.read_text().splitlines()] if calls.exists() else []
        said = [line for line in result.stdout.splitlines() if line.startswith("step ")]
        again.output = result.stdout
        return ran, said

    assert again() == ([1, 2, 3], [])
    again.folder = run.folder
    return again


def shown(output: str) -> str:
    """The tables and the answers, without what is measured in seconds."""
    tables = output[output.index("held-out answers") :]
    return "\n".join(line for line in tables.splitlines() if ": seconds" not in line)


def test_what_is_done_is_not_run_again_and_the_report_is_the_same(done):
    first, before = done.output, json.loads((done.folder / "output/summary.json").read_text())
    ran, said = done()
    assert ran == [] and said == [f"step {n}: done, as before ({where})" for n, where in enumerate(DIRECTORIES, 1)]
    assert shown(done.output) == shown(first)
    after = json.loads((done.folder / "output/summary.json").read_text())
    assert after["seconds"].pop("total") >= 0.3 and before["seconds"].pop("total") >= 0.3
    assert after == before, "the seconds of the stages too: those of when they ran"


@pytest.mark.parametrize(
    ("flags", "ran", "reasons"),
    [
        (["--sft.learning_rate", "1e-4"], [1, 2, 3], {1: "--learning_rate default -> 0.0001"}),
        (["--reward.learning_rate", "2e-4"], [2, 3], {2: "--learning_rate default -> 0.0002"}),
        (["--kl_coef", "0.3"], [3], {3: "--kl_coef default -> 0.3"}),
        (["--seed", "4"], [1, 2, 3], dict.fromkeys((1, 2, 3), "--seed default -> 4")),
        (["--log_interval", "5", "--num_workers", "2"], [], {}),
        (["--output-dir", "./output"], [], {}),
    ],
)
def test_a_changed_flag_runs_its_stage_and_what_depends_on_it(done, flags, ran, reasons):
    found, said = done(*flags)
    assert found == ran and len(said) == 3
    for number, line in enumerate(said, 1):
        again = f"step {number} again: {reasons.get(number, 'the output of step ')}"
        assert line.startswith(again if number in ran else f"step {number}: done, as before")
    assert done(*flags)[0] == [], "and it is done then"


def test_a_flag_that_is_left_out_again_changes_it_back(done):
    done("--kl_coef", "0.3")
    assert done() == (
        [3],
        [
            f"step 1: done, as before ({DIRECTORIES[0]})",
            f"step 2: done, as before ({DIRECTORIES[1]})",
            "step 3 again: --kl_coef 0.3 -> default",
        ],
    )


def test_changed_data_runs_again_and_a_touched_file_does_not(done):
    os.utime(done.folder / "mine.jsonl")
    assert done()[0] == []
    (done.folder / "mine.jsonl").write_text('{"prompt": "a", "response": "c"}\n')
    ran, said = done()
    assert ran == [1, 2, 3] and all(" again: data changed: mine.jsonl" in line for line in said)
    (done.folder / "held.jsonl").write_text('{"prompt": "a", "response": "c"}\n')
    assert done()[1][0] == "step 1 again: data changed: held.jsonl"
    assert done(data=("--data-path", "mine.jsonl"))[1][0] == (
        "step 1 again: --data_path mine.jsonl:0.5 -> mine.jsonl; --eval_data_path held.jsonl -> default"
    )


def test_an_earlier_stage_with_the_same_output_runs_nothing_after_it(done):
    """Only what went into a stage decides: step 1 made the same model once more."""
    (done.folder / DIRECTORIES[0] / "stage.json").unlink()
    ran, said = done()
    assert ran == [1] and said[0].startswith("step 2: done") and said[1].startswith("step 3: done")


def test_an_output_that_is_changed_or_gone_is_made_again(done):
    path = done.folder / DIRECTORIES[1] / "model.safetensors"
    path.write_text("cut sho")
    assert done()[1][1] == "step 2 again: its output was changed"
    path.unlink()
    assert done()[0] == [2], "and step 3, which read the same as before, is not"
    (done.folder / DIRECTORIES[1] / "run.json").unlink()
    assert done()[0] == [2]
    shutil.rmtree(done.folder / DIRECTORIES[0])
    assert done()[0] == [1]


def test_what_a_run_leaves_for_people_is_no_output(done):
    for name in ("tensorboard/more", "checkpoints/3/state", "quality/a.png", ".lock", "metrics.jsonl"):
        path = done.folder / DIRECTORIES[1] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert done()[0] == []


def test_fresh_runs_all_again(done):
    ran, said = done("--fresh")
    assert ran == [1, 2, 3] and said == [f"step {n} again: --fresh" for n in (1, 2, 3)]
    assert done("--fresh", "--step", "3")[0] == [3]
    assert done()[0] == []


def test_a_stage_that_did_not_finish_is_started_again_and_the_others_are_not(done):
    done("--kl_coef", "0.3", fake="crash@3", code=5)
    ran, said = done("--kl_coef", "0.3")
    assert ran == [3] and said[2] == "step 3 again: it had not finished"


def test_a_stage_that_failed_before_it_wrote_anything_leaves_the_old_output_done(done):
    done("--kl_coef", "-1", fake="user@3", code=2)
    assert done()[0] == [] and (done.folder / "output/summary.json").is_file()


def test_other_machines_are_other_results(done):
    record = done.folder / DIRECTORIES[0] / "stage.json"
    flags = json.loads(record.read_text())["made_from"]["flags"]
    assert flags["--deployment-type"] == "cpu" and flags["DSCHAT_LAUNCH"].endswith("fake.py")
    assert {"--output_dir", "--model_name_or_path"} & set(flags) == {"--model_name_or_path"}
    assert flags["--data_path"] == "mine.jsonl:0.5"


# The record itself


MADE = MadeFrom({"--seed": "1"}, "code", {"step 1": "a"})


def record_of(tmp_path: Path) -> StageRecord:
    return StageRecord(tmp_path / "stage", Hashes(tmp_path / "none"))


def test_continue_or_start_over(tmp_path):
    other = MadeFrom({"--seed": "2"}, "code", {"step 1": "a"})
    mended = MadeFrom({"--seed": "1"}, "mended", {"step 1": "a"})
    assert record_of(tmp_path).why_again(MADE) == ([], False)
    record_of(tmp_path).start(MADE, anew=False)
    assert record_of(tmp_path).why_again(MADE) == (["it had not finished"], False)
    assert record_of(tmp_path).why_again(other) == (["--seed 1 -> 2"], True)
    assert record_of(tmp_path).why_again(mended) == (["the code changed"], False), "who mends a crash continues"
    checkpoints = tmp_path / "stage/checkpoints"
    checkpoints.mkdir()
    record_of(tmp_path).start(other, anew=True)
    os.utime(checkpoints, (0, 0))
    assert record_of(tmp_path).why_again(other) == (["it had not finished"], True), "the checkpoint is of the other"
    later = (tmp_path / "stage/started.json").stat().st_mtime + 1
    os.utime(checkpoints, (later, later))
    record_of(tmp_path).start(other, anew=False)
    assert record_of(tmp_path).why_again(other) == (["it had not finished"], False)
    record_of(tmp_path).finish(other, 1.0, 2.0)
    assert record_of(tmp_path).is_done(other) and not record_of(tmp_path).is_done(MADE)
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["checkpoints", "stage.json"]
    assert record_of(tmp_path).why_again(mended) == (["--seed 2 -> 1", "the code changed"], True)


def test_a_file_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "data").write_text("abc")
    hashes = Hashes(tmp_path / "none")
    value = hashes.of(tmp_path / "data")
    again = Hashes(tmp_path / "none")
    again.known = json.loads(json.dumps(hashes.known))

    def unread(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(stage_record.hashlib, "file_digest", unread)
    assert again.of(tmp_path / "data") == value
    stat = (tmp_path / "data").stat()
    (tmp_path / "data").write_text("abd")  # as long, and dated back
    os.utime(tmp_path / "data", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(AssertionError, match="read again"):
        again.of(tmp_path / "data")


def test_a_folder_is_its_names_and_contents(tmp_path):
    def made(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
        return Hashes(tmp_path / name / "output").of(tmp_path / name)

    one = made("a", {"x": "1", "in/y": "2"})
    assert one == made("b", {"x": "1", "in/y": "2", "output/z": "3", ".hidden": "4", "run.json": "5"})
    assert (
        len({one, made("c", {"x": "2", "in/y": "2"}), made("d", {"z": "1", "in/y": "2"}), made("e", {"x": "1"})}) == 4
    )


def test_paths_in_the_values_of_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.py", "b.jsonl", "m"):
        Path(name).touch()
    assert named_paths("function:a.py:score") == ["a.py"] and named_paths("0.5*full:m") == ["m"]
    assert named_paths("b.jsonl:0.5") == ["b.jsonl"] and named_paths("api:http://x:80") == named_paths("toy") == []


def test_the_code_of_a_stage(tmp_path):
    for name in ("dschat/a.py", "training/one/main.py", "training/two/main.py", "training/one/scripts/run.sh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")

    def code() -> str:
        return stage_record.code_hash(tmp_path, tmp_path / "training/one/main.py")

    first = code()
    (tmp_path / "training/two/main.py").write_text("2")
    assert code() == first
    for name in ("dschat/a.py", "training/one/main.py", "training/one/scripts/run.sh"):
        (tmp_path / name).write_text("2")
        assert code() != first
        (tmp_path / name).write_text("1")
    assert (ROOT / "dschat").is_dir() and code() == first
