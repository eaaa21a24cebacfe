"""Runs of the embedded task by its recipes, for the benchmarks: what is there already is not run again."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str], log: Path, threads: int) -> None:
    """One program; its output goes to ``log``, which the error names when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env).returncode
    if code:
        sys.exit(f"{' '.join(command)} failed; see {log}")


def prepare(output: Path, seed: int, threads: int) -> None:
    """The models of steps 1 and 2: ``<output>/seed<n>/actor-models/toy`` and ``reward-models/toy``."""
    base = output / f"seed{seed}"
    if not (base / "reward-models/toy/run.json").is_file():
        command = [sys.executable, str(ROOT / "e2e_rlhf.py"), "--step", "1", "2", "--seed", str(seed)]
        run([*command, "--output-dir", str(base)], base / "steps12.log", threads)


def train(output: Path, seed: int, name: str, program: str, flags: str, threads: int) -> Path:
    """``<output>/seed<n>/<name>``: a recipe or a main.py, below training/, from the models of `prepare`."""
    base, target = output / f"seed{seed}", output / f"seed{seed}" / name
    if not (target / "run.json").is_file():
        models = ["--model_name_or_path", str(base / "actor-models/toy")]
        if program.startswith("step3"):
            models = ["--actor_model_name_or_path", str(base / "actor-models/toy")]
            models += ["--critic_model_name_or_path", str(base / "reward-models/toy")]
        command = [sys.executable if program.endswith(".py") else "bash", str(ROOT / "training" / program), *models]
        command += ["--data_path", "toy", "--seed", str(seed), "--output_dir", str(target)]
        run([*command, *flags.split()], target.with_suffix(".log"), threads)
    return target
