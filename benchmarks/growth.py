"""How the time of a PPO step grows: with the answers, their length, the models, the ranks. A picture and a table.

    python benchmarks/growth.py --dtype fp32 --picture docs/pictures/growth.png
    python benchmarks/growth.py --sizes 125m 1.3b 7b --dtype bf16                       on a GPU

One of them changes, the others stay: 16 answers of 64 tokens to prompts of 64, 4 layers x 256, by step3.py. Ranks have
a thread each and run the program of step 3 on the embedded task, at every ZeRO stage of actor and critic, with as many
answers in all: on one machine two ranks can at best halve the time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dschat.errors import UserError, run_program

from harness import parser, report
from plan import run_ranks
from programs import ROOT
from shapes import SIZES
from start_up import stage_arguments

PHASES = ("rollout", "score", "train")
COLOURS = ("#0072B2", "#D55E00", "#009E73")
SKIPPED_STEPS = 2  # of a program: the first ones make what later ones reuse
Seconds = dict[str, float]  # of each phase


def random_step(changes: dict[str, Any], dtype: str, repeats: int) -> Seconds:
    """Medians of step3.py's turns."""
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        path = Path(folder, "found.json")
        flags = {"dtype": dtype, "repeats": repeats, "warmup": 1, "old_logprobs": "sampler", "json": path} | changes
        words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks/step3.py"), *words], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"step3.py {' '.join(words)} failed: {done.stderr[-2000:]}")
        turns = json.loads(path.read_text(encoding="utf-8"))["turns"]["dschat"]
    return {phase: statistics.median(facts[f"{phase}_s"] for facts in turns) for phase in PHASES}


def steps_on_ranks(folder: Path, repeats: int, dtype: str) -> Iterator[tuple[str, Seconds]]:
    """(ranks and ZeRO stage, medians of the steps of step 3's program), with 16 answers in all."""
    os.environ["OMP_NUM_THREADS"] = "1"

    def run(stage: str, num_steps: int, num_ranks: int, words: list[str]) -> None:
        path, *flags = stage_arguments(stage, folder, num_steps)
        run_ranks([sys.executable, str(ROOT / path), *flags, *words], num_ranks, folder)

    for stage in ("sft", "reward"):
        run(stage, 1, 1, ["--output_dir", str(folder / stage)])
    for num_ranks, zero_stage in ((1, 0), *((2, stage) for stage in range(4))):
        name = f"{num_ranks} rank{'s' * (num_ranks > 1)}, ZeRO {zero_stage}"
        sizes = ("per_device_generation_batch_size", "per_device_training_batch_size")
        flags: dict[str, Any] = dict.fromkeys(sizes, 16 // num_ranks)
        flags |= {"actor_zero_stage": zero_stage, "critic_zero_stage": zero_stage, "dtype": dtype}
        flags["output_dir"] = folder / name.replace(" ", "-")
        words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        run("ppo", SKIPPED_STEPS + repeats, num_ranks, words)
        lines = map(json.loads, (flags["output_dir"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        steps = [line for line in lines if "time/rollout_s" in line][SKIPPED_STEPS:]
        yield name, {phase: statistics.median(line[f"time/{phase}_s"] for line in steps) for phase in PHASES}


def draw(path: Path, found: dict[str, dict[str, Seconds]]) -> None:
    """A panel for each thing that grows; numbers on logarithmic axes, on which twice the work is one slope."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(3.4 * len(found), 3.3), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        is_number = all(label.isdigit() for label in points)
        for colour, phase in zip(COLOURS, PHASES, strict=True):
            heights = [seconds[phase] for seconds in points.values()]
            if is_number:
                axes.loglog([float(label) for label in points], heights, "o-", color=colour, markersize=4, label=phase)
                continue
            below = [sum(seconds[p] for p in PHASES[: PHASES.index(phase)]) for seconds in points.values()]
            axes.bar(range(len(points)), heights, bottom=below, color=colour, label=phase)
        if is_number:
            axes.set_xticks([float(label) for label in points], list(points))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.minorticks_off()
        else:
            axes.set_xticks(range(len(points)), [label.replace(", ", "\n") for label in points], fontsize=7)
        axes.set_xlabel(name)
        axes.set_ylabel("seconds of a step")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    made.add_argument("--repeats", type=int, default=5, help="measured steps of each point")
    made.add_argument("--answers", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    made.add_argument("--lengths", nargs="+", type=int, default=[16, 32, 64, 128, 256], help="tokens of an answer")
    made.add_argument("--sizes", nargs="+", default=["tiny", "125m", "350m"], choices=tuple(SIZES))
    made.add_argument("--no_ranks", action="store_true", help="leave the ranks out")
    made.add_argument("--picture", type=Path, help="draw it here, as PNG or SVG by the name")
    args = made.parse_args()
    found: dict[str, dict[str, Seconds]] = {"answers": {}, "tokens of an answer": {}, "model": {}}
    for number in args.answers:
        found["answers"][str(number)] = random_step({"batch": number}, args.dtype, args.repeats)
    for number in args.lengths:
        found["tokens of an answer"][str(number)] = random_step({"response": number}, args.dtype, args.repeats)
    for size in args.sizes:
        found["model"][size] = random_step({"size": size, "micro_batch": 4}, args.dtype, min(2, args.repeats))
    if not args.no_ranks:
        with tempfile.TemporaryDirectory(prefix="growth-") as folder:
            found["ranks"] = dict(steps_on_ranks(Path(folder), args.repeats, args.dtype))
    rows = [
        [what, label, *(f"{1000 * seconds[phase]:.0f}" for phase in PHASES), f"{1000 * sum(seconds.values()):.0f}"]
        for what, points in found.items()
        for label, seconds in points.items()
    ]
    report(args, None, ["what grows", "", *(f"{phase}, ms" for phase in PHASES), "step, ms"], rows, found=found)
    if args.picture:
        draw(args.picture, found)


if __name__ == "__main__":
    run_program(main)
