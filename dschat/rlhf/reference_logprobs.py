"""The reference's log-probabilities of every row: computed once, before training, and kept on disk by content.

So no second model is in memory while the policy is trained, and another run on the same rows reads them.
"""

import gc
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from dschat.engine.deepspeed_engine import create_frozen_model
from dschat.engine.distributed import Runtime, all_reduce_sum
from dschat.engine.micro_batches import MicroBatches
from dschat.engine.release import release
from dschat.engine.sharded_loading import sharded_loading, whole_weights
from dschat.errors import UserError
from dschat.models.liger import apply_liger
from dschat.models.load import check_context, load_causal_lm
from dschat.report.progress import Console
from dschat.rlhf.answer_logprobs import ask_answers
from dschat.rlhf.answer_rows import AnswerRows
from dschat.rlhf.rlhf_engine import require_same_tokenizer

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = "1"  # change it with anything here, in answer_logprobs.py or in collate_answers.py that changes a value


def weights_hash(model: PreTrainedModel) -> str:
    """sha256 over the config and the names, shapes and bytes of the weights, the same on every rank. Where they are
    sharded it is a collective."""
    ours = ("_name_or_path", "transformers_version")
    config = {name: value for name, value in model.config.to_dict().items() if name not in ours}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        with whole_weights([tensor]):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def reference_logprobs(
    model: nn.Module, family: PreTrainedModel, weights: str, rows: AnswerRows, cache_dir: str, console: Console
) -> tuple[Tensor, bool]:
    """(N, 2) float32 on the CPU: log-probabilities, in nats, of the two answers of each row; and whether they were
    read from the cache. A collective; equal on every rank.

    Args:
        model: the reference, or its engine; it is put into eval mode.
        family: the Hugging Face model inside.
        weights: its `weights_hash`.
        rows: without their `ref_logps`.
        cache_dir: the folder of the data cache.
        console: shows how far it is.

    Raises:
        UserError: a log-probability is not finite.
    """
    runtime, shape = rows.runtime, (len(rows.rows), 2)
    name = hashlib.sha256(json.dumps([VERSION, weights, *rows.key]).encode()).hexdigest()[:32]
    path = Path(cache_dir) / "reference_logprobs" / f"{name}.safetensors"
    kept = _read(path, shape) if runtime.is_main else None
    was_read = bool(all_reduce_sum(torch.tensor(float(kept is not None)), runtime))
    if was_read:  # rank 0 tells the others, whose disk may be another
        values = all_reduce_sum(torch.zeros(shape) if kept is None else kept, runtime)
        return values.float().cpu(), True
    values = _compute(model, family, rows, console)
    assert values.shape == shape
    if not values.isfinite().all():
        raise UserError(
            f"{family.config.name_or_path}: as the reference it gives log-probabilities that are not finite; "
            "use --dtype bf16 or fp32, or another model"
        )
    if runtime.is_main:
        _write(path, values)
    return values, False


def with_frozen_model(
    path: str,
    policy_path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    use: Callable[[nn.Module, PreTrainedModel, str], None],
    *,
    dtype: torch.dtype,
    zero_stage: int,
    runtime: Runtime,
    use_liger_kernel: bool,
) -> None:
    """Call ``use`` with the model at ``path``: frozen, the Hugging Face model inside, its `weights_hash`. On return it
    is out of memory again.

    Raises:
        UserError: no language model, one with another tokenizer than the policy's or with too few positions.
    """
    require_same_tokenizer(policy_path, tokenizer, path)
    with sharded_loading(zero_stage, dtype):
        family = load_causal_lm(path, tokenizer, dtype=dtype, dropout=0.0)
    check_context(family.config, max_seq_len, "--max_seq_len")
    if use_liger_kernel:
        apply_liger(family)
    weights = weights_hash(family)
    model = create_frozen_model(family, zero_stage=zero_stage, dtype=dtype, device=runtime.device)
    try:
        use(model, family, weights)
    finally:
        release(model)
        del model, family
        gc.collect()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()


def _compute(model: nn.Module, family: PreTrainedModel, rows: AnswerRows, console: Console) -> Tensor:
    batches = console.track(rows.in_order(), len(rows.steps), "reference")
    memory = MicroBatches(rows.runtime, [model], unit="{} rows for the reference")
    return ask_answers(model, family, batches, memory).logps.cpu()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The stored values, or None: there are none, or the file is damaged."""
    try:
        values = load_file(str(path))["logps"]
    except (OSError, SafetensorError, KeyError):
        return None
    whole = values.shape == shape and values.dtype == torch.float32 and bool(values.isfinite().all())
    return values if whole else None


def _write(path: Path, values: Tensor) -> None:
    """Whole or not at all, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save_file({"logps": values.contiguous()}, str(temporary))
    os.replace(temporary, path)
