"""The figures of the preflight, from sampled answers, and the verdict on them: GO, WARN or STOP, with the reason."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

PLAUSIBLE = 0.01  # the probability from which a token counts as plausible
NUCLEUS = 0.9
GO, WARN, STOP = "GO", "WARN", "STOP"
ORDER = {GO: 0, WARN: 1, STOP: 2}
# A prompt has no spread of reward where its answers' scores differ by less than this share of all scores' spread.
NO_SPREAD = 0.02
Answer = Mapping[str, Any]  # as `dschat.rlhf.preflight.sample_space` makes it


def figures(answers: Sequence[Answer], num_samples: int) -> dict[str, Any]:
    """Plain JSON values; None where nothing can be said.

    ``effective_answers`` is exp of the entropy of a whole answer (the chain rule: the sum of its tokens' entropies,
    averaged over answers): of so many equally likely answers does the policy choose. ``score_std_within`` and
    ``score_std_between``: the spread (root mean square) of the scores around their prompt's mean, and of these means.
    ``normalised_scores``: score - mean of the prompt's + mean of all.
    """
    groups = [answers[start : start + num_samples] for start in range(0, len(answers), num_samples)]
    ids = [answer["ids"] for answer in answers]
    entropy = fmean(math.fsum(answer["entropy"]) for answer in answers)
    found: dict[str, Any] = {
        "num_prompts": len(groups),
        "num_samples": num_samples,
        "entropy": _per_token(answers, "entropy"),
        "entropy_per_answer": entropy,
        "effective_answers": math.exp(min(entropy, 700.0)),
        "top_probability": _per_token(answers, "top"),
        "sampled_probability": _per_token(answers, "sampled"),
        "plausible_tokens": _per_token(answers, "plausible"),
        "nucleus_tokens": _per_token(answers, "nucleus"),
        "entropy_by_position": _by_position(answers),
        "finished": fmean(answer["finished"] for answer in answers),
        "length": fmean(map(len, ids)),
        "distinct_1": _distinct(ids, 1),
        "distinct_2": _distinct(ids, 2),
        "distinct_answers": fmean(len({answer["text"] for answer in group}) / len(group) for group in groups),
    }
    return {name: _plain(value) for name, value in (found | _reward(groups)).items()}


def _reward(groups: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    scores = [np.array([a["score"] for a in group if a["score"] is not None], dtype=float) for group in groups]
    given = [group for group in scores if len(group)]
    found: dict[str, Any] = {"unscored": 1 - sum(map(len, scores)) / sum(map(len, groups))}
    names = ("score_mean", "score_std", "score_std_within", "score_std_between", "no_spread")
    if not given:
        return found | dict.fromkeys(names) | {"normalised_scores": []}
    everything = np.concatenate(given)
    means = np.array([group.mean() for group in given])
    centred = np.concatenate([group - group.mean() for group in given])
    total = float(everything.std())
    ranges = np.array([np.ptp(group) for group in given if len(group) > 1])
    found |= {"score_mean": everything.mean(), "score_std": total, "score_std_between": means.std()}
    found["score_std_within"] = math.sqrt(float(np.square(centred).mean()))
    found["no_spread"] = float((ranges <= NO_SPREAD * total).mean()) if len(ranges) else None
    return found | {"normalised_scores": [round(x, 4) for x in (centred + everything.mean()).tolist()]}


def verdict(found: Mapping[str, Any], on_training: Mapping[str, Any] | None = None) -> tuple[str, list[str]]:
    """(GO, WARN or STOP, why, the worst first) of the `figures` of one policy on the prompts that PPO would use, and
    where they are known on the prompts that SFT was trained on."""
    reasons: list[tuple[str, str]] = []
    mend_space = "raise --temperature, take an earlier epoch of SFT, or use other prompts"
    unscored = found["unscored"]
    if unscored > 0:
        level = STOP if unscored == 1 else WARN
        reasons.append((level, f"{unscored:.0%} of the answers have no finite score: mend the reward"))
    if found["no_spread"] is not None and found["no_spread"] > 0.5:
        level = STOP if found["no_spread"] > 0.9 else WARN
        reasons.append((level, f"{found['no_spread']:.0%} of prompts have no spread of reward: {mend_space}"))
    choices = found["effective_answers"]
    if choices < 12:
        level = STOP if choices < 2 else WARN
        text = f"the policy chooses among {choices:.1f} answers to a prompt (exp of the entropy of an answer)"
        reasons.append((level, f"{text}, too few to learn from: {mend_space}"))
    finished = found["finished"]
    if finished < 0.9:
        level = STOP if finished < 0.1 else WARN
        text = f"only {finished:.0%} of the answers end before the limit of tokens"
        reasons.append((level, f"{text}: raise --max_answer_seq_len, or train SFT so that its answers end"))
    if on_training is not None and on_training["entropy"] < 0.5 * found["entropy"]:
        text = f"the entropy on SFT's own prompts, {on_training['entropy']:.2f} nats a token, is less than half of "
        text += f"that on PPO's, {found['entropy']:.2f}: SFT has learned its data by heart; take an earlier epoch"
        reasons.append((WARN, text))
    reasons.sort(key=lambda reason: -ORDER[reason[0]])
    return (reasons[0][0] if reasons else GO), [text for _, text in reasons]


def choose(candidates: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """(place, why) of the checkpoint to start PPO from: of those with the best verdict the one that promises most, by
    the mean score plus the spread within a prompt, which is about where the best of three samples lies."""
    best = min(ORDER[candidate["verdict"]] for candidate in candidates)
    kept = [i for i, candidate in enumerate(candidates) if ORDER[candidate["verdict"]] == best]

    def promise(i: int) -> float:
        found = candidates[i]["prompts"]
        return -math.inf if found["score_mean"] is None else found["score_mean"] + found["score_std_within"]

    chosen = max(kept, key=promise)
    found = candidates[chosen]["prompts"]
    if found["score_mean"] is None:
        return chosen, "no candidate has a score"
    others = "of all" if len(kept) == len(candidates) else f"of those that are {candidates[chosen]['verdict']}"
    why = f"the highest mean score plus spread within a prompt {others}: {found['score_mean']:+.2f} + "
    return chosen, why + f"{found['score_std_within']:.2f}"


def assemble(candidates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of preflight.json.

    ``candidates``: each ``name``, ``path``, ``prompts`` (`figures`) and ``training`` (those on SFT's prompts, or
    None). The verdict is that on the chosen one.
    """
    judged = []
    for candidate in candidates:
        level, reasons = verdict(candidate["prompts"], candidate["training"])
        curves = {"PPO's prompts": candidate["prompts"]["entropy_by_position"]}
        if candidate["training"] is not None:
            curves["SFT's prompts"] = candidate["training"]["entropy_by_position"]
        scores = candidate["prompts"]["normalised_scores"]
        judged.append(
            candidate
            | {"verdict": level, "reasons": reasons, "entropy_by_position": curves, "normalised_scores": scores}
        )
    chosen, why = choose(judged)
    reason = (
        "; ".join(judged[chosen]["reasons"]) or "the policy has room to learn in and the reward tells answers apart"
    )
    return {
        "verdict": judged[chosen]["verdict"],
        "reason": reason,
        "start_from": judged[chosen]["name"],
        "why": why,
        "candidates": judged,
    }


def _per_token(answers: Sequence[Answer], name: str) -> float:
    values = [value for answer in answers for value in answer[name]]
    return fmean(values) if values else math.nan


def _by_position(answers: Sequence[Answer]) -> list[float]:
    """The mean entropy of the r-th token over the answers that reach it, as far as a tenth of them does."""
    longest = max(len(answer["entropy"]) for answer in answers)
    columns = [[a["entropy"][r] for a in answers if len(a["entropy"]) > r] for r in range(longest)]
    return [round(fmean(column), 4) for column in columns if len(column) >= max(1, len(answers) / 10)]


def _distinct(ids: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams (Li et al. 2016); 0 when there is none."""
    grams = [tuple(row[i : i + n]) for row in ids for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
