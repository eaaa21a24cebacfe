"""What a run left behind, read for its report: the records of its stages, their metrics and answers."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.report.monitor_file import read_alarms
from dschat.report.reward_quality import QUALITY_FOLDER, read_quality

STAGE_NAMES = {"sft": "SFT", "reward": "reward model", "dpo": "DPO", "ppo": "PPO"}
POLICY_NAMES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
NOT_STAGES = {"checkpoints", "tensorboard", "actor", "critic", "actor_ema", "best", "quality", "explain", "repro"}
DEPTH = 2  # of a stage's folder below the one that is given: <output_dir>/step3-models/toy


@dataclass
class StageRun:
    """One stage."""

    key: str  # of STAGE_NAMES
    path: Path
    record: dict[str, Any]  # run.json; {} while the stage is not finished
    lines: list[dict[str, Any]]  # metrics.jsonl


@dataclass
class Run:
    """All that the report tells of one run."""

    name: str
    path: Path
    stages: dict[str, StageRun]
    summary: dict[str, Any]
    quality: dict[str, Any] | None
    # name of a policy -> prompt -> its row: response, score, judge, length, …; the one before training comes first
    answers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    alarms: list[dict[str, Any]] = field(default_factory=list)  # of the monitor: step, kind, text
    preflight: dict[str, Any] | None = None
    left_out: list[Path] = field(default_factory=list)  # older stages of the same kind


def load_run(directory: Path, stages: Mapping[str, Path] | None = None, name: str = "") -> Run:
    """The run in an output directory of e2e_rlhf.py or of one stage.

    ``stages``: where each lies; without it they are looked for, and of several of a kind the newest counts.

    Raises:
        UserError: no such directory, no stage in it, a damaged file.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; give the output of e2e_rlhf.py or of one stage")
    left_out: list[Path] = []
    if stages is None:
        stages, left_out = find_stages(directory)
    if not stages:
        raise UserError(f"{directory}: no metrics.jsonl in it; give the output of e2e_rlhf.py or of one stage")
    found = {key: StageRun(key, stages[key], _json(stages[key] / "run.json") or {}, _lines(stages[key]))
             for key in STAGE_NAMES if key in stages}  # fmt: skip
    quality = read_quality(str(stages["reward"] / QUALITY_FOLDER)) if "reward" in stages else None
    run = Run(name or directory.resolve().name, directory, found, _json(directory / "summary.json") or {}, quality)
    run.left_out = left_out
    if "ppo" in stages:
        run.alarms = read_alarms(stages["ppo"])
        run.preflight = _json(stages["ppo"] / "preflight.json")
        run.answers |= _sampled(stages["ppo"])
    for folder in (directory / "answers", directory):
        if (folder / "answers.jsonl").is_file():
            run.answers = _side_by_side(folder / "answers.jsonl", stages) | run.answers
            break
    return run


def find_stages(directory: Path) -> tuple[dict[str, Path], list[Path]]:
    """(the newest folder of each stage, the older ones)."""
    found: dict[str, list[Path]] = {}
    for root, folders, files in os.walk(directory):
        here = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NOT_STAGES)
        if len(here.relative_to(directory).parts) >= DEPTH:
            folders.clear()
        if "metrics.jsonl" in files:
            lines = _lines(here)
            if lines and lines[0].get("stage") in STAGE_NAMES:
                found.setdefault(lines[0]["stage"], []).append(here)
    for paths in found.values():
        paths.sort(key=lambda path: (path / "metrics.jsonl").stat().st_mtime)
    newest = {key: paths[-1] for key, paths in found.items()}
    return newest, [path for paths in found.values() for path in paths[:-1]]


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a metric where it was logged as a number."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def evaluations(run: Run) -> list[dict[str, Any]]:
    """The lines of step 3 that hold an evaluation on held-out prompts."""
    return [line for line in run.stages["ppo"].lines if "eval/kl_per_seq" in line] if "ppo" in run.stages else []


def _sampled(directory: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Of samples.jsonl: the policy before and after training, the best of n, each with the tokens that were kept."""
    path = directory / "samples.jsonl"
    groups: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in _json_lines(path):
        groups.setdefault((row["kind"], row["step"]), {})[row["prompt"]] = row
    for row in _json_lines(directory / "tokens.jsonl"):
        kept = groups.get((row["kind"], row["step"]), {}).get(row["prompt"])
        if kept is not None and kept["response"] == row.get("response"):  # drawn again, it may differ by rounding
            kept["tokens"] = row
    steps = [step for kind, step in groups if kind == "policy"]
    restored = [step for kind, step in groups if kind == "restored"]
    if not steps:
        return {}
    answers = {"SFT": groups[("policy", 0)]} if 0 in steps else {}
    for kind, step in groups:
        if kind.startswith("best_of_"):
            answers[kind.replace("_", " ")] = groups[(kind, step)]
    if restored:
        answers["PPO"] = groups[("restored", max(restored))]
        answers["PPO, over-optimised"] = groups[("policy", max(steps))]
    elif max(steps):
        answers["PPO"] = groups[("policy", max(steps))]
    return answers


def _side_by_side(path: Path, stages: Mapping[str, Path]) -> dict[str, dict[str, dict[str, Any]]]:
    """Of prompt_eval.py's answers.jsonl: each model's by each decoding, a stage's model under the stage's name."""
    rows = list(_json_lines(path))
    decodings = {row["decoding"] for row in rows}
    config = (_json(path.parent / "summary.json") or {}).get("models", {})
    places = {str(Path(folder).resolve()): POLICY_NAMES.get(key) for key, folder in stages.items()}
    if "ppo" in stages:
        places[str((stages["ppo"] / "actor").resolve())] = "PPO"
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        name = places.get(str(Path(config.get(row["model"], row["model"])).resolve())) or row["model"]
        label = f"{name} {row['decoding'].replace('_', ' ')}" if len(decodings) > 1 else name
        groups.setdefault(label, {})[row["prompt"]] = row | {"length": row.get("num_tokens")}
    return groups


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run its stage again") from None


def _lines(directory: Path) -> list[dict[str, Any]]:
    return list(_json_lines(directory / "metrics.jsonl"))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none where there is no file; a last line that is still being written does not count."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if line:
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number == len(lines):
                    break
                raise UserError(f"{path}:{number} is damaged ({error}); run its stage again") from None
    return rows
