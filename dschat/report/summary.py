"""What a whole run came to: the numbers of summary.json and the tables a person reads, from the records of its stages.

Every comparison is between answers to the same held-out prompts: the policy's before PPO (it is then the model of
step 1), the best of n samples of that policy by the reward model, and the policy's after PPO; or the models of step 1
and of DPO.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dschat.report.progress import table
from dschat.report.reward_quality import weakness
from dschat.report.samples import short, shown_score
from dschat.report.statistics import wilson_interval

SFT, PPO, DPO = "sft", "ppo", "dpo"
LABELS = {SFT: "SFT", "reward": "reward model", PPO: "PPO", DPO: "DPO", "answers": "answers", "total": "in all"}


class Verdict(Protocol):
    @property
    def score(self) -> float: ...
    @property
    def correct(self) -> bool: ...


Judge = Callable[[str, str], Verdict]


@dataclass(frozen=True)
class Graded:
    """One policy's answers to the held-out prompts, in their order."""

    rows: list[dict[str, Any]]  # of samples.jsonl: prompt, response, score (the reward's), …
    scores: list[float | None]  # the judge's, or the reward's where the task has no judge; None: it gave none
    correct: list[bool] | None  # what the judge says; None without a judge, or where it does not tell
    is_judged: bool  # whether the scores are a judge's


def read_run(directory: Path, name: str = "run.json") -> dict[str, Any]:
    """The record that a finished stage leaves in its output directory."""
    return json.loads((directory / name).read_text(encoding="utf-8"))


def read_answers(ppo_directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of samples.jsonl by policy: "sft" (step 0), "best_of_8" (or of another number; may lack), "ppo" (last,
    or those of the checkpoint that an alarm of the monitor restored).

    Raises:
        ValueError: the file holds one evaluation only, or the policies were asked different prompts.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    samples = ppo_directory / "samples.jsonl"
    with open(samples, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            groups.setdefault((row["kind"], row["step"]), []).append(row)
    last = max(step for _, step in groups)
    answers = {SFT: groups[("policy", 0)]}
    answers |= {kind: rows for (kind, _), rows in groups.items() if kind.startswith("best_of_")}
    answers[PPO] = groups.get(("restored", last)) or groups[("policy", last)]
    prompts = [[row["prompt"] for row in rows] for rows in answers.values()]
    if last == 0 or any(other != prompts[0] for other in prompts):
        raise ValueError(f"{samples}: expected answers to the same prompts before and after training")
    return answers


def read_side_by_side(directory: Path) -> dict[str, Graded]:
    """The answers of prompt_eval.py, which was given the model of step 1 and that of DPO, as its judge, else its
    reward, graded them; where it was told several decodings, those of the first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    decoding = None
    with open(directory / "answers.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            decoding = decoding or row["decoding"]
            if row["decoding"] == decoding:
                groups.setdefault(row["model"], []).append(row)
    return {name: _as_graded(rows) for name, rows in zip((SFT, DPO), groups.values(), strict=True)}


def _as_graded(rows: list[dict[str, Any]]) -> Graded:
    is_judged = any(row["judge"] is not None for row in rows)
    tells = any(row["correct"] is not None for row in rows)
    scores = [row["judge" if is_judged else "score"] for row in rows]
    return Graded(rows, scores, [bool(row["correct"]) for row in rows] if tells else None, is_judged)


def grade(rows: list[dict[str, Any]], judge: Judge | None) -> Graded:
    if judge is None:
        return Graded(rows, [row["score"] for row in rows], None, False)
    verdicts = [judge(row["prompt"], row["response"]) for row in rows]
    return Graded(rows, [verdict.score for verdict in verdicts], [verdict.correct for verdict in verdicts], True)


def win_rate(scores: Sequence[float | None], baseline: Sequence[float | None]) -> dict[str, Any]:
    """How often an answer scores above the baseline's to the same prompt; a tie counts half. Prompts where either has
    no score are left out."""
    pairs = [(a, b) for a, b in zip(scores, baseline, strict=True) if a is not None and b is not None]
    wins = sum((a > b) + (a == b) / 2 for a, b in pairs)
    value = wins / len(pairs) if pairs else math.nan
    return _share(value, wilson_interval(wins, len(pairs))) | {"num_prompts": len(pairs)}


def summarize(
    graded: dict[str, Graded],
    runs: dict[str, dict],
    quality: dict | None,
    seconds: dict[str, float],
    peak_rss_gb: float,
) -> dict[str, Any]:
    """The content of summary.json (DESIGN, section 6). "judge" only where there is one; without it the win rate goes
    by the reward model, which PPO was trained to please, and says so; where there is neither, it is left out.

    Args:
        graded: the policies, that of step 1 first, the trained one last.
        runs: the records of the stages, by name ("sft", "reward", "ppo", "dpo").
        quality: what `dschat.report.reward_quality` says of the reward model; None without a reward model.
    """
    trained = list(graded)[-1]
    summary: dict[str, Any] = {"seconds": {name: round(value, 1) for name, value in seconds.items()}}
    for name in ("reward", "dpo"):
        if name in runs:
            metrics = runs[name]["metrics"]
            accuracy = _share(metrics["eval/accuracy"], (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]))
            summary[f"{name}_accuracy"] = accuracy | {"num_pairs": int(metrics["eval/num_pairs"])}
    if quality is not None:
        ece = quality["calibration"]["ece"]  # None: no pair has finite scores
        summary["reward_quality"] = {
            "weakness": weakness(quality),
            "length_only_accuracy": round(quality["baselines"]["length"]["accuracy"], 4),
            "ece": None if ece is None else round(ece, 4),
        }
    judged = {
        name: {"mean": round(_mean(policy.scores), 4)}
        | ({} if policy.correct is None else {"correct": round(_mean(policy.correct), 4)})
        for name, policy in graded.items()
        if policy.is_judged
    }
    won = win_rate(graded[trained].scores, graded[SFT].scores)
    summary |= {"judge": judged} if judged else {}
    if won["num_prompts"]:
        summary["win_rate"] = {f"{trained}_vs_sft": won | ({} if judged else {"by": "reward_model"})}
    if PPO in runs:
        summary["kl_per_seq"] = round(runs[PPO]["metrics"]["eval/kl_per_seq"], 4)
    return summary | {"peak_rss_gb": round(peak_rss_gb, 3)}


def results_table(summary: dict[str, Any], graded: dict[str, Graded]) -> str:
    """What a person reads at the end: the policies side by side, then the stages."""
    has_judge, tells = "judge" in summary, any(policy.correct is not None for policy in graded.values())
    has_reward = any(row["score"] is not None for policy in graded.values() for row in policy.rows)
    header = ["held-out answers", *["judge"] * has_judge, *["correct"] * tells, *["reward model"] * has_reward]
    policies = []
    for name, policy in graded.items():
        cells = [f"{_mean(policy.scores):.2f}"] * has_judge
        cells += [f"{_mean(policy.correct):.0%}"] if policy.correct is not None else []
        cells += [f"{_mean([row['score'] for row in policy.rows]):+.2f}"] * has_reward
        won = win_rate(policy.scores, graded[SFT].scores)
        cells += [_interval(won)] if name != SFT and won["num_prompts"] else [""]
        policies.append([LABELS.get(name, f"{name.replace('_', ' ')} by the reward model"), *cells])
    run = []
    if "reward_accuracy" in summary:
        accuracy = summary["reward_accuracy"]
        run += [[f"reward model: accuracy on {accuracy['num_pairs']} held-out pairs (95 %)", _interval(accuracy)]]
    if "reward_quality" in summary:
        by_length = summary["reward_quality"]["length_only_accuracy"]
        run += [["reward model: accuracy that the lengths alone reach", f"{by_length:.2f}"]]
    if "dpo_accuracy" in summary:
        accuracy = summary["dpo_accuracy"]
        run += [[f"DPO: accuracy on {accuracy['num_pairs']} held-out pairs (95 %)", _interval(accuracy)]]
    if "kl_per_seq" in summary:
        run += [["PPO: KL to SFT, in nats a sequence", f"{summary['kl_per_seq']:.2f}"]]
    run += [[f"{LABELS.get(name, name)}: seconds", f"{value:.0f}"] for name, value in summary["seconds"].items()]
    run += [["peak memory of one process, in GB", f"{summary['peak_rss_gb']:.1f}"]]
    answers = table([*header, "better than SFT (95 %)"], policies)
    if not has_judge and has_reward:
        answers += "\n(no judge for this task: better means a higher score of the reward model)"
    elif not has_judge:
        answers = "no judge and no reward model for this task: read the answers"
    return answers + "\n\n" + table(["the run", ""], run)


def before_and_after(graded: dict[str, Graded], count: int = 5) -> str:
    """The first held-out prompts with what the policy answered before training and after it, each with its score."""
    trained = list(graded)[-1]
    lines = [f"The first {min(count, len(graded[SFT].rows))} held-out prompts (not the best), before and after:"]
    for i, row in enumerate(graded[SFT].rows[:count]):
        lines += ["", short(row["prompt"])]
        for name in (SFT, trained):
            score, response = graded[name].scores[i], graded[name].rows[i]["response"]
            lines.append(f"  {LABELS[name]} [{shown_score(score)}] {short(response)}")
    return "\n".join(lines)


def _mean(values: Sequence[Any]) -> float:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else math.nan


def _share(value: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {"value": round(value, 4), "ci95": [round(end, 4) for end in interval]}


def _interval(share: dict[str, Any]) -> str:
    return f"{share['value']:.2f} ({share['ci95'][0]:.2f} to {share['ci95'][1]:.2f})"
