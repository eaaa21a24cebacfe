"""The alarms of step 3 on the embedded task: silent in healthy runs, raised by planted faults.

    python e2e_rlhf.py --output-dir output/alarms/base    the models of steps 1 and 2
    python benchmarks/alarms.py                           ten healthy seeds and every fault; an hour of two cores
    python benchmarks/alarms.py --only hack endless

Each run is step 3's recipe, shortened, from those models, evaluated every five rollouts by the task's judge. One that
is there already is not run again. `reports` in the output folder holds a page of every fault beside the healthy run.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from dschat.data import toy
from dschat.report.findings import policy_findings
from dschat.report.overoptimisation import Measured, alarm
from dschat.report.page import write_page
from dschat.report.picture import write_picture
from dschat.report.progress import table
from dschat.report.run_files import evaluations, load_run

import numpy as np
from programs import PROGRAMS, ROOT
from toy_runs import run

STEP3 = "step3_rlhf_finetuning/training_scripts/toy/cpu/run_toy.sh"
SHORT = "--max_steps 30 --per_device_generation_batch_size 60 --per_device_training_batch_size 30 --eval_interval 5 "
SHORT += "--max_eval_samples 200 --best_of_n 0"
HOLES = f"function:{ROOT / 'benchmarks/alarm_rewards.py'}"
FAST = "--kl_coef 0 --actor_learning_rate 3e-3 --num_warmup_steps 5"
# name -> (flags of step 3, the alarms of which one must be raised, the metrics of its picture)
FAULTS = {
    "hack": (
        f"--reward full:REWARD {HOLES}:thanks --clip_reward_value 0 --kl_coef 0.02",
        {"overoptimised"},
        ("eval/score_mean", "eval/judge_mean", "eval/judge_agreement"),
    ),
    "hack-stopped": (
        f"--reward full:REWARD {HOLES}:thanks --clip_reward_value 0 --kl_coef 0.02 --stop_on_overoptimisation",
        {"overoptimised"},
        ("eval/score_mean", "eval/judge_mean", "eval/kl_per_seq"),
    ),
    "endless": (
        f"--reward {HOLES}:words --missing_eos_penalty 0 --clip_reward_value 0 {FAST}",
        {"endless"},
        ("eval/finished_fraction", "eval/response_length", "eval/judge_mean"),
    ),
    "collapse": (
        f"--reward full:REWARD 3*{HOLES}:sameness {FAST}",
        {"collapse", "overoptimised"},
        ("objective/entropy_per_token", "eval/distinct_2", "eval/judge_mean"),
    ),
    "kl": (
        f"--reward -1*full:REWARD {FAST} --max_grad_norm 0",
        {"kl"},
        ("eval/kl_per_seq", "policy/approx_kl", "eval/judge_mean"),
    ),
    "weak-reward": (
        "--reward full:WEAK --allow_weak_reward_model",
        set(),
        ("eval/score_mean", "eval/judge_mean", "eval/judge_agreement"),
    ),
}
SEEDS = range(1, 11)


def random_labels(base: Path) -> Path:
    """A reward model of step 2's recipe, shortened, on pairs whose labels are coins; its report calls it weak."""
    target, data = base / "weak-reward-model", base / "random-labels.jsonl"
    if not (target / "run.json").is_file():
        with open(data, "w", encoding="utf-8") as file:
            coins = Random(0)
            for record in toy.records("preference", "train"):
                pair = coins.sample([record["chosen"], record["rejected"]], 2)
                row = {"prompt": record["prompt"], "chosen": pair[0], "rejected": pair[1]}
                file.write(json.dumps(row) + "\n")
        recipe = ROOT / "training/step2_reward_model_finetuning/training_scripts/toy/cpu/run_toy.sh"
        words = ["bash", str(recipe), "--model_name_or_path", str(base / "actor-models/toy"), "--data_path", str(data)]
        words += [
            "--data_split",
            "0,1,0",
            "--eval_data_path",
            "toy",
            "--output_dir",
            str(target),
            "--max_steps",
            "200",
        ]
        run(words, base / "weak.log", 1)
    return target


def step3(base: Path, output: Path, seed: int, flags: str) -> None:
    if (output / "run.json").is_file():
        return
    reward = base / "reward-models/toy"
    flags = flags.replace("REWARD", str(reward)).replace("WEAK", str(base / "weak-reward-model"))
    words = ["bash", str(ROOT / "training" / STEP3), "--actor_model_name_or_path", str(base / "actor-models/toy")]
    words += ["--critic_model_name_or_path", str(reward), "--data_path", "toy", "--seed", str(seed)]
    run([*words, "--output_dir", str(output), *SHORT.split(), *flags.split()], output.with_suffix(".log"), 1)


def refused(base: Path, output: Path) -> str:
    """What step 3 says of the reward model of random labels when nothing allows it."""
    words = [sys.executable, str(PROGRAMS["ppo"]), "--data_path", "toy"]
    words += ["--actor_model_name_or_path", str(base / "actor-models/toy"), "--output_dir", str(output / "refused")]
    words += ["--critic_model_name_or_path", str(base / "weak-reward-model"), "--max_steps", "1"]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return f"exit code {done.returncode}: {done.stderr.strip()}"


def alarms_of(directory: Path) -> dict[str, int]:
    """The alarms of a run, each with the rollout that raised it first: as step 3 raised them, or would today, from its
    samples and metrics. They change nothing of a run that does not stop for them."""
    samples: dict[int, list[dict]] = {}
    for line in (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        if sample["kind"] == "policy":
            samples.setdefault(sample["step"], []).append(sample)
    history, raised = [], {}
    lines = evaluations(load_run(directory))
    for line in lines:
        columns = [[sample[name] for sample in samples[line["step"]]] for name in ("score", "judge", "length")]
        history.append(Measured(line["step"], *(np.array(column, dtype=float) for column in columns)))
        found = [each for each in (alarm(history),) if each is not None] + policy_findings(lines[0], line)
        for finding in found:
            raised.setdefault(finding.kind, line["step"])
    return raised


def row(directory: Path, expected: set[str] | None) -> list[str]:
    found, raised = load_run(directory), alarms_of(directory)
    first, last = evaluations(found)[0], evaluations(found)[-1]
    judged = [line["eval/judge_mean"] for line in evaluations(found)]
    if expected is None:
        verdict = "silent" if not raised else "FALSE ALARM"
    else:
        verdict = "raised" if expected & set(raised) else "MISSED" if expected else "step 3 refuses it"
    return [
        directory.name,
        ", ".join(f"{kind} at {step}" for kind, step in raised.items()) or "none",
        f"{first['eval/score_mean']:+.2f} -> {last['eval/score_mean']:+.2f}",
        f"{judged[0]:+.2f} -> {max(judged):+.2f} -> {judged[-1]:+.2f}",
        f"{last['eval/kl_per_seq']:.1f}",
        f"{last['eval/finished_fraction']:.0%}",
        verdict,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("output/alarms/base"), help="output of e2e_rlhf.py")
    parser.add_argument("--output-dir", type=Path, default=Path("output/alarms"))
    parser.add_argument("--only", nargs="+", default=["healthy", *FAULTS], choices=["healthy", *FAULTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time, a thread each")
    args = parser.parse_args()
    runs = [(f"healthy-{seed}", seed, "", None) for seed in args.seeds if "healthy" in args.only]
    runs += [(name, 1, *FAULTS[name][:2]) for name in FAULTS if name in args.only]
    if "weak-reward" in args.only:
        random_labels(args.base)
        print(refused(args.base, args.output_dir))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda each: step3(args.base, args.output_dir / each[0], each[1], each[2]), runs))
    header = ["run", "alarms", "reward", "judge: start, best, end", "KL", "finished", "verdict"]
    print(table(header, [row(args.output_dir / name, expected) for name, _, _, expected in runs]))
    healthy, reports = args.output_dir / f"healthy-{args.seeds[0]}", args.output_dir / "reports"
    reports.mkdir(exist_ok=True)
    for name, *_ in runs:
        if name in FAULTS and healthy.is_dir():
            pair = [load_run(healthy, name="healthy"), load_run(args.output_dir / name)]
            write_page(reports / f"{name}.html", pair)
            write_picture(reports / f"{name}.png", pair, FAULTS[name][2])


if __name__ == "__main__":
    main()
