"""The pages in docs/: their tables are those of the dataclasses, and the names that they use exist."""

import dataclasses
import importlib.util
import re
from pathlib import Path

from dschat.config import flag, flags_table
from dschat.rlhf.flags import GROUPS, PPOFlags

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def generator():
    spec = importlib.util.spec_from_file_location("docs_flags", DOCS / "flags.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert generator().updated(text) == text, "run `make docs`"


def test_a_changed_default_changes_the_page(monkeypatch):
    text = (DOCS / "ppo.md").read_text(encoding="utf-8")
    field = PPOFlags.__dataclass_fields__["kl_coef"]
    from dschat.rlhf.flags import KLFlags

    monkeypatch.setattr(KLFlags.__dataclass_fields__["kl_coef"], "default", field.default + 1)
    assert generator().updated(text) != text


def test_every_flag_of_step_3_is_in_its_page():
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("ppo.md", "reading-a-run.md"))
    own = {field.name for group in GROUPS for field in dataclasses.fields(group)}
    assert own and all(f"| `--{name}` |" in text for name in own)


def test_every_flag_that_the_page_of_step_3_names_exists():
    text = (DOCS / "ppo.md").read_text(encoding="utf-8")
    known = {field.name for field in dataclasses.fields(PPOFlags)} | {"lora_dim", "model_name_or_path"}
    named = set(re.findall(r"--(?:no-)?([a-z][a-z0-9_]+)", text))
    assert named - known == set()


def test_the_table_escapes_and_leaves_out_what_is_inherited():
    @dataclasses.dataclass(kw_only=True)
    class Base:
        inherited: int = flag(1, "no")

    @dataclasses.dataclass(kw_only=True)
    class Own(Base):
        needed: str = flag(help="a | b")
        kind: str = flag("x", "which", choices=("x", "y"))
        paths: list[str] = flag([], "files")

    assert flags_table(Own).splitlines()[2:] == [
        "| `--needed` | required | a \\| b |",
        "| `--kind` | `x` | which (`x`, `y`) |",
        "| `--paths` |  | files |",
    ]
