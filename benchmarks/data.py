"""Tokenising a large file: seconds, MB/s and peak memory, by the number of workers; then again, from the cache.

    python benchmarks/data.py                                  32 MB, 1 and 2 workers
    python benchmarks/data.py --megabytes 1000 --json data.json

The file is made up: dialogues of one to four turns in the shape of HH-RLHF, chosen and rejected, of words as frequent
as those of a language. Reading makes the table of examples; tokenising makes its rows of token ids. Each run is a
process of its own. Memory counts the process and its workers, sampled twenty times a second; private leaves out what
they share and what is mapped from files, which the system takes back when it needs it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from dschat.data.prepare import KINDS, DataSpec, load_rows
from dschat.data.sources import load_stage_data
from dschat.data.tokenizer import load_tokenizer, train_tokenizer
from dschat.errors import UserError, run_program

import psutil
from harness import parser, report

HEADER = ["run", "seconds", "reading", "tokenising", "MB/s", "rows", "peak MB", "private MB"]
INTERVAL_S = 0.05


def write_dialogues(path: Path, megabytes: float, seed: int) -> None:
    """A .jsonl file of at least ``megabytes``; the same seed makes the same bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]  # Zipf
    drawn = iter(())

    def text(num_words: int) -> str:
        nonlocal drawn
        taken = [word for _, word in zip(range(num_words), drawn, strict=False)]
        if len(taken) < num_words:
            drawn = iter(rng.choices(words, weights, k=100_000))
            taken += [word for _, word in zip(range(num_words - len(taken)), drawn, strict=False)]
        return " ".join(taken)

    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            turns = [f"\n\nHuman: {text(rng.randint(4, 40))}\n\nAssistant: " for _ in range(rng.randint(1, 4))]
            prompt = turns[0] + "".join(text(rng.randint(4, 80)) + turn for turn in turns[1:])
            record = {name: prompt + text(rng.randint(4, 80)) for name in ("chosen", "rejected")}
            written += file.write(json.dumps(record) + "\n")


def measure(spec: DataSpec, kind: str, tokenizer_path: str, max_len: int) -> dict[str, float]:
    """In this process: seconds of the parts, rows, and the most memory of the process and its workers."""
    tokenizer = load_tokenizer(tokenizer_path)
    peaks, done = {"rss": 0, "private": 0}, threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, done))
    watcher.start()
    times = [time.perf_counter()]
    load_stage_data(
        spec.data_path, (), KINDS[kind][0], spec.data_split, spec.eval_fraction, spec.seed, spec.cache_dir, False
    )
    times.append(time.perf_counter())
    rows = load_rows(spec, kind, tokenizer, max_len)
    times.append(time.perf_counter())
    done.set()
    watcher.join()
    parts = {"reading": times[1] - times[0], "tokenising": times[2] - times[1], "rows": len(rows.train)}
    return parts | {f"{name}_mb": value / 1e6 for name, value in peaks.items()}


def watch(peaks: dict[str, int], done: threading.Event) -> None:
    """Keep the largest sums over the process and its workers in ``peaks``, until ``done``."""
    own = psutil.Process()
    finished = False
    while not finished:
        finished = done.wait(INTERVAL_S)  # then once more
        sums = dict.fromkeys(peaks, 0)
        for process in [own, *own.children(recursive=True)]:
            try:
                memory = process.memory_info()
            except psutil.NoSuchProcess:
                continue
            sums["rss"] += memory.rss
            sums["private"] += memory.rss - memory.shared
        for name, value in sums.items():
            peaks[name] = max(peaks[name], value)


def run(spec: DataSpec, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """`measure` in a fresh process."""
    given = {"spec": vars(spec), "kind": args.kind, "path": str(folder / "tokenizer"), "max_len": args.max_seq_len}
    command = [sys.executable, __file__, "--worker", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"a run failed: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        given = json.loads(sys.argv[2])
        spec = DataSpec(**given["spec"])
        print(json.dumps(measure(spec, given["kind"], given["path"], given["max_len"])))
        return
    made = parser(__doc__)
    made.add_argument("--megabytes", type=float, default=32.0, help="size of the file")
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes that tokenise")
    made.add_argument("--kind", default="sft", choices=tuple(KINDS), help="of rows")
    made.add_argument("--max_seq_len", type=int, default=512)
    args = made.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        folder = Path(name)
        write_dialogues(folder / "made.jsonl", args.megabytes, args.seed)
        megabytes = (folder / "made.jsonl").stat().st_size / 1e6
        with open(folder / "made.jsonl", encoding="utf-8") as file:
            train_tokenizer((line for _, line in zip(range(2000), file, strict=False)), 4096).save_pretrained(
                folder / "tokenizer"
            )
        split = {"sft": "1,0,0", "prompt": "0,0,1"}.get(KINDS[args.kind][0], "0,1,0")
        spec = DataSpec((str(folder / "made.jsonl"),), (), split, 0.01, 0, "", False, 1, 0)
        measured = {}
        for workers in args.workers:
            cache = replace(spec, cache_dir=str(folder / f"cache{workers}"), num_workers=workers)
            measured[f"{workers} workers"] = run(cache, args, folder)
            measured[f"{workers} workers, again"] = run(cache, args, folder)
    rows = []
    for name, found in measured.items():
        seconds = found["reading"] + found["tokenising"]
        numbers = [seconds, found["reading"], found["tokenising"], megabytes / seconds]
        rest = [f"{found['rows']:.0f}", f"{found['rss_mb']:.0f}", f"{found['private_mb']:.0f}"]
        rows.append([name, *(f"{number:.1f}" for number in numbers), *rest])
    report(args, None, HEADER, rows, runs=measured, megabytes=megabytes)


if __name__ == "__main__":
    run_program(main)
