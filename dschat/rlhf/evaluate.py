"""The policy on held-out prompts: what it answers, how the reward scores it, how far it moved."""

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any

from dschat.engine.distributed import Runtime, gather_objects
from dschat.rlhf.collect import Collector, ask_models, judge, roll_out
from dschat.rlhf.experience import distinct_n
from dschat.rlhf.judges import Judge
from dschat.rlhf.rollout import tokens_of
from dschat.rlhf.samples import decode_responses, prompt_text

import datasets

# Every evaluation draws with the same numbers, so that two policies differ by their weights only.
EVAL_SEED = 1_000_003


@dataclass
class HeldOut:
    """This rank's share of the held-out prompts. ``num_prompts`` counts the real ones of all ranks; the shares are
    filled up to equal size with repeats, which come last in global order and are cut off after gathering."""

    rows: list[dict[str, Any]]  # token rows of the data
    num_prompts: int


def held_out_prompts(rows: datasets.Dataset, runtime: Runtime) -> HeldOut:
    """This rank's every world_size-th prompt; repeats of the first fill the shares up to equal size."""
    num_prompts = len(rows)
    padded = [*range(num_prompts), *[0] * (-num_prompts % runtime.world_size)]
    return HeldOut([rows[i] for i in padded[runtime.rank :: runtime.world_size]], num_prompts)


def evaluate_policy(
    collector: Collector, held_out: HeldOut, kl_coef: float, independent: Judge | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One sampled response per held-out prompt. Returns metrics (equal on all ranks) and a row per prompt.

    The KL is that of the sampled tokens (k1). The mean score is over the responses that have a finite one; the
    objective is the mean score less ``kl_coef`` times the KL. ``independent`` judges the same answers; training never
    sees what it says.
    """
    engine = dataclasses.replace(collector.engine, critic=None)  # whose values nobody asks for
    collector = dataclasses.replace(collector, engine=engine, num_samples=1, kl_kind="kl")
    real, runtime, tokenizer = held_out.num_prompts, collector.runtime, collector.tokenizer
    rollout = roll_out(collector, held_out.rows, EVAL_SEED)
    samples, scores = judge(collector, rollout, held_out.rows)
    # Every token of every answer, whatever is learned from it.
    everyone = ask_models(collector, rollout, scores, rollout.response_mask)
    questions = gather_objects([prompt_text(row["messages"]) for row in held_out.rows], runtime)
    counted = gather_objects(scores.counts.tolist(), runtime)
    judged = gather_objects(independent(samples).scores, runtime) if independent is not None else None
    responses = tokens_of(everyone.response_ids, everyone.response_mask)[:real]
    kl = everyone.kl.sum(1).tolist()
    totals, finished = everyone.scores.tolist(), everyone.finished.tolist()
    rows = [
        {
            "prompt": questions[i],
            "response": text,
            "score": round(totals[i], 4) if counted[i] and math.isfinite(totals[i]) else None,
            "kl": round(kl[i], 4),
            "length": len(responses[i]),
            "finished": finished[i],
        }
        | ({} if judged is None else {"judge": _rounded(judged[i])})
        for i, text in enumerate(decode_responses(tokenizer, responses))
    ]
    given = [row["score"] for row in rows if row["score"] is not None]
    mean = {name: _mean([row[name] for row in rows]) for name in ("score", "kl", "length", "finished")}
    metrics = {
        "eval/score_mean": mean["score"],
        "eval/kl_per_seq": mean["kl"],
        "eval/objective": mean["score"] - kl_coef * mean["kl"],
        "eval/response_length": mean["length"],
        "eval/finished_fraction": mean["finished"],
        "eval/distinct_2": distinct_n(responses, 2),
        "eval/repetition": repetition(responses),
        "eval/score_std": statistics.pstdev(given) if given else math.nan,
    }
    if judged is not None:
        metrics["eval/judge_mean"] = _mean([row["judge"] for row in rows])
    return metrics, rows


def repetition(responses: list[list[int]], n: int = 4) -> float:
    """The share of a response's n-grams that came before in it, over all n-grams of all responses; 0 without any."""
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in responses]
    total = sum(map(len, grams))
    return 1 - sum(len(set(row)) for row in grams) / total if total else 0.0


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _mean(values: list[float | None]) -> float:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else math.nan


def best_of_n(
    collector: Collector, held_out: HeldOut, n: int, independent: Judge | None = None
) -> list[dict[str, Any]]:
    """The response that the reward likes best out of ``n`` samples, a row per held-out prompt, with its length in
    tokens and what ``independent`` says of it."""
    collector = dataclasses.replace(collector, num_samples=1)
    best: list[dict[str, Any]] = [
        {"prompt": prompt_text(row["messages"]), "response": "", "score": None} for row in held_out.rows
    ]
    for sample in range(n):
        rollout = roll_out(collector, held_out.rows, EVAL_SEED + 1 + sample)
        samples, scores = judge(collector, rollout, held_out.rows)
        verdicts = independent(samples).scores if independent is not None else None
        totals, counts, lengths = scores.total.tolist(), scores.counts.tolist(), rollout.response_mask.sum(1).tolist()
        for i, row in enumerate(best):
            if counts[i] and math.isfinite(totals[i]) and (row["score"] is None or totals[i] > row["score"]):
                row |= {"response": samples.responses[i], "score": round(totals[i], 4), "length": lengths[i]}
                row |= {"finished": samples.finished[i]}
                row |= {} if verdicts is None else {"judge": _rounded(verdicts[i])}
    return gather_objects(best, collector.runtime)[: held_out.num_prompts]


METRICS = {"score": "eval/score_mean", "objective": "eval/objective", "judge": "eval/judge_mean"}


class BestSoFar:
    """The best evaluation by a held-out metric (a key of METRICS, or "none"), and when to give up on a better."""

    def __init__(self, metric: str, patience: int):
        self.name = METRICS.get(metric)
        self.patience, self.step, self.value, self.num_worse = patience, 0, -math.inf, 0

    def state_dict(self) -> dict[str, float]:
        return {"step": self.step, "value": self.value, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.value, self.num_worse = state["step"], state["value"], state["num_worse"]

    def improves(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far; one that is not a number never is."""
        if self.name is None:
            return False
        if metrics[self.name] > self.value:
            self.step, self.value, self.num_worse = step, metrics[self.name], 0
            return True
        self.num_worse += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether ``patience`` evaluations in a row were no better; never with a patience of 0."""
        return 0 < self.patience <= self.num_worse
