"""One step of decoding: the next token of every slot of a preallocated key-value cache, each at its own position.

A model's forward spends most of such a step in Python and in launching small operations, so it is recorded once for
inputs of one shape: on a CPU as a TorchScript trace, on a GPU as a CUDA graph, which also costs the host one launch
for all kernels. A recorded step must give the model's own numbers: it is compared with the plain one when it is made.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dschat.models.precision import tolerance
from dschat.rlhf.rollout import draw
from dschat.rlhf.specs import Sampling

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

Step = Callable[..., tuple[Tensor, Tensor]]


def forward_step(model: PreTrainedModel, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The plain step for inputs of this shape: tokens, positions (S,); of each layer keys and values (S, H, width, D);
    the weights of the model. It writes to the cache and gives the logits (S, V) of the next tokens."""
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


def draw_step(model: PreTrainedModel, sampling: Sampling, inputs: Sequence[Tensor]) -> Step:
    """`forward_step` and the draw: of tokens, positions, uniforms (S,) and the rest the next tokens (S,) and their
    log-probabilities (S,)."""
    forward = forward_step(model, [*inputs[:2], *inputs[3:]])

    def step(tokens: Tensor, positions: Tensor, uniforms: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return draw(forward(tokens, positions, *rest), sampling, uniforms)

    return step


def weights_of(model: PreTrainedModel) -> list[Tensor]:
    """The memory of the parameters, each once, without gradients."""
    return [parameter.detach() for parameter in model.parameters()]


def traced(step: Step, model: PreTrainedModel, inputs: Sequence[Tensor]) -> Step:
    """The step as a TorchScript function, for inputs of this shape.

    The weights are inputs: of constants a trace may merge those that are equal when it is made. Recording makes the
    step, and so does comparing: the cache is written with the same numbers again.

    Raises:
        RuntimeError: the recorded step gives other numbers than the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is constant in a trace, which a step's is
        found: Any = torch.jit.trace(step, tuple(inputs), check_trace=False)
    if not _agree(found(*inputs), step(*inputs), model.dtype):
        kind = type(model).__name__
        raise RuntimeError(f"a recorded step of {kind} gives other numbers than the model; use --rollout_engine hf")
    return found


class Graphs:
    """The steps of one rollout on a GPU as CUDA graphs, which share the memory of what they compute in between.

    A graph reads and writes the memory that it was recorded with: tokens, positions and uniforms are copied there;
    cache and weights must stay where they are, so the graphs end with the rollout.
    """

    def __init__(self) -> None:
        self.problem = ""  # why steps run plainly
        self._pool: Any = None

    def record(self, step: Step, model: PreTrainedModel) -> Step:
        """The step, which becomes a graph when it is made for the second time; what was loaded or allocated for good
        in the first is not part of it."""
        calls, graphed = 0, None

        def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls, graphed
            if graphed is not None:
                return graphed(*inputs)
            calls += 1
            result = step(*inputs)
            if calls == 2 and not self.problem:
                graphed = self._graphed(step, inputs, result, model)
            return result

        return run

    def _graphed(
        self, step: Step, inputs: Sequence[Tensor], result: tuple[Tensor, Tensor], model: PreTrainedModel
    ) -> Step | None:
        """The graph of a step that gave ``result``; None, with a warning, where none can be made or it differs."""
        own = [x.clone() for x in inputs[:3]]
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            back = torch.cuda.stream(torch.cuda.current_stream())  # even where ending the recording fails
            with back, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                tokens, logprobs = step(*own, *inputs[3:])
        except Exception as error:  # whatever a family's code does that a graph cannot hold, such as asking the GPU
            self.problem = " ".join(str(error).split())[:200]
        else:
            kept = inputs[3:]  # whose memory the graph reads

            def replay(*given: Tensor) -> tuple[Tensor, Tensor]:
                assert len(given) == len(own) + len(kept)
                for x, new in zip(own, given, strict=False):
                    x.copy_(new)
                graph.replay()
                return tokens, logprobs  # which the next call replaces

            if _agree(replay(*inputs), result, model.dtype):
                return replay
            self.problem = "a graph gives other numbers than the model"
        warnings.warn(f"decoding without CUDA graphs, which is slower: {self.problem}", stacklevel=2)
        return None


def _agree(recorded: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], dtype: torch.dtype) -> bool:
    """Whether both drew the same with the same log-probabilities. Rounding differs in rare cases, and may turn the
    choice of a token then."""
    same = recorded[0] == own[0]
    gap = (recorded[1] - own[1])[same].abs().max().item() if same.any() else 0.0
    return int((~same).sum()) <= 1 + len(same) // 10 and gap <= tolerance(dtype)


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
