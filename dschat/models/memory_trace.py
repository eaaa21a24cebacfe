"""What a pass of a model takes of memory: the very pass, of a model without weights on torch's meta device, counted.

No formula per family: the operations that a training step makes are made, with shapes and no numbers, and every piece
of memory is counted from when it is made until it is let go. So checkpointing, tied embeddings, adapters and what the
losses keep are in it, for every family, and a model of any size is measured in a second.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import finalize

from dschat.engine.memory_plan import ACTIVATIONS, LOGITS
from dschat.functional import entropy, sft_loss, token_logprobs
from dschat.models.attention import KEPT_KEYS
from dschat.models.forward import model_inputs, response_logits
from dschat.models.scorer import Scorer

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

_NAME = "dschat_trace"  # of the attention that a traced model has


# Moments of a pass: until the backward pass leaves the last layer, until it has left the first, and after that.
BEFORE, INSIDE, AFTER = range(3)
Moments = Sequence[dict[str, int]]  # bytes by kind at the fullest time of each of the three moments


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside of it that are still in use, by kind, and keeps the `Moments`.

    What ends in a vocabulary is logits, the rest activations. Parameters are not counted, and neither are their
    gradients, once they are whole: how long these are held is a matter of ZeRO (engine/memory_plan.py).
    """

    def __init__(self, model: nn.Module, vocab_size: int, *, keeps_gradients: bool = False):
        super().__init__()
        self.vocab_size, self.keeps_gradients = vocab_size, keeps_gradients
        self.live: Counter[str] = Counter()
        self.peaks: list[dict[str, int]] = [{}, {}, {}]
        self.moment = BEFORE
        self._kinds = {tensor.untyped_storage()._cdata: "" for tensor in model.parameters()}  # of storages in use
        self._kinds |= {tensor.untyped_storage()._cdata: "" for tensor in model.buffers()}
        layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        inner = {id(parameter) for layer in layers for parameter in layer.parameters()}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._num_inner = self._waiting = len(inner & {id(parameter) for parameter in trained})
        for parameter in trained:
            drop = self._drop_inner if id(parameter) in inner else self._drop
            parameter.register_post_accumulate_grad_hook(drop)

    def begin(self) -> None:
        """Another pass."""
        self._waiting, self.moment = self._num_inner, BEFORE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._kinds:
            return
        self._kinds[storage._cdata] = self.kind_of(tensor)
        self.live[self._kinds[storage._cdata]] += storage.nbytes()
        finalize(storage, self._free, storage._cdata, storage.nbytes())
        if sum((now := self._now()).values()) > sum(self.peaks[self.moment].values()):
            self.peaks[self.moment] = now

    def kind_of(self, tensor: Tensor) -> str:
        return LOGITS if tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size else ACTIVATIONS

    def _now(self) -> dict[str, int]:
        return dict(self.live)

    def _free(self, key: int, num_bytes: int) -> None:
        self.live[self._kinds.pop(key)] -= num_bytes

    def _drop_inner(self, parameter: Tensor) -> None:
        self._drop(parameter)
        self._waiting -= 1
        self.moment = INSIDE if self._waiting else AFTER

    def _drop(self, parameter: Tensor) -> None:
        if not self.keeps_gradients:
            parameter.grad = None


Pass = Callable[[], Any]


def traced(model: nn.Module, vocab_size: int, run: Pass, *, on_cpu: bool) -> Moments:
    """Counts ``run``. ``model`` is on the meta device.

    ``on_cpu``: count what the attention keeps on a CPU, where in bf16 it is our own (models/attention.py).
    """
    with traced_attention(model, on_cpu), all_true_masks(), LiveBytes(model, vocab_size) as counted:
        run()
    return counted.peaks


# The passes of the programs


def sft_pass(model: PreTrainedModel, num_rows: int, num_tokens: int, *, train: bool = True) -> Pass:
    """Step 1 on rows of ``num_tokens``, all of them answer."""
    ids, mask = _rows(num_rows, num_tokens)

    def run() -> None:
        logits = model(**model_inputs(model, ids, mask), use_cache=False).logits
        loss, _ = sft_loss(logits[:, :-1], ids[:, 1:])
        _backward(loss, train)

    return _mode(model, run, train)


def response_pass(
    model: PreTrainedModel, num_rows: int, num_tokens: int, response_size: int, *, train: bool = True
) -> Pass:
    """The log-probabilities of the last ``response_size`` tokens: DPO, the actor, the reference."""
    ids, mask = _rows(num_rows, num_tokens)

    def run() -> None:
        logits = response_logits(model, model, ids, mask, response_size)
        _backward(token_logprobs(logits, ids[:, -response_size:], banned_ids=(0,)).sum(), train)

    return _mode(model, run, train)


def scorer_pass(model: PreTrainedModel, num_rows: int, num_tokens: int, *, train: bool = True) -> Pass:
    """The scores of every prefix: step 2, the reward, the critic."""
    ids, mask = _rows(num_rows, num_tokens)
    return _mode(model, lambda: _backward(Scorer(model)(ids, mask).sum(), train), train)


def compare_pass(model: PreTrainedModel, num_rows: int, num_tokens: int, response_size: int) -> Pass:
    """Reference and actor, both of this shape, asked about the same answers, as a rollout is scored: the logits of a
    micro-batch are let go when those of the next are there."""
    ids, mask = _rows(num_rows, num_tokens)

    def run() -> None:
        for _ in range(2):
            reference = response_logits(model, model, ids, mask, response_size)
            token_logprobs(reference, ids[:, -response_size:], banned_ids=(0,))
            logits = response_logits(model, model, ids, mask, response_size)
            entropy(logits, banned_ids=(0,))

    return _mode(model, run, train=False)


def prefill_pass(model: PreTrainedModel, num_rows: int, num_tokens: int) -> Pass:
    """Prompts into a cache, which is counted with the activations."""
    ids, mask = _rows(num_rows, num_tokens)

    def run() -> Any:
        cache = DynamicCache(config=model.config)
        return model(**model_inputs(model, ids, mask), past_key_values=cache, use_cache=True, logits_to_keep=1)

    return _mode(model, run, train=False)


def cache_bytes_per_token(model: PreTrainedModel, *, on_cpu: bool) -> int:
    """Of keys and values, in all layers."""
    cache: Any = DynamicCache(config=model.config)
    ids, mask = _rows(1, 1)
    with torch.no_grad(), traced_attention(model, on_cpu):
        model(**model_inputs(model, ids, mask), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _rows(num_rows: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(num_rows, num_tokens, dtype=torch.long, device="meta")
    return ids, torch.ones(num_rows, num_tokens, dtype=torch.bool, device="meta")


def _backward(loss: Tensor, train: bool) -> None:
    if train:
        loss.backward()


def _mode(model: nn.Module, run: Pass, train: bool) -> Pass:
    def in_mode() -> Any:
        model.train(train)
        with torch.set_grad_enabled(train):
            return run()

    return in_mode


# Where the meta device needs help


@contextmanager
def all_true_masks() -> Iterator[None]:
    """Of a mask without numbers every element counts as True: the most that indexing by it can give."""
    before = fx_config.meta_nonzero_assume_all_nonzero
    fx_config.meta_nonzero_assume_all_nonzero = True
    try:
        yield
    finally:
        fx_config.meta_nonzero_assume_all_nonzero = before


@contextmanager
def traced_attention(model: nn.Module, on_cpu: bool) -> Iterator[None]:
    """torch has no fused attention on the meta device and would count scores that no fused kernel ever stores."""
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    before = [owner.config._attn_implementation for owner in owners]
    fused = [name in ("sdpa", "dschat") for name in before]
    _kernel.on_cpu = on_cpu
    try:
        for owner, is_fused in zip(owners, fused, strict=True):
            if is_fused:
                owner.config._attn_implementation = _NAME
        yield
    finally:
        for owner, name in zip(owners, before, strict=True):
            owner.config._attn_implementation = name


class _Kernel:
    on_cpu = True


_kernel = _Kernel()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `models.attention.attention` in what it takes, gives and keeps."""
    groups = query.shape[1] // key.shape[1]
    is_ours = _kernel.on_cpu and query.dtype == torch.bfloat16
    if groups > 1 and not is_ours:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    result = _Attention.apply(query, key, value, is_ours)
    return (result if is_ours else result.transpose(1, 2).contiguous()), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_ours: bool) -> Tensor:
        rows, heads, num_queries, _ = query.shape
        sums = query.new_empty(rows, heads, num_queries, dtype=torch.float32)
        if not is_ours:
            result = query.new_empty(*query.shape[:3], value.shape[3])
            ctx.save_for_backward(query, key, value, result, sums)
            return result
        result = query.new_empty(rows, num_queries, heads, value.shape[3])
        kept = [x.contiguous() for x in (query, key, value)]
        if key.shape[2] <= KEPT_KEYS:
            kept.append(query.new_empty(rows, heads, num_queries, key.shape[2]))
        ctx.save_for_backward(*kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None)


def _mask(
    batch_size: int, q_length: int, kv_length: int, *args: Any, device: Any = None, **options: Any
) -> Tensor | None:
    return torch.empty(batch_size, 1, int(q_length), int(kv_length), dtype=torch.bool, device=device)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
