"""--dry_run and --calibrate: what a run takes of memory, disk and time, before it is started."""

import json
import os
import resource
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dschat.engine.distributed import quiet_libraries
from dschat.engine.memory_plan import Plan, find_machine
from dschat.engine.workload import Changes, PlanRequest, Workload
from dschat.errors import UserError
from dschat.models.plan import make_plan
from dschat.report.progress import table

import torch

LINE = (64, 128)  # two values of a flag that counts rows: large, so that rows outweigh what does not grow with them
DOES_NOT_FIT = 3  # exit code of a plan that cannot work
Planned = Callable[[Changes], Workload]  # what the run would do with these flags changed


def plan_run(request: PlanRequest, main: Callable[[list[str]], None], argv: list[str] | None) -> None:
    """Print what the run needs; before that, with --calibrate, make its first steps.

    Raises:
        SystemExit: with `DOES_NOT_FIT`, where it cannot work.
    """
    times = calibrate(request, main, sys.argv[1:] if argv is None else argv) if request.num_steps else []
    quiet_libraries()
    is_main = os.environ.get("RANK", "0") == "0"
    plan = make_plan(request.planned({}), find_machine(request.plan_for))
    if is_main:
        lines = plan_lines(plan, request.planned, request.batch_flags, request.changes)
        text = [f"plan of {plan.title} on {plan.machine.name}", "", plan_table(plan), "", *lines, *times]
        print(*text, sep="\n", flush=True)
    if plan.missing > 0 and not times:
        sys.exit(DOES_NOT_FIT)


def calibrate(request: PlanRequest, main: Callable[[list[str]], None], argv: list[str]) -> list[str]:
    """Run the first steps in a directory of their own, which goes again; what they took, and what the whole will."""
    folder = Path(request.output_dir).with_name(f"{Path(request.output_dir).name}.calibration")
    if folder.exists() and "RANK" not in os.environ:
        raise UserError(f"{folder} is in the way of --calibrate: remove it")
    steps = ["--max_steps", str(request.num_steps), "--log_interval", "1", "--checkpoint_interval", "0"]
    plain = ["--no-dry_run", "--calibrate", "0", "--no-fresh", "--resume", "auto", "--output_dir", str(folder)]
    try:
        main([*argv, *steps, *plain])
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        num_rows = json.loads((folder / "run.json").read_text(encoding="utf-8"))["data"]["train"]
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
    return time_lines(
        lines, request.count_steps(num_rows, int(os.environ.get("WORLD_SIZE", 1))), request.eval_interval
    )


def time_lines(lines: list[dict], num_steps: int, eval_interval: int) -> list[str]:
    """From metrics.jsonl of a few steps to the time of all. The first step, which also warms up, counts only alone."""
    trained = [line["time"] for line in lines if "lr" in line]
    start, end = (line["time"] for line in (lines[0], lines[-1]))
    between = [later - earlier for earlier, later in zip([start, *trained], trained, strict=False)]
    seconds = statistics.mean(between[1:] or between)
    num_evaluations = 2 + (max(0, num_steps - 1) // eval_interval if eval_interval else 0)
    evaluation = end - trained[-1]
    total = num_steps * seconds + num_evaluations * evaluation
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_reserved()
    each = f"a step {seconds:.2f} s, the first {between[0]:.2f} s, an evaluation {evaluation:.2f} s"
    return [
        f"measured in {len(between)} steps: {each}; peak {gb(peak)} GB",
        f"time: {num_steps} steps and {num_evaluations} evaluations like these take {total / 3600:.2f} hours",
    ]


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f}"


def plan_table(plan: Plan) -> str:
    """Two tables of a rank's memory: what each model holds all the time, what each phase adds; in GB."""
    machine = plan.machine
    resting = [model.resting(machine) for model in plan.models]
    kinds = list(dict.fromkeys(kind for held in resting for kind in held))
    rows = []
    for model, held in zip(plan.models, resting, strict=True):
        size = f"{model.num_weights / 1e6:,.1f}"
        trained = f"{model.num_trained / model.num_weights:.1%}" if model.num_trained else "frozen"
        numbers = [gb(held[kind]) if held[kind] else "" for kind in kinds]
        rows.append([f"{model.role}: {model.name}", size, trained, str(model.zero_stage), *numbers, gb(held.total())])
    held_table = table(["GB of a rank, all the time", "M weights", "trained", "ZeRO", *kinds, "total"], rows)
    extras = list(dict.fromkeys(kind for phase in plan.phases for kind in phase.extra))
    rows = [
        [phase.name, *(gb(phase.extra[kind]) if phase.extra.get(kind) else "" for kind in extras)]
        + [gb(plan.bytes_of(phase))]
        for phase in plan.phases
    ]
    return held_table + "\n\n" + table(["GB more while it", *extras, "all together"], rows)


def plan_lines(plan: Plan, planned: Planned, batch_flags: Mapping[str, int], changes: Sequence[Changes]) -> list[str]:
    """What follows from a plan: whether it fits, the largest micro-batch, or what would help most; disk."""
    machine = plan.machine
    memory = "memory" if machine.on_cpu else "GPU memory"
    where = f"in '{plan.fullest.name}'; libraries {gb(machine.libraries)}"
    where += f", kept of freed activations {gb(plan.kept)}" if plan.kept else ""
    peak = f"peak of a rank: {gb(plan.peak)} GB, of {gb(machine.free)} GB free {memory}, {where}"
    lines = [peak]
    if machine.on_cpu and sum(model.num_trained > 0 for model in plan.models) > 1:
        lines.append("with two trained models, runs on a CPU took up to 22 % more than planned (docs/scaling.md)")
    if plan.on_host:
        lines.append(f"offloaded: {gb(plan.on_host)} GB of a rank, of {gb(machine.host_free)} GB free in the host")
    lines.append(f"disk: {gb(plan.disk)} GB, the checkpoints while it runs and the models at the end")
    if plan.missing <= 0:
        lines.append(f"it fits; {largest_batch(plan, planned, batch_flags)}")
        return lines
    lines.append(f"IT DOES NOT FIT: {gb(plan.missing)} GB too much on every rank")
    lines.append(best_change(plan, planned, changes))
    return lines


def largest_batch(plan: Plan, planned: Planned, flags: Mapping[str, int]) -> str:
    """The largest value of each of ``flags``, by itself, that fits: what a phase takes is linear in its rows, of which
    each makes so many units of the flag."""
    found = []
    for flag, unit in flags.items():
        low, high = (make_plan(planned({flag: rows * unit}), plan.machine) for rows in LINE)
        limits = []
        for one, two in zip(low.phases, high.phases, strict=True):
            start, end = low.bytes_of(one), high.bytes_of(two)
            if end > start:
                limits.append(LINE[0] + int((plan.machine.free - start) * (LINE[1] - LINE[0]) // (end - start)))
        found.append(f"--{flag} {max(1, min(limits)) * unit}" if limits else f"--{flag}, which may be any")
    return f"the largest that would: {' or '.join(found)}"


def best_change(plan: Plan, planned: Planned, changes: Sequence[Changes]) -> str:
    """Which of ``changes`` saves most, and whether it is enough."""
    plans = []
    for change in changes:
        try:
            plans.append((make_plan(planned(change), plan.machine), change))
        except UserError:  # goes with no other flag of this run
            continue
    plans = [(other, change) for other, change in plans if other.missing < plan.missing]
    if not plans:
        return "no single change of flags helps: give it more devices (--plan_for tells how many), or a smaller model"
    other, change = min(plans, key=lambda item: item[0].missing)
    words = " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in change.items())
    saved = f"what would help most: {words}, which leaves a peak of {gb(other.peak)} GB"
    return saved + (": it fits" if other.missing <= 0 else f", still {gb(other.missing)} GB too much")
