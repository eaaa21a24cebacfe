"""Imports point one way (CONTRIBUTING.md)."""

import ast
import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

import pytest

BASE = {"dschat", "dschat.errors", "dschat.config", "dschat.remote_code"}
# room -> the rooms of this project that it may import
ALLOWED = {
    "dschat.functional": set(),
    "dschat.report": BASE,
    "dschat.data": BASE | {"dschat.functional"},
    "dschat.engine": BASE | {"dschat.functional"},
    "dschat.models": BASE | {"dschat.functional", "dschat.data", "dschat.engine", "dschat.report"},
    "dschat.flag_checks": BASE,
    "dschat.flags": BASE | {"dschat.flag_checks", "dschat.data", "dschat.engine"},
    "dschat.rlhf": BASE
    | {
        "dschat.functional",
        "dschat.data",
        "dschat.engine",
        "dschat.models",
        "dschat.report",
        "dschat.flags",
        "dschat.flag_checks",
    },
    "dschat.planning": BASE | {"dschat.engine", "dschat.models", "dschat.report"},
    "dschat": set(),
    "dschat.errors": set(),
    "dschat.remote_code": {"dschat.errors"},
    "dschat.server": {"dschat.errors"},
    "dschat.config": {"dschat", "dschat.errors", "dschat.remote_code"},
}
LIBRARY = set(ALLOWED)
# A command that lies in a room, where its users look for it: nothing of the library may import it.
COMMANDS = {"dschat.report.preflight": LIBRARY, "dschat.report.__main__": BASE}
PROGRAMS = ("training", "inference", "chat", "e2e_rlhf")


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted((ROOT / "dschat").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path))
def test_the_library_imports_downwards_only(path):
    own = room(module_name(path))
    assert own in ALLOWED, f"{own} is a room without a place in the layers"
    allowed = COMMANDS.get(module_name(path), ALLOWED[own])
    for name in imports(path):
        assert name not in COMMANDS, f"{path} imports a command: {name}"
        if name.split(".")[0] == "dschat":
            assert room(name) == own or room(name) in allowed, f"{path} imports {name}"
        assert name.split(".")[0] not in PROGRAMS, f"{path} imports a program: {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "dschat" / "functional").glob("*.py")), ids=lambda path: path.name)
def test_the_mathematics_imports_torch_only(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top in ("torch", "dschat") or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_programs_do_not_import_each_other():
    programs = [p for folder in ("training", "inference") for p in (ROOT / folder).rglob("*.py")]
    assert len(programs) >= 4
    for path in programs:
        for name in imports(path):
            top = name.split(".")[0]
            own = path.relative_to(ROOT).parts[0]
            assert top not in PROGRAMS or top == own == "inference", f"{path} imports {name}"


def test_only_the_engine_knows_deepspeed_and_torch_distributed():
    for path in FILES:
        if room(module_name(path)) == "dschat.engine":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("deepspeed", "torch.distributed")):
                raise AssertionError(f"{path} imports from {node.module}")
        assert "torch.distributed" not in imports(path), path


# What is loaded: the start of a program is the import of its libraries, which take seconds.

LIBRARIES = {"torch", "transformers", "deepspeed", "datasets", "peft", "pandas", "accelerate"}
FLAGS = ("dschat.flags", "dschat.rlhf.flags", "dschat.report.__main__")
MAINS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "training").glob("step*/*.py"))]
HELPS = ["chat.py", "e2e_rlhf.py", *MAINS, "dschat.report", "dschat.report.preflight", "dschat.models.create"]


def loaded_by(code: str) -> set[str]:
    """The modules in a process of its own after ``code``."""
    script = f"import json, runpy, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_flags_and_the_report_load_no_library():
    assert not LIBRARIES & loaded_by(f"import {', '.join(FLAGS)}")


@pytest.mark.parametrize("program", HELPS)
def test_help_loads_no_library(program):
    run = f"run_path({program!r}" if program.endswith(".py") else f"run_module({program!r}"
    code = f"""
sys.path.insert(0, "")
sys.argv = [{program!r}, "--help"]
try:
    runpy.{run}, run_name="__main__")
except SystemExit as end:
    assert end.code in (0, None), end.code
else:
    raise AssertionError("it went on")"""
    assert not LIBRARIES & loaded_by(code)


def test_the_chat_loads_what_it_decodes_with():
    """accelerate is loaded by transformers' own models."""
    found = loaded_by("import inference.chatbot, inference.session, inference.terminal")
    assert "torch" in found and not found & (LIBRARIES - {"torch", "transformers", "accelerate"})


def test_training_loads_no_adapters_before_they_are_asked_for():
    """Nor the Trainer of transformers, which brings PEFT along."""
    mains = [f"runpy.run_path({path!r}, run_name='program')" for path in MAINS]
    found = loaded_by("\n".join(mains))
    assert "deepspeed" in found and not found & {"peft", "bitsandbytes", "transformers.trainer_utils"}
