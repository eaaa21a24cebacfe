"""How a program ends, alone and as one of several ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import atexit
import gc
from dschat.errors import UserError, run_program

class Last:
    def __init__(self):
        self.itself = self

    def __del__(self):
        print("finalized")

atexit.register(lambda: print("left"))

def main():
    gc.set_threshold(0)  # what is found is found at the end
    Last()
    print("worked", end=" ")  # without a newline it stays in the buffer
    if {fails}:
        raise {fails}

run_program(main)
"""


@pytest.mark.parametrize(
    ("fails", "code"), [("None", 0), ("UserError('mend it')", 2), ("KeyboardInterrupt()", 130), ("KeyError('x')", 1)]
)
@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_rank_leaves_out_the_end_of_the_interpreter_and_nothing_else(world_size, fails, code):
    env = os.environ | {"WORLD_SIZE": world_size}
    program = [sys.executable, "-c", PROGRAM.format(fails=fails)]
    done = subprocess.run(program, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.split() == ["worked", "left"] + (["finalized"] if world_size == "1" else [])
    assert ("mend it" in done.stderr) == (code == 2)


def test_after_a_part_that_succeeds_the_program_goes_on_without_the_collector_of_cycles_until_it_runs():
    for part, code, said in (("lambda: 3", 0, "False True"), ("lambda: int('x')", 1, "")):
        program = f"""
import gc
from dschat.errors import run_before_imports, run_program
run_before_imports({part})
print(gc.isenabled(), end=" ")
run_program(lambda: print(gc.isenabled()))
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (code, said)
