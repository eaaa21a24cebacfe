"""How e2e_rlhf.py starts the stages, on which machine and in how many ranks; and the real stages through it."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dschat.errors import UserError

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "e2e_rlhf.py"
sys.path.insert(0, str(ROOT))  # a program, not part of an installed package
e2e = importlib.import_module("e2e_rlhf")


@pytest.mark.parametrize(
    ("given", "gpu", "wanted"),
    [
        ((None, None), False, ("cpu", 1)),
        ((None, 2), False, ("cpu", 2)),
        (("cpu", 1), True, ("cpu", 1)),
        ((None, None), True, ("single_gpu", 1)),
        ((None, 4), True, ("single_node", 4)),
        (("single_node", None), True, ("single_node", 0)),  # 0: as many as there are
    ],
)
def test_the_launcher_by_machine_and_ranks(monkeypatch, given, gpu, wanted):
    monkeypatch.delenv("DSCHAT_LAUNCH", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: iter([self / "nvidia0"] if gpu and "nvidia" in pattern else [])
    )
    deployment, launcher = e2e.choose_launcher(*given)
    words, python = launcher.split(), Path(sys.executable).name
    number = int(words[words.index("--num_accelerators") + 1]) if "--num_accelerators" in words else 0
    if wanted[1] == 1:
        assert (deployment, words) == (wanted[0], [python])
    else:
        assert (deployment, number) == wanted and words[:3] == [python, "-m", "deepspeed.launcher.runner"]
        assert 1024 <= int(words[words.index("--master_port") + 1]) < 65536


@pytest.mark.parametrize(
    "given", [("single_gpu", 2), ("cpu", 0), ("multi_node", 2), ("multi_node", None)], ids=lambda given: str(given)
)
def test_launchers_that_cannot_be_are_refused(monkeypatch, given):
    monkeypatch.delenv("DSCHAT_LAUNCH", raising=False)
    with pytest.raises(UserError):
        e2e.choose_launcher(*given)


def test_it_starts_light():
    code = "import sys, time; t = time.process_time(); sys.path.insert(0, sys.argv[1]); import e2e_rlhf; "
    code += "print(time.process_time() - t, *{'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules))"
    seconds, *heavy = subprocess.check_output([sys.executable, "-c", code, str(ROOT)], text=True).split()
    assert float(seconds) < 1 and heavy == []


ALLOW = "--allow_weak_reward_model"  # two steps make no good one


def run_real(*flags, cwd, num_ranks=1):
    small = ["--max_steps", "2", "--max_eval_samples", "12", "--ppo.max_answer_seq_len", "12", "--ppo.best_of_n", "2"]
    small += ["--ppo.preflight", "off"] if "dpo" not in flags else []  # two steps teach no end of an answer
    sizes = ["--ppo.per_device_generation_batch_size", "8", "--ppo.per_device_training_batch_size", "8"]
    sizes += ["--sft.per_device_train_batch_size", "8", "--reward.per_device_train_batch_size", "4"]
    ranks = ["--deployment-type", "cpu", "--num-ranks", str(num_ranks)]
    command = [sys.executable, str(PROGRAM), *small, *sizes, *ranks, *flags]
    env = {name: text for name, text in os.environ.items() if name != "DSCHAT_LAUNCH"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)


def test_the_real_stages_end_to_end(tmp_path):
    refused = run_real("--seed", "9", "--output-dir", "my out", cwd=tmp_path)
    assert refused.returncode == 2 and "is too weak a reward model for PPO" in refused.stderr.splitlines()[-1]
    result = run_real("--seed", "9", "--output-dir", "my out", "--step", "3", ALLOW, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "my out"
    summary = json.loads((out / "summary.json").read_text())
    names = {"seconds", "reward_accuracy", "reward_quality", "judge", "win_rate", "kl_per_seq", "peak_rss_gb"}
    assert set(summary) == names and "cannot be told from chance" in summary["reward_quality"]["weakness"]
    assert set(summary["judge"]) == {"sft", "best_of_2", "ppo"} and 0.2 < summary["peak_rss_gb"] < 10
    assert summary["reward_accuracy"]["num_pairs"] == summary["win_rate"]["ppo_vs_sft"]["num_prompts"] == 12
    for directory, role in (
        ("actor-models/toy", "policy"),
        ("reward-models/toy", "reward"),
        ("step3-models/toy", "policy"),
    ):
        run = json.loads((out / directory / "run.json").read_text())
        assert (run["role"], run["seed"], run["config"]["data_path"]) == (role, 9, ["toy"])
    assert (out / "step3-models/toy/actor/model.safetensors").is_file()
    again = run_real("--seed", "9", "--output-dir", "my out", ALLOW, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count(": done, as before (") == 3, again.stdout
    after = json.loads((out / "summary.json").read_text())
    assert after | {"seconds": 0} == summary | {"seconds": 0} and after["peak_rss_gb"] == summary["peak_rss_gb"]
    shown = result.stdout.partition("held-out prompts (not the best)")[2]
    assert again.stdout.partition("held-out prompts (not the best)")[2] == shown
    assert shown.count("\n  SFT [") == shown.count("\n  PPO [") == 5
    assert sorted(path.name for path in out.iterdir()) == [
        "actor-models",
        "report.html",
        "report.png",
        "reward-models",
        "step3-models",
        "summary.json",
    ]


@pytest.mark.long
def test_the_real_stages_with_dpo(tmp_path):
    sizes = ["--method", "dpo", "--dpo.per_device_train_batch_size", "8", "--answers.max_new_tokens", "12"]
    command = [sys.executable, str(PROGRAM), "--max_steps", "2", "--max_eval_samples", "12", "--seed", "9", *sizes]
    command += ["--sft.per_device_train_batch_size", "8", "--answers.num_prompts", "12", "--deployment-type", "cpu"]
    env = {name: text for name, text in os.environ.items() if name != "DSCHAT_LAUNCH"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "output/summary.json").read_text())
    assert set(summary) == {"seconds", "dpo_accuracy", "judge", "win_rate", "peak_rss_gb"}
    assert set(summary["judge"]) == {"sft", "dpo"} and summary["win_rate"]["dpo_vs_sft"]["num_prompts"] == 12
    assert list(summary["seconds"]) == ["sft", "dpo", "answers", "total"]
    assert (tmp_path / "output/dpo-models/toy/model.safetensors").is_file()


def test_a_real_mistake_in_the_data_is_the_last_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    result = run_real("--data-path", "bad.jsonl", cwd=tmp_path)
    assert result.returncode == 2 and "bad.jsonl:2" in result.stderr.splitlines()[-1]


@pytest.mark.long
def test_two_ranks_through_the_deepspeed_launcher(tmp_path):
    result = run_real("--actor-zero-stage", "2", ALLOW, cwd=tmp_path, num_ranks=2)
    assert result.returncode == 0, result.stderr
    run = json.loads((tmp_path / "output/step3-models/toy/run.json").read_text())
    assert run["config"]["actor_zero_stage"] == 2
    rows = (tmp_path / "output/step3-models/toy/samples.jsonl").read_text().splitlines()
    assert len(rows) == 12 * 3  # before, best of 2, after


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (signal.SIGSTOP, "rank 1 did not answer for 10 s: stopped, or its machine is gone; last at "),
        (signal.SIGKILL, "was killed by SIGKILL; out of memory is the usual cause"),
    ],
)
def test_a_rank_that_dies_or_stalls_ends_everything(fault, cause, tmp_path):
    command = [sys.executable, str(PROGRAM), "--num-ranks", "2", "--stall_timeout", "10", "--deployment-type", "cpu"]
    env = {name: text for name, text in os.environ.items() if name != "DSCHAT_LAUNCH"} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, **pipes)
    log = tmp_path / "output/actor-models/toy/metrics.jsonl"
    while not (log.is_file() and '"loss"' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.2)
    ranks = ranks_below(tmp_path)
    os.kill(ranks[1], fault)
    start = time.time()
    _, errors = process.communicate(timeout=70)
    assert process.returncode and time.time() - start < 70
    last = errors.splitlines()[-1]
    assert last.startswith("rank 1 ") and cause in last and not ranks_below(tmp_path)


def ranks_below(folder):
    """The running processes of the job in ``folder``: rank -> process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_text().split("\0")
            if Path(os.readlink(path / "cwd")) == folder and words[2].endswith("main.py"):
                found[int(words[3].removeprefix("--local_rank="))] = int(path.name)
        except (OSError, IndexError, ValueError):
            continue
    return found


@pytest.mark.long
def test_a_mistake_behind_the_launcher_is_still_the_last_line_and_code_2(tmp_path):
    result = run_real("--dtype", "fp16", cwd=tmp_path, num_ranks=2)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: --dtype fp16 needs a GPU; use --dtype bf16 or fp32 on a CPU"
