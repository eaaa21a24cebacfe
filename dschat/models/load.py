"""Load and save models as Hugging Face directories. Loading is strict: no weight is silently made up."""

import json
from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from dschat import remote_code
from dschat.engine.sharded_loading import whole_loading, whole_weights
from dschat.errors import UserError
from dschat.models.activations import use_fused_gelu
from dschat.models.adapter_files import adapter_base, adapter_config
from dschat.models.attention import use_fast_attention
from dschat.models.quantized import quantized, require_whole
from dschat.models.scorer import Scorer, check_probes, load_score_stats

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

POLICY, REWARD, CRITIC = "policy", "reward", "critic"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU that has it and fp32 elsewhere.

    Raises:
        UserError: fp16 on a CPU, where its kernels and loss scaling are missing.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16 needs a GPU; use --dtype bf16 or fp32 on a CPU")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def load_causal_lm(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    dropout: float | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A causal language model from a directory or hub name, or the embedded one (``toy``).

    The embeddings are grown when the tokenizer has more tokens than the model; they are never shrunk. An adapter is
    merged into the model that it was trained on. ``quantization``: None, 4bit or 8bit.

    Raises:
        UserError: not a model, a reward model, or weights missing from the checkpoint.
    """
    model: PreTrainedModel
    if path == "toy":
        with whole_loading():
            model = AutoModelForCausalLM.from_config(toy_config(tokenizer), dtype=dtype)
    else:
        config = load_config(path)
        if model_role(path, config) != POLICY:
            raise UserError(f"{path} is a reward model, not a language model; give the directory of step 1")
        if base := adapter_base(path):
            require_whole(path, quantization)
            from dschat.models.lora import merge_adapter  # PEFT takes a second to import

            with whole_loading():
                return _fit(merge_adapter(load_causal_lm(base, tokenizer, dtype=dtype), path), tokenizer, dropout)
        model, info = _from_pretrained(AutoModelForCausalLM, path, config, dtype, **quantized(quantization, dtype))
        _require_exact(path, info["missing_keys"], info["unexpected_keys"])
    return _fit(model, tokenizer, dropout)


def load_scorer(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    dropout: float | None = None,
    quantization: str | None = None,
) -> PreTrainedModel:
    """A sequence classifier with one label whose trunk is the model at ``path``: the start of step 2.

    A reward model keeps its head; any other model gets a new one, N(0, 1 / (d + 1)) as in Stiennon et al. (2020). An
    adapter is merged into the model that it was trained on.
    """
    if path == "toy":
        config: PretrainedConfig = toy_config(tokenizer)
        config.num_labels = 1
        with whole_loading():
            model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        missing, unexpected = ["score.weight"], []
    elif base := adapter_base(path):
        require_whole(path, quantization)
        from dschat.models.lora import merge_adapter  # PEFT takes a second to import

        with whole_loading():
            return _fit(merge_adapter(load_scorer(base, tokenizer, dtype=dtype), path), tokenizer, dropout)
    else:
        model, info = _from_pretrained(
            AutoModelForSequenceClassification,
            path,
            load_config(path),
            dtype,
            num_labels=1,
            **quantized(quantization, dtype),
        )
        missing = list(info["missing_keys"])
        trunk = f"{model.base_model_prefix}."
        unexpected = [name for name in info["unexpected_keys"] if name.startswith(trunk)]  # else: the head it had
    _require_exact(path, [name for name in missing if not name.startswith("score.")], unexpected)
    if missing:
        head = model.score
        with whole_weights(head.parameters(), changed=True):
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
    return _fit(model, tokenizer, dropout)


def load_trained_scorer(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    normalize: bool,
    verify: bool = True,
    device: torch.device | None = None,
) -> Scorer:
    """The reward model of step 3, or the critic that starts from it, with dropout off.

    With ``normalize`` its scores are (raw - mean) / std by the statistics of step 2, which with ``verify`` are proved
    first: the model must score the probe texts beside them as it did then. ``device``: where to put the model before
    that (default: it stays on the CPU, where the probes of a large model take long).

    Raises:
        UserError: a language model, a classifier with several labels, a head that the checkpoint lacks or that reads
            one position only; statistics that are missing, damaged or not those of this model and tokenizer.
    """
    if path == "toy":
        raise UserError("toy is not a trained reward model; run step 2 first and give its --output_dir")
    config = load_config(path)
    if model_role(path, config) == POLICY:
        raise UserError(f"{path} is a language model, not a reward model; give the directory of step 2")
    if config.num_labels != 1 and not adapter_base(path):
        raise UserError(f"{path} has {config.num_labels} labels; a reward model has exactly one")
    if adapter_base(path):
        model = load_scorer(path, tokenizer, dtype=dtype)
    else:
        model, info = _from_pretrained(AutoModelForSequenceClassification, path, config, dtype)
        _require_exact(path, info["missing_keys"], info["unexpected_keys"])
    if not hasattr(model, "score"):
        raise UserError(
            f"{path}: {type(model).__name__} gives no score per token; use a reward model made from a language model, "
            "or serve this one and give its address as api:URL"
        )
    scorer = Scorer(_fit(model, tokenizer, 0.0), *(load_score_stats(path) if normalize else (0.0, 1.0)))
    if device is not None:
        scorer.to(device)
    if normalize and verify:
        check_probes(path, scorer)
    return scorer


def model_role(path: str, config: PretrainedConfig) -> str:
    """policy, reward or critic: as run.json says, else by the architecture in the config."""
    record = Path(path) / "run.json"
    if record.is_file():
        try:
            return json.loads(record.read_text(encoding="utf-8"))["role"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{record} is damaged ({error}); restore or delete it") from None
    if adapter_base(path):
        return REWARD if adapter_config(path).get("task_type") == "SEQ_CLS" else POLICY
    names = config.architectures or []
    return REWARD if any(name.endswith("ForSequenceClassification") for name in names) else POLICY


def toy_config(tokenizer: PreTrainedTokenizerBase) -> GPT2Config:
    """The embedded task's model: a GPT-2 of 0.6 million parameters without dropout.

    At equal time on two cores it learns more of the task than a Llama of that size, whose small kernels cost more.
    """
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=96,
        n_layer=4,
        n_head=4,
        n_positions=256,
        initializer_range=0.06,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def max_positions(config: PretrainedConfig) -> int | None:
    """How many positions the model was made for; None where it has no limit (ALiBi)."""
    if config.model_type == "bloom":
        return None
    return getattr(config, "max_position_embeddings", None)


def check_context(config: PretrainedConfig, num_tokens: int, flags: str) -> None:
    """Refuse sequences longer than the model has positions for.

    Raises:
        UserError: naming the flags to lower.
    """
    limit = max_positions(config)
    if limit is not None and num_tokens > limit:
        raise UserError(f"{flags} asks for {num_tokens} tokens but the model has {limit} positions; lower it")


def disable_dropout(model: nn.Module, probability: float = 0.0) -> None:
    """Set every dropout of the model; log-probabilities are exact only without it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name in ("dropout", "attention_dropout", "hidden_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str, adapter_base: str | None = None
) -> None:
    """Weights (safetensors), config, tokenizer with its chat template, generation defaults.

    Of a model with trained adapters these alone, in PEFT's format, where ``adapter_base`` tells the path of the model
    under them; without it the two merged.
    """
    if hasattr(model, "peft_config"):
        from dschat.models.lora import merged_copy, save_adapter  # PEFT takes a second to import

        if adapter_base is not None:
            save_adapter(model, tokenizer, directory, adapter_base)
            return
        model = merged_copy(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(directory)


def load_config(path: str) -> PretrainedConfig:
    """Of an adapter the configuration of the model that it was trained on.

    Raises:
        UserError: no model is there, or the parent of one.
    """
    if base := adapter_base(path):
        return load_config(base)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=remote_code.is_trusted())
    except (OSError, ValueError) as error:
        remote_code.refuse_if_asked_for(path, error)
        where = Path(path)
        if where.is_dir() and not (where / "config.json").is_file():
            inner = where / "actor"
            mend = f"did you mean {inner}?" if inner.is_dir() else "give a Hugging Face model directory"
            raise UserError(f"{path} holds no config.json; {mend}") from None
        raise UserError(f"{path} is neither a model directory nor a reachable hub name ({_line(error)})") from None


def _from_pretrained(auto_class: type, path: str, config: PretrainedConfig, dtype: torch.dtype, **options) -> tuple:
    try:
        if "num_labels" in options and getattr(config, "num_labels", 1) != options["num_labels"]:
            config.num_labels = options["num_labels"]
        more = {"trust_remote_code": remote_code.is_trusted(), "weights_only": True, "output_loading_info": True}
        more |= {name: value for name, value in options.items() if name != "num_labels"}
        return auto_class.from_pretrained(path, config=config, dtype=dtype, **more)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        remote_code.refuse_if_asked_for(path, error)
        raise UserError(f"{path} cannot be loaded: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _require_exact(path: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    for verb, keys in (("lacks", missing), ("has, beyond its model,", unexpected)):
        if keys:
            names = ", ".join(sorted(keys)[:3])
            raise UserError(
                f"{path}: the checkpoint {verb} {len(keys)} weights ({names}); it is damaged or of another kind"
            )


def _fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dropout: float | None) -> PreTrainedModel:
    """Make model and tokenizer agree: vocabulary, pad and end tokens; set dropout when asked, attention and GELU."""
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        _grow_embeddings(model, len(tokenizer))
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    if dropout is not None:
        disable_dropout(model, dropout)
    use_fast_attention(model)
    use_fused_gelu(model)
    return model


@torch.no_grad()
def _grow_embeddings(model: PreTrainedModel, num_tokens: int) -> None:
    """The new rows are the mean of the old ones: the same in every run, so that an adapter finds the trunk it knew."""
    num_old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(num_tokens, pad_to_multiple_of=8, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters() if module is not None else ():
            with whole_weights([parameter], changed=True):
                parameter[num_old:] = parameter[:num_old].mean(0, keepdim=True)
