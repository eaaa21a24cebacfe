from dataclasses import dataclass

from dschat.config import flag, parse_config
from dschat.errors import UserError

import pytest


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="a path")
    learning_rate: float = flag(1e-4, "peak")
    steps: int | None = flag(None, "how many")
    paths: list[str] = flag(["a"], "files")
    kind: str = flag("x", "which", choices=("x", "y"))
    check: bool = flag(True, "50% of the time")


def test_command_line_overrides_yaml_overrides_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nlearning_rate: 3e-5\npaths: [p, q]\ncheck: false\nsteps: 7\n")
    config = parse_config(Config, ["--config", str(file), "--steps", "9", "--local_rank=1"])
    assert config == Config(model="m", learning_rate=3e-5, steps=9, paths=["p", "q"], kind="x", check=False)
    assert parse_config(Config, ["--model", "m", "--no-check"]).check is False


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "missing --model"),
        (["--model", "m", "--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--model", "m", "--steps", "many"], "invalid int value: 'many'"),
        (["--model", "m", "--kind", "z"], "invalid choice: 'z'"),
        (["--model", "m", "stray"], "unknown argument stray"),
        (["--model", "m", "--old", "1"], "--old is gone: use --new"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
    ],
)
def test_a_bad_command_line_is_one_line(argv, expected):
    with pytest.raises(UserError) as error:
        parse_config(Config, argv, removed={"old": "use --new"})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learnin_rate: 1", "did you mean learning_rate?"),
        ("steps: soon", "steps: expected int, found 'soon'"),
        ("check: 3", "check: expected bool"),
        ("kind: z", "'z' is not one of x, y"),
        ("- 1", "expected 'flag: value' lines"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_yaml_file_is_one_line(tmp_path, text, expected):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_config(Config, ["--model", "m", "--config", str(file)])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_help_renders(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = capsys.readouterr().out
    assert "50% of the time" in text and "(default: 0.0001)" in text
