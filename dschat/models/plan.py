"""From what a run will do to how much memory it takes: shapes, traced passes, and the arithmetic of ZeRO."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from dschat.engine.memory_plan import (
    ACTIVATIONS,
    CACHE,
    GRADIENTS,
    LOGITS,
    WEIGHTS,
    Machine,
    Phase,
    Plan,
    PlannedModel,
)
from dschat.engine.workload import (
    COMPARE,
    PREFILL,
    RESPONSE,
    SAMPLE,
    SCORER,
    SFT,
    LoraShape,
    ModelUse,
    PassUse,
    Workload,
)
from dschat.functional.logprobs import DEVICE_BLOCK
from dschat.models.adapted import adapted_layers
from dschat.models.heap_trace import heap_traced
from dschat.models.load import check_context, resolve_dtype
from dschat.models.memory_trace import (
    Moments,
    cache_bytes_per_token,
    compare_pass,
    prefill_pass,
    response_pass,
    scorer_pass,
    sft_pass,
    traced,
)
from dschat.models.shapes import build, find_shape, has_equal_layers, with_depth
from dschat.models.specs import LoraSpec

import torch

DEPTHS, HEAP_DEPTHS = (1, 2), (8, 16)  # layers of the models that are traced for a deeper one


def make_plan(work: Workload, machine: Machine) -> Plan:
    """
    Raises:
        UserError: a model whose shape cannot be had, or that has too few positions.
    """
    dtype = torch.bfloat16 if work.dtype == "auto" and not machine.on_cpu else None  # of the GPUs that are planned for
    dtype = dtype or resolve_dtype(work.dtype, torch.device("cpu" if machine.on_cpu else "cuda"))
    uses = {use.role: use for use in work.models}
    models = {role: planned_model(use, dtype) for role, use in uses.items()}
    for use in work.models:
        check_context(find_shape(use.path), *work.longest)
    trained = [role for role, model in models.items() if model.num_trained]
    phases: list[Phase] = []
    for item in work.passes:
        # Every model has made its backward pass before the first makes its step.
        place = trained.index(item.role) if item.train else 0
        before, after = (
            sum((models[role].waiting(machine) for role in roles), Counter())
            for roles in (trained[:place], trained[place + 1 :])
        )
        found = phases_of(item, uses[item.role], models[item.role], dtype, machine)
        phases += [phase.beside(after if phase.is_step else before) for phase in found] if item.train else found
    return Plan(work.title, machine, list(models.values()), phases, work.num_checkpoints)


def planned_model(use: ModelUse, dtype: torch.dtype) -> PlannedModel:
    size = _count(use.path, use.is_scorer, use.lora, use.quantized_bits > 0)
    return PlannedModel(
        use.role,
        use.path.rstrip("/").rsplit("/", 1)[-1],
        num_weights=size.num_weights,
        num_trained=size.num_trained if use.is_trained else 0,
        itemsize=dtype.itemsize,
        zero_stage=max(use.zero_stage, 1) if dtype != torch.float32 and use.is_trained else use.zero_stage,
        accumulates=use.accumulates,
        offload=use.offload,
        has_average=use.has_average,
        shares_trunk=use.shares_trunk,
        saves_adapter=use.saves_adapter,
        num_quantized=size.num_quantized,
        quantized_bits=use.quantized_bits,
    )


class Size(NamedTuple):
    num_weights: int
    num_trained: int
    num_quantized: int


@cache
def _count(path: str, is_scorer: bool, lora: LoraShape, is_quantized: bool) -> Size:
    model = build(find_shape(path), torch.float32, is_scorer=is_scorer, lora=lora_spec(lora))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    layers = set(adapted_layers(model, "auto")) if is_quantized else set()
    quantized = [p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") in layers]
    trained = sum(size for size, is_trained in sizes if is_trained)
    return Size(sum(size for size, _ in sizes), trained, sum(quantized))


def lora_spec(shape: LoraShape) -> LoraSpec | None:
    return LoraSpec(*shape) if shape[0] else None


def phases_of(item: PassUse, use: ModelUse, model: PlannedModel, dtype: torch.dtype, machine: Machine) -> list[Phase]:
    """What the largest pass of a phase takes; of training its three moments: the loss, the end of the backward pass,
    the optimizer's step."""
    in_pass = machine.on_cpu and item.train and model.zero_stage < 2  # traced with its gradients, as they share a heap
    moments = pass_bytes(item, use, dtype, machine.on_cpu, in_pass)
    *first, last = (model.in_use(machine) + Counter(found) for found in moments)
    fullest, activations = max(first, key=Counter.total), max(found.get(ACTIVATIONS, 0) for found in moments)
    if not machine.on_cpu and item.kind != SCORER:  # float32 copies of a block of logits (functional/logprobs.py)
        fullest[LOGITS] += min(3 * 4 * DEVICE_BLOCK, 6 * fullest[LOGITS])
    if item.kind == SAMPLE and model.zero_stage == 3:
        fullest[WEIGHTS] += model.itemsize * model.num_weights  # a rollout at stage 3 gathers a whole copy
    if not item.train:
        return [Phase(item.phase, fullest, activations)]
    gradients, step = model.in_backward(machine), model.in_step(machine)
    if in_pass:
        own = Counter({GRADIENTS: gradients[GRADIENTS]})
        gradients, step = gradients - own, last + (step - own)
    elif model.accumulates:
        fullest += gradients
    return [
        Phase(f"{item.phase}: loss", fullest, activations),
        Phase(f"{item.phase}: gradients", last + gradients),
        Phase(f"{item.phase}: step", step, is_step=True),
    ]


def pass_bytes(
    item: PassUse, use: ModelUse, dtype: torch.dtype, on_cpu: bool, keeps_gradients: bool = False
) -> Moments:
    """Activations, logits and cache of a pass by kind, at its moments; on a CPU by where they are (heap_trace.py), and
    with ``keeps_gradients`` these too.

    They are linear in the layers, which are all alike: two depths are traced, and a model of unlike layers whole. How
    a heap fills up is linear only of some layers on.
    """
    if item.kind == SAMPLE:
        prompt_size = item.num_tokens - item.response_size
        prompts = replace(item, kind=PREFILL, num_rows=item.num_prompts, num_tokens=prompt_size)
        first, *others = pass_bytes(prompts, use, dtype, on_cpu)
        return [first | _decoding(item, use, dtype, on_cpu), *others]
    config = find_shape(use.path)
    depth, (low, high) = config.num_hidden_layers, HEAP_DEPTHS if on_cpu else DEPTHS
    shape = use.path, use.checkpointing, use.lora, use.accumulates and keeps_gradients
    same = replace(item, phase=""), shape, dtype, on_cpu, keeps_gradients
    if depth <= high or not has_equal_layers(config):
        return _traced_pass(*same, depth)
    return _line(_traced_pass(*same, low), _traced_pass(*same, high), (depth - low) / (high - low))


def _line(one: Sequence[Mapping[str, int]], two: Sequence[Mapping[str, int]], place: float) -> Moments:
    """At ``place``, of what has these values at 0 and 1."""

    def at(low: Mapping[str, int], high: Mapping[str, int]) -> dict[str, int]:
        ends = {kind: (low.get(kind, 0), high.get(kind, 0)) for kind in {**low, **high}}
        return {kind: max(0, round(first + place * (second - first))) for kind, (first, second) in ends.items()}

    return [at(*pair) for pair in zip(one, two, strict=True)]


@cache
def _traced_pass(
    item: PassUse,
    shape: tuple[str, bool, LoraShape, bool],
    dtype: torch.dtype,
    on_cpu: bool,
    keeps_gradients: bool,
    depth: int,
) -> Moments:
    path, checkpointing, lora, accumulates = shape
    config = with_depth(find_shape(path), depth)
    model = build(config, dtype, is_scorer=item.kind == SCORER, lora=lora_spec(lora))
    size = item.num_rows, item.num_tokens
    if checkpointing and item.train:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if item.kind == SFT:
        run = sft_pass(model, *size, train=item.train)
    elif item.kind == RESPONSE:
        run = response_pass(model, *size, item.response_size, train=item.train)
    elif item.kind == SCORER:
        run = scorer_pass(model, *size, train=item.train)
    elif item.kind == COMPARE:
        run = compare_pass(model, *size, item.response_size)
    else:
        assert item.kind == PREFILL
        run = prefill_pass(model, *size)
    if on_cpu:
        num_passes = 0 if not item.train else 2 if accumulates else 1
        return heap_traced(model, run, keeps_gradients=keeps_gradients, num_passes=num_passes)
    return traced(model, config.vocab_size, run, on_cpu=False)


def _decoding(item: PassUse, use: ModelUse, dtype: torch.dtype, on_cpu: bool) -> dict[str, int]:
    """A cache with a place for every token, and what drawing one needs: log-probabilities, two sums of theirs and the
    logits."""
    config = find_shape(use.path)
    of_layer = cache_bytes_per_token(build(with_depth(config, 1), dtype, is_scorer=False), on_cpu=on_cpu)
    cache_size = item.num_rows * item.num_tokens * config.num_hidden_layers * of_layer
    return {CACHE: cache_size, LOGITS: item.num_rows * config.vocab_size * (3 * 4 + dtype.itemsize)}
