"""Flags from dataclasses: one field is one flag, one YAML key and one entry of the saved config.

A program declares ``@dataclass(kw_only=True) class Config`` with fields made by `flag`; `parse_config` reads the
command line over an optional ``--config file.yaml`` over the defaults. Every mistake is a one-line `UserError`.
"""

import argparse
import ast
import dataclasses
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dschat import remote_code
from dschat.errors import UserError

Config = TypeVar("Config")

DTYPES = ("auto", "fp32", "bf16", "fp16")  # choices of --dtype


def flag(default: Any = dataclasses.MISSING, help: str = "", choices: tuple | None = None) -> Any:
    """A dataclass field that is also a flag. Without a default the flag is required."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and propose the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_config(
    config_class: type[Config], argv: list[str] | None = None, *, doc: str = "", removed: dict[str, str] | None = None
) -> Config:
    """Build ``config_class`` from the command line.

    ``removed`` maps a flag of DeepSpeed-Chat that has no meaning here to the sentence that says what replaces it.
    ``--local_rank``, which the deepspeed launcher adds, is taken and left to the environment variable of that name.
    ``--trust_remote_code``, where the class has it, takes effect here, for the whole process.

    Raises:
        UserError: unknown, removed, missing or ill-typed flag, bad choice, unreadable or unknown YAML key.
    """
    argv = sys.argv[1:] if argv is None else argv
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(config_class)
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # -0.5*full:PATH is a value as -0.5 is, no flag
    parser.add_argument("--config", metavar="FILE.yaml", help="flags from a YAML file; the command line overrides it")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    for name, field in fields.items():
        _add_flag(parser, name, field, hints[name])

    given, unknown = parser.parse_known_args(argv)
    values = {name: value for name, value in vars(given).items() if name in fields}
    for word in unknown:
        _refuse(word, fields, removed or {})
    if given.config:
        values = _read_yaml(given.config, fields, hints) | values
    missing = [f"--{n}" for n, f in fields.items() if _default(f) is dataclasses.MISSING and n not in values]
    if missing:
        raise UserError(f"missing {', '.join(missing)}; see --help")
    config = config_class(**values)
    remote_code.trust(getattr(config, "trust_remote_code", False))
    return config


def read_flags(sources: Iterable[Path], name: str = "Config") -> dict[str, str]:
    """The flags of class ``name`` and their types, read from source text, where importing it would import torch.

    ``sources``: the files of the class and of all its bases.
    """
    nodes = [node for path in sources for node in ast.parse(path.read_text(encoding="utf-8")).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}

    def fields(node: ast.ClassDef) -> dict[str, str]:
        found: dict[str, str] = {}
        for base in node.bases:
            found |= fields(classes[ast.unparse(base)])
        own = (item for item in node.body if isinstance(item, ast.AnnAssign))
        return found | {ast.unparse(item.target): ast.unparse(item.annotation) for item in own}

    return fields(classes[name])


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved config as plain JSON values, for run.json."""
    return dataclasses.asdict(config)


def flags_table(config_class: type) -> str:
    """The flags that the class itself declares as a Markdown table: flag, default, meaning. For docs/."""
    lines = ["| flag | default | meaning |", "|---|---|---|"]
    own = config_class.__dict__.get("__annotations__", {})
    for field in dataclasses.fields(config_class):
        if field.name not in own:
            continue
        default = _default(field)
        shown = "required" if default is dataclasses.MISSING else "" if default in (None, []) else f"`{default}`"
        choices = field.metadata["choices"]
        listed = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
        text = (field.metadata["help"] + listed).replace("|", "\\|")
        lines.append(f"| `--{field.name}` | {shown} | {text} |")
    return "\n".join(lines)


def require_positive(flags: object, *names: str) -> None:
    for name in names:
        if not getattr(flags, name) > 0:
            raise UserError(f"--{name} {getattr(flags, name)}: expected a number above 0")


def require_not_negative(flags: object, *names: str) -> None:
    for name in names:
        if not getattr(flags, name) >= 0:
            raise UserError(f"--{name} {getattr(flags, name)}: expected 0 or more")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _base_type(hint: Any) -> tuple[Any, bool]:
    """(``int`` from ``int | None`` or ``list[int]``, is it a list)."""
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _add_flag(parser: argparse.ArgumentParser, name: str, field: dataclasses.Field, hint: Any) -> None:
    base, is_list = _base_type(hint)
    default = _default(field)
    text = field.metadata["help"].replace("%", "%%")
    if default not in (dataclasses.MISSING, None, False, []):
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" (default: {shown})"
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if base is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": base, "choices": field.metadata["choices"], "metavar": base.__name__.upper()}
        if field.metadata["choices"]:
            options["metavar"] = None
        if is_list:
            options["nargs"] = "+"
    parser.add_argument(f"--{name}", **options)


def _refuse(word: str, fields: dict, removed: dict[str, str]) -> NoReturn:
    name = word.split("=")[0].lstrip("-")
    if word.startswith("--") and name in removed:
        raise UserError(f"--{name} is gone: {removed[name]}")
    close = difflib.get_close_matches(name.replace("-", "_"), fields, n=1)
    hint = f"; did you mean --{close[0]}?" if close else "; see --help"
    raise UserError(f"unknown {'flag' if word.startswith('-') else 'argument'} {word}{hint}")


def _read_yaml(path: str, fields: dict, hints: dict) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected 'flag: value' lines, found {type(values).__name__}")
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            raise UserError(
                f"--config {path}: unknown key '{name}'" + (f"; did you mean {close[0]}?" if close else "")
            )
        values[name] = _coerce(path, name, value, hints[name], fields[name].metadata["choices"])
    return values


def _coerce(path: str, name: str, value: Any, hint: Any, choices: tuple | None) -> Any:
    """A YAML value in the type of its flag; YAML reads 1e-4 as text, so numbers are converted from their text."""
    if value is None and type(None) in typing.get_args(hint):
        return None
    base, is_list = _base_type(hint)
    items = value if is_list and isinstance(value, list) else [value]
    try:
        for item in items:
            if isinstance(item, (dict, list)) or (base is bool) != isinstance(item, bool):
                raise ValueError
        items = [item if base is bool else base(str(item)) for item in items]
    except ValueError:
        raise UserError(f"--config {path}: {name}: expected {base.__name__}, found {value!r}") from None
    if choices and any(item not in choices for item in items):
        raise UserError(f"--config {path}: {name}: {value!r} is not one of {', '.join(map(str, choices))}")
    return items if is_list else items[0]
