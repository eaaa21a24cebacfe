"""The models of PPO, each under its own ZeRO stage."""

from dataclasses import dataclass, field
from pathlib import Path

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, create_frozen_model, create_train_engine
from dschat.engine.distributed import Runtime
from dschat.engine.ema import EMA
from dschat.errors import UserError
from dschat.models.adapters import AdapterScorer, add_adapter_reward, load_merged_scorer
from dschat.models.load import load_causal_lm, load_scorer, load_trained_scorer
from dschat.models.precision import upcast_layernorm
from dschat.models.scorer import Scorer, load_score_stats

import deepspeed
import torch
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class RLHFEngine:
    """actor and critic are trained; ref (the actor before training) is frozen. Without a critic: None.

    ``family`` is the Hugging Face model inside the actor, which knows its own call signature. ``adapters`` are the
    reward models on the reference's trunk, by directory.
    """

    actor: deepspeed.DeepSpeedEngine
    critic: deepspeed.DeepSpeedEngine | None
    ref: nn.Module
    family: PreTrainedModel
    adapters: dict[str, AdapterScorer] = field(default_factory=dict)
    ema: EMA | None = None

    def train(self) -> None:
        self.actor.train()
        if self.critic is not None:
            self.critic.train()

    def eval(self) -> None:
        self.actor.eval()
        if self.critic is not None:
            self.critic.eval()


def create_actor_and_reference(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: TrainSpec,
    reference_stage: int,
    *,
    dtype: torch.dtype,
    runtime: Runtime,
    upcast_norms: bool = False,
    adapter_dirs: tuple[str, ...] = (),
    normalize_reward: bool = True,
) -> RLHFEngine:
    """The engine without a critic. The reward adapters go onto the reference before it may be sharded.

    Dropout is off in all models: a log-probability that depends on a coin flip is not one.

    Raises:
        UserError: not a language model, an adapter of another one.
    """
    actor = load_causal_lm(path, tokenizer, dtype=dtype, dropout=0.0)
    reference = load_causal_lm(path, tokenizer, dtype=dtype, dropout=0.0)
    if upcast_norms:
        for model in (actor, reference):
            upcast_layernorm(model)
    adapters = {
        directory: add_adapter_reward(reference, directory, normalize=normalize_reward) for directory in adapter_dirs
    }
    return RLHFEngine(
        actor=create_train_engine(actor, spec, dtype=dtype, runtime=runtime),
        critic=None,
        ref=create_frozen_model(reference, zero_stage=reference_stage, dtype=dtype, device=runtime.device),
        family=actor,
        adapters=adapters,
    )


def load_critic(
    path: str | None, actor_path: str, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype, normalize: bool
) -> Scorer:
    """What the critic starts from: a reward model (whole, or an adapter merged into the actor's weights), else the
    actor with a head of zeros, whose first values are all 0, the mean of normalised scores.

    Raises:
        UserError: not a reward model, or one with another tokenizer.
    """
    if path is None:
        model = load_scorer(actor_path, tokenizer, dtype=dtype, dropout=0.0)
        nn.init.zeros_(model.score.weight)  # type: ignore[arg-type, union-attr]
        return Scorer(model)
    require_same_tokenizer(actor_path, tokenizer, path)
    if (Path(path) / CONFIG_NAME).is_file():
        model = load_merged_scorer(path, actor_path, tokenizer, dtype=dtype)
        return Scorer(model, *(load_score_stats(path) if normalize else (0.0, 1.0)))
    return load_trained_scorer(path, tokenizer, dtype=dtype, normalize=normalize, verify=False)


def same_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> bool:
    """Whether both mean the same by every id: compared by content, not by size."""
    other = load_tokenizer(path)
    return tokenizer.get_vocab() == other.get_vocab() and tokenizer.eos_token_id == other.eos_token_id


def require_same_tokenizer(actor_path: str, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Token ids of the actor go to the model at ``path`` as they are.

    Raises:
        UserError: they would mean something else there.
    """
    if not same_tokenizer(tokenizer, path):
        raise UserError(
            f"{actor_path} and {path} have different tokenizers; train the model from one of the actor's family, for "
            "instance from the output of step 1"
        )
