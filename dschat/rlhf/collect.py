"""Sampling and scoring, as every rollout and every evaluation do it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dschat.data.loader import collate_prompts
from dschat.engine.deepspeed_engine import whole_model
from dschat.engine.distributed import Runtime, all_reduce_max, gather_objects
from dschat.engine.micro_batches import MicroBatches
from dschat.errors import UserError
from dschat.rlhf.experience import Experience, gather_experience, score_rollout
from dschat.rlhf.rewards import CombinedReward, Samples, Scores, write_repro
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Rollout, generate_in_batches, row_uniforms
from dschat.rlhf.samples import describe_rollout, learned_tokens
from dschat.rlhf.slots import SlotDecoder
from dschat.rlhf.specs import FORWARD, Sampling

from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Collector:
    """Who answers, who judges, and in what portions."""

    engine: RLHFEngine
    rewards: CombinedReward
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    runtime: Runtime
    generation_batch_size: int  # prompts of a rank sampled at once
    micro_batch_size: int  # responses of a rank scored at once
    kl_kind: str = "kl"  # one of specs.KL_KINDS
    num_samples: int = 1  # responses to each prompt
    max_tokens: int = 0  # of a micro-batch, with padding; 0: no limit
    old_logprobs: str = FORWARD  # or specs.SAMPLER
    decoder: SlotDecoder | None = None  # None: the plain decode loop
    memory: MicroBatches | None = None  # for scoring: halves the portions where it runs out
    sampling_memory: MicroBatches | None = None  # for sampling


def roll_out(collector: Collector, rows: list[dict[str, Any]], seed: int) -> Rollout:
    """Responses of the actor to this rank's prompts, drawn with the random numbers of their global rows.

    ``rows`` are every world_size-th of the global batch, as many on every rank. Responses to one prompt are
    neighbours.
    """
    runtime, num_samples, steps = collector.runtime, collector.num_samples, collector.sampling.max_new_tokens
    prompts = collate_prompts(rows, collector.tokenizer.pad_token_id)
    uniforms = row_uniforms(len(rows) * runtime.world_size * num_samples, steps, seed).unflatten(0, (-1, num_samples))
    sample = generate_in_batches if collector.decoder is None else collector.decoder.generate
    memory = collector.sampling_memory or MicroBatches(runtime)
    with whole_model(collector.engine.actor, runtime.device) as actor:
        return memory.ask(
            lambda: sample(
                actor,
                prompts["input_ids"].to(runtime.device),
                prompts["attention_mask"].to(runtime.device),
                collector.sampling,
                uniforms[runtime.rank :: runtime.world_size].flatten(0, 1),
                batch_size=memory.rows(collector.generation_batch_size),
                eos_token_id=collector.tokenizer.eos_token_id,
                pad_token_id=collector.tokenizer.pad_token_id,
            )
        )


def judge(collector: Collector, rollout: Rollout, rows: list[dict[str, Any]]) -> tuple[Samples, Scores]:
    """This rank's responses as the reward sources see them, and what they say."""
    samples = describe_rollout(rollout, rows, collector.tokenizer)
    return samples, collector.rewards(samples)


def collect(
    collector: Collector, rollout: Rollout, samples: Samples, scores: Scores
) -> tuple[Experience, dict[str, list[float | None]]]:
    """The experience of all ranks on every rank, in global order, and their scores by source."""
    runtime, num_samples = collector.runtime, collector.num_samples
    experience = ask_models(collector, rollout, scores, learned_tokens(rollout, samples, scores, collector.tokenizer))
    by_source = {name: gather_objects(given, runtime, num_samples) for name, given in scores.by_source.items()}
    return experience, by_source


def ask_models(collector: Collector, rollout: Rollout, scores: Scores, action_mask: Tensor) -> Experience:
    """What actor, reference and critic say of this rank's responses (`score_rollout`), of all ranks on every rank, in
    global order. ``action_mask`` (B, R)."""
    runtime = collector.runtime
    local = score_rollout(
        collector.engine,
        rollout,
        scores.total.to(runtime.device),
        action_mask,
        collector.sampling,
        collector.kl_kind,
        collector.micro_batch_size,
        max_tokens=collector.max_tokens,
        old_logprobs=collector.old_logprobs,
        memory=collector.memory or MicroBatches(runtime, collector.engine.policy_models),
    )
    return gather_experience(local, runtime, collector.tokenizer.pad_token_id, collector.num_samples)


class BadScores:
    """Rollouts with a score that is not finite, or without any: none of their steps is made, they are counted, and
    what is not finite is written down."""

    LIMIT = 3  # in a row

    def __init__(self, output_dir: str, runtime: Runtime):
        self.output_dir, self.runtime = Path(output_dir), runtime
        self.number = self.in_a_row = 0
        self.message = ""

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number, self.in_a_row = state["number"], state["in_a_row"]

    def found(self, step: int, samples: Samples, scores: Scores) -> bool:
        """Whether this is one, on any rank. A rank writes its own ``repro/``; above 0 in a folder of its own.

        Raises:
            UserError: it is the third in a row: the reward is broken.
        """
        given = [score for source in scores.by_source.values() for score in source if score is not None]
        mine = not all(map(math.isfinite, [*given, *scores.total.tolist()]))
        folder = self.output_dir if self.runtime.is_main else self.output_dir / f"rank{self.runtime.rank}"
        if mine:
            write_repro(str(folder), step, samples, scores)
        if all_reduce_max(float(mine), self.runtime):
            problem = f"a score is not finite; see {self.output_dir}/repro"
        elif not all_reduce_max(float(scores.counts.any()), self.runtime):
            problem = "the reward gave no answer a score"
        else:
            self.in_a_row = 0
            return False
        self.number += 1
        self.in_a_row += 1
        self.message = f"rollout {step} skipped: {problem}"
        if self.in_a_row == self.LIMIT:
            raise UserError(f"{self.message}; it is the {self.LIMIT}rd in a row: mend the reward")
        return True
