"""During PPO: every evaluation on held-out prompts beside an independent judge, and the alarms that it may raise.

Nothing here draws from the generators of training: answers come from `row_uniforms` of a seed of their own and the
bootstrap from numpy's, so that a run is the same to the last bit with the monitor and without.
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.data.sources import load_evaluation
from dschat.data.stages import tokenize_preferences
from dschat.engine.distributed import Runtime, barrier, gather_objects
from dschat.report.findings import Finding, policy_findings
from dschat.report.metrics import MetricsWriter
from dschat.report.monitor_file import write_alarms
from dschat.report.overoptimisation import Measured, alarm
from dschat.report.samples import SampleWriter
from dschat.rlhf.answer_logprobs import gather_answers, score_answers
from dschat.rlhf.answer_rows import AnswerRows
from dschat.rlhf.collect import Collector, judge, roll_out
from dschat.rlhf.evaluate import EVAL_SEED, HeldOut, evaluate_policy
from dschat.rlhf.experience import Experience, policy_logits, policy_logprobs
from dschat.rlhf.judges import Judge

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

MAX_SECOND_ANSWERS = 128  # prompts that get a second answer, to see whether reward and judge order the two alike
OVEROPTIMISED = ("overoptimised", "length")  # the alarms for which --stop_on_overoptimisation stops


@dataclass
class Monitor:
    """Measures the policy and remembers what it was like.

    ``judge``: an independent reward; None: only what needs none. ``pairs``: held-out preferences of which the policy's
    own are measured. The alarms of a run go to ``output_dir``/alarms.json.
    """

    collector: Collector
    held_out: HeldOut
    judge: Judge | None
    pairs: AnswerRows | None
    output_dir: Path
    stops: bool  # --stop_on_overoptimisation
    history: list[dict[str, Any]] = field(default_factory=list)  # by evaluation: step, score, judge, length (N,)
    metrics: list[dict[str, float]] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    best_rows: list[dict[str, Any]] = field(default_factory=list)  # the answers of the evaluation the judge likes best

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("history", "metrics", "alarms", "best_rows")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.metrics = list(state["history"]), list(state["metrics"])
        self.alarms, self.best_rows = list(state["alarms"]), list(state["best_rows"])

    @property
    def is_over(self) -> bool:
        """Whether the run should stop and go back to the best checkpoint."""
        is_judged = any(math.isfinite(mean) for mean in self._judged())
        return self.stops and is_judged and any(row["kind"] in OVEROPTIMISED for row in self.alarms)

    @property
    def best(self) -> int:
        """The place in `history` of the evaluation that the judge likes best, the first of equals; 0: no judge."""
        judged = self._judged()
        return max(range(len(judged)), key=judged.__getitem__)

    def _judged(self) -> list[float]:
        """The judge's mean at every evaluation, as `BestSoFar` compares them; -inf: it judged nothing."""
        means = [values.get("eval/judge_mean", math.nan) for values in self.metrics]
        return [mean if math.isfinite(mean) else -math.inf for mean in means]

    def evaluate(self, kl_coef: float) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """`evaluate_policy`, and what the judge, a second answer and the pairs add to it. A collective."""
        values, rows = evaluate_policy(self.collector, self.held_out, kl_coef, self.judge)
        start = time.time()
        if self.judge is not None:
            values |= self._agreement(rows)
        if self.pairs is not None:
            values |= preference_accuracy(self.collector, self.pairs)
        return values | {"time/monitor_s": time.time() - start}, rows

    def observe(self, step: int, values: dict[str, float], rows: list[dict[str, Any]]) -> list[Finding]:
        """Remember an evaluation; the alarms that it raises and that its predecessor did not."""
        columns = {name: [row.get(name) for row in rows] for name in ("score", "judge", "length")}
        self.history.append({"step": step} | columns)
        self.metrics.append(values)
        if self.best == len(self.history) - 1:
            self.best_rows = rows
        found = [each for each in (alarm([_measured(past) for past in self.history]),) if each is not None]
        if step:
            found += policy_findings(self.metrics[0], values)
        before = {row["kind"] for row in self.alarms if row["step"] == self._previous_step()}
        self.alarms += [{"step": step} | finding.row() for finding in found]
        if self.collector.runtime.is_main:
            write_alarms(self.output_dir, self.alarms)
        return [finding for finding in found if finding.kind not in before]

    def log_restored(self, metrics: MetricsWriter, samples: SampleWriter) -> None:
        """Let the records end with the evaluation of the actor that is kept."""
        step = self.history[-1]["step"]
        metrics.log(step, self.metrics[self.best])
        samples.add(step, "restored", self.best_rows)

    def _previous_step(self) -> int:
        return self.history[-2]["step"] if len(self.history) > 1 else -1

    def _agreement(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """How often reward and judge order two answers of the present policy to one prompt alike; pairs between which
        the judge sees no difference are left out, and between which the reward sees none count half."""
        assert self.judge is not None
        runtime = self.collector.runtime
        mine = self.held_out.rows[: -(-MAX_SECOND_ANSWERS // runtime.world_size)]
        collector = dataclasses.replace(self.collector, num_samples=1)
        samples, scores = judge(collector, roll_out(collector, mine, EVAL_SEED - 1), mine)
        verdicts = self.judge(samples).scores
        totals, counts = scores.total.tolist(), scores.counts.tolist()
        given = [total if counted else None for total, counted in zip(totals, counts, strict=True)]
        second = gather_objects(list(zip(given, verdicts, strict=True)), runtime)
        alike = []
        for row, (score, judged) in zip(rows, second, strict=False):
            numbers = [math.nan if value is None else value for value in (row["score"], row["judge"], score, judged)]
            if all(map(math.isfinite, numbers)) and numbers[1] != numbers[3]:
                alike.append(float(np.heaviside((numbers[0] - numbers[2]) * (numbers[1] - numbers[3]), 0.5)))
        if not alike:
            return {"eval/judge_agreement_pairs": 0.0}
        return {"eval/judge_agreement": float(np.mean(alike)), "eval/judge_agreement_pairs": float(len(alike))}


def load_pairs(
    data_path: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_len: int,
    max_pairs: int,
    batch_size: int,
    runtime: Runtime,
    source: dict[str, Any],
) -> AnswerRows:
    """Held-out preferences: of each path its part for evaluation where it has one, else what the stages hold out.

    Args:
        max_len: tokens of a dialogue at most.
        max_pairs: the first so many; 0: all.
        source: eval_fraction, seed, cache_dir and skip_bad_records of `load_evaluation`.

    Raises:
        UserError: a bad file or record, no pair.
    """
    examples, _ = load_evaluation(data_path, "preference", **source)
    rows, _ = tokenize_preferences(examples, tokenizer, max_len)
    rows = rows.select(range(min(max_pairs, len(rows)) or len(rows)))
    assert tokenizer.pad_token_id is not None
    shape: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "max_len": max_len, "seed": 0}
    return AnswerRows(rows, True, **shape, batch_size=batch_size, runtime=runtime)


@torch.no_grad()
def preference_accuracy(collector: Collector, pairs: AnswerRows) -> dict[str, float]:
    """The share of held-out pairs whose chosen answer is likelier than the rejected one, by its mean
    log-probability a token (``eval/preference_accuracy``) and as a whole (``…_of_wholes``, which favours the shorter);
    a tie counts half. A collective."""
    engine = collector.engine
    engine.eval()
    parts = [score_answers(engine.actor, engine.family, batch) for batch in pairs.in_order()]
    answers = gather_answers(parts, collector.runtime)
    by_token = (answers.logps / answers.lengths.clamp(min=1)).double()
    found = {"eval/preference_accuracy": by_token, "eval/preference_accuracy_of_wholes": answers.logps.double()}
    return {name: _share_above(logps[:, 0] - logps[:, 1]) for name, logps in found.items()}


@torch.no_grad()
def update_ratios(collector: Collector, experience: Experience) -> torch.Tensor:
    """(M,): the policy ratios, after an update, of the actions of its rollout's first micro-batch. A collective."""
    few = experience.rows(slice(0, collector.micro_batch_size))
    collector.engine.eval()
    logits = policy_logits(collector.engine.actor, collector.engine, few)
    logprobs = policy_logprobs(logits, few, collector.sampling)
    return (logprobs - few.logprobs)[few.action_mask].exp().cpu()


def restore_best(output_dir: str, runtime: Runtime) -> None:
    """``actor/`` becomes what ``best/`` holds, whole or not at all, with best/ itself as it was."""
    if runtime.is_main:
        actor, copy = Path(output_dir) / "actor", Path(output_dir) / "actor.tmp"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(Path(output_dir) / "best", copy)
        shutil.rmtree(actor, ignore_errors=True)
        copy.rename(actor)
    barrier(runtime)


def _share_above(differences: torch.Tensor) -> float:
    return float(((differences > 0).double() + (differences == 0).double() / 2).mean())


def _measured(past: dict[str, Any]) -> Measured:
    columns = (np.array([math.nan if x is None else x for x in past[name]]) for name in ("score", "judge", "length"))
    return Measured(past["step"], *columns)
