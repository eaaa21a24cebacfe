"""The rollout engine: answers decoded in slots of a preallocated key-value cache, each at its own position.

A slot holds one answer. Its prompt is computed at once, however many answers it has, then a step gives every slot its
next token. An answer that has ended makes place for the next prompt, or the slots become fewer, so that nothing
finished is computed. A step of the model is recorded for each number of slots and width of the cache
(`decode_step.py`), and works on the live training weights. On a CPU a small model is decoded by as many threads as
there are cores, each with slots of its own: a step's matrices are too small to be worth splitting. On a GPU the host
runs ahead: what has ended is found there, and looked at every few steps.

`rollout.generate` is the plain reference: in float32 both give the same tokens.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from dschat.rlhf.decode_step import Graphs, Step, draw_step, traced, weights_of
from dschat.rlhf.rollout import Rollout
from dschat.rlhf.specs import PREFILL_TOKENS, Sampling

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

_WIDTH = 64  # columns of the cache are read in multiples of so many
_WIDTHS = 8  # and in so many different widths at most
_SMALL_WEIGHTS = 2**27  # bytes up to which each core decodes by itself: they stay in the caches
_LOOK_EVERY = 8  # steps of a GPU, between which nobody waits for it


class SlotDecoder:
    """Decodes answers of one model; keeps its recorded steps from rollout to rollout, where they may be kept."""

    def __init__(self) -> None:
        self.problem = ""  # why steps are not recorded
        self._steps: dict[Any, Step] = {}
        self._graphs: Graphs | None = None
        self._layout: list[tuple[int, int, torch.dtype]] = []  # heads, their size, dtype: keys and values by layer
        self._lock = threading.Lock()

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        sampling: Sampling,
        uniforms: Tensor,
        *,
        batch_size: int,
        eos_token_id: int,
        pad_token_id: int,
    ) -> Rollout:
        """As `rollout.generate`, with the cache of ``batch_size`` prompts and their answers at once."""
        num_samples = len(uniforms) // len(input_ids)
        prompts = [ids[mask] for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)]
        job = _Job(self, model, prompts, num_samples, sampling, uniforms.to(input_ids.device), eos_token_id)
        by_length = sorted(range(len(uniforms)), key=lambda row: len(prompts[row // num_samples]))
        num_threads = torch.get_num_threads()
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        num_workers = num_threads if input_ids.is_cpu and size <= _SMALL_WEIGHTS else 1
        num_workers = max(1, min(num_workers, len(uniforms) // 2))
        slots = -(-min(batch_size * num_samples, len(uniforms)) // num_workers)
        if num_workers > 1:
            torch.set_num_threads(1)
            try:
                with ThreadPoolExecutor(num_workers) as pool:
                    shares = [by_length[worker::num_workers] for worker in range(num_workers)]
                    list(pool.map(job.run, shares, [slots] * num_workers))  # which raises what a worker raised
            finally:
                torch.set_num_threads(num_threads)
        else:
            self._graphs = Graphs() if input_ids.is_cuda and not self.problem else None
            try:
                job.run(by_length, slots)
            finally:
                if not input_ids.is_cpu:
                    self._end_graphs()
        lengths = job.lengths[:-1]
        longest = int(lengths.max())
        response_mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
        response_ids = job.response_ids[:-1, :longest].masked_fill(~response_mask, pad_token_id)
        return Rollout(
            input_ids.repeat_interleave(num_samples, 0),
            attention_mask.bool().repeat_interleave(num_samples, 0),
            response_ids,
            response_mask,
            job.logprobs[:-1, :longest] * response_mask,
            response_ids.gather(1, lengths[:, None] - 1).squeeze(1) == eos_token_id,
        )

    def new_storage(self, model: PreTrainedModel, num_slots: int, width: int) -> list[Tensor]:
        """Keys and values (S, H, width, D) of each layer of ``model``, which is asked for their shapes once."""
        with self._lock:
            if not self._layout:
                found = prefill(model, torch.zeros(1, 1, dtype=torch.long, device=model.device))
                self._layout = [(x.shape[1], x.shape[3], x.dtype) for x in found]
        shapes = [((num_slots, heads, width, size), dtype) for heads, size, dtype in self._layout]
        return [torch.zeros(shape, dtype=dtype, device=model.device) for shape, dtype in shapes]

    def step(self, model: PreTrainedModel, sampling: Sampling, inputs: Sequence[Tensor]) -> Step:
        """The step for inputs of this shape, recorded where that can be. ``inputs``: tokens, positions, uniforms (S,);
        of each layer keys and values (S, H, width, D); the weights of the model."""
        key = (sampling, inputs[3].shape)
        with self._lock:
            if key not in self._steps:
                step = draw_step(model, sampling, inputs)
                if self._graphs is not None:
                    step = self._graphs.record(step, model)
                elif inputs[0].is_cpu:
                    step = traced(step, model, inputs)
                self._steps[key] = step
            return self._steps[key]

    def _end_graphs(self) -> None:
        """They know the cache of this rollout; and plain steps hold the model, at ZeRO 3 a copy for this rollout."""
        self._steps.clear()
        if self._graphs is not None:
            self.problem, self._graphs = self._graphs.problem, None


def prefill(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """(N, P) right-padded -> keys and values (N, H, P, D) of each layer. What padding adds is never attended to: an
    answer's own tokens replace it before they reach it."""
    cache: Any = DynamicCache(config=model.config)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


class _Job:
    """The answers of one rollout. Row number B of what is written is nobody's: empty slots write there."""

    def __init__(
        self,
        decoder: SlotDecoder,
        model: PreTrainedModel,
        prompts: list[Tensor],
        num_samples: int,
        sampling: Sampling,
        uniforms: Tensor,
        eos_token_id: int,
    ):
        self.decoder, self.model, self.sampling, self.eos_token_id = decoder, model, sampling, eos_token_id
        self.prompts, self.num_samples, self.weights = prompts, num_samples, weights_of(model)
        self.uniforms = torch.cat([uniforms, uniforms.new_zeros(1, uniforms.shape[1])])
        self.nobody = len(uniforms)
        size, device = (len(uniforms) + 1, sampling.max_new_tokens), uniforms.device
        self.response_ids = torch.zeros(size, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(size, device=device)
        self.lengths = torch.zeros(size[0], dtype=torch.long, device=device)

    @torch.no_grad()
    def run(self, rows: list[int], num_slots: int) -> None:
        """Decode these rows, in this order, in so many slots."""
        if not rows:
            return
        waiting = deque(rows)
        slots = _Slots(self, min(num_slots, len(rows)))
        look_every = 1 if self.uniforms.is_cpu else _LOOK_EVERY
        while True:
            free = (slots.rows == self.nobody).nonzero().squeeze(1)
            if waiting and 4 * len(free) >= len(slots.rows):
                slots.fill(free[: len(waiting)], [waiting.popleft() for _ in range(min(len(free), len(waiting)))])
            elif len(free) == len(slots.rows):
                return
            elif not waiting:
                slots.shrink(len(slots.rows) - len(free))
            slots.furthest = int(slots.positions.max())
            ended = torch.zeros_like(slots.rows, dtype=torch.bool)
            for number in count(1):
                ended |= slots.step()
                if number % look_every == 0 and ended.any():
                    break


class _Slots:
    """The state of each slot: its row, the token to feed, that token's position, how many tokens its answer has."""

    def __init__(self, job: _Job, num_slots: int):
        self.job = job
        device = job.uniforms.device
        longest = max(map(len, job.prompts)) + job.sampling.max_new_tokens
        self.unit = max(_WIDTH, -(-longest // (_WIDTHS * _WIDTH)) * _WIDTH)
        width = -(-longest // self.unit) * self.unit
        self.storage = job.decoder.new_storage(job.model, num_slots, width)
        self.rows = torch.full((num_slots,), job.nobody, device=device)
        self.tokens, self.positions, self.steps = (torch.zeros_like(self.rows) for _ in range(3))
        self.furthest = 0  # no slot is at a later position
        self._parts: dict[tuple[int, int], list[Tensor]] = {}

    def step(self) -> Tensor:
        """The next token of every slot; (S,) bool: whose answer ends with it. Such a slot is nobody's from then on."""
        job = self.job
        uniforms = job.uniforms[self.rows, self.steps]
        inputs = [self.tokens, self.positions, uniforms, *self._part(), *job.weights]
        self.tokens, logprobs = job.decoder.step(job.model, job.sampling, inputs)(*inputs)
        job.response_ids[self.rows, self.steps] = self.tokens
        job.logprobs[self.rows, self.steps] = logprobs
        self.steps = self.steps + 1
        job.lengths[self.rows] = self.steps
        ends = (self.tokens == job.eos_token_id) | (self.steps == job.sampling.max_new_tokens)
        runs = self.rows != job.nobody
        ended = runs & ends
        runs &= ~ends
        self.rows = torch.where(runs, self.rows, job.nobody)
        self.steps = self.steps * runs
        self.positions = (self.positions + 1) * runs
        self.furthest += 1
        return ended

    def _part(self) -> list[Tensor]:
        """Only as many columns of the cache as the furthest slot needs."""
        width = (self.furthest // self.unit + 1) * self.unit
        size = (len(self.rows), width)
        if size not in self._parts:
            self._parts[size] = [x[: size[0], :, :width] for x in self.storage]
        return self._parts[size]

    def fill(self, places: Tensor, rows: list[int]) -> None:
        """Begin the answers of ``rows`` in these slots: all of their prompts but the last token, which is fed next."""
        job = self.job
        of_prompt = [row // job.num_samples for row in rows]
        lengths = torch.tensor([len(job.prompts[n]) for n in of_prompt], device=places.device)
        self.rows[places] = torch.tensor(rows, device=places.device)
        self.tokens[places] = torch.stack([job.prompts[n][-1] for n in of_prompt])
        self.positions[places], self.steps[places] = lengths - 1, 0
        chunk = max(1, PREFILL_TOKENS // int(lengths.max()))
        different = sorted(set(of_prompt), key=of_prompt.index)
        for start in range(0, len(different), chunk):
            some = {n: k for k, n in enumerate(different[start : start + chunk])}
            ids = torch.nn.utils.rnn.pad_sequence([job.prompts[n][:-1] for n in some], batch_first=True)
            if ids.shape[1] == 0:
                continue
            here = [k for k, n in enumerate(of_prompt) if n in some]
            chosen = torch.tensor([some[of_prompt[k]] for k in here], device=places.device)
            for stored, computed in zip(self.storage, prefill(job.model, ids), strict=True):
                stored[places[here], :, : ids.shape[1]] = computed[chosen]

    def shrink(self, num_running: int) -> None:
        """Fewer slots, once half of them or a quarter are empty for good."""
        size = 1 << (num_running - 1).bit_length()
        size = size * 3 // 4 if num_running <= size * 3 // 4 else size
        if size >= len(self.rows):
            return
        order = (self.rows == self.job.nobody).int().argsort(stable=True)[:size]
        self.rows, self.tokens, self.positions, self.steps = (
            x[order] for x in (self.rows, self.tokens, self.positions, self.steps)
        )
        width = int(self.positions.max()) + 1
        for x in self.storage:
            x[:size, :, :width] = x[order, :, :width]
