"""From a rollout to what PPO trains on: log-probabilities, values, scores, rewards, advantages."""

import dataclasses
from dataclasses import dataclass

from dschat.engine.distributed import Runtime, all_reduce_max, gather_rows
from dschat.functional import entropy, gae, kl_penalty, masked_mean, masked_whiten, shape_rewards, token_logprobs
from dschat.models.forward import response_logits
from dschat.models.scorer import last_token_values
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Rollout, Sampling

import torch
from torch import nn


@dataclass
class Experience:
    """B responses and what the four models say of them. P prompt, R response; nats; 0 outside ``action_mask``."""

    input_ids: torch.Tensor  # (B, P) left-padded prompts
    attention_mask: torch.Tensor  # (B, P) bool
    response_ids: torch.Tensor  # (B, R)
    action_mask: torch.Tensor  # (B, R) bool, up to and including EOS
    finished: torch.Tensor  # (B,) bool
    sampler_logprobs: torch.Tensor  # (B, R) as the sampler saw them
    logprobs: torch.Tensor  # (B, R) actor, one forward
    ref_logprobs: torch.Tensor  # (B, R)
    entropy: torch.Tensor  # (B, R)
    values: torch.Tensor  # (B, R) critic, of the state before each action
    scores: torch.Tensor  # (B,) reward model, as it says
    kl: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (B, R)
    rewards: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (B, R)
    advantages: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (B, R)
    returns: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (B, R)

    def __len__(self) -> int:
        return len(self.scores)

    def rows(self, index: torch.Tensor | slice) -> "Experience":
        """The given rows, without the columns that are padding in all of them."""
        picked = {f.name: getattr(self, f.name)[index] for f in dataclasses.fields(self) if len(getattr(self, f.name))}
        prompt_size = int(picked["attention_mask"].sum(1).max())
        response_size = int(picked["action_mask"].sum(1).max())
        for name, value in picked.items():
            if name in ("input_ids", "attention_mask"):
                picked[name] = value[:, value.shape[1] - prompt_size :]
            elif value.ndim == 2:
                picked[name] = value[:, :response_size]
        return Experience(**picked)


def sequences(batch: Rollout | Experience) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and response side by side: ids (B, P + R) and their mask (B, P + R)."""
    ids = torch.cat([batch.input_ids, batch.response_ids], dim=1)
    return ids, torch.cat([batch.attention_mask, batch.action_mask], dim=1)


def policy_logits(
    model: nn.Module, engine: RLHFEngine, batch: Rollout | Experience, sampling: Sampling
) -> torch.Tensor:
    """(B, R, V) float32 logits of the sampled distribution at each action; ``model`` is the actor or the reference."""
    ids, mask = sequences(batch)
    return sampling.adjust(response_logits(model, engine.family, ids, mask, batch.response_ids.shape[1]))


def response_values(critic: nn.Module, batch: Rollout | Experience) -> torch.Tensor:
    """(B, R): the critic's value of the state in which each action was taken, that is at the token before it."""
    ids, mask = sequences(batch)
    return critic(ids, mask)[:, batch.input_ids.shape[1] - 1 : -1]


def response_scores(reward: nn.Module, batch: Rollout | Experience) -> torch.Tensor:
    """(B,): the reward model's value at the last real token."""
    ids, mask = sequences(batch)
    return last_token_values(reward(ids, mask), mask)


@torch.no_grad()
def score_rollout(engine: RLHFEngine, rollout: Rollout, sampling: Sampling, micro_batch_size: int) -> Experience:
    """Ask all four models about a rollout, in micro-batches, everything in eval mode."""
    engine.eval()
    parts = []
    for start in range(0, len(rollout.finished), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        part = Rollout(**{f.name: getattr(rollout, f.name)[rows] for f in dataclasses.fields(rollout)})
        mask = part.action_mask
        logits = policy_logits(engine.actor, engine, part, sampling)
        ref_logits = policy_logits(engine.ref, engine, part, sampling)
        parts.append(
            {
                "logprobs": _masked(token_logprobs(logits, part.response_ids), mask),
                "ref_logprobs": _masked(token_logprobs(ref_logits, part.response_ids), mask),
                "entropy": _masked(entropy(logits), mask),
                "values": _masked(response_values(engine.critic, part), mask),
                "scores": response_scores(engine.reward, part),
            }
        )
    scored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Experience(
        rollout.input_ids,
        rollout.attention_mask,
        rollout.response_ids,
        rollout.action_mask,
        rollout.finished,
        rollout.logprobs,
        **scored,
    )


def _masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, x, torch.zeros((), device=x.device, dtype=x.dtype))


def gather_experience(local: Experience, runtime: Runtime, pad_token_id: int) -> Experience:
    """The rows of all ranks on every rank, in global order.

    An experience is small beside a model (some tens of MB for a thousand long responses). Having all of it everywhere
    makes whitening and the choice of minibatches the same on any number of ranks.
    """
    if runtime.world_size == 1:
        return local
    prompt_size = int(all_reduce_max(local.input_ids.shape[1], runtime))
    response_size = int(all_reduce_max(local.response_ids.shape[1], runtime))
    gathered = {}
    for field in dataclasses.fields(local):
        value = getattr(local, field.name)
        if not len(value):
            continue
        if value.ndim == 2:
            is_prompt = field.name in ("input_ids", "attention_mask")
            missing = (prompt_size if is_prompt else response_size) - value.shape[1]
            fill = pad_token_id if field.name in ("input_ids", "response_ids") else 0
            value = nn.functional.pad(value, (missing, 0) if is_prompt else (0, missing), value=fill)
        gathered[field.name] = gather_rows(value, runtime)
    return Experience(**gathered)


@dataclass(frozen=True)
class Shaping:
    """How scores become advantages; see the flags of the same names in step 3."""

    kl_coef: float
    gamma: float
    lam: float
    clip_reward_value: float  # 0: no clipping
    missing_eos_penalty: float
    whiten_advantages: bool


def add_advantages(experience: Experience, shaping: Shaping) -> Experience:
    """Rewards (the KL penalty on every action, the score on the last one), then GAE, then whitening.

    The score is clipped to ± ``clip_reward_value``; a response cut off at the length limit loses
    ``missing_eos_penalty``. All rows of the rollout must be here: whitening is over the whole of them.
    """
    mask = experience.action_mask
    kl = kl_penalty(experience.logprobs, experience.ref_logprobs, "kl")
    scores = experience.scores
    if shaping.clip_reward_value > 0:
        scores = scores.clamp(-shaping.clip_reward_value, shaping.clip_reward_value)
    scores = scores - shaping.missing_eos_penalty * (~experience.finished)
    rewards = shape_rewards(scores, kl, mask, shaping.kl_coef)
    advantages, returns = gae(rewards, experience.values, mask, shaping.gamma, shaping.lam)
    if shaping.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return dataclasses.replace(experience, kl=kl, rewards=rewards, advantages=advantages, returns=returns)


def experience_metrics(experience: Experience, clip_reward_value: float) -> dict[str, float]:
    """What a rollout says about the policy. Nats; a name says its denominator."""
    mask = experience.action_mask
    kl = kl_penalty(experience.logprobs, experience.ref_logprobs, "kl") * mask
    scores = experience.scores
    returns_error = experience.returns - experience.values
    metrics = {
        "objective/kl_per_seq": kl.sum(1).mean(),
        "objective/kl_per_token": kl.sum() / mask.sum(),
        "objective/entropy_per_token": masked_mean(experience.entropy, mask),
        "objective/score_mean": scores.mean(),
        "objective/score_std": scores.std(correction=0),
        "critic/explained_variance": 1 - _variance(returns_error, mask) / _variance(experience.returns, mask),
        "rollout/response_length": mask.sum(1).float().mean(),
        "rollout/finished_fraction": experience.finished.float().mean(),
        "rollout/sampler_logprob_diff_max": (experience.logprobs - experience.sampler_logprobs).abs().max(),
    }
    if clip_reward_value > 0:
        metrics["objective/score_clipped_fraction"] = (scores.abs() > clip_reward_value).float().mean()
    result = {name: value.item() for name, value in metrics.items()}
    return result | {"rollout/distinct_2": distinct_n(response_tokens(experience.response_ids, mask), 2)}


def _variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x[mask].var(correction=0).clamp(min=1e-12)


def response_tokens(response_ids: torch.Tensor, action_mask: torch.Tensor) -> list[list[int]]:
    """The tokens of each response, padding left out."""
    sizes = action_mask.sum(1).tolist()
    return [row[:size] for row, size in zip(response_ids.tolist(), sizes, strict=True)]


def distinct_n(responses: list[list[int]], n: int) -> float:
    """Different n-grams over all n-grams of a set of responses (Li et al. 2016); 0 when there is none."""
    grams = [tuple(row[i : i + n]) for row in responses for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
