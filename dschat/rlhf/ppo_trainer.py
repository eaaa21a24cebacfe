"""One PPO update: the clipped policy and value losses over a minibatch, and the check of the first one."""

from dataclasses import dataclass

from dschat.engine.deepspeed_engine import backward, grad_norm
from dschat.engine.distributed import Runtime, all_reduce_max, all_reduce_sum
from dschat.functional import ppo_policy_loss, ppo_value_loss, token_logprobs
from dschat.rlhf.experience import Experience, policy_logits, response_scores, response_values
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Sampling

import torch
from torch import nn


@dataclass(frozen=True)
class UpdateSpec:
    """How a rollout is trained on; see the flags of the same names in step 3. Sizes count rows."""

    ppo_epochs: int
    minibatch_size: int  # of all ranks: one optimizer step
    micro_batch_size: int  # of one rank: one forward and backward
    cliprange: float
    cliprange_value: float


def train_rlhf(
    engine: RLHFEngine, experience: Experience, sampling: Sampling, spec: UpdateSpec, seed: int, runtime: Runtime
) -> list[dict[str, float]]:
    """``ppo_epochs`` passes over the rollout, each cut into minibatches in a fresh order, the same on every rank.

    Returns the statistics of each minibatch, the first one first.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    updates = []
    for _ in range(spec.ppo_epochs):
        order = torch.randperm(len(experience), generator=generator).to(experience.scores.device)
        for rows in order.split(spec.minibatch_size):
            updates.append(train_minibatch(engine, experience.rows(rows), sampling, spec, runtime))
    return updates


def train_minibatch(
    engine: RLHFEngine, minibatch: Experience, sampling: Sampling, spec: UpdateSpec, runtime: Runtime
) -> dict[str, float]:
    """One optimizer step of actor and critic on the rows of ``minibatch`` (the same on every rank).

    Each rank takes every world_size-th row. Both losses are divided by the actions of the whole minibatch, so neither
    micro-batches nor ranks change the step.

    Raises:
        RuntimeError: a loss is not finite; nothing has been stepped then.
    """
    engine.train()
    num_tokens = float(minibatch.action_mask.sum())
    rows = torch.arange(runtime.rank, len(minibatch), runtime.world_size, device=minibatch.scores.device)
    sums: dict[str, torch.Tensor] = {}
    maxima = {"policy/ratio_max": 0.0, "policy/log_ratio_abs_max": 0.0}
    for part in rows.split(spec.micro_batch_size):
        batch = minibatch.rows(part)
        logprobs = token_logprobs(policy_logits(engine.actor, engine, batch, sampling), batch.response_ids)
        policy_loss, policy = ppo_policy_loss(
            logprobs, batch.logprobs, batch.advantages, batch.action_mask, spec.cliprange, denominator=num_tokens
        )
        backward(engine.actor, policy_loss)
        values = response_values(engine.critic, batch)
        value_loss, critic = ppo_value_loss(
            values, batch.values, batch.returns, batch.action_mask, spec.cliprange_value, denominator=num_tokens
        )
        backward(engine.critic, value_loss)
        share = policy["num_tokens"] / num_tokens
        shares = {
            "policy/loss": policy_loss.detach(),
            "policy/approx_kl": policy["approx_kl"] * share,
            "policy/clip_fraction": policy["clip_fraction"] * share,
            "critic/loss": value_loss.detach(),
            "critic/clip_fraction": critic["value_clip_fraction"] * share,
        }
        sums = {name: sums.get(name, 0) + value for name, value in shares.items()}
        log_ratio = (logprobs.detach() - batch.logprobs)[batch.action_mask].abs().max()
        maxima["policy/ratio_max"] = max(maxima["policy/ratio_max"], policy["ratio_max"].item())
        maxima["policy/log_ratio_abs_max"] = max(maxima["policy/log_ratio_abs_max"], log_ratio.item())

    totals = all_reduce_sum(torch.stack(list(sums.values())), runtime).tolist()
    stats = dict(zip(sums, totals, strict=True))
    stats |= {name: all_reduce_max(value, runtime) for name, value in maxima.items()}
    if not all(torch.isfinite(torch.tensor([stats["policy/loss"], stats["critic/loss"]]))):
        raise RuntimeError(f"PPO loss is not finite: {stats}; lower the learning rates or use --dtype bf16 or fp32")
    engine.actor.step()
    engine.critic.step()
    return stats | {"policy/grad_norm": grad_norm(engine.actor), "critic/grad_norm": grad_norm(engine.critic)}


def tolerance(dtype: torch.dtype) -> float:
    """How far two forwards of the same weights may differ, in nats: rounding, not mathematics."""
    return 1e-3 if dtype == torch.float32 else 0.3


@torch.no_grad()
def check_experience(experience: Experience, kl_coef: float, dtype: torch.dtype) -> None:
    """The self-check of the first rollout: what must hold exactly before any update.

    The sampler and the trainer agree on every log-probability; actor and reference are still the same model; each
    score lands on exactly one action.

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
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1]).bool()
    score = experience.rewards + kl_coef * experience.kl
    if (score[~last].abs() > 1e-6).any() or (experience.rewards[~mask] != 0).any():
        raise RuntimeError("self-check: a score is not on the last action of its answer alone")
    if not torch.isfinite(experience.scores).all():
        raise RuntimeError("self-check: the reward model gave a score that is not finite")


@torch.no_grad()
def check_reward_padding(reward: nn.Module, experience: Experience, pad_token_id: int, dtype: torch.dtype) -> None:
    """The reward of a response must not depend on padding. All ranks call it with the same rows.

    Raises:
        RuntimeError: four more pads on either side change a score.
    """
    few = experience.rows(slice(0, 4))
    plain = response_scores(reward, few)
    pad = nn.functional.pad
    wider = experience.rows(slice(0, 4))
    wider.input_ids = pad(few.input_ids, (4, 0), value=pad_token_id)
    wider.attention_mask = pad(few.attention_mask, (4, 0), value=False)
    wider.response_ids = pad(few.response_ids, (0, 4), value=pad_token_id)
    wider.action_mask = pad(few.action_mask, (0, 4), value=False)
    gap = (response_scores(reward, wider) - plain).abs().max().item()
    if not gap <= tolerance(dtype):
        raise RuntimeError(f"self-check: padding changes a reward by {gap:.2e}; the model does not honour its mask")


def check_first_update(stats: dict[str, float], dtype: torch.dtype) -> None:
    """The first minibatch is scored by the very weights that made it: every ratio is 1.

    Raises:
        RuntimeError: it is not; dropout, a stale mask or another distribution.
    """
    if not stats["policy/log_ratio_abs_max"] <= tolerance(dtype):
        raise RuntimeError(
            f"self-check: the ratio before the first update is exp({stats['policy/log_ratio_abs_max']:.2e}), not 1"
        )
