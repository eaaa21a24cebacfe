"""A run that is killed again and again ends bit for bit as one that never was.

    python benchmarks/kill_fuzz.py --program ppo --kills 25
    python benchmarks/kill_fuzz.py --program ppo --kills 10 --ranks 2 --zero_stage 2
    python benchmarks/kill_fuzz.py --program e2e --kills 25           all stages, killed inside of them and between

The embedded task in a small setting. One run is left alone; the others get SIGKILL, on all ranks at once: every other
time at a random instant between the loading of the models and the end, otherwise while a checkpoint is written. The
same command starts the run again each time. Whoever ends is compared with the first: weights, metrics.jsonl and the
metrics of run.json and the summary but for what a clock says, samples.jsonl.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.engine.checkpoint import TEMPORARY, list_checkpoints

from programs import PROGRAMS, ROOT

E2E = "e2e"
COMMON = (
    "--data_path toy --dtype fp32 --max_eval_samples 20 --checkpoint_interval 2 --log_interval 1 --eval_interval 3"
)
SUPERVISED = f"{COMMON} --max_seq_len 96 --per_device_eval_batch_size 20 --dropout 0.1 --learning_rate 1e-3"
PPO = (
    f"{COMMON} --max_prompt_seq_len 48 --max_answer_seq_len 16 --num_samples_per_prompt 2 --ppo_epochs 2 --enable_ema "
    "--ptx_data_path toy --kl_target 1 --kl_horizon 1000 --best_metric score --allow_weak_reward_model "
    "--actor_learning_rate 1e-3 --critic_learning_rate 1e-3"
)
CLOCKS = ("time", "perf/", "seconds", "peak_rss")  # what begins so is never twice the same


@dataclass
class Report:
    """What became of the kills."""

    kills: Counter[str] = field(default_factory=Counter)  # by what the run was at
    runs: int = 0  # that came to their end
    starts: int = 0
    differences: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", choices=(*PROGRAMS, E2E), default="ppo")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, choices=range(4), default=0)
    parser.add_argument("--max_steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-fuzz-") as folder:
        command = toy_command(args.program, Path(folder), args.ranks, args.zero_stage, args.max_steps)
        report = fuzz(command, Path(folder) / "runs", args.kills, args.ranks, args.seed)
    kills = ", ".join(f"{number} {what}" for what, number in report.kills.most_common())
    print(f"{args.program}, {args.ranks} ranks, ZeRO {args.zero_stage}: {args.kills} kills ({kills}), {report.starts} "
          f"starts, {report.runs} runs to the end, {len(report.differences)} differences")  # fmt: skip
    sys.exit("\n".join(report.differences) or 0)


def toy_command(program: str, folder: Path, ranks: int, zero_stage: int, max_steps: int) -> list[str]:
    """The command without --output_dir; trains first, briefly, the models that it starts from."""

    def words(name: str, flags: str) -> list[str]:
        return [str(PROGRAMS[name]), *flags.split()]

    rows = f"--per_device_train_batch_size {8 // ranks} --zero_stage {zero_stage}"
    steps = f"--max_steps {max_steps}"
    if program == E2E:
        stages = f"--actor-zero-stage {zero_stage} --reward-zero-stage {zero_stage} --num-ranks {ranks}"
        small = "--per_device_generation_batch_size 8 --per_device_training_batch_size 4 --allow_weak_reward_model"
        return [str(ROOT / "e2e_rlhf.py"), *f"{COMMON} {steps} {stages} {small}".split()]
    if program == "sft":
        return words("sft", f"{SUPERVISED} {rows} {steps} --model_name_or_path toy")
    Run(words("sft", f"{SUPERVISED} --max_steps 3 --model_name_or_path toy"), folder / "sft", 1).require_success()
    if program != "ppo":
        return words(program, f"{SUPERVISED} {rows} {steps} --model_name_or_path {folder / 'sft'}")
    reward = words("reward", f"{SUPERVISED} --max_steps 3 --model_name_or_path {folder / 'sft'}")
    Run(reward, folder / "reward", 1).require_success()
    models = f"--actor_model_name_or_path {folder / 'sft'} --critic_model_name_or_path {folder / 'reward'}"
    rows = f"--per_device_generation_batch_size {8 // ranks} --per_device_training_batch_size {4 // ranks}"
    stages = f"--actor_zero_stage {zero_stage} --critic_zero_stage {zero_stage}"
    return words("ppo", f"{PPO} {rows} {steps} {models} {stages}")


class Run:
    """A program on several ranks of this machine, its output in ``<output_dir>.log``. e2e_rlhf.py starts its own."""

    def __init__(self, command: list[str], output_dir: Path, ranks: int):
        self.output_dir, self.log = output_dir, output_dir.with_suffix(".log")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if command[0].endswith("e2e_rlhf.py"):
            env, ranks = os.environ | {"OMP_NUM_THREADS": "1"}, 1
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as log:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, *command, "--output_dir", str(output_dir)],
                    env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(ranks)
            ]

    def is_alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def require_success(self) -> "Run":
        for process in self.processes:
            process.wait()
        if any(process.returncode for process in self.processes):
            sys.exit(f"{self.output_dir} failed:\n{self.log.read_text(errors='replace')[-4000:]}")
        return self

    def kill(self) -> None:
        for pid in descendants([process.pid for process in self.processes]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def checkpoints(self) -> list[Path]:
        """The folders of them, of all stages."""
        return [*self.output_dir.glob("checkpoints"), *self.output_dir.glob("*/*/checkpoints")]

    def is_writing(self) -> bool:
        return any((folder / TEMPORARY).exists() for folder in self.checkpoints())

    def wait_until(self, is_so: Any) -> None:
        """Or until it has ended."""
        while self.is_alive() and not is_so():
            time.sleep(0.001)

    def has_data(self) -> bool:
        return b"data: " in self.log.read_bytes()


def descendants(pids: list[int]) -> list[int]:
    """These processes and all that they have started, from the top."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, rest = stat.read_text().split(" ", 1)
            parents[int(pid)] = int(rest.rpartition(") ")[2].split()[1])
    found = list(pids)
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def fuzz(command: list[str], folder: Path, kills: int, ranks: int, seed: int) -> Report:
    """Run ``command`` once undisturbed, then under fire until ``kills`` have hit; ``folder`` is for the outputs."""
    rng, report = random.Random(seed), Report()
    whole = Run(command, folder / "whole", ranks)
    whole.wait_until(whole.has_data)
    start = time.monotonic()
    whole.require_success()
    seconds, expected = time.monotonic() - start, results(folder / "whole")
    print(f"left alone: {seconds:.0f} s from the data to the end", flush=True)
    while sum(report.kills.values()) < kills:
        output_dir = folder / f"killed-{report.runs}"
        while True:
            report.starts += 1
            attempt = Run(command, output_dir, ranks)
            if sum(report.kills.values()) < kills:
                seconds = strike(attempt, seconds, rng, report)
            else:
                attempt.require_success()
            if all(process.returncode == 0 for process in attempt.processes):
                break
            if any(process.returncode > 0 for process in attempt.processes):
                attempt.require_success()
        found = results(output_dir)
        report.runs += 1
        report.differences += [
            f"{output_dir.name}: {name} differs"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        print(f"run {report.runs} ended, {len(report.differences)} differences so far", flush=True)
        shutil.rmtree(output_dir)
    return report


def strike(attempt: Run, seconds: float, rng: random.Random, report: Report) -> float:
    """Kill a run, unless it ends before. Returns how long a whole one lasts: ``seconds``, or less if this one did."""
    is_whole = not any(attempt.checkpoints())
    attempt.wait_until(attempt.has_data)
    start = time.monotonic()
    if sum(report.kills.values()) % 2:
        for _ in range(rng.randint(1, 3)):  # to get on, let some be written
            attempt.wait_until(attempt.is_writing)
            delay = time.monotonic() + rng.uniform(0.0, 0.03)
            attempt.wait_until(lambda delay=delay: time.monotonic() > delay)
    else:
        end = time.monotonic() + rng.uniform(0.0, seconds)
        attempt.wait_until(lambda: time.monotonic() > end)
    if not attempt.is_alive():
        return min(seconds, time.monotonic() - start) if is_whole else seconds
    attempt.kill()
    if all(process.returncode == 0 for process in attempt.processes):
        return seconds
    if attempt.is_writing():
        what = "while a checkpoint was written"
    elif any(map(list_checkpoints, attempt.checkpoints())):
        what = "after a checkpoint"
    else:
        what = "before the first checkpoint of a stage"
    report.kills[what] += 1
    return seconds


def results(directory: Path) -> dict[str, Any]:
    """What has to be equal, by name."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*.safetensors")):
        if "checkpoints" not in path.parts:
            found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(directory.rglob("metrics.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        name = path.relative_to(directory)
        found |= {f"{name}:{number}": timeless(json.loads(line)) for number, line in enumerate(lines, 1)}
    for path in sorted(directory.rglob("run.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        found[str(path.relative_to(directory))] = timeless(metrics)
    for path in sorted(directory.glob("summary.json")):
        found["summary.json"] = timeless(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(directory.rglob("samples.jsonl")):
        found[str(path.relative_to(directory))] = path.read_text(encoding="utf-8")
    return found


def timeless(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock or the memory says, inside of its dictionaries too."""
    kept = {name: value for name, value in metrics.items() if not name.startswith(CLOCKS)}
    return {name: timeless(value) if isinstance(value, dict) else value for name, value in kept.items()}


if __name__ == "__main__":
    main()
