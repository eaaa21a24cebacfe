"""What must hold exactly in every right run, asserted while it runs: a run that would be silently wrong stops."""

from dschat.functional import shape_rewards
from dschat.models.precision import tolerance
from dschat.rlhf.experience import Experience, response_values, sequences
from dschat.rlhf.reward_lora import LoraReward
from dschat.rlhf.reward_sources import FullReward
from dschat.rlhf.rewards import CombinedReward, Samples
from dschat.rlhf.specs import Shaping

import torch
from torch import nn


@torch.no_grad()
def check_experience(experience: Experience, shaping: Shaping, kl_coef: float, dtype: torch.dtype) -> None:
    """Of the first rollout, before any update. The sampler and the trainer agree on every log-probability; actor and
    reference are still the same model; each score lands on exactly one action.

    Raises:
        RuntimeError: one of them does not hold; training would be silently wrong.
    """
    limit = tolerance(dtype)
    mask = experience.action_mask
    gap = (experience.logprobs - experience.sampler_logprobs).abs().max().item()
    if not gap <= limit:
        raise RuntimeError(f"self-check: sampler and trainer differ by {gap:.2e} nats on a token (limit {limit})")
    drift = (experience.logprobs - experience.ref_logprobs).abs().max().item()
    if not drift <= limit:
        raise RuntimeError(f"self-check: actor and reference differ by {drift:.2e} nats before training")
    if not torch.isfinite(experience.scores).all():
        raise RuntimeError("self-check: the reward gave a score that is not finite")
    if (experience.rewards[~mask] != 0).any():
        raise RuntimeError("self-check: there is a reward where there is no action")
    if shaping.whiten_rewards:
        return  # every reward has been scaled: what is the score's share cannot be told any more
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = positions == (positions * mask).max(1, keepdim=True).values
    coefficient = kl_coef if shaping.kl_in_reward else 0.0
    score = experience.rewards - shape_rewards(torch.zeros_like(experience.scores), experience.kl, mask, coefficient)
    if not (score[~last].abs() <= 1e-6).all():  # what is not a number is not 0 either
        raise RuntimeError("self-check: a score is not on the last action of its answer alone")


@torch.no_grad()
def check_critic_padding(critic: nn.Module, experience: Experience, pad_token_id: int, dtype: torch.dtype) -> None:
    """The value of a state must not depend on padding. All ranks call it with the same rows.

    Raises:
        RuntimeError: four more pads on either side change a value.
    """
    few = experience.rows(slice(0, 4))
    ids, mask = sequences(few)
    plain = response_values(critic, few)
    wider = critic(nn.functional.pad(ids, (4, 4), value=pad_token_id), nn.functional.pad(mask, (4, 4), value=False))[
        :, 4 + few.input_ids.shape[1] - 1 : -4
    ]
    real = nn.functional.pad(few.response_mask, (1, 0), value=True)
    gap = (plain - wider)[real].abs().max().item()
    if not gap <= tolerance(dtype):
        raise RuntimeError(f"self-check: padding changes a value by {gap:.2e}; the model does not honour its mask")


def check_reward_padding(rewards: CombinedReward, samples: Samples, dtype: torch.dtype) -> None:
    """The score of a response must not depend on padding: of every reward model in this process. All ranks call it.

    Raises:
        RuntimeError: four more pads on either side change a score.
    """
    for name, (source, _) in rewards.sources.items():
        if isinstance(source, FullReward | LoraReward):
            gap = source.padding_gap(samples)
            if not gap <= tolerance(dtype):
                raise RuntimeError(
                    f"self-check: padding changes a score of {name} by {gap:.2e}; the model does not honour its mask"
                )


def check_first_minibatch(stats: dict[str, float], dtype: torch.dtype) -> None:
    """The first minibatch of an update is scored by the very weights that sampled it: every ratio is 1.

    Raises:
        RuntimeError: it is not; dropout, a stale mask or another distribution.
    """
    if not stats.get("policy/log_ratio_abs_max", 0.0) <= tolerance(dtype):
        raise RuntimeError(
            f"self-check: the ratio before an update is exp({stats['policy/log_ratio_abs_max']:.2e}), not 1"
        )
