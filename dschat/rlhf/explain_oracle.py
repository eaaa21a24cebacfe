"""What PPO makes of a rollout, computed a second time in plain Python floats (64 bits), to compare with the run.

What the models say (log-probabilities, values) and the scores are given. From there on sums are written out and none
of the functions that the run used is called: KL from log-probabilities, rewards from KL and scores, advantages from
rewards and values.
"""

import dataclasses
import math
from typing import Any

from dschat.rlhf.experience import Experience
from dschat.rlhf.specs import GAE, Shaping

Floats = list[float]

# Two roundings of float32. A result is compared within some of them, times the largest number that went into it.
UNIT = 2.0**-23
FEW = 4  # for a handful of operations: exp, log, division, square root; a sum of n terms has n more
WHITEN_EPSILON, GRPO_EPSILON = 1e-8, 1e-6  # as in the run: in the variance, and beside the deviation
# Column here, field of `Experience`.
CHECKED = {"kl": "kl", "reward": "rewards", "return": "returns", "advantage": "advantages"}
GIVEN = {
    "sampler_logprob": "sampler_logprobs",
    "logprob": "logprobs",
    "ref_logprob": "ref_logprobs",
    "value": "values",
    "entropy": "entropy",
}


@dataclasses.dataclass
class Trace:
    """One response in Python floats. Lists have an entry per action: what is not learned from is left out."""

    actions: list[int]  # their columns
    score: float
    clipped_score: float
    final_score: float  # after the rule for answers cut off
    rewards: Floats  # of the run: what its advantages come from
    numbers: dict[str, Floats]
    slack: dict[str, float] = dataclasses.field(default_factory=dict)  # by column: how far float32 may be off
    notes: dict[str, float] = dataclasses.field(default_factory=dict)  # what all tokens share: mean, std


def check(row: int, column: str, tokens: list[int], found: Floats, expected: Floats, slack: float) -> None:
    """Raises RuntimeError at the first of ``tokens`` where the two differ by more than ``slack`` or one is NaN."""
    for token, ours, theirs in zip(tokens, expected, found, strict=True):
        if not abs(theirs - ours) <= slack:
            raise RuntimeError(
                f"explain: response {row}, token {token}, {column}: the run has {theirs!r}, plain Python {ours!r} "
                f"(float32 explains a difference of {slack:.1e})"
            )


def recompute(experience: Experience, shaping: Shaping, kl_kind: str, kl_coef: float) -> list[Trace]:
    """Every row of the rollout from log-probabilities, values, scores, masks and flags. The exact KL ("full") is taken
    as given: the policy that it is of no longer exists."""
    given = {f.name: getattr(experience, f.name).tolist() for f in dataclasses.fields(experience)}
    traces = [_rewarded(given, row, shaping, kl_kind, kl_coef) for row in range(len(experience))]
    if shaping.whiten_rewards:
        _whiten(traces, "reward", keep_mean=True)
    for row, trace in enumerate(traces):
        if shaping.estimator == GAE:
            final = 0.0 if given["finished"][row] or shaping.missing_eos != "bootstrap" else given["final_values"][row]
            _sum_deltas(trace, trace.numbers["value"], final, shaping.gamma, shaping.gamma * shaping.lam)
        elif shaping.estimator == "reinforce_pp":
            _sum_deltas(trace, [0.0] * len(trace.actions), 0.0, shaping.gamma, shaping.gamma)
    if shaping.estimator in ("rloo", "grpo"):
        for start in range(0, len(traces), shaping.group_size):
            _compare_group(traces[start : start + shaping.group_size], shaping.estimator)
    for trace in traces:
        if shaping.estimator != GAE:
            trace.numbers["return"], trace.slack["return"] = [0.0] * len(trace.actions), 0.0
        trace.numbers["advantage_raw"] = trace.numbers["advantage"]
    if shaping.whiten_advantages:
        _whiten(traces, "advantage", keep_mean=False)
    return traces


def kl_of(d: float, kind: str) -> float:
    """Of a log-ratio; http://joschu.net/blog/kl-approx.html."""
    if kind == "k3":
        return math.exp(-d) - 1 + d if d > -700 else math.inf
    return {"kl": d, "abs": abs(d), "mse": d * d / 2}[kind]


def _rewarded(given: dict[str, Any], row: int, shaping: Shaping, kl_kind: str, kl_coef: float) -> Trace:
    actions = [t for t, counts in enumerate(given["action_mask"][row]) if counts]
    numbers: dict[str, Floats] = {name: [given[key][row][t] for t in actions] for name, key in GIVEN.items()}
    numbers["k1"] = [p - q for p, q in zip(numbers["logprob"], numbers["ref_logprob"], strict=True)]
    penalties, rewards = ([given[key][row][t] for t in actions] for key in ("kl", "rewards"))
    exact = kl_kind == "full"  # at least it cannot be negative
    numbers["kl"] = [max(kl, 0.0) for kl in penalties] if exact else [kl_of(d, kl_kind) for d in numbers["k1"]]
    score = clipped = given["scores"][row]
    if shaping.clip_reward_value > 0:
        clipped = min(max(score, -shaping.clip_reward_value), shaping.clip_reward_value)
    final = clipped
    if not given["finished"][row]:
        rules = {"subtract": clipped - shaping.missing_eos_penalty, "replace": -shaping.missing_eos_penalty}
        final = (rules | {"bootstrap": 0.0})[shaping.missing_eos]
    coefficient = kl_coef if shaping.kl_in_reward else 0.0
    numbers["kl_share"] = [-coefficient * kl for kl in penalties]
    numbers["score_share"] = [final if t == actions[-1] else 0.0 for t in actions]
    numbers["reward_raw"] = [s + k for s, k in zip(numbers["score_share"], numbers["kl_share"], strict=True)]
    numbers["reward"] = numbers["reward_raw"]
    slack = {"reward": FEW * UNIT * (abs(clipped) + abs(final) + max(map(abs, numbers["kl_share"]), default=0.0))}
    # Of a rounded log-ratio d, exp(-d) is off by |d| roundings; the exact KL sums log-probabilities, of -32 say.
    products = [(1 + abs(d)) * (abs(d) + abs(kl)) for d, kl in zip(numbers["k1"], penalties, strict=True)]
    slack["kl"] = FEW * UNIT * (max(products, default=0.0) + 32 * exact)
    return Trace(actions, score, clipped, final, rewards, numbers, slack)


def _whiten(traces: list[Trace], column: str, *, keep_mean: bool) -> None:
    """To variance 1 over all actions of all rows. Slack grows by what the numbers are divided by: where all are nearly
    equal, rounding is all that whitening shows."""
    everything = [x for trace in traces for x in trace.numbers[column]]
    if not everything:
        return
    mean = math.fsum(everything) / len(everything)
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in everything) / len(everything) + WHITEN_EPSILON)
    error = max(trace.slack[column] for trace in traces) + FEW * UNIT * max(map(abs, everything))
    slack = 2 * (1 + max(abs(x - mean) for x in everything) / std) * error / std + keep_mean * error
    for trace in traces:
        trace.numbers[column] = [(x - mean) / std + keep_mean * mean for x in trace.numbers[column]]
        trace.slack[column] = slack
        trace.notes |= {f"{column}_mean": mean, f"{column}_std": std}


def _sum_deltas(trace: Trace, values: Floats, final_value: float, gamma: float, decay: float) -> None:
    """delta_t = r_t + gamma V_{t+1} - V_t and A_t = sum_l decay^l delta_{t+l}, over the actions."""
    rewards = trace.rewards
    next_values = [*values[1:], final_value][: len(values)]
    deltas = [r + gamma * after - v for r, after, v in zip(rewards, next_values, values, strict=True)]
    powers = [decay**step for step in range(len(deltas))]
    advantages = [
        math.fsum(power * delta for power, delta in zip(powers, deltas[t:], strict=False)) for t in range(len(deltas))
    ]
    trace.numbers |= {"next_value": next_values, "delta": deltas, "advantage": advantages}
    trace.numbers["return"] = [a + v for a, v in zip(advantages, values, strict=True)]
    # Each step of the run's recursion rounds the sum so far and what it adds; later ones are decayed with it.
    largest = sum(max(map(abs, numbers), default=0.0) for numbers in (rewards, values, next_values, advantages))
    slack = (FEW + sum(powers)) * UNIT * largest
    trace.slack |= {"advantage": slack, "return": slack}


def _compare_group(group: list[Trace], estimator: str) -> None:
    """Answers to one prompt, judged by each other; without an action there is no total, and no part in the mean."""
    for trace in group:
        trace.numbers["advantage"], trace.slack["advantage"] = [0.0] * len(trace.actions), 0.0
    counted = [trace for trace in group if trace.actions]
    if len(counted) < 2:
        return
    totals = [math.fsum(trace.rewards) for trace in counted]
    error = max((FEW + len(trace.actions)) * UNIT * math.fsum(map(abs, trace.rewards)) for trace in counted)
    mean = math.fsum(totals) / len(totals)
    std = math.sqrt(math.fsum((total - mean) ** 2 for total in totals) / (len(totals) - 1))
    for trace, total in zip(counted, totals, strict=True):
        others = (math.fsum(totals) - total) / (len(totals) - 1)
        advantage, slack = total - others, 4 * error
        if estimator == "grpo":
            advantage = (total - mean) / (std + GRPO_EPSILON)
            slack = 4 * (1 + abs(advantage)) * error / (std + GRPO_EPSILON)
        trace.numbers["advantage"], trace.slack["advantage"] = [advantage] * len(trace.actions), slack
        trace.notes |= {"total": total, "others_mean": others, "group_mean": mean, "group_std": std}


def compare(experience: Experience, traces: list[Trace], vocab_size: int, forward_tolerance: float) -> None:
    """The whole rollout against its traces. Two forwards of one model may differ by ``forward_tolerance`` nats.

    Raises:
        RuntimeError: a number differs, is impossible, or stands where there is no action.
    """
    limits = {"logprob": (-math.inf, 0.0), "ref_logprob": (-math.inf, 0.0), "entropy": (0.0, math.log(vocab_size))}
    for column, name in (GIVEN | CHECKED).items():  # what comes first is compared first: the cause before the effect
        for row, (trace, given) in enumerate(zip(traces, getattr(experience, name).tolist(), strict=True)):
            outside = sorted(set(range(len(given))) - set(trace.actions))
            elsewhere = [given[t] for t in outside]
            check(row, f"{column} outside the action mask", outside, elsewhere, [0.0] * len(outside), 0.0)
            found = [given[t] for t in trace.actions]
            if column in CHECKED:
                check(row, column, trace.actions, found, trace.numbers[column], trace.slack[column])
            if column in limits:
                low, high = limits[column]
                possible = [min(max(x, low), high) for x in found]
                check(row, f"{column} (its range)", trace.actions, found, possible, FEW * UNIT * (1 + abs(high)))
            if column == "logprob":
                check(row, column, trace.actions, found, trace.numbers["sampler_logprob"], forward_tolerance)
