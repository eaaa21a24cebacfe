"""A reward model that is LoRA adapters and a head on a language model's own trunk (Hu et al. 2021), in PEFT's format.

Step 2 trains one with ``--lora_dim``; step 3 puts it on the frozen reference, so that no second model is in memory:
LLaMA-Factory's ``reward_model_type: lora``.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.models.forward import model_inputs
from dschat.models.load import load_scorer
from dschat.models.scorer import Scorer, load_score_stats
from dschat.report.progress import table

import torch
from peft import LoraConfig, LoraModel, PeftConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.functional import set_adapter
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

NAME = "reward"  # of the adapter inside a model; files do not hold it
PREFIX = "base_model.model."  # PEFT's, in front of every weight in a file


# Training


class LoraScorer(Scorer):
    """A scorer of which only the adapters and the head are trained. ``classifier`` is changed in place."""

    def __init__(self, classifier: PreTrainedModel, config: LoraConfig):
        LoraModel(classifier, config, NAME)  # freezes the whole classifier, then adds what is trained
        head: Any = classifier.score
        head.requires_grad_(True)
        super().__init__(classifier)
        self.lora_config = config

    def rebuild(self) -> "LoraScorer":
        return LoraScorer(type(self.model)(self.model.config), copy.deepcopy(self.lora_config))


def create_lora_scorer(
    classifier: PreTrainedModel, dim: int, alpha: int | None = None, module_name: str = "auto"
) -> LoraScorer:
    """Adapters of rank ``dim``, scaled by ``alpha`` / ``dim`` (default 2), on the layers that ``module_name`` names.

    They start at zero: before training the scores are those of the classifier. No dropout, no biases.

    Raises:
        UserError: as `adapted_layers`.
    """
    targets = adapted_layers(classifier, module_name)
    is_conv1d = isinstance(classifier.get_submodule(targets[0]), Conv1D)  # GPT-2 stores its weights transposed
    config = LoraConfig(
        r=dim,
        lora_alpha=2 * dim if alpha is None else alpha,
        target_modules=_short_names(classifier, targets),
        fan_in_fan_out=is_conv1d,
    )
    return LoraScorer(classifier, config)


def _short_names(model: PreTrainedModel, layers: list[str]) -> list[str]:
    """The last parts of the names where they mean exactly these layers: then a deeper model lacks weights, aloud."""
    ends = {name.rsplit(".", 1)[-1] for name in layers}
    meant = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in ends]
    return sorted(ends) if meant == layers else layers


def adapted_layers(model: PreTrainedModel, module_name: str) -> list[str]:
    """Full names of the linear layers inside the transformer blocks: all of them (``auto``), or those whose name has
    one of the comma-separated parts in it (``q_proj,v_proj``; DeepSpeed-Chat's ``decoder.layers.``).

    Raises:
        UserError: a part that is in no name.
    """
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(blocks)
    ]
    if module_name == "auto":
        return linear
    parts = [part.strip() for part in module_name.split(",")]
    for part in parts:
        if not part or not any(part in name for name in linear):
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(f"--lora_module_name {module_name}: no linear layer has {part!r} in its name; use {kinds}")
    return [name for name in linear if any(part in name for part in parts)]


def trained_table(model: nn.Module) -> str:
    """How many parameters are trained of how many, by kind."""
    sizes = {"adapters": [0, 0], "score head": [0, 0], "trunk": [0, 0]}
    for name, parameter in model.named_parameters():
        kind = "adapters" if ".lora_" in name else "score head" if ".score." in name else "trunk"
        sizes[kind][0] += parameter.numel() if parameter.requires_grad else 0
        sizes[kind][1] += parameter.numel()
    sizes["together"] = [sum(column) for column in zip(*sizes.values(), strict=True)]
    rows = [[kind, f"{trained:,}", f"{whole:,}", f"{trained / whole:.2%}"] for kind, (trained, whole) in sizes.items()]
    return table(["parameters", "trained", "all", "share"], rows)


def save_adapter(scorer: LoraScorer, tokenizer: PreTrainedTokenizerBase, directory: str, base: str) -> None:
    """Adapters and head as ``AutoPeftModelForSequenceClassification`` reads them, and the tokenizer.

    ``base`` is the directory or hub name of the trunk, for other tools; step 3 never looks for it.
    """
    head: Any = scorer.model.score
    weights = get_peft_model_state_dict(scorer.model, adapter_name=NAME, save_embedding_layers=False)
    weights |= {f"score.{name}": weight for name, weight in head.state_dict().items()}
    config = copy.deepcopy(scorer.lora_config)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["classifier", "score"]
    config.inference_mode = True
    config.save_pretrained(directory)
    path = str(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    save_file({f"{PREFIX}{name}": weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})
    tokenizer.save_pretrained(directory)


# Use


class AdapterScorer(Scorer):
    """A reward model on the trunk of a frozen language model, whose own logits stay bit for bit what they were.

    Only the head is its own. ``model`` may be sharded by DeepSpeed after this is made: each call runs the model from
    its root, as DeepSpeed's hooks want it, and on every rank, for it is then a collective.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear, mean: float = 0.0, std: float = 1.0):
        super().__init__(model, mean, std)
        self.head = head
        self.eval()

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T), (B, T) -> (B, T) float32: (raw - mean) / std of each prefix; at padding it means nothing."""
        hidden = self._hidden_states(model_inputs(self.model, input_ids, attention_mask))
        self.head.to(hidden.device, hidden.dtype)  # the trunk may have moved
        return (self.head(hidden).squeeze(-1).float() - self.mean) / self.std

    def _hidden_states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B, T, d): what reaches the vocabulary projection with the adapter on; only one position goes through it."""
        found = []

        def keep(_: nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
            found.append(args[0])
            return args[0][:, -1:]

        projection: Any = self.model.get_output_embeddings()
        hook = projection.register_forward_pre_hook(keep)
        try:
            with _adapter_on(self.model):
                self.model(**inputs, use_cache=False)
        finally:
            hook.remove()
        return found[0]


def add_adapter_reward(model: PreTrainedModel, adapter_dir: str, *, normalize: bool = True) -> AdapterScorer:
    """Put the adapter of ``adapter_dir`` on a frozen causal language model, off until its scorer is called.

    Call it before DeepSpeed shards ``model``. Parameters of the adapter and the head are all that is added.

    Raises:
        UserError: no adapter directory, an adapter of another model, a missing or unexpected weight.
    """
    output: Any = model.get_output_embeddings()
    config, weights = _read_adapter(adapter_dir)
    head = nn.Linear(output.weight.shape[1], 1, bias="score.bias" in weights, device=output.weight.device)
    _inject(model, head, config, weights, adapter_dir)
    model.requires_grad_(False)
    set_adapter(model, [], inference_mode=True)
    stats = load_score_stats(adapter_dir) if normalize else (0.0, 1.0)
    return AdapterScorer(model, head.to(output.weight.dtype).requires_grad_(False), *stats)


def load_merged_scorer(
    adapter_dir: str, base_path: str, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
) -> PreTrainedModel:
    """The sequence classifier that the model at ``base_path`` and the adapter make together, W + B A alpha / r.

    A plain trainable model without dropout: the critic of step 3 starts from it. Give the path that the actor came
    from; where the adapter was trained does not matter.

    Raises:
        UserError: as `add_adapter_reward`.
    """
    config, weights = _read_adapter(adapter_dir)
    classifier = load_scorer(base_path, tokenizer, dtype=dtype, dropout=0.0)
    head: Any = classifier.score
    tuner = _inject(classifier, head, config, weights, adapter_dir)
    merged: Any = tuner.merge_and_unload()
    return merged.requires_grad_(True).eval()


@contextmanager
def _adapter_on(model: PreTrainedModel) -> Iterator[None]:
    """The adapter takes part in the forward pass inside, and never outside, whatever happens."""
    set_adapter(model, NAME, inference_mode=True)
    try:
        yield
    finally:
        set_adapter(model, [], inference_mode=True)


def _read_adapter(directory: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The configuration and the weights, under the names that they have in a model."""
    where = Path(directory)
    if not (where / CONFIG_NAME).is_file():
        raise UserError(f"{directory} holds no {CONFIG_NAME}; give the output of step 2 with --lora_dim")
    try:
        config = PeftConfig.from_pretrained(directory)
        weights = load_file(str(where / SAFETENSORS_WEIGHTS_NAME))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: the adapter cannot be read ({problem}); run step 2 again") from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{directory} holds a {config.peft_type} adapter; only LoRA is supported, see --lora_dim")
    config.modules_to_save, config.inference_mode = None, True  # the head is read here, and nothing is trained
    return config, {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def _inject(
    model: PreTrainedModel, head: nn.Module, config: LoraConfig, weights: dict[str, torch.Tensor], directory: str
) -> LoraModel:
    """Add the adapter to ``model``, in place, and load it and ``head``: exactly the weights that they have."""
    misfit = f"{directory}: the adapter was trained on another model than this {model.config.model_type}"
    try:
        tuner = LoraModel(model, config, NAME)
    except ValueError as error:
        raise UserError(f"{misfit} ({' '.join(str(error).split())[:200]}); train it from this actor") from None
    own = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    own |= {f"score.{name}": weight for name, weight in head.state_dict().items()}
    wanted, found = ({(k, *v.shape) for k, v in tensors.items()} for tensors in (own, weights))
    if wanted != found:
        name, *shape = min(wanted ^ found)
        raise UserError(
            f"{misfit}: {len(wanted - found)} weights are missing and {len(found - wanted)} unexpected, for instance "
            f"{name} {tuple(shape)}; train it from this actor"
        )
    head.load_state_dict({name: weights.pop(f"score.{name}") for name in head.state_dict()})
    set_peft_model_state_dict(model, weights, adapter_name=NAME)
    return tuner
