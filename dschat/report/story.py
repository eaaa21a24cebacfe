"""The story of a run in words and tables: what was trained on what, how long it took, whether it helped."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dschat.report.findings import (
    BAD,
    GOOD,
    WARN,
    Finding,
    outcome_findings,
    policy_findings,
    training_findings,
)
from dschat.report.reward_quality import weakness
from dschat.report.run_files import STAGE_NAMES, Run, evaluations
from dschat.report.statistics import length_controlled_share
from dschat.report.summary import win_rate

import numpy as np

Rows = Mapping[str, Mapping[str, Any]]  # prompt -> the answer to it
START = {"sft": "model_name_or_path", "reward": "model_name_or_path", "dpo": "model_name_or_path"}
START |= {"ppo": "actor_model_name_or_path"}


def stage_rows(run: Run) -> list[list[str]]:
    """A row for each stage: its name, what it started from, the data, steps, seconds, the result in one figure."""
    rows = []
    for key, stage in run.stages.items():
        config, data = stage.record.get("config", {}), stage.record.get("data", {})
        last: dict[str, Any] = {}
        for line in stage.lines:
            last |= {name: value for name, value in line.items() if value is not None}
        source = " ".join(config.get("data_path", []))
        number = f" ({data['train']:,} rows)" if "train" in data else ""
        seconds = stage.record.get("seconds")
        duration = _duration(seconds) if seconds is not None else "not finished"
        result = _result(key, last)
        name = STAGE_NAMES[key][0].upper() + STAGE_NAMES[key][1:]
        rows.append(
            [
                name,
                _short_path(config.get(START[key], ""), run),
                source + number,
                str(last.get("step", 0)),
                duration,
                result,
            ]
        )
    return rows


STAGE_HEADER = ("stage", "started from", "data", "steps", "time", "held-out result")


def _short_path(path: str, run: Run) -> str:
    """A path inside the run's folder from there on."""
    return path.removeprefix(f"{run.path}/")


def _result(key: str, last: Mapping[str, Any]) -> str:
    if key == "sft" and "eval/perplexity" in last:
        return f"perplexity {last['eval/perplexity']:.2f}"
    if key in ("reward", "dpo") and "eval/accuracy" in last:
        return f"accuracy {last['eval/accuracy']:.1%}"
    if key == "ppo" and "eval/score_mean" in last:
        return f"reward {last['eval/score_mean']:+.2f}, KL {last['eval/kl_per_seq']:.1f} nats a sequence"
    return ""


POLICY_HEADER = ("answers by", "prompts", "judge", "reward", "tokens", "finished", "better (95 %)", "at equal length")


def policy_rows(run: Run) -> list[list[str]]:
    """A row for each policy: means over held-out prompts and its win rate over the one before training."""
    baseline = baseline_of(run)
    rows = []
    for name, answers in run.answers.items():
        cells = [name, str(len(answers)), *(_mean(answers, key, "+.2f") for key in ("judge", "score"))]
        cells += [_mean(answers, "length", ".1f"), _mean(answers, "finished", ".0%")]
        if baseline is None or name == baseline:
            rows.append([*cells, "", ""])
            continue
        won, controlled, _ = compare(answers, run.answers[baseline])
        low, high = won["ci95"]
        cells.append(f"{won['value']:.2f} ({low:.2f} to {high:.2f})" if won["num_prompts"] else "")
        cells.append(f"{controlled[0]:.2f} ({controlled[1]:.2f} to {controlled[2]:.2f})" if controlled else "")
        rows.append(cells)
    return rows


def baseline_of(run: Run) -> str | None:
    """The policy before training."""
    return "SFT" if "SFT" in run.answers else next(iter(run.answers), None)


def trained_of(run: Run) -> str | None:
    return next((name for name in ("PPO", "DPO") if name in run.answers), None)


def compare(rows: Rows, baseline: Rows) -> tuple[dict[str, Any], tuple[float, float, float] | None, str]:
    """(raw win rate over the baseline, the length-controlled one or None where lengths are not known, by what)."""
    common = [prompt for prompt in baseline if prompt in rows]
    judged = any(rows[p].get("judge") is not None for p in common)
    judged = judged and any(baseline[p].get("judge") is not None for p in common)
    key = "judge" if judged else "score"
    kept = [p for p in common if rows[p].get(key) is not None and baseline[p].get(key) is not None]
    mine, theirs = ([group[p][key] for p in kept] for group in (rows, baseline))
    won = win_rate(mine, theirs)
    controlled = None
    if kept and all(group[p].get("length") is not None for p in kept for group in (rows, baseline)):
        wins = np.heaviside(np.array(mine, dtype=float) - np.array(theirs, dtype=float), 0.5)
        gain = np.array([rows[p]["length"] - baseline[p]["length"] for p in kept], dtype=float)
        controlled = length_controlled_share(wins, gain)
    return won, controlled, "the independent judge" if judged else "the training reward, which PPO was made to please"


def findings(run: Run) -> list[Finding]:
    """What is to be said of the run, the worst first; one that says all is well where nothing else is to be said."""
    found: list[Finding] = []
    baseline, trained = baseline_of(run), trained_of(run)
    if baseline and trained and baseline != trained:
        won, controlled, by = compare(run.answers[trained], run.answers[baseline])
        found += outcome_findings(trained, baseline, won, controlled, by)
    if run.quality is not None and (reason := weakness(run.quality)):
        found.append(Finding(BAD, "reward", f"the reward model is weak: {reason}"))
    if run.preflight and run.preflight["verdict"] != "GO":
        level = WARN if run.preflight["verdict"] == "WARN" else BAD
        found.append(Finding(level, "preflight", f"before PPO: {run.preflight['verdict']}: {run.preflight['reason']}"))
    last_alarm = {alarm["kind"]: alarm for alarm in run.alarms}
    found += [
        Finding(BAD, alarm["kind"], f"rollout {alarm['step']}: {alarm['text']}") for alarm in last_alarm.values()
    ]
    lines = evaluations(run)
    if len(lines) > 1:
        now = policy_findings(lines[0], lines[-1])
        found += [finding for finding in now if finding.kind not in last_alarm]
        found += training_findings(run.stages["ppo"].lines)
    order = {BAD: 0, WARN: 1, GOOD: 2}
    if found and all(finding.kind == "outcome" for finding in found) and "ppo" in run.stages:
        found.append(Finding(GOOD, "health", "No alarm: KL, length, endings, variety and entropy stayed healthy."))
    return sorted(found, key=lambda finding: (finding.kind != "outcome", order[finding.level]))


def _mean(rows: Rows, key: str, spec: str) -> str:
    values = [row[key] for row in rows.values() if row.get(key) is not None]
    return format(fmean(values), spec) if values else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def comparison_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """(header, a row for each run): its last evaluation and its outcome, side by side."""
    names = ("eval/score_mean", "eval/judge_mean", "eval/kl_per_seq", "eval/response_length", "eval/finished_fraction")
    header = [
        "run",
        "reward",
        "judge",
        "KL (nats a sequence)",
        "tokens",
        "finished",
        "better than before (95 %)",
        "alarms",
    ]
    rows = []
    for run in runs:
        line = (evaluations(run) or [{}])[-1]
        cells = [f"{line[name]:.3f}" if line.get(name) is not None else "" for name in names]
        baseline, trained, won = baseline_of(run), trained_of(run), ""
        if baseline and trained and baseline != trained:
            rate, _, _ = compare(run.answers[trained], run.answers[baseline])
            low, high = rate["ci95"]
            won = f"{rate['value']:.2f} ({low:.2f} to {high:.2f})" if rate["num_prompts"] else ""
        rows.append([run.name, *cells, won, ", ".join(sorted({alarm["kind"] for alarm in run.alarms})) or "none"])
    return header, rows
