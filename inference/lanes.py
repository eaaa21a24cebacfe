"""Where answers are decoded together while others come and go: rows of one key-value cache, or a loop for each.

`SlotLanes` takes the steps of the rollout engine (`dschat/rlhf/slots.py`) and lets an answer begin at any step. What a
finished answer left in its row stays there: the next turn of the same conversation computes only what is new.
`PlainLanes` is for models that cannot be decoded so. Both draw as the rollout does: the same logits, the same draw,
the same random numbers.
"""

import dataclasses
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dschat.functional import token_logprobs
from dschat.models.precision import tolerance
from dschat.rlhf.decode_step import forward_step, weights_of
from dschat.rlhf.rollout import decode, draw
from dschat.rlhf.rollout_engine import why_not_slots
from dschat.rlhf.slots import SlotDecoder
from dschat.rlhf.specs import Sampling

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

COLUMNS = 64  # the cache has so many or twice, four times, … so many: a step is recorded for each width
_PREPARED = 2**28  # bytes of the largest cache for which steps are recorded before they are needed
_recording = threading.Lock()  # of one model at a time: torch's tracer has state of its own


@dataclass(eq=False)
class Request:
    """One answer to decode. ``uniforms`` (max_new_tokens,): its random numbers, one a token."""

    prompt_ids: list[int]
    sampling: Sampling
    uniforms: Tensor
    num_tokens: int = field(default=0, init=False)  # drawn so far


Drawn = list[tuple[Request, int, float]]  # a token and its log-probability in nats


class Lanes(Protocol):
    """Answers that are being decoded."""

    size: int  # how many at most
    note: str  # why these are not the fast ones; empty where they are

    def begin(self, request: Request) -> None:
        """Compute the prompt. There must be room."""

    def step(self) -> Drawn:
        """The next token of every answer."""

    def end(self, request: Request) -> None: ...

    def prepare(self) -> bool:
        """Something that makes later steps faster, for idle moments. False: there is nothing left."""


class PlainLanes:
    """Every answer in a loop of its own (`rollout.decode`)."""

    def __init__(self, model: PreTrainedModel, eos_token_id: int, size: int, note: str):
        self.model, self.eos_token_id, self.size, self.note = model, eos_token_id, size, note
        self._loops: dict[Request, Iterator[tuple[Tensor, Tensor, Tensor]]] = {}

    def begin(self, request: Request) -> None:
        ids = torch.tensor([request.prompt_ids], device=self.model.device)
        given = (ids, torch.ones_like(ids), request.sampling, request.uniforms[None].to(ids.device))
        self._loops[request] = decode(self.model, *given, self.eos_token_id)

    def step(self) -> Drawn:
        drawn = []
        for request, loop in self._loops.items():
            _, tokens, logprobs = next(loop)
            request.num_tokens += 1
            drawn.append((request, int(tokens), float(logprobs)))
        return drawn

    def end(self, request: Request) -> None:
        del self._loops[request]

    def prepare(self) -> bool:
        return False


@dataclass(eq=False)
class _Row:
    """A row of the cache: the tokens whose keys and values it holds, and the answer that is decoded in it."""

    ids: list[int] = field(default_factory=list)
    request: Request | None = None
    token: int = 0  # to be fed next
    used: int = 0  # when it was last begun in


class SlotLanes:
    """Rows of one cache. The answers that run are the first rows, so that a step computes few others; an idle row
    keeps what it holds: the step writes behind it."""

    note = ""

    def __init__(self, model: PreTrainedModel, size: int, context: int):
        self.model, self.size, self.context = model, size, context
        self.weights = weights_of(model)
        self.num_prompt_tokens = 0  # computed so far; the others of the prompts were there already
        self._rows: list[_Row] = []
        self._running = 0
        self._decoder = SlotDecoder()
        self._storage: list[Tensor] = []
        self._steps: dict[tuple[int, int], Callable[..., Tensor]] = {}
        self._clock = itertools.count(1)
        self._unrecorded = [(rows, width) for rows in _doubled(1, size) for width in _doubled(COLUMNS, context)]

    @torch.no_grad()
    def begin(self, request: Request) -> None:
        self._reserve(self._running + 1, len(request.prompt_ids) + request.sampling.max_new_tokens)
        self._swap(self._choose(request.prompt_ids), self._running)
        row = self._rows[self._running]
        *ids, row.token = request.prompt_ids
        known = _common(row.ids, ids)
        row.ids = row.ids[:known]
        if ids[known:]:
            self._prefill(self._running, ids[known:])
        row.request, row.used = request, next(self._clock)
        self._running += 1

    @torch.no_grad()
    def step(self) -> Drawn:
        if not self._running:
            return []
        count = min(self.size, _doubled(1, self._running)[-1])
        self._reserve(count, 1)
        device = self.model.device
        tokens = torch.tensor([row.token for row in self._rows[:count]], device=device)
        positions = [len(row.ids) for row in self._rows[:count]]
        width = _doubled(COLUMNS, max(positions) + 1)[-1]
        storage = [x[:count, :, :width] for x in self._storage]
        inputs = [tokens, torch.tensor(positions, device=device), *storage, *self.weights]
        logits = self._recorded(count, width, inputs)(*inputs)
        drawn = []
        for row, (token, logprob) in zip(self._rows, self._draw(logits), strict=False):
            assert row.request is not None
            row.ids.append(row.token)
            row.token = token
            row.request.num_tokens += 1
            drawn.append((row.request, token, logprob))
        return drawn

    def end(self, request: Request) -> None:
        (number,) = (i for i, row in enumerate(self._rows[: self._running]) if row.request is request)
        self._rows[number].request = None
        self._running -= 1
        self._swap(number, self._running)

    def prepare(self) -> bool:
        if not self._unrecorded or self.model.device.type != "cpu":
            return False
        count, width = self._unrecorded.pop(0)
        count = min(count, self.size)
        one = self._storage[0][0, 0, 0].nbytes * self._storage[0].shape[1] * len(self._storage)  # of a token
        if one * count * width > _PREPARED:
            return True
        zeros = torch.zeros(count, dtype=torch.long)
        storage = self._decoder.new_storage(self.model, count, width)
        self._recorded(count, width, [zeros, zeros, *storage, *self.weights])
        return True

    def _draw(self, logits: Tensor) -> list[tuple[int, float]]:
        """A token for every running answer, those of one sampling together, as the rollout draws them."""
        groups: dict[Sampling, list[int]] = {}
        requests = [row.request for row in self._rows[: self._running]]
        for number, request in enumerate(requests):
            assert request is not None
            groups.setdefault(dataclasses.replace(request.sampling, max_new_tokens=0), []).append(number)
        found: dict[int, tuple[int, float]] = {}
        for sampling, numbers in groups.items():
            uniforms = torch.stack([r.uniforms[r.num_tokens] for r in (requests[n] for n in numbers) if r is not None])
            tokens, logprobs = draw(logits[numbers], sampling, uniforms.to(logits.device))
            found |= dict(zip(numbers, zip(tokens.tolist(), logprobs.tolist(), strict=True), strict=True))
        return [found[number] for number in range(len(requests))]

    def _recorded(self, count: int, width: int, inputs: list[Tensor]) -> Callable[..., Tensor]:
        if (count, width) not in self._steps:
            with _recording:
                self._steps[count, width] = _record(self.model, inputs)
        return self._steps[count, width]

    def _prefill(self, number: int, ids: list[int]) -> None:
        """Keys and values of ``ids``, which follow what the row holds."""
        row = self._rows[number]
        start, stop = len(row.ids), len(row.ids) + len(ids)
        cache: Any = DynamicCache(config=self.model.config)
        if start:
            for layer, (keys, values) in enumerate(_pairs(self._storage)):
                cache.update(keys[number, None, :, :start], values[number, None, :, :start], layer)
        device = self.model.device
        positions = torch.arange(start, stop, device=device)[None]
        given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        self.model(input_ids=torch.tensor([ids], device=device), position_ids=positions, **given)
        for layer, (keys, values) in zip(cache.layers, _pairs(self._storage), strict=True):
            keys[number, :, start:stop] = layer.keys[0, :, start:stop]
            values[number, :, start:stop] = layer.values[0, :, start:stop]
        row.ids += ids
        self.num_prompt_tokens += len(ids)

    def _choose(self, ids: list[int]) -> int:
        """The idle row where most of the prompt is there already; if that costs another conversation more than this
        one gains, an empty row, and if there is none the one that has waited longest."""

        def gain(number: int) -> int:
            known = _common(self._rows[number].ids, ids)
            return 2 * known - len(self._rows[number].ids)

        idle = range(self._running, len(self._rows))
        best = max(idle, key=gain)
        if gain(best) > 0:
            return best
        if len(self._rows) < self.size and all(self._rows[i].ids for i in idle):
            self._reserve(len(self._rows) + 1, 1)
            return len(self._rows) - 1
        return min(range(self._running, len(self._rows)), key=lambda i: (bool(self._rows[i].ids), self._rows[i].used))

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        width = max(len(self._rows[one].ids), len(self._rows[other].ids))
        both, turned = [one, other], [other, one]
        for x in self._storage:
            x[both, :, :width] = x[turned, :, :width]
        self._rows[one], self._rows[other] = self._rows[other], self._rows[one]

    def _reserve(self, num_rows: int, num_columns: int) -> None:
        """Room for so many rows, and so many tokens in each."""
        have_rows, have_columns = (self._storage[0].shape[0], self._storage[0].shape[2]) if self._storage else (0, 0)
        rows = min(self.size, _doubled(1, max(num_rows, have_rows))[-1])
        columns = _doubled(COLUMNS, max(num_columns, have_columns))[-1]
        if (rows, columns) != (have_rows, have_columns):
            storage = self._decoder.new_storage(self.model, rows, columns)
            for new, old in zip(storage, self._storage, strict=False):
                new[:have_rows, :, :have_columns] = old
            self._storage = storage
        self._rows += [_Row() for _ in range(rows - len(self._rows))]


def open_lanes(model: PreTrainedModel, eos_token_id: int, size: int, context: int, sampling: Sampling) -> Lanes:
    """`SlotLanes` where the model is fit for them and they agree with a forward of it, else `PlainLanes`."""
    reason = why_not_slots(model)
    if reason is None:
        lanes = SlotLanes(model, size, context)
        try:
            gap = _gap(lanes, model, eos_token_id, sampling)
            if gap <= tolerance(model.dtype):
                return lanes
            reason = f"they are {gap:.1e} nats away from a forward of the model"
        except Exception as error:  # whatever a family's code does with our cache, the plain loop can do
            reason = " ".join(str(error).split())[:200]
    return PlainLanes(model, eos_token_id, size, f"each answer in a loop of its own: {reason}")


@torch.no_grad()
def _gap(lanes: SlotLanes, model: PreTrainedModel, eos_token_id: int, sampling: Sampling) -> float:
    """By how many nats the log-probabilities of a few made-up tokens differ from those of one forward. The second
    answer continues the first, so that what is kept between turns is proved too."""
    banned = {*sampling.banned_ids, eos_token_id}
    embeddings: Any = model.get_input_embeddings()
    ids = [i for i in range(embeddings.num_embeddings) if i not in banned][:12:2]
    few = dataclasses.replace(sampling, max_new_tokens=3, temperature=1.0, top_k=0, top_p=1.0)
    gap = 0.0
    for _ in range(2):
        request = Request(ids, few, torch.full((3,), 0.5))
        lanes.begin(request)
        drawn = [lanes.step()[0] for _ in range(3)]
        lanes.end(request)
        tokens = [token for _, token, _ in drawn]
        both = torch.tensor([ids + tokens], device=model.device)
        logits = model(input_ids=both, use_cache=False).logits[:, -4:-1]
        expected = token_logprobs(logits, both[:, -3:], **few.scored)[0].tolist()
        gap = max([gap, *(abs(a - b) for a, (_, _, b) in zip(expected, drawn, strict=True))])
        ids = ids + tokens + ids[:2]
    return gap


def _record(model: PreTrainedModel, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The step as a TorchScript function that gives the model's own logits; the plain step on other devices than a
    CPU. It writes the same numbers to the cache again."""
    step = forward_step(model, inputs)
    if not inputs[0].is_cpu:
        return step
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is constant in a trace, which a step's is
        traced: Any = torch.jit.trace(step, tuple(inputs), check_trace=False)
        own = step(*inputs).log_softmax(-1)
        for _ in range(2):  # the executor settles in its first two runs
            gap = (traced(*inputs).log_softmax(-1) - own).abs().max().item()
    if not gap <= tolerance(model.dtype):
        raise RuntimeError(f"a recorded step of {type(model).__name__} gives other numbers than the model")
    return traced


def _doubled(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, … up to the first that is at least ``last``."""
    numbers = [first]
    while numbers[-1] < last:
        numbers.append(2 * numbers[-1])
    return numbers


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _pairs(storage: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(storage[::2], storage[1::2], strict=True))
