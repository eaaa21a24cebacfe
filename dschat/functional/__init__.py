"""The mathematics of the three stages: tensors in, tensors out. Imports torch only; holds no state, does no I/O."""

from dschat.functional.advantages import gae, shape_rewards
from dschat.functional.logprobs import entropy, full_kl, kl_penalty, token_logprobs
from dschat.functional.losses import dpo_loss, listwise_ranking_loss, pairwise_ranking_loss, sft_loss
from dschat.functional.masks import lengths_to_mask, masked_mean, masked_whiten, positions_from_mask
from dschat.functional.ppo import ppo_policy_loss, ppo_value_loss

__all__ = [
    "dpo_loss",
    "entropy",
    "full_kl",
    "gae",
    "kl_penalty",
    "lengths_to_mask",
    "listwise_ranking_loss",
    "masked_mean",
    "masked_whiten",
    "pairwise_ranking_loss",
    "positions_from_mask",
    "ppo_policy_loss",
    "ppo_value_loss",
    "sft_loss",
    "shape_rewards",
    "token_logprobs",
]
