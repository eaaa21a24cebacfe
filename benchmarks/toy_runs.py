"""Runs of the embedded task by its recipes, for the benchmarks: what is there already is not run again."""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from programs import ROOT


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


def train_all(doc: str, programs: dict[str, tuple[str, str]], name: str) -> tuple[Path, list[int], list[str]]:
    """Read the command line and make every run: steps 1 and 2 for each seed, then for each seed and each name its
    program below training/ with its flags (`train`). Returns the output folder, the seeds and the names asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", help="names, with semicolons between them", default=";".join(programs))
    parser.add_argument("--output-dir", type=Path, default=Path("output") / name)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time, a thread each")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(";")]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: prepare(args.output_dir, seed, 1), args.seeds))
        runs = [(seed, name) for name in names for seed in args.seeds]
        list(pool.map(lambda pair: train(args.output_dir, *pair, *programs[pair[1]], 1), runs))
    return args.output_dir, args.seeds, names


def folder(name: str) -> str:
    """The name of a run as that of its folder."""
    return name.replace(", ", "-").replace(" ", "-")


def train(output: Path, seed: int, name: str, program: str, flags: str, threads: int) -> None:
    """``<output>/seed<n>/<name>``: a recipe or a main.py, below training/, from the models of `prepare`."""
    base, target = output / f"seed{seed}", output / f"seed{seed}" / folder(name)
    if not (target / "run.json").is_file():
        models = ["--model_name_or_path", str(base / "actor-models/toy")]
        if program.startswith("step3"):
            models = ["--actor_model_name_or_path", str(base / "actor-models/toy")]
            models += ["--critic_model_name_or_path", str(base / "reward-models/toy")]
        command = [sys.executable if program.endswith(".py") else "bash", str(ROOT / "training" / program), *models]
        command += ["--data_path", "toy", "--seed", str(seed), "--output_dir", str(target)]
        run([*command, *flags.split()], target.with_suffix(".log"), threads)
