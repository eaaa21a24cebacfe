"""What the numbers of step 3 say about its health, in sentences for a person; no model is asked here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GOOD, WARN, BAD = "good", "warn", "bad"
# Where a policy leaves the range that docs/reading-a-run.md calls healthy.
FEW_FINISHED, TOO_FEW_FINISHED = 0.9, 0.5
KL_PER_TOKEN = 1.0  # nats; exp(1) times likelier, token for token, than under the reference
SHRUNK = 1 / 3  # of distinct-2 or entropy, to what they were at the start
REPETITIVE = 0.3


@dataclass(frozen=True)
class Finding:
    """One sentence, and how it should be taken."""

    level: str  # GOOD, WARN, BAD
    kind: str  # one word
    text: str

    def row(self) -> dict[str, str]:
        return asdict(self)


def policy_findings(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[Finding]:
    """What is wrong with a policy by two evaluations, the one before training and the present one (lines of
    metrics.jsonl); nothing where nothing is."""
    found = []
    finished, before = now["eval/finished_fraction"], first["eval/finished_fraction"]
    if finished < FEW_FINISHED and finished < before - 0.05 or finished < TOO_FEW_FINISHED:
        level = BAD if finished < TOO_FEW_FINISHED else WARN
        text = f"answers do not end: {finished:.0%} finish before the limit ({before:.0%} before training); "
        found.append(Finding(level, "endless", text + "raise --missing_eos_penalty or --max_answer_seq_len"))
    kl = now["eval/kl_per_seq"] / max(now["eval/response_length"], 1.0)
    if kl > KL_PER_TOKEN:
        text = f"the policy is {now['eval/kl_per_seq']:.1f} nats a sequence from its reference, {kl:.2f} a token; "
        found.append(Finding(BAD, "kl", text + "raise --kl_coef, lower the learning rate, or give a --kl_target"))
    if now["eval/distinct_2"] < SHRUNK * first["eval/distinct_2"]:
        text = f"the answers become alike: distinct-2 fell from {first['eval/distinct_2']:.3f} to "
        text += f"{now['eval/distinct_2']:.3f}; raise --kl_coef, lower the learning rate or add --entropy_coef"
        found.append(Finding(BAD, "collapse", text))
    repetition = now.get("eval/repetition") or 0.0
    if repetition > REPETITIVE and repetition > 2 * (first.get("eval/repetition") or 0.0):
        text = f"answers repeat themselves: {repetition:.0%} of their 4-grams came before; raise --kl_coef"
        found.append(Finding(BAD, "repetition", text))
    return found


def training_findings(lines: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the lines of training, the whole metrics.jsonl of step 3, say of its course."""
    found = []
    start, end = _ends(lines, "objective/entropy_per_token")
    if end < SHRUNK * start:
        text = f"the entropy collapsed: from {start:.3f} to {end:.3f} nats a token; raise --kl_coef, lower the "
        found.append(Finding(WARN, "entropy", text + "learning rate, or add --entropy_coef"))
    _, clipped = _ends(lines, "policy/clip_fraction")
    if clipped > 0.3:
        text = f"updates are too large: {clipped:.0%} of the tokens end outside the clip; lower the learning rate"
        found.append(Finding(WARN, "clip", text + " or --ppo_epochs"))
    _, explained = _ends(lines, "critic/explained_variance")
    if explained < 0:
        text = f"the critic explains nothing (explained variance {explained:.2f}); raise --critic_learning_rate"
        found.append(Finding(WARN, "critic", text + " or give --critic_warmup_rollouts"))
    bad = [line["rewards/num_bad_rollouts"] for line in lines if line.get("rewards/num_bad_rollouts")]
    if bad:
        found.append(Finding(WARN, "bad_rollouts", f"{bad[-1]:.0f} rollouts were skipped: see repro/"))
    return found


def outcome_findings(
    label: str, before: str, win: Mapping[str, Any] | None, controlled: tuple[float, float, float] | None, by: str
) -> list[Finding]:
    """Whether training helped: ``win`` is the raw win rate of ``label`` over ``before``, ``controlled`` the
    length-controlled one, both ``by`` the judge or by the reward."""
    if not win or not win["num_prompts"]:
        return []
    low, high = win["ci95"]
    text = f"{label} beats {before} on {win['value']:.0%} of {win['num_prompts']} held-out prompts by {by} "
    text += f"(95 %: {low:.0%} to {high:.0%})"
    if controlled is not None:
        text += (
            f"; if the answers were equally long, on {controlled[0]:.0%} ({controlled[1]:.0%} to {controlled[2]:.0%})"
        )
    if high < 0.5:
        return [Finding(BAD, "outcome", f"It got worse: {text}")]
    if low <= 0.5:
        return [Finding(WARN, "outcome", f"No difference can be told: {text}")]
    if controlled is not None and controlled[1] <= 0.5:
        return [Finding(WARN, "outcome", f"It helped, but length may explain it: {text}")]
    return [Finding(GOOD, "outcome", f"It helped: {text}")]


def _ends(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Means over the first and the last tenth of a metric's values; NaN where it was never logged."""
    values = [line[name] for line in lines if line.get(name) is not None]
    size = max(1, len(values) // 10)
    if not values:
        return math.nan, math.nan
    return sum(values[:size]) / size, sum(values[-size:]) / size
