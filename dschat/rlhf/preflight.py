"""Before PPO: how large the space is that the policy samples from, and what the reward sees in it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dschat.engine.distributed import gather_objects
from dschat.errors import UserError
from dschat.functional.logprobs import blocks, distribution
from dschat.models.packed import on_tokens
from dschat.report.preflight_figures import NUCLEUS, PLAUSIBLE, STOP, assemble, figures
from dschat.report.preflight_text import preflight_text, write_preflight
from dschat.rlhf.collect import Collector, judge, roll_out
from dschat.rlhf.experience import parts_of, policy_logits, sizes_of, take_rows
from dschat.rlhf.rollout import Rollout, tokens_of
from dschat.rlhf.specs import Sampling

import torch

STOPS = "stop"  # of --preflight
PREFLIGHT_SEED = 2_000_003  # of its own random numbers: training draws the same with and without a preflight


def check_sample_space(
    collector: Collector,
    rows: Sequence[dict[str, Any]],
    num_samples: int,
    mode: str,
    output_dir: str,
    say: Callable[[str], None],
) -> None:
    """Step 3's first act: the preflight of its own actor, reward and ``rows``, printed and written to
    ``output_dir``/preflight.json. A collective.

    Raises:
        UserError: the verdict is STOP, and the ``mode`` "stop".
    """
    found = figures(sample_space(collector, rows, num_samples), num_samples)
    result = assemble([{"name": "actor", "path": "", "prompts": found, "training": None}])
    if collector.runtime.is_main:
        write_preflight(result, Path(output_dir), pictures=False)
    say(preflight_text(result))
    if result["verdict"] == STOP and mode == STOPS:
        raise UserError(f"preflight: {result['reason']}; to train all the same: --preflight warn")


@torch.no_grad()
def sample_space(collector: Collector, rows: Sequence[dict[str, Any]], num_samples: int) -> list[dict[str, Any]]:
    """``num_samples`` answers to each of ``rows``, the whole list on every rank: neighbours belong to one prompt.

    Each answer has ``text``, ``ids``, ``finished``, ``score`` (None: the reward gave none, or none that is finite)
    and by token ``entropy`` (nats), ``top`` and ``sampled`` (probabilities), ``plausible`` (tokens of at least
    `PLAUSIBLE`) and ``nucleus`` (the fewest tokens of together `NUCLEUS`). A collective.
    """
    runtime, world_size = collector.runtime, collector.runtime.world_size
    collector = dataclasses.replace(collector, num_samples=num_samples)
    padded = [*rows, *[rows[0]] * (-len(rows) % world_size)]  # equal shares; cut off after gathering
    mine = padded[runtime.rank :: world_size]
    rollout = roll_out(collector, mine, PREFLIGHT_SEED)
    samples, scores = judge(collector, rollout, mine)
    columns = next_tokens(collector, rollout)
    totals, counts = scores.total.tolist(), scores.counts.tolist()
    responses = tokens_of(rollout.response_ids, rollout.response_mask)
    found = [
        {
            "text": text,
            "ids": ids,
            "finished": finished,
            "score": totals[i] if counts[i] and math.isfinite(totals[i]) else None,
        }
        | {name: values[i, : len(ids)].tolist() for name, values in columns.items()}
        for i, (text, ids, finished) in enumerate(
            zip(samples.responses, responses, rollout.finished.tolist(), strict=True)
        )
    ]
    return gather_objects(found, runtime, num_samples)[: len(rows) * num_samples]


def next_tokens(collector: Collector, rollout: Rollout) -> dict[str, torch.Tensor]:
    """(B, R) each, of the distribution that every token was drawn from; 0 after the end of an answer."""
    collector.engine.eval()
    size = rollout.response_ids.shape
    names = ("entropy", "top", "sampled", "plausible", "nucleus")
    columns = {name: torch.zeros(size, device=rollout.response_ids.device) for name in names}
    for rows in parts_of(sizes_of(rollout), range(size[0]), collector.micro_batch_size, 0):
        part = take_rows(rollout, rows)
        logits = policy_logits(collector.engine.actor, collector.engine, part)
        found = describe(logits, part.response_ids[part.response_mask][None], collector.sampling)
        for name, values in found.items():
            columns[name][rows, : part.response_ids.shape[1]] = on_tokens(values, part.response_mask)
    return columns


def describe(logits: torch.Tensor, token_ids: torch.Tensor, sampling: Sampling) -> dict[str, torch.Tensor]:
    """What the distributions of (B, R, V) ``logits`` are like at ``token_ids`` (B, R): see `sample_space`."""
    names = ("entropy", "top", "sampled", "plausible", "nucleus")
    result = {name: torch.empty(token_ids.shape, device=logits.device) for name in names}
    for block in blocks(logits):
        p, logp = distribution(logits[block], **sampling.scored)
        result["entropy"][block] = -torch.linalg.vecdot(p, logp)
        result["sampled"][block] = p.gather(-1, token_ids[block][..., None]).squeeze(-1)
        result["plausible"][block] = (p >= PLAUSIBLE).sum(-1).float()
        ranked = p.sort(dim=-1, descending=True).values
        result["top"][block] = ranked[..., 0]
        result["nucleus"][block] = 1.0 + (ranked.cumsum(-1) < NUCLEUS).sum(-1)
    return result
