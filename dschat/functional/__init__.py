"""The mathematics of the three stages: tensors in, tensors out. Imports torch only; holds no state, does no I/O."""

from dschat.functional.advantages import gae, rewards_to_go, score_unfinished, shape_rewards
from dschat.functional.groups import grpo_advantages, rloo_advantages
from dschat.functional.kl import adaptive_kl_coef, full_kl, kl_penalty
from dschat.functional.logprobs import entropy, token_logprobs
from dschat.functional.losses import listwise_ranking_loss, pairwise_ranking_loss, sft_loss
from dschat.functional.masks import lengths_to_mask, masked_mean, masked_whiten, positions_from_mask
from dschat.functional.ppo import ppo_policy_loss, ppo_value_loss
from dschat.functional.preference import dpo_loss, kto_loss, orpo_loss, sequence_logprobs, simpo_loss
from dschat.functional.reduction import token_mean

__all__ = [
    "adaptive_kl_coef",
    "dpo_loss",
    "entropy",
    "full_kl",
    "gae",
    "grpo_advantages",
    "kl_penalty",
    "kto_loss",
    "lengths_to_mask",
    "listwise_ranking_loss",
    "masked_mean",
    "masked_whiten",
    "orpo_loss",
    "pairwise_ranking_loss",
    "positions_from_mask",
    "ppo_policy_loss",
    "ppo_value_loss",
    "rewards_to_go",
    "rloo_advantages",
    "score_unfinished",
    "sequence_logprobs",
    "sft_loss",
    "shape_rewards",
    "simpo_loss",
    "token_logprobs",
    "token_mean",
]
