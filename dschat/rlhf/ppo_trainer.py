"""One PPO update: the clipped policy and value losses over a minibatch, and the checks around it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dschat.data.loader import Batch, num_rows, take_rows
from dschat.engine.deepspeed_engine import backward, grad_norm
from dschat.engine.distributed import Runtime, all_reduce_max, all_reduce_sum
from dschat.engine.micro_batches import MicroBatches
from dschat.functional import (
    entropy,
    full_kl,
    kl_penalty,
    ppo_policy_loss,
    ppo_value_loss,
    sft_loss,
    token_mean,
)
from dschat.models.packed import on_tokens, token_logits
from dschat.rlhf.experience import Experience, parts_of, policy_logits, policy_logprobs, response_values, sizes_of
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.specs import Sampling, UpdateSpec

import torch

Stats = dict[str, float]


@dataclass
class UpdateProgress:
    """How far an update has come: minibatches that are done with, and the statistics of those that were stepped on."""

    position: int = 0
    updates: list[Stats] = field(default_factory=list)


def train_rlhf(
    engine: RLHFEngine,
    experience: Experience,
    sampling: Sampling,
    spec: UpdateSpec,
    seed: int,
    runtime: Runtime,
    *,
    kl_coef: float = 0.0,
    train_policy: bool = True,
    ptx: Iterator[list[Batch]] | None = None,
    progress: UpdateProgress | None = None,
    after_step: Callable[[int], None] = lambda position: None,
    is_bad: Callable[[int, Stats, Experience], bool] | None = None,
    memory: MicroBatches | None = None,
) -> list[Stats]:
    """``ppo_epochs`` passes over the rollout, each cut into minibatches in a fresh order, the same on every rank.

    ``train_policy`` False trains the critic alone. ``kl_coef`` weighs a KL term of the loss; ``ptx`` yields the
    demonstrations of one optimizer step, this rank's micro-batches. Ends early before a minibatch on which the policy
    is too far from the one that sampled (`UpdateSpec.max_approx_kl`, ``max_ratio``). Goes on from ``progress``, which
    it keeps up to date, and calls ``after_step`` with the position there after each step. Returns the statistics of
    each minibatch, the first one first.

    Where a loss is not finite neither model makes a step; where a gradient is not, its model makes none. ``is_bad``
    gets the position, the statistics and the rows of each minibatch, and says whether it is such a one, whose
    statistics do not count. ``memory`` halves the micro-batches where it runs out.

    Raises:
        RuntimeError: a step is not finite, and there is no ``is_bad``.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    orders = [torch.randperm(len(experience), generator=generator) for _ in range(spec.ppo_epochs)]
    minibatches = [rows for order in orders for rows in order.to(experience.scores.device).split(spec.minibatch_size)]
    progress = progress if progress is not None else UpdateProgress()
    memory = memory or MicroBatches(runtime, engine.policy_models)
    for rows in minibatches[progress.position :]:
        minibatch = experience.rows(rows)
        if minibatch.action_mask.any():
            if progress.updates and train_policy and too_far(engine, minibatch, sampling, spec, runtime):
                break
            policy: Stats = {}
            if train_policy:
                demonstrations = next(ptx) if ptx is not None else []
                policy = add_policy_gradient(engine, minibatch, sampling, spec, memory, kl_coef, demonstrations)
            critic = add_critic_gradient(engine, minibatch, spec, memory) if engine.critic is not None else {}
            if not all(map(math.isfinite, (policy | critic).values())):
                spoil_gradients(engine, minibatch, train_policy)
            stats = policy | critic | step(engine, train_policy)
            if is_bad is None and not all(map(math.isfinite, stats.values())):
                raise RuntimeError(f"PPO loss is not finite: {stats}")
            if is_bad is None or not is_bad(progress.position, stats, minibatch):
                progress.updates.append(stats)
        progress.position += 1
        after_step(progress.position)
    return progress.updates


def spoil_gradients(engine: RLHFEngine, minibatch: Experience, train_policy: bool) -> None:
    """Where the loss of one model is not finite, neither makes its step: a gradient that is not finite is left out."""
    one = minibatch.rows([0])
    if train_policy:
        backward(engine.actor, math.nan * policy_logits(engine.actor, engine, one).float().sum())
    if engine.critic is not None:
        backward(engine.critic, math.nan * response_values(engine.critic, one).sum())


def step(engine: RLHFEngine, train_policy: bool) -> Stats:
    """One optimizer step of each model whose gradient is finite."""
    norms = {}
    if train_policy:
        engine.actor.step()
        norms["policy/grad_norm"] = grad_norm(engine.actor)
        if engine.ema is not None and math.isfinite(norms["policy/grad_norm"]):
            engine.ema.update()
    if engine.critic is not None:
        engine.critic.step()
        norms["critic/grad_norm"] = grad_norm(engine.critic)
    return norms


def add_policy_gradient(
    engine: RLHFEngine,
    minibatch: Experience,
    sampling: Sampling,
    spec: UpdateSpec,
    memory: MicroBatches,
    kl_coef: float = 0.0,
    demonstrations: list[Batch] | None = None,
) -> Stats:
    """The gradient of the actor on the rows of ``minibatch`` (the same on every rank): the clipped objective,
    minus the entropy bonus, plus the KL term, plus ``spec.unsup_coef`` times the mean loss of the demonstrations'
    tokens (PPO-ptx: Ouyang et al. 2022, eq. 2), each where it is asked for.

    Each rank takes every world_size-th row. Every term is divided by the actions (PTX: the tokens) of the whole
    minibatch, so neither micro-batches nor ranks change the step.
    """
    engine.train()
    runtime, num_tokens = memory.runtime, float(minibatch.action_mask.sum())
    ptx_tokens = count_tokens(demonstrations, runtime) if demonstrations else 0.0

    def accumulate() -> _Sums:
        sums = _Sums()
        for batch in memory.cut(list(micro_batches(minibatch, spec, runtime)), len, Experience.rows):
            backward(engine.actor, policy_objective(engine, batch, sampling, spec, num_tokens, kl_coef, sums))
        # A backward pass of its own frees the graph of the policy first; the sum of the gradients is that of one loss.
        for demonstration in memory.cut(demonstrations or [], num_rows, take_rows):
            loss = demonstrations_loss(engine, demonstration, ptx_tokens)
            backward(engine.actor, spec.unsup_coef * loss)
            sums.add("policy/ptx_loss", loss)
        return sums

    return memory.run(engine.actor, accumulate).reduce(runtime)


def policy_objective(
    engine: RLHFEngine,
    batch: Experience,
    sampling: Sampling,
    spec: UpdateSpec,
    num_tokens: float,
    kl_coef: float,
    sums: "_Sums",
) -> torch.Tensor:
    """The share of a micro-batch in the loss of a minibatch of ``num_tokens`` actions, and in its statistics."""
    mask = batch.action_mask
    logits = policy_logits(engine.actor, engine, batch)
    logprobs = policy_logprobs(logits, batch, sampling)
    loss, policy = ppo_policy_loss(
        logprobs,
        batch.logprobs,
        batch.advantages,
        mask,
        spec.cliprange,
        dual_clip=spec.dual_clip,
        denominator=num_tokens,
    )
    sums.add("policy/loss", loss)
    share = policy["num_tokens"] / num_tokens
    for name in ("approx_kl", "clip_fraction", "dual_clip_fraction"):
        if name in policy:
            sums.add(f"policy/{name}", policy[name] * share)
    sums.maximum("policy/ratio_max", policy["ratio_max"])
    drift = torch.where(mask, logprobs.detach() - batch.logprobs, 0.0).abs().max()
    sums.maximum("policy/log_ratio_abs_max", drift)
    if spec.entropy_coef:
        by_token = on_tokens(entropy(logits, **sampling.scored), batch.response_mask)
        bonus = token_mean(by_token, mask, denominator=num_tokens)
        sums.add("policy/entropy_per_token", bonus)
        loss = loss - spec.entropy_coef * bonus
    if spec.kl_loss is not None:
        if spec.kl_loss == "full":
            with torch.no_grad():
                ref_logits = policy_logits(engine.ref, engine, batch)
            kl = on_tokens(full_kl(logits, ref_logits, **sampling.scored), batch.response_mask)
        else:
            # Outside of the actions anything may stand, and 0 times an infinite penalty is not a number.
            kl = kl_penalty(torch.where(mask, logprobs, batch.ref_logprobs), batch.ref_logprobs, spec.kl_loss)
        penalty = token_mean(kl, mask, denominator=num_tokens)
        sums.add("policy/kl_loss", penalty)
        loss = loss + kl_coef * penalty
    return loss


def demonstrations_loss(engine: RLHFEngine, batch: Batch, num_tokens: float) -> torch.Tensor:
    """The share of a micro-batch in the mean loss of the step's demonstrations, which have ``num_tokens``."""
    ids, mask = batch["input_ids"], batch["loss_mask"]
    logits = token_logits(engine.actor, engine.family, ids, batch["attention_mask"], mask)
    return sft_loss(logits, ids[mask][None], denominator=num_tokens)[0]


def count_tokens(demonstrations: list[Batch], runtime: Runtime) -> float:
    """That are in the loss, over all ranks."""
    counts = torch.stack([batch["loss_mask"].sum() for batch in demonstrations]).sum()
    return all_reduce_sum(counts, runtime).item()


def add_critic_gradient(engine: RLHFEngine, minibatch: Experience, spec: UpdateSpec, memory: MicroBatches) -> Stats:
    """The gradient of the critic, of the clipped value loss; rows and denominators as for the policy."""
    critic, runtime = engine.critic, memory.runtime
    assert critic is not None
    engine.train()
    num_tokens = float(minibatch.action_mask.sum())

    def accumulate() -> _Sums:
        sums = _Sums()
        for batch in memory.cut(list(micro_batches(minibatch, spec, runtime)), len, Experience.rows):
            values = response_values(critic, batch)[:, :-1]
            loss, stats = ppo_value_loss(
                values, batch.values, batch.returns, batch.action_mask, spec.cliprange_value, denominator=num_tokens
            )
            backward(critic, spec.vf_coef * loss)
            sums.add("critic/loss", loss)
            sums.add("critic/clip_fraction", stats["value_clip_fraction"] * stats["num_tokens"] / num_tokens)
        return sums

    return memory.run(critic, accumulate).reduce(runtime)


def micro_batches(minibatch: Experience, spec: UpdateSpec, runtime: Runtime) -> Iterator[Experience]:
    """This rank's rows of a minibatch, every world_size-th, in parts of similar length. A rank with fewer parts than
    another ends with parts that have no action, so that all make equally many passes."""
    sizes, num_ranks = sizes_of(minibatch), runtime.world_size
    everyone = [range(rank, len(minibatch), num_ranks) for rank in range(num_ranks)]
    parts = [parts_of(sizes, rows, spec.micro_batch_size, spec.max_tokens) for rows in everyone]
    for part in parts[runtime.rank]:
        yield minibatch.rows(part)
    for _ in range(max(map(len, parts)) - len(parts[runtime.rank])):
        filler = minibatch.rows([0])
        filler.action_mask = filler.action_mask & False
        yield filler


@torch.no_grad()
def too_far(engine: RLHFEngine, minibatch: Experience, sampling: Sampling, spec: UpdateSpec, runtime: Runtime) -> bool:
    """Whether the policy has left the one that sampled by more than the limits, on this minibatch; before its step,
    at the price of a forward pass. Without limits nothing is computed."""
    if not spec.max_approx_kl and not spec.max_ratio:
        return False
    num_tokens = float(minibatch.action_mask.sum())
    sums = _Sums()
    for batch in micro_batches(minibatch, spec, runtime):
        logprobs = policy_logprobs(policy_logits(engine.actor, engine, batch), batch, sampling)
        _, stats = ppo_policy_loss(logprobs, batch.logprobs, batch.advantages, batch.action_mask, spec.cliprange)
        sums.add("kl", stats["approx_kl"] * stats["num_tokens"] / num_tokens)
        sums.maximum("ratio", stats["ratio_max"])
    measured = sums.reduce(runtime)
    return bool(
        (spec.max_approx_kl and measured["kl"] > spec.max_approx_kl)
        or (spec.max_ratio and measured["ratio"] > spec.max_ratio)
    )


def mean_of(updates: list[Stats]) -> Stats:
    """Over the minibatches of one rollout; of a maximum the maximum."""
    names = updates[0] if updates else {}
    return {
        name: max(u[name] for u in updates) if name.endswith("_max") else sum(u[name] for u in updates) / len(updates)
        for name in names
    }


class _Sums:
    """Statistics of micro-batches, put together over micro-batches and ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.maxima: dict[str, float] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value.detach()

    def maximum(self, name: str, value: torch.Tensor) -> None:
        self.maxima[name] = max(self.maxima.get(name, 0.0), value.item())

    def reduce(self, runtime: Runtime) -> Stats:
        totals = all_reduce_sum(torch.stack(list(self.sums.values())), runtime).tolist()
        stats = dict(zip(self.sums, totals, strict=True))
        return stats | {name: all_reduce_max(value, runtime) for name, value in self.maxima.items()}
