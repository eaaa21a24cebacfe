"""From a rollout to what PPO trains on: log-probabilities, values, scores, rewards, advantages."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from dschat.engine.distributed import Runtime, all_reduce_max, gather_rows
from dschat.engine.micro_batches import MicroBatches
from dschat.functional import (
    entropy,
    full_kl,
    gae,
    grpo_advantages,
    kl_penalty,
    masked_mean,
    masked_whiten,
    rewards_to_go,
    rloo_advantages,
    score_unfinished,
    shape_rewards,
    token_logprobs,
)
from dschat.models.packed import by_prompt, neighbours, on_tokens, token_logits
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Rollout, tokens_of
from dschat.rlhf.specs import FORWARD, GAE, SAMPLER, Sampling, Shaping

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


@dataclass
class Experience:
    """B responses and what the models and the reward say of them. P prompt, R response; nats; 0 outside
    ``action_mask``.

    ``response_mask`` is True on every token of a response up to and including EOS; ``action_mask`` only on those that
    are learned from: none of a response without a score, none of what a mask of the data or the reward leaves out.
    """

    input_ids: torch.Tensor  # (B, P) left-padded prompts
    attention_mask: torch.Tensor  # (B, P) bool
    response_ids: torch.Tensor  # (B, R)
    response_mask: torch.Tensor  # (B, R) bool
    action_mask: torch.Tensor  # (B, R) bool
    finished: torch.Tensor  # (B,) bool: ended with EOS
    scores: torch.Tensor  # (B,) of the reward; 0 where there is none
    sampler_logprobs: torch.Tensor  # (B, R) as the sampler saw them
    logprobs: torch.Tensor  # (B, R) actor, one forward or the sampler's
    ref_logprobs: torch.Tensor  # (B, R)
    entropy: torch.Tensor  # (B, R)
    kl: torch.Tensor  # (B, R) of the kind that is penalised
    values: torch.Tensor  # (B, R) critic, of the state before each action; 0 without a critic
    final_values: torch.Tensor  # (B,) of the state after the last token
    rewards: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (B, R)
    advantages: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (B, R)
    returns: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))  # (B, R)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def scored(self) -> torch.Tensor:
        """(B,) bool: rows with anything to learn from."""
        return self.action_mask.any(1)

    def rows(self, index: torch.Tensor | slice | list[int]) -> "Experience":
        """The given rows, without the columns that are padding in all of them."""
        return take_rows(self, index)


Rows = TypeVar("Rows", Rollout, Experience)


def take_rows(batch: Rows, index: torch.Tensor | slice | list[int]) -> Rows:
    """The given rows, without the columns that are padding in all of them."""
    if isinstance(index, list):  # sent to a GPU once, not for each field, each time after all that it has to do
        index = torch.tensor(index, device=batch.response_ids.device)
    picked = {f.name: getattr(batch, f.name)[index] for f in dataclasses.fields(batch) if len(getattr(batch, f.name))}
    prompt_size = int(picked["attention_mask"].sum(1).max())
    response_size = int(picked["response_mask"].sum(1).max())
    for name, value in picked.items():
        if name in ("input_ids", "attention_mask"):
            picked[name] = value[:, value.shape[1] - prompt_size :]
        elif value.ndim == 2:
            picked[name] = value[:, :response_size]
    return type(batch)(**picked)


def sizes_of(batch: Rollout | Experience) -> list[list[int]]:
    """[tokens of the prompt, of the response, number of the prompt: the same for rows with the same] of each row."""
    _, prompts = _prompts(batch).unique(dim=0, return_inverse=True)
    return torch.stack([batch.attention_mask.sum(1), batch.response_mask.sum(1), prompts], 1).tolist()


def parts_of(sizes: list[list[int]], rows: Iterable[int], max_rows: int, max_tokens: int) -> list[list[int]]:
    """``rows`` of a batch of these `sizes_of`, those of similar length together and those of one prompt next to each
    other, in parts of at most ``max_rows`` rows and ``max_tokens`` tokens with the padding that `take_rows` leaves; 0:
    no limit of tokens. A row that is larger by itself stands alone."""
    prompts, lengths = [size[2] for size in sizes], [sum(size[:2]) for size in sizes]
    parts: list[list[int]] = []
    for row in by_prompt(rows, prompts, lengths):
        grown = [*parts[-1], row] if parts else [row]
        width = sum(max(sizes[each][side] for each in grown) for side in (0, 1))
        if not parts or len(grown) > max_rows or (max_tokens and len(grown) * width > max_tokens):
            parts.append([row])
        else:
            parts[-1] = grown
    return parts


def _prompts(batch: Rollout | Experience) -> torch.Tensor:
    """(B, P) ids, -1 at padding."""
    return torch.where(batch.attention_mask, batch.input_ids, -1)


def same_prompts(batch: Rollout | Experience) -> torch.Tensor:
    """(B,): for each row the first one of its neighbours with the same prompt, which `pack` then computes once."""
    prompts = _prompts(batch)
    return neighbours((prompts[1:] == prompts[:-1]).all(1))


def sequences(batch: Rollout | Experience) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and response side by side: ids (B, P + R) and their mask (B, P + R)."""
    ids = torch.cat([batch.input_ids, batch.response_ids], dim=1)
    return ids, torch.cat([batch.attention_mask, batch.response_mask], dim=1)


def policy_logits(model: nn.Module, engine: RLHFEngine, batch: Rollout | Experience) -> torch.Tensor:
    """(1, M, V) logits at the M tokens of all responses, row by row, in the model's dtype, before the temperature;
    ``model`` is the actor or the reference. `Sampling.scored` says which distribution they make."""
    ids, mask = sequences(batch)
    wanted = mask.clone()
    wanted[:, : batch.input_ids.shape[1]] = False
    return token_logits(model, engine.family, ids, mask, wanted, same_prompts(batch))


def policy_logprobs(logits: torch.Tensor, batch: Rollout | Experience, sampling: Sampling) -> torch.Tensor:
    """(B, R), 0 at padding: the log-probabilities of the responses under `policy_logits`."""
    ids = batch.response_ids[batch.response_mask][None]
    return on_tokens(token_logprobs(logits, ids, **sampling.scored), batch.response_mask)


def response_values(critic: nn.Module, batch: Rollout | Experience) -> torch.Tensor:
    """(B, R + 1): the critic's value of the state before each action, that is at the token before it; then of the
    state after the last column, which is the state after the last token where a response has no padding."""
    ids, mask = sequences(batch)
    return critic(ids, mask, same_prompts(batch))[:, batch.input_ids.shape[1] - 1 :]


@torch.no_grad()
def score_rollout(
    engine: RLHFEngine,
    rollout: Rollout,
    scores: torch.Tensor,
    action_mask: torch.Tensor,
    sampling: Sampling,
    kl_kind: str,
    micro_batch_size: int,
    *,
    max_tokens: int = 0,
    old_logprobs: str = FORWARD,
    memory: MicroBatches | None = None,
) -> Experience:
    """Ask actor, reference and critic about a rollout that has been scored, all in eval mode, in micro-batches of
    responses of similar length, those to one prompt together.

    Args:
        scores: (B,) as in `Experience`, and ``action_mask`` (B, R).
        kl_kind: one of KL_KINDS.
        micro_batch_size: responses asked about at once.
        max_tokens: of them with padding; 0: no limit.
        old_logprobs: FORWARD, or SAMPLER to take the actor's side from the sampler: no forward of the actor, and each
            token's entropy is estimated by minus its log-probability. Not with the KL of the kind "full".
        memory: halves the micro-batches where it runs out; needed on several ranks.
    """
    engine.eval()
    size = rollout.response_ids.shape
    columns = ("sampler_logprobs", "logprobs", "ref_logprobs", "entropy", "kl", "values")
    scored = {name: torch.zeros(size, device=scores.device) for name in columns}
    scored["final_values"] = torch.zeros(size[0], device=scores.device)
    parts = parts_of(sizes_of(rollout), range(size[0]), micro_batch_size, max_tokens)
    memory = memory or MicroBatches(Runtime(0, 1, scores.device))
    parts += parts[:1] * (int(all_reduce_max(len(parts), memory.runtime)) - len(parts))  # equally many on every rank

    def ask_in_parts(part: list[int]) -> None:
        for rows in memory.cut([part], len, lambda rows, some: rows[some]):
            ask(rows)

    def ask(rows: list[int]) -> None:
        here = torch.tensor(rows, device=scores.device)
        part = take_rows(rollout, here)
        mask = action_mask[here, : part.response_ids.shape[1]]
        ref_logits = policy_logits(engine.ref, engine, part)
        found = {"ref_logprobs": policy_logprobs(ref_logits, part, sampling)}
        if old_logprobs == SAMPLER:
            found |= {"logprobs": part.logprobs, "entropy": -part.logprobs}
        else:
            logits = policy_logits(engine.actor, engine, part)
            found["logprobs"] = policy_logprobs(logits, part, sampling)
            found["entropy"] = on_tokens(entropy(logits, **sampling.scored), part.response_mask)
        if kl_kind == "full":
            found["kl"] = on_tokens(full_kl(logits, ref_logits, **sampling.scored), part.response_mask)
        else:
            found["kl"] = kl_penalty(found["logprobs"], found["ref_logprobs"], kl_kind)
        if engine.critic is not None:
            values = response_values(engine.critic, part)
            found["values"] = values[:, :-1]
            ends = part.response_mask.sum(1, keepdim=True)
            scored["final_values"][here] = values.gather(1, ends).squeeze(1).float()
        for name, value in (found | {"sampler_logprobs": part.logprobs}).items():
            scored[name][here, : mask.shape[1]] = _masked(value, mask).float()

    for part in parts:
        memory.ask(partial(ask_in_parts, part))
    return Experience(
        rollout.input_ids,
        rollout.attention_mask,
        rollout.response_ids,
        rollout.response_mask,
        action_mask,
        rollout.finished,
        scores,
        **scored,
    )


def repro_responses(batch: Experience, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Prompts and responses and what was found of them, for a file that lets them be looked at. Numbers are text
    there, for JSON has no nan."""
    prompts = tokens_of(batch.input_ids, batch.attention_mask)
    responses = tokens_of(batch.response_ids, batch.response_mask)
    rows = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        names = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
        found = {name: getattr(batch, name)[row] for name in names if len(getattr(batch, name))}
        columns = {name: [str(x) for x in value[: len(response)].tolist()] for name, value in found.items()}
        texts = {"prompt": tokenizer.decode(prompt), "response": tokenizer.decode(response)}
        rows.append(texts | {"token_ids": [*prompt, *response], "score": str(batch.scores[row].item())} | columns)
    return rows


def _masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, x, torch.zeros((), device=x.device, dtype=x.dtype))


def gather_experience(local: Experience, runtime: Runtime, pad_token_id: int, group_size: int = 1) -> Experience:
    """The rows of all ranks on every rank, in global order; ``group_size`` responses to one prompt stay neighbours.

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
        gathered[field.name] = gather_rows(value, runtime, group_size)
    return Experience(**gathered)


def add_advantages(experience: Experience, shaping: Shaping, kl_coef: float) -> Experience:
    """Rewards (the KL penalty on every action, the score on the last one), then advantages, then whitening.

    The score is clipped to ± ``clip_reward_value``, then changed by the rule for responses cut off at the length
    limit. All rows of the rollout must be here: whitening is over the whole of them. Returns are 0 without a critic.
    """
    mask = experience.action_mask
    scores = experience.scores
    if shaping.clip_reward_value > 0:
        scores = scores.clamp(-shaping.clip_reward_value, shaping.clip_reward_value)
    scores = score_unfinished(scores, experience.finished, shaping.missing_eos_penalty, shaping.missing_eos)
    rewards = shape_rewards(scores, experience.kl, mask, kl_coef if shaping.kl_in_reward else 0.0)
    if shaping.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    returns = torch.zeros_like(rewards)
    if shaping.estimator == GAE:
        cut_off = torch.where(experience.finished, 0.0, experience.final_values)
        final_values = cut_off if shaping.missing_eos == "bootstrap" else None
        advantages, returns = gae(
            rewards, experience.values, mask, shaping.gamma, shaping.lam, final_values=final_values
        )
    elif shaping.estimator == "reinforce_pp":
        advantages = rewards_to_go(rewards, mask, shaping.gamma)
    else:
        against_group = {"rloo": rloo_advantages, "grpo": grpo_advantages}[shaping.estimator]
        of_response = against_group(rewards.sum(1), shaping.group_size, experience.scored)
        advantages = _masked(of_response[:, None].expand_as(rewards), mask)
    if shaping.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return dataclasses.replace(experience, rewards=rewards, advantages=advantages, returns=returns)


def experience_metrics(experience: Experience, clip_reward_value: float) -> dict[str, float]:
    """What a rollout says about the policy. Nats; a name says its denominator; rows without a score do not count."""
    mask = experience.action_mask
    kl = kl_penalty(experience.logprobs, experience.ref_logprobs, "kl") * mask
    scores = experience.scores[experience.scored]
    metrics = {
        "objective/kl_per_seq": kl.sum() / len(scores),
        "objective/kl_per_token": kl.sum() / mask.sum(),
        "objective/kl_penalty_per_seq": experience.kl.sum() / len(scores),
        "objective/entropy_per_token": masked_mean(experience.entropy, mask),
        "objective/score_mean": scores.mean(),
        "objective/score_std": scores.std(correction=0),
        "rollout/response_length": experience.response_mask.sum(1).float().mean(),
        "rollout/finished_fraction": experience.finished.float().mean(),
        "rollout/scored_fraction": experience.scored.float().mean(),
        "rollout/masked_fraction": 1 - mask.sum() / experience.response_mask.sum(),
        "rollout/sampler_logprob_diff_max": (experience.logprobs - experience.sampler_logprobs).abs().max(),
    }
    if len(experience.returns) and bool(experience.returns.any()):
        error = experience.returns - experience.values
        metrics["critic/explained_variance"] = 1 - _variance(error, mask) / _variance(experience.returns, mask)
    if clip_reward_value > 0:
        metrics["objective/score_clipped_fraction"] = (scores.abs() > clip_reward_value).float().mean()
    result = {name: value.item() for name, value in metrics.items()}
    responses = tokens_of(experience.response_ids, experience.response_mask)
    return result | {"rollout/distinct_2": distinct_n(responses, 2)}


def rollout_values(experience: Experience) -> dict[str, torch.Tensor]:
    """What tensorboard shows as histograms: scores and lengths by answer, advantages by action."""
    return {
        "objective/scores": experience.scores[experience.scored].cpu(),
        "objective/advantages": experience.advantages[experience.action_mask].cpu(),
        "rollout/response_lengths": experience.response_mask.sum(1).cpu(),
    }


def _variance(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x[mask].var(correction=0).clamp(min=1e-12)


def distinct_n(responses: list[list[int]], n: int) -> float:
    """Different n-grams over all n-grams of a set of responses (Li et al. 2016); 0 when there is none."""
    grams = [tuple(row[i : i + n]) for row in responses for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
