"""Do the tests of the mathematics see a fault? Each of these, alone in a copy of the code, must turn one red.

    python benchmarks/mutants.py --jobs 2        all of them, minutes
    python benchmarks/mutants.py --only 12 40    the ones with these numbers

A fault, of those in `faults.py`, is (file of dschat/functional/, text that occurs once in it, what replaces it). Exit
code 1 if one survives, if one breaks the import (which proves nothing), or if the code without a fault is not green.
The repository itself is not written to.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import pytest

ROOT = Path(__file__).parents[1]
Fault = tuple[str, str, str]
# Every run is a fresh process, forked from one that has loaded what takes seconds (but nothing of dschat).
SERVER = multiprocessing.get_context("forkserver")

FAULTS: list[Fault] = [(file, old, new) for file, pairs in faults.FAULTS.items() for old, new in pairs]


def check_faults(all_faults: Iterable[Fault]) -> None:
    """Every text occurs exactly once, so that a fault is what its author meant when the code has moved on."""
    for file, old, new in all_faults:
        count = (ROOT / "dschat" / "functional" / file).read_text(encoding="utf-8").count(old)
        if count != 1 or old == new:
            raise SystemExit(f"{file}: {old!r} occurs {count} times, must occur once and change")


def pytest_in(folder: str, tests: list[str], log: str) -> None:
    """The whole life of one process: pytest in `folder`, whose dschat is found first; ends with pytest's exit code."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.exit(int(pytest.main(["-x", "-q", *tests])))


def run_tests(fault: Fault | None) -> tuple[str, str]:
    """The tests of dschat/functional/ in a fresh copy of the code: the verdict, and the first test that failed."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        copy = Path(folder)
        for name in ("dschat", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        stem = ""
        if fault:
            file, old, new = fault
            target = copy / "dschat" / "functional" / file
            target.write_text(target.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
            stem = target.stem
        tests = [str(path.relative_to(copy)) for path in sorted((copy / "tests").glob("test_functional_*.py"))]
        tests.sort(key=lambda name: not name.endswith(f"_{stem}.py"))  # the nearest first: they fail soonest
        log = copy / "pytest.log"
        process = SERVER.Process(target=pytest_in, args=(folder, tests, str(log)))
        process.start()
        process.join()
        output = log.read_text(encoding="utf-8")
    failed = re.search(r"^FAILED tests/(\S+)", output, re.MULTILINE)
    verdicts: dict[int | None, str] = {0: "SURVIVED", 1: "red"}
    verdict = verdicts.get(process.exitcode, f"BROKEN ({process.exitcode})")
    return verdict, failed[1] if failed else output if verdict != "SURVIVED" else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the faults to make; default all")
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at the same time")
    args = parser.parse_args()
    check_faults(FAULTS)
    numbers = args.only or range(1, len(FAULTS) + 1)
    if not all(1 <= n <= len(FAULTS) for n in numbers):
        parser.error(f"--only takes numbers from 1 to {len(FAULTS)}")

    os.environ["OMP_NUM_THREADS"] = "1"
    SERVER.set_forkserver_preload(["torch", "hypothesis"])
    verdict, detail = run_tests(None)
    if verdict != "SURVIVED":
        print(f"the code without a fault is not green: {detail}")
        return 1
    num_red = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(run_tests, (FAULTS[n - 1] for n in numbers))
        for n, (verdict, detail) in zip(numbers, results, strict=True):
            file, old, new = (" ".join(text.split()) for text in FAULTS[n - 1])
            num_red += verdict == "red"
            print(f"{n:4} {verdict:9} {file}: {old}  ->  {new}\n{'':15}{detail}", flush=True)
    print(f"{num_red} of {len(numbers)} faults are red")
    return 0 if num_red == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
