"""A rank of a job that goes wrong: `python -m tests.rank_driver RANK FAULT STALL_TIMEOUT`; that rank has the fault."""

import os
import signal
import subprocess
import sys
import time

from dschat.engine.distributed import all_reduce_sum, init_runtime, main_process_first
from dschat.errors import UserError, run_program

import torch


def spin_somewhere() -> None:
    while True:
        time.sleep(0.1)


def main() -> None:
    number, fault, timeout = [word for word in sys.argv[1:] if not word.startswith("--local")]
    runtime = init_runtime(0, float(timeout))
    os.write(1, f"pid {os.getpid()}\n".encode())  # in one piece, which two ranks that print at once leave whole
    for step in range(12):
        if step == 5 and runtime.rank == int(number):
            if fault == "user":
                raise UserError("bad.jsonl:3: mend it")
            if fault == "crash":
                raise RuntimeError("boom")
            if fault == "spin":
                spin_somewhere()
            if fault in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), signal.Signals[fault])
        if fault == "patience" and step == 5:
            with main_process_first(runtime):
                time.sleep(1.6 * float(timeout) if runtime.is_main else 0)
        if fault == "patience" and step == 8:  # the whole job is stopped and goes on later
            subprocess.Popen(["sh", "-c", f"sleep {1.3 * float(timeout)}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        total = all_reduce_sum(torch.ones(1), runtime)
        time.sleep(0.05)
    print(f"rank {runtime.rank} is done, {total.item():.0f}", flush=True)


if __name__ == "__main__":
    run_program(main)
