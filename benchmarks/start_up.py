"""From the command to what was asked for: help, a report, an answer of the chat, the first step of each stage.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --only chat ppo --repeats 5 --versus ../another-checkout

Models, data cache and a run to report on are made first, by runs of one step on the embedded task. The CPU's seconds,
user and system, stand beside those of the clock: a neighbour on the machine changes them less. The first step of a
stage is there when metrics.jsonl has its line; --max_eval_samples and --preflight off leave out what is no start-up.
`--versus` takes turns with another checkout of this repository.
"""

import argparse
import json
import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from dschat.errors import UserError, run_program

from harness import parser, report
from programs import PROGRAMS, ROOT

HELP = ["chat.py", "e2e_rlhf.py", *(str(path.relative_to(ROOT)) for path in PROGRAMS.values())]
TIMEOUT_S = 300.0
Cost = tuple[float, float]  # seconds of the clock, of the CPU


def start(root: Path, arguments: list[str], **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(root), "PROMPT_TOOLKIT_NO_CPR": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=root, env=environment, **options)


def cost(process: subprocess.Popen, begin: float, seconds: float | None = None) -> Cost:
    """Of a process, when it has ended; ``seconds``: when it had got as far as it was to."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - begin if seconds is None else seconds
    return took, usage.ru_utime + usage.ru_stime


def last_words(said: IO[bytes]) -> str:
    said.seek(0)
    return " ".join(said.read().decode().split())[-300:]


def whole(root: Path, arguments: list[str], text: str = "") -> Cost:
    """Of a command, from its start to its end."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = start(root, arguments, stdin=subprocess.PIPE, stdout=said, stderr=said)
        process.stdin.write(text.encode())
        process.stdin.close()
        found = cost(process, begin)
        if process.returncode:
            raise UserError(f"{' '.join(arguments)} failed: {last_words(said)}")
    return found


def prompt(root: Path, path: Path) -> Cost:
    """Of the chat in a terminal, from its start to "you>"."""
    begin = time.perf_counter()
    terminal, inner = pty.openpty()
    process = start(root, ["chat.py", "--path", str(path)], stdin=inner, stdout=inner, stderr=inner)
    os.close(inner)
    seen = b""
    while b"you>" not in seen:
        if not select.select([terminal], [], [], TIMEOUT_S)[0]:
            raise UserError(f"the chat shows no prompt: {seen[-300:]!r}")
        seen += os.read(terminal, 4096)
    seconds = time.perf_counter() - begin
    process.kill()
    found = cost(process, begin, seconds)
    os.close(terminal)
    return found


def first_step(root: Path, arguments: list[str], folder: Path) -> Cost:
    """Of a stage, from its start to the line of its first step; then it is killed."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = start(root, [*arguments, "--output_dir", str(folder)], stdout=said, stderr=said)
        lines = folder / "metrics.jsonl"
        while not (lines.is_file() and '"lr"' in lines.read_text(encoding="utf-8")):
            if process.poll() is not None or time.perf_counter() - begin > TIMEOUT_S:
                raise UserError(f"{' '.join(arguments)} made no step: {last_words(said)}")
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        process.kill()
        return cost(process, begin, seconds)


def stage_arguments(stage: str, folder: Path, num_steps: int) -> list[str]:
    """Of a run of few rows; the models are those that `make` has made."""
    given: dict[str, object] = {"data_path": "toy", "data_output_path": folder / "cache", "max_eval_samples": 8}
    given |= {"max_steps": num_steps}
    if stage == "ppo":
        given |= {"actor_model_name_or_path": folder / "sft", "critic_model_name_or_path": folder / "reward"}
        given |= {"per_device_generation_batch_size": 8, "per_device_training_batch_size": 8, "preflight": "off"}
        given |= {"max_prompt_seq_len": 48, "max_answer_seq_len": 40, "max_preference_pairs": 8}
    else:
        given |= {"model_name_or_path": "toy" if stage == "sft" else folder / "sft", "max_seq_len": 128}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    more = ["--allow_weak_reward_model"] if stage == "ppo" else []
    return [str(PROGRAMS[stage].relative_to(ROOT)), *flags, *more]


def commands(folder: Path) -> dict[str, Callable[[Path, int], Cost]]:
    """What is measured, by name; each takes the checkout and a number that no other turn has."""
    sft = folder / "sft"
    found: dict[str, Callable[[Path, int], Cost]] = {}
    for program in HELP:
        found[f"help: {program}"] = lambda root, _, program=program: whole(root, [program, "--help"])
    found["report"] = lambda root, _: whole(root, ["-m", "dschat.report", str(folder / "ppo")])
    ask = ["chat.py", "--path", str(sft), "--max_new_tokens", "20"]
    found["chat: a message through a pipe"] = lambda root, _: whole(root, ask, "What is the capital of France?\n")
    found["chat: the prompt in a terminal"] = lambda root, _: prompt(root, sft)
    for stage in PROGRAMS:
        found[f"first step: {stage}"] = lambda root, turn, stage=stage: first_step(
            root, stage_arguments(stage, folder, 100), folder / f"{stage}-{turn}"
        )
    return found


def main() -> None:
    made: argparse.ArgumentParser = parser(__doc__)
    made.add_argument("--repeats", type=int, default=3, help="measured turns of each command")
    made.add_argument("--only", nargs="+", default=[], help="commands with one of these words in their names")
    made.add_argument("--versus", type=Path, help="another checkout, which takes turns with this one")
    args = made.parse_args()
    roots = {"here": ROOT} | ({"there": args.versus.resolve()} if args.versus else {})
    with tempfile.TemporaryDirectory(prefix="start-up-") as name:
        folder = Path(name)
        for stage in PROGRAMS:
            whole(ROOT, [*stage_arguments(stage, folder, 1), "--output_dir", str(folder / stage)])
        chosen = {n: c for n, c in commands(folder).items() if not args.only or any(word in n for word in args.only)}
        turns: dict[tuple[str, str], list[Cost]] = {(n, side): [] for n in chosen for side in roots}
        for turn in range(args.repeats + 1):  # the first reads the files from the disk and does not count
            for n, command in chosen.items():
                for side, root in roots.items():
                    found = command(root, 2 * turn + list(roots).index(side))
                    if turn:
                        turns[n, side].append(found)
    rows = []
    for (n, side), found in turns.items():
        seconds, cpu = zip(*found, strict=True)
        rows.append([n, side, f"{statistics.median(seconds):.2f}", f"{statistics.median(cpu):.2f}"])
        rows[-1] += [f"{min(seconds):.2f} to {max(seconds):.2f}"]
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")
    measured = [{"command": n, "side": side, "turns": found} for (n, side), found in turns.items()]
    report(
        args,
        None,
        ["command", "checkout", "seconds", "CPU seconds", "from, to"],
        rows,
        turns=json.loads(json.dumps(measured)),
    )


if __name__ == "__main__":
    run_program(main)
