"""The four models of PPO, each under its own ZeRO stage."""

from dataclasses import dataclass

from dschat.data.tokenizer import load_tokenizer
from dschat.engine.deepspeed_engine import TrainSpec, create_frozen_model, create_train_engine
from dschat.engine.distributed import Runtime
from dschat.errors import UserError
from dschat.models.load import load_causal_lm, load_trained_scorer

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class RLHFEngine:
    """actor and critic are trained; ref (the actor before training) and reward are frozen.

    ``family`` is the Hugging Face model inside the actor, which knows its own call signature.
    """

    actor: deepspeed.DeepSpeedEngine
    critic: deepspeed.DeepSpeedEngine
    ref: nn.Module
    reward: nn.Module
    family: PreTrainedModel

    def train(self) -> None:
        self.actor.train()
        self.critic.train()

    def eval(self) -> None:
        self.actor.eval()
        self.critic.eval()


def create_rlhf_engine(
    actor_path: str,
    reward_path: str,
    tokenizer: PreTrainedTokenizerBase,
    specs: tuple[TrainSpec, TrainSpec],
    frozen_stages: tuple[int, int],
    *,
    dtype: torch.dtype,
    runtime: Runtime,
    normalize_reward: bool,
) -> RLHFEngine:
    """Build actor and reference from ``actor_path``, critic and reward from ``reward_path``.

    ``specs`` are of the actor and the critic, ``frozen_stages`` the ZeRO stages of reference and reward. Dropout is
    off in all four: a log-probability that depends on a coin flip is not one.

    Raises:
        UserError: a directory of the wrong kind, or a reward model with another tokenizer.
    """
    require_same_tokenizer(actor_path, tokenizer, reward_path)
    actor_model = load_causal_lm(actor_path, tokenizer, dtype=dtype, dropout=0.0)
    ref_model = load_causal_lm(actor_path, tokenizer, dtype=dtype, dropout=0.0)
    critic_model = load_trained_scorer(reward_path, tokenizer, dtype=dtype, normalize=normalize_reward)
    reward_model = load_trained_scorer(reward_path, tokenizer, dtype=dtype, normalize=normalize_reward)
    ref_stage, reward_stage = frozen_stages
    return RLHFEngine(
        actor=create_train_engine(actor_model, specs[0], dtype=dtype, runtime=runtime),
        critic=create_train_engine(critic_model, specs[1], dtype=dtype, runtime=runtime),
        ref=create_frozen_model(ref_model, zero_stage=ref_stage, dtype=dtype, device=runtime.device),
        reward=create_frozen_model(reward_model, zero_stage=reward_stage, dtype=dtype, device=runtime.device),
        family=actor_model,
    )


def require_same_tokenizer(actor_path: str, tokenizer: PreTrainedTokenizerBase, reward_path: str) -> None:
    """Token ids go to the reward model as they are, so both must mean the same by every id: compared by content.

    Raises:
        UserError: they differ.
    """
    other = load_tokenizer(reward_path)
    if tokenizer.get_vocab() != other.get_vocab() or tokenizer.eos_token_id != other.eos_token_id:
        raise UserError(
            f"{actor_path} and {reward_path} have different tokenizers; train the reward model from a model of the "
            "actor's family, for instance from the output of step 1"
        )
