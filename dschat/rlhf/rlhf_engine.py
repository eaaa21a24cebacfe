"""The models of PPO, each under its own ZeRO stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.ema import EMA
from dschat.engine.sharded_loading import whole_weights
from dschat.errors import UserError
from dschat.models.adapter_files import ADAPTER_CONFIG, adapter_base
from dschat.models.load import load_scorer, load_trained_scorer
from dschat.models.scorer import Scorer, load_score_stats
from dschat.models.specs import LoraSpec
from dschat.models.trunk import critic_on_trunk

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from dschat.models.adapters import AdapterScorer  # imports PEFT, which takes a second


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
    adapters: "dict[str, AdapterScorer]" = field(default_factory=dict)
    actor_base: str | None = None  # the path of the model under the adapters that are saved; None: whole models are
    critic_base: str | None = None
    trunk: PreTrainedModel | None = None  # the actor without its adapters, on the very same weights, where it has any
    ema: EMA | None = None

    @property
    def policy_models(self) -> tuple[nn.Module | None, ...]:
        """Those that training and scoring ask about a micro-batch of responses."""
        return self.actor, self.critic, self.ref

    def train(self) -> None:
        self.actor.train()
        if self.critic is not None:
            self.critic.train()

    def eval(self) -> None:
        self.actor.eval()
        if self.critic is not None:
            self.critic.eval()


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
        head: Any = model.score
        with whole_weights([head.weight], changed=True):
            nn.init.zeros_(head.weight)
        return Scorer(model)
    require_same_tokenizer(actor_path, tokenizer, path)
    if (Path(path) / ADAPTER_CONFIG).is_file():
        from dschat.models.adapters import load_merged_scorer  # PEFT takes a second to import

        model = load_merged_scorer(path, actor_path, tokenizer, dtype=dtype)
        return Scorer(model, *(load_score_stats(path) if normalize else (0.0, 1.0)))
    return load_trained_scorer(path, tokenizer, dtype=dtype, normalize=normalize, verify=False)


def load_critic_on_trunk(
    trunk: PreTrainedModel,
    path: str | None,
    actor_path: str,
    tokenizer: PreTrainedTokenizerBase,
    spec: LoraSpec,
    *,
    normalize: bool,
) -> Scorer:
    """A critic that is adapters and a head on ``trunk``: those of the reward adapter in ``path``, or new ones whose
    first values are all 0.

    Raises:
        UserError: a whole model, or an adapter that does not fit.
    """
    if path is None:
        return Scorer(critic_on_trunk(trunk, None, spec))
    if adapter_base(path) is None:
        raise UserError(
            f"--share_trunk: {path} is a whole model with a trunk of its own; give the critic a reward adapter of the "
            "actor (step 2 with --lora_dim), or leave --critic_model_name_or_path out"
        )
    require_same_tokenizer(actor_path, tokenizer, path)
    return Scorer(critic_on_trunk(trunk, path, spec), *(load_score_stats(path) if normalize else (0.0, 1.0)))


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
