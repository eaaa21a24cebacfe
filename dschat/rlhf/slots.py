"""The rollout engine: answers decoded in slots of a preallocated key-value cache, each at its own position.

A slot holds one answer. Its prompt is computed at once, however many answers it has, then a step gives every slot its
next token. An answer that has ended makes place for the next prompt, or the slots become fewer, so that nothing
finished is computed. One step of the model is recorded for each number of slots and width of the cache, as a
TorchScript trace that is given the live training weights: the same operations without Python between them. On a CPU a
small model is decoded by as many threads as there are cores, each with slots of its own: a step's matrices are too
small to be worth splitting.

`rollout.generate` is the plain reference: in float32 both give the same tokens.
"""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from dschat.models.precision import tolerance
from dschat.rlhf.rollout import Rollout, draw
from dschat.rlhf.specs import PREFILL_TOKENS, Sampling

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

Step = Callable[..., tuple[Tensor, Tensor]]
_WIDTH = 64  # columns of the cache are read in multiples of so many
_WIDTHS = 8  # and in so many different widths at most

_SMALL_WEIGHTS = 2**27  # bytes up to which each core decodes by itself: they stay in the caches


class SlotDecoder:
    """Decodes answers of one model; keeps its recorded steps from rollout to rollout."""

    def __init__(self) -> None:
        self._steps: dict[Any, Step] = {}
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
        if num_workers == 1:
            job.run(by_length, slots)
        else:
            torch.set_num_threads(1)
            try:
                with ThreadPoolExecutor(num_workers) as pool:
                    shares = [by_length[worker::num_workers] for worker in range(num_workers)]
                    list(pool.map(job.run, shares, [slots] * num_workers))  # which raises what a worker raised
            finally:
                torch.set_num_threads(num_threads)
        if not input_ids.is_cpu:
            self._steps.clear()  # plain steps hold the model, which at ZeRO 3 is a copy for this rollout
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
        """The recorded step for inputs of this shape. ``inputs``: tokens, positions, uniforms (S,); of each layer keys
        and values (S, H, width, D); the weights of the model."""
        key = (sampling, inputs[3].shape)
        with self._lock:
            if key not in self._steps:
                self._steps[key] = _record(model, sampling, inputs)
            return self._steps[key]


def forward_step(model: PreTrainedModel, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The plain step for inputs of this shape, those of `SlotDecoder.step` without the uniforms: it writes to the
    cache and gives the logits (S, V) of the next tokens."""
    rows = torch.arange(len(inputs[0]), device=inputs[0].device)[:, None]
    heads = torch.arange(inputs[2].shape[1], device=rows.device)[None]
    columns = torch.arange(inputs[2].shape[2], device=rows.device)
    size = len(inputs) - len(weights_of(model))

    def step(tokens: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
        where = (rows, heads, positions[:, None])
        storage, weights = rest[: size - 2], rest[size - 2 :]
        pairs = zip(storage[::2], storage[1::2], strict=True)
        cache = Cache(layers=[_SlotLayer(keys, values, where) for keys, values in pairs])
        given = {
            "input_ids": tokens[:, None],
            "position_ids": positions[:, None],
            "attention_mask": (columns <= positions[:, None])[:, None, None],
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with _with_weights(model, weights):
            return model(**given).logits[:, -1]

    return step


def _record(model: PreTrainedModel, sampling: Sampling, inputs: Sequence[Tensor]) -> Step:
    """One step of ``model`` as a TorchScript function; the plain step on devices other than a CPU.

    The weights are inputs: of constants a trace may merge those that are equal when it is made. Recording makes the
    step, and so does comparing: the cache is written with the same numbers again.

    Raises:
        RuntimeError: the recorded step gives other numbers than the model.
    """
    forward = forward_step(model, [*inputs[:2], *inputs[3:]])

    def step(tokens: Tensor, positions: Tensor, uniforms: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return draw(forward(tokens, positions, *rest), sampling, uniforms)

    if not inputs[0].is_cpu:
        return step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is constant in a trace, which a step's is
        traced: Any = torch.jit.trace(step, tuple(inputs), check_trace=False)
    (tokens, logprobs), (own_tokens, own_logprobs) = traced(*inputs), step(*inputs)
    same = tokens == own_tokens
    gap = (logprobs - own_logprobs)[same].abs().max().item() if same.any() else 0.0
    # Rounding differs in rare cases, and may turn the choice of a token then.
    if int((~same).sum()) > 1 + len(same) // 10 or not gap <= tolerance(model.dtype):
        kind = type(model).__name__
        raise RuntimeError(f"a recorded step of {kind} gives other numbers than the model; use --rollout_engine hf")
    return traced


def prefill(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """(N, P) right-padded -> keys and values (N, H, P, D) of each layer. What padding adds is never attended to: an
    answer's own tokens replace it before they reach it."""
    cache: Any = DynamicCache(config=model.config)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """The memory of the parameters, each once, without gradients."""
    return [parameter.detach() for parameter in model.parameters()]


@contextmanager
def _with_weights(model: PreTrainedModel, weights: Sequence[Tensor]) -> Iterator[None]:
    """The model with other tensors for its parameters. (torch.func.functional_call cannot be traced.)"""
    other = dict(zip(model.parameters(), weights, strict=True))
    found = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    try:
        for module, name, parameter in found:
            module._parameters[name] = other[parameter]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in found:
            module._parameters[name] = parameter


class _SlotLayer(CacheLayerMixin):
    """Keys and values (S, H, width, D) of all slots; a new token goes to its slot's own position."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, where: tuple[Tensor, ...]):
        super().__init__()
        self.keys, self.values, self.where = keys, values, where
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_put_(self.where, key_states[:, :, 0])
        self.values.index_put_(self.where, value_states[:, :, 0])
        return self.keys, self.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]


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
        size, device = (len(uniforms) + 1, sampling.max_new_tokens), uniforms.device
        self.response_ids = torch.zeros(size, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(size, device=device)
        self.lengths = torch.zeros(size[0], dtype=torch.long, device=device)

    @torch.no_grad()
    def run(self, rows: list[int], num_slots: int) -> None:
        """Decode these rows, in this order, in so many slots."""
        if not rows:
            return
        nobody, limit = len(self.uniforms) - 1, self.sampling.max_new_tokens
        waiting = deque(rows)
        slots = _Slots(self, min(num_slots, len(rows)), nobody)
        while True:
            free = (slots.rows == nobody).nonzero().squeeze(1)
            if waiting and 4 * len(free) >= len(slots.rows):
                slots.fill(free[: len(waiting)], [waiting.popleft() for _ in range(min(len(free), len(waiting)))])
            elif len(free) == len(slots.rows):
                return
            elif not waiting:
                slots.shrink(len(slots.rows) - len(free))
            ended = torch.zeros((), dtype=torch.bool)
            while not ended.any():
                inputs = slots.inputs(self.uniforms)
                tokens, logprobs = self.decoder.step(self.model, self.sampling, inputs)(*inputs)
                self.response_ids[slots.rows, slots.steps] = tokens
                self.logprobs[slots.rows, slots.steps] = logprobs
                running = slots.rows != nobody
                slots.steps += running
                slots.positions += running
                slots.tokens = tokens
                ended = running & ((tokens == self.eos_token_id) | (slots.steps == limit))
            self.lengths[slots.rows[ended]] = slots.steps[ended]
            slots.rows[ended], slots.steps[ended], slots.positions[ended] = nobody, 0, 0


class _Slots:
    """The state of each slot: its row, the token to feed, that token's position, how many tokens its answer has."""

    def __init__(self, job: _Job, num_slots: int, nobody: int):
        self.job = job
        device = job.uniforms.device
        longest = max(map(len, job.prompts)) + job.sampling.max_new_tokens
        self.unit = max(_WIDTH, -(-longest // (_WIDTHS * _WIDTH)) * _WIDTH)
        width = -(-longest // self.unit) * self.unit
        self.storage = job.decoder.new_storage(job.model, num_slots, width)
        self.rows = torch.full((num_slots,), nobody, device=device)
        self.tokens, self.positions, self.steps = (torch.zeros_like(self.rows) for _ in range(3))

    def inputs(self, uniforms: Tensor) -> list[Tensor]:
        """Of the step: only as many columns of the cache as the furthest slot needs."""
        width = (int(self.positions.max()) // self.unit + 1) * self.unit
        storage = [x[: len(self.rows), :, :width] for x in self.storage]
        return [self.tokens, self.positions, uniforms[self.rows, self.steps], *storage, *self.job.weights]

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
        order = (self.rows == len(self.job.uniforms) - 1).int().argsort(stable=True)[:size]
        self.rows, self.tokens, self.positions, self.steps = (
            x[order] for x in (self.rows, self.tokens, self.positions, self.steps)
        )
        width = int(self.positions.max()) + 1
        for x in self.storage:
            x[:size, :, :width] = x[order, :, :width]
