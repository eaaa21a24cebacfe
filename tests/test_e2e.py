"""e2e_rlhf.py over stand-in stages, which leave the records of real ones in no time; the real ones at the end."""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.fake_stages import ROOT, calls, stand_ins, value

import pytest

sys.path.insert(0, str(ROOT))  # a program, not part of an installed package
e2e = importlib.import_module("e2e_rlhf")


@pytest.fixture
def run(tmp_path):
    return stand_ins(tmp_path)


def refusal(result):
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    return result.stderr


def test_without_flags_the_embedded_task_runs_through_all_stages(run):
    result = run()
    assert result.returncode == 0, result.stderr
    paths = [str(Path("output", kind, "toy")) for kind in ("actor-models", "reward-models", "step3-models")]
    sft, reward, ppo = (calls(run)[step][0] for step in (1, 2, 3))
    assert value(sft, "--model_name_or_path") == "toy" and value(sft, "--output_dir") == paths[0]
    assert value(reward, "--model_name_or_path") == paths[0] and value(reward, "--output_dir") == paths[1]
    assert value(ppo, "--actor_model_name_or_path") == paths[0] and value(ppo, "--output_dir") == paths[2]
    assert value(ppo, "--critic_model_name_or_path") == paths[1]
    assert all(value(flags, "--data_path") == "toy" for flags in (sft, reward, ppo))
    assert calls(run)[1][1] == {"GOMP_SPINCOUNT": "1000", "PYTHONPATH": str(ROOT)}
    assert result.stdout.startswith(
        f"[1/3] supervised fine-tuning: toy -> {paths[0]}\n[1/3] supervised fine-tuning done"
    )
    assert f"[3/3] PPO: {paths[0]} -> {paths[2]}\n" in result.stdout
    assert result.stdout.endswith(
        f"chat: python {os.path.relpath(ROOT / 'chat.py', run.folder)} --path {paths[2]}/actor\n"
    )


def test_dpo_takes_the_place_of_the_reward_model_and_ppo(run):
    result = run("--method", "dpo", "--dpo.beta", "0.3", "--seed", "5", "--actor-zero-stage", "1")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (run.folder / "calls.jsonl").read_text().splitlines()]
    sft, dpo, answers = (flags for _, flags, _ in lines)
    assert [step for step, _, _ in lines] == [1, 2, 3]
    assert value(dpo, "--model_name_or_path") == "output/actor-models/toy" and value(dpo, "--beta") == "0.3"
    assert value(dpo, "--output_dir") == "output/dpo-models/toy" and value(dpo, "--zero_stage") == "1"
    start = answers.index("--model_name_or_path")
    assert answers[start + 1 : start + 3] == ["output/actor-models/toy", "output/dpo-models/toy"]
    assert (value(answers, "--data_path"), value(answers, "--seed")) == ("toy", "5") and "--judge" not in answers
    assert value(answers, "--eval_fraction") == "0.1", "the prompts that the stages hold out"
    summary = json.loads((run.folder / "output/summary.json").read_text())
    assert list(summary.pop("seconds")) == ["sft", "dpo", "answers", "total"]
    assert summary == {
        "dpo_accuracy": {"value": 0.75, "ci95": [0.3006, 0.9544], "num_pairs": 4},
        "judge": {"sft": {"mean": -0.5, "correct": 0.0}, "dpo": {"mean": 0.5, "correct": 0.5}},
        "win_rate": {"dpo_vs_sft": {"value": 0.75, "ci95": [0.1979, 0.9733], "num_prompts": 2}},
        "peak_rss_gb": 53.0,
    }
    assert "[3/3] answers side by side: output/actor-models/toy, output/dpo-models/toy" in result.stdout
    assert result.stdout.endswith(" --path output/dpo-models/toy\n")
    assert run("--method", "dpo", "--step", "3", "--answers.temperature", "0.5").returncode == 0
    assert value(calls(run)[3][0], "--temperature") == "0.5"


def test_dpo_on_data_without_a_judge_has_answers_and_no_win_rate(run):
    result = run("--method", "dpo", "--data-path", "mine.jsonl")
    summary = json.loads((run.folder / "output/summary.json").read_text())
    assert "judge" not in summary and "win_rate" not in summary
    assert "no judge and no reward model for this task" in result.stdout


def test_summary_json_holds_exactly_what_was_agreed(run):
    run()
    summary = json.loads((run.folder / "output/summary.json").read_text())
    seconds = summary.pop("seconds")
    assert list(seconds) == ["sft", "reward", "ppo", "total"]
    assert all(0.1 <= value < 10 for value in seconds.values()) and seconds["total"] >= 0.3
    assert summary == {
        "reward_accuracy": {"value": 0.75, "ci95": [0.3006, 0.9544], "num_pairs": 4},
        # by the table of toy.judge: "Paris." is clear, right and crisp (1.5) for France, and no answer (-0.5) for the
        # lemon; "Berlin." is clear, wrong and crisp (0.2), then no answer; "?" is no answer to either
        "judge": {
            "sft": {"mean": 0.5, "correct": 0.5},
            "best_of_8": {"mean": -0.15, "correct": 0.0},
            "ppo": {"mean": -0.5, "correct": 0.0},
        },
        # one loss, one tie: 0.5 of 2 is 0.25; Wilson: (0.25 + 0.9604 ± 1.96·sqrt(0.09375 + 0.24009)) / 2.9207
        "win_rate": {"ppo_vs_sft": {"value": 0.25, "ci95": [0.0267, 0.8021], "num_prompts": 2}},
        "kl_per_seq": 3.125,
        "peak_rss_gb": 53.0,
    }


def test_without_a_judge_the_win_rate_is_by_the_reward_model_and_says_so(run):
    result = run("--data-path", "mine.jsonl", "x y.jsonl")
    assert [word for word in calls(run)[2][0] if word.endswith(".jsonl")] == ["mine.jsonl", "x y.jsonl"]
    summary = json.loads((run.folder / "output/summary.json").read_text())
    assert "judge" not in summary  # scores at step 4: 2 and -10, at step 0: 1 and 1
    assert summary["win_rate"]["ppo_vs_sft"] == {
        "value": 0.5,
        "ci95": [0.0945, 0.9055],
        "num_prompts": 2,
        "by": "reward_model",
    }
    assert "no judge for this task" in result.stdout
    assert "no judge for this task" in run("--data-path", "toy", "--eval_data_path", "mine.jsonl").stdout
    assert "no judge" not in run("--data-path", "toy:0.5", "mine.jsonl", "--ppo.eval_data_path", "toy").stdout


def test_stage_flags_reach_the_stages_that_have_them(run):
    words = ["--seed", "3", "--learning_rate", "1e-4", "--kl_coef=0.2", "--skip_bad_records", "--no-self_check"]
    words += ["--sft.learning_rate", "2e-4", "--reward.eval_data_path", "a b", "c", "--ppo.seed", "-1"]
    assert run(*words, "--actor-zero-stage", "2", "--reward-zero-stage", "1").returncode == 0
    sft, reward, ppo = (calls(run)[step][0] for step in (1, 2, 3))
    assert [value(flags, "--seed") for flags in (sft, reward, ppo)] == ["3", "3", "-1"]
    assert [float(value(flags, "--learning_rate")) for flags in (sft, reward)] == [2e-4, 1e-4]
    assert "--learning_rate" not in ppo and value(ppo, "--kl_coef") == "0.2" and "--kl_coef" not in sft + reward
    assert all("--skip_bad_records" in flags for flags in (sft, reward, ppo))
    assert "--no-self_check" in ppo and "--no-self_check" not in sft + reward
    start = reward.index("--eval_data_path")
    assert reward[start + 1 : start + 3] == ["a b", "c"] and "--eval_data_path" not in sft + ppo
    assert value(sft, "--zero_stage") == "2" and value(reward, "--zero_stage") == "1"
    assert value(ppo, "--actor_zero_stage") == "2" and value(ppo, "--critic_zero_stage") == "1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sft.learning_rat", "1"], "unknown flag --sft.learning_rat; did you mean --sft.learning_rate?"),
        (["--kl_coeff", "1"], "unknown flag --kl_coeff; did you mean --kl_coef?"),
        (["--ppo.learning_rate", "1"], "did you mean --ppo."),
        (["--actor_model=toy"], "did you mean --actor-model?"),
        (
            ["--ppo.output_dir", "x"],
            "--ppo.output_dir is set here; use --actor-model, --reward-model and --output-dir",
        ),
        (["--step", "1", "2", "--kl_coef", "1"], "--kl_coef is a flag of step 3, which --step leaves out"),
        (["--method", "dpo", "--kl_coef", "1"], "--kl_coef is a flag of --method ppo, not of dpo; drop it"),
        (["--dpo.beta", "1"], "--dpo.beta is a flag of --method dpo, not of ppo; drop it"),
        (["--method", "dpo", "--step", "1", "--beta", "1"], "--beta is a flag of step 2, which --step leaves out"),
        (["--method", "dpo", "--step", "3"], "does not hold the output of step 1; run --step 1 first"),
        (["--ppo.kl_coef", "much"], "--ppo.kl_coef: invalid float value: 'much'"),
        (["--step", "4"], "--step: invalid choice: 4"),
        (["more"], "unknown argument more"),
        (["--actor-model", "opt-13b"], "no recipe of step 1 for opt-13b on cpu; there are: "),
        (["--actor-model", "nowhere/at-all"], "nowhere/at-all is neither a directory nor a model with a recipe"),
        (["--actor-model", "."], "--data-path is missing"),
        (["--step", "3"], "output/actor-models/toy does not hold the output of step 1; run --step 1 first"),
        (["--step", "2"], "output/actor-models/toy does not hold the output of step 1; run --step 1 first"),
        (["--step", "3", "1"], "output/reward-models/toy does not hold the output of step 2; run --step 2 first"),
        (["--num-ranks", "2"], "--num-ranks 2 does not go with cpu and its launcher: leave it out"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(run, flags, message):
    assert message in refusal(run(*flags, "--deployment-type", "cpu"))
    assert list(run.folder.iterdir()) == []


def test_an_output_directory_that_cannot_be_made_is_refused(run):
    (run.folder / "file").write_text("")
    assert "--output_dir file/x cannot be written" in refusal(run("--output-dir", "file/x"))


def test_later_steps_use_what_earlier_ones_left(run):
    assert run("--step", "2", "1", "--output-dir", "my out").returncode == 0
    assert not (run.folder / "my out/summary.json").exists()
    assert run("--step", "3", "--output-dir", "my out", "--sft.learning_rate", "1").returncode == 0
    assert list(calls(run)) == [1, 2, 3]
    for folder in ("actor-models", "reward-models"):  # made by other means: then only run.json tells the seconds
        (run.folder / "my out" / folder / "toy/stage.json").unlink()
    assert run("--step", "3", "--output-dir", "my out").returncode == 0
    seconds = json.loads((run.folder / "my out/summary.json").read_text())["seconds"]
    assert (seconds["sft"], seconds["reward"]) == (10.0, 20.0) and 30 < seconds["total"] < 60
    run("--step", "1", "--output-dir", "my out", "--seed", "5")
    assert not (run.folder / "my out/summary.json").exists(), "it would tell of another step 1"


def test_models_of_ones_own_and_from_the_hub(run, tmp_path):
    for name in ("base model", "judge"):
        (tmp_path / name).mkdir()
    own = ["--actor-model", tmp_path / "base model", "--reward-model", tmp_path / "judge", "--data-path", "d.jsonl"]
    assert run(*own, "--deployment-type", "cpu").returncode == 0
    assert value(calls(run)[1][0], "--model_name_or_path") == str(tmp_path / "base model")
    assert value(calls(run)[2][0], "--model_name_or_path") == str(tmp_path / "judge")
    assert value(calls(run)[2][0], "--output_dir") == "output/reward-models/judge"
    assert value(calls(run)[3][0], "--critic_model_name_or_path") == "output/reward-models/judge"
    for actor in ("facebook/opt-1.3b", "1.3b"):
        assert run("--actor-model", actor, "--reward-model", "350m", "--deployment-type", "single_gpu").returncode == 0
        sft, reward, ppo = (calls(run)[step][0] for step in (1, 2, 3))
        assert (
            value(sft, "--model_name_or_path") == "facebook/opt-1.3b"
            and value(sft, "--data_path") == "Dahoas/rm-static"
        )
        assert (
            value(reward, "--model_name_or_path") == "facebook/opt-350m" and value(reward, "--weight_decay") == "0.1"
        )
        assert value(ppo, "--output_dir") == "output/step3-models/opt-1.3b" and value(ppo, "--kl_coef") == "0.1"


@pytest.mark.parametrize(
    ("fake", "code", "last"),
    [
        ("user@1", 2, "error: no disk\n"),  # 2 although the launcher said 5
        ("crash@2", 5, "Trace\nboom\n"),
        ("killed@3", 137, "killed by SIGKILL; out of memory is the usual cause\n"),
        ("nothing@2", 1, "it left no output/reward-models/toy/run.json; its own last lines are above\n"),
    ],
)
def test_when_a_stage_fails_its_error_is_last(run, fake, code, last):
    step = int(fake[-1])
    (run.folder / "output").mkdir()
    key = e2e.METHODS["ppo"][step - 1]
    title = e2e.STAGES[key].title
    (run.folder / f"output/error-{key}.txt").write_text("of an earlier run")
    result = run(fake=fake)
    assert result.returncode == code and result.stderr.endswith(last)
    assert f"[{step}/3] {title} failed after" in result.stderr and f"with exit code {code}\n" in result.stderr
    assert "noise of a library" in result.stderr and "earlier run" not in result.stderr
    assert list(calls(run)) == list(range(1, step + 1)), "nothing runs after a failure"


def test_a_stage_that_asks_for_it_is_started_again(run):
    (run.folder / "output").mkdir()
    result = run("--fresh", fake="again@2")
    assert result.returncode == 0, result.stderr
    title = e2e.STAGES["reward"].title
    assert f"[2/3] {title}: started again after: rank 1: out of memory\n" in result.stdout
    lines = (run.folder / "calls.jsonl").read_text().splitlines()
    steps, flags = zip(*(json.loads(line)[:2] for line in lines), strict=True)
    assert steps == (1, 2, 2, 3)
    assert flags[1] == [*flags[2], "--fresh"], "what it has learned is not forgotten"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_it_stops_the_stage_and_all_its_processes(run, number, code):
    process = run(fake="hang@1", wait=False)
    pids = run.folder / "pids"
    while not (pids.exists() and pids.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    deadline = time.time() + 10
    while any(map(is_running, pids.read_text().split())) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids.read_text().split()))


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(") ")[2][0] != "Z"  # a dead orphan may wait for its new parent
    except OSError:
        return False


def test_list_prints_every_pair_and_its_steps(run):
    lines = {tuple(line.split(maxsplit=2)) for line in run("--list").stdout.splitlines()[1:-2]}
    assert ("opt-66b", "multi_node", "step 1, step 2, step 3, dpo") in lines
    assert ("chinese-1.5b", "single_gpu", "step 1") in lines and ("opt-350m", "single_gpu", "step 2, dpo") in lines
    found = {
        (path.parts[-3], path.parts[-2], path.stem[4:]) for path in ROOT.glob("training/*/training_scripts/*/*/*")
    }
    assert len(lines) == len({pair for pair in found if pair[1] != "sweep"})


def test_a_dry_run_asks_each_stage_and_writes_nothing(run):
    flags = ("--actor-model", "opt-6.7b-lora", "--reward-model", "facebook/opt-350m", "--dry_run", "--seed", "3")
    result = run(*flags, "--deployment-type", "single_gpu", "--num-ranks", "2")
    sft, reward, ppo = (calls(run)[step][0] for step in (1, 2, 3))
    assert value(sft, "--model_name_or_path") == "facebook/opt-6.7b", "the lora recipe, of this model"
    assert value(sft, "--lora_dim") == "128" and value(sft, "--plan_for") == "2" and "--dry_run" in sft
    assert value(reward, "--model_name_or_path") == "facebook/opt-350m" and value(reward, "--seed") == "3"
    assert value(ppo, "--actor_model_name_or_path") == "facebook/opt-6.7b"
    assert value(ppo, "--critic_model_name_or_path") == "facebook/opt-350m"
    assert result.returncode == 0 and not (run.folder / "output" / "summary.json").exists()
    assert run("--calibrate", "3").stderr.startswith("error: --calibrate is for one stage at a time")
