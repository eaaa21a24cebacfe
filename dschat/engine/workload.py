"""What a run will do, in the numbers that decide its memory: which models, and the largest pass of each phase."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SFT, RESPONSE, SCORER, COMPARE = "sft", "response", "scorer", "compare"
SAMPLE, PREFILL = "sample", "prefill"
Changes = dict[str, Any]  # flags and other values of theirs
LoraShape = tuple[int, int | None, str, bool]  # dim, alpha, module_name, only; dim 0: the whole model


@dataclass(frozen=True)
class ModelUse:
    """A model of the run and how it is held. ``path`` as the flags name it: a directory, a hub name, toy."""

    role: str
    path: str
    is_scorer: bool = False
    is_trained: bool = True
    zero_stage: int = 0
    checkpointing: bool = False
    accumulates: bool = False  # several micro-batches make a step
    offload: bool = False
    has_average: bool = False
    lora: LoraShape = (0, None, "auto", True)
    shares_trunk: bool = False  # its frozen weights are another model's
    saves_adapter: bool = False  # and not the whole model
    quantized_bits: int = 0  # of the frozen weights under adapters; 0: not quantized


@dataclass(frozen=True)
class PassUse:
    """The largest pass of a phase: ``num_rows`` of ``num_tokens``, of which the last ``response_size`` are answers.

    ``kind``: SFT, all logits; RESPONSE, the logits of answers; SCORER, no logits; COMPARE, those of two models at
    once; SAMPLE, answers decoded with a cache, into which ``num_prompts`` prompts go at once (PREFILL).
    """

    phase: str
    role: str
    kind: str
    num_rows: int
    num_tokens: int
    response_size: int = 0
    train: bool = False
    num_prompts: int = 0


@dataclass(frozen=True)
class Workload:
    title: str
    dtype: str  # as --dtype
    models: Sequence[ModelUse]
    passes: Sequence[PassUse]
    num_checkpoints: int
    longest: tuple[int, str]  # tokens that the models need positions for, and the flags that say so


@dataclass(frozen=True)
class PlanRequest:
    """What --dry_run and --calibrate ask for."""

    planned: Callable[[Changes], Workload]  # the run with some flags changed
    batch_flags: Mapping[str, int]  # say how many rows a pass has, times this
    changes: Sequence[Changes]  # save memory
    plan_for: str
    num_steps: int  # real ones to make; 0: none
    output_dir: str
    count_steps: Callable[[int, int], int]  # rows of data, ranks -> steps of the whole run
    eval_interval: int
