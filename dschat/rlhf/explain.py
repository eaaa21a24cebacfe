"""PPO in slow motion: answers of one rollout token by token, and every number of it checked in plain Python.

All of a rollout is compared with what `explain_oracle` makes of it, whose means whitening needs anyway; what comes
after the update, here, only for the answers that are written down. What float32 does not explain stops the run.
"""

import dataclasses
import math
from typing import Any

from dschat.functional import entropy as entropy_of
from dschat.functional import full_kl, kl_penalty, ppo_policy_loss, ppo_value_loss, token_logprobs
from dschat.models.precision import tolerance
from dschat.report.explain_page import Answer, visible, write_explanation
from dschat.rlhf.collect import Collector
from dschat.rlhf.experience import Experience, policy_logits, response_values
from dschat.rlhf.explain_oracle import CHECKED, FEW, GIVEN, UNIT, Floats, Trace, check, compare, kl_of, recompute
from dschat.rlhf.specs import Shaping, UpdateSpec

import torch

VOCABULARY_BUDGET = 2**24  # logits summed in plain Python, about 12 s; of longer answers the first tokens
NEVER = -1e38  # the logit of a banned token
MAX_LOG_RATIO = 20.0  # as in the run


def explain_update(
    collector: Collector,
    experience: Experience,
    shaping: Shaping,
    update: UpdateSpec,
    kl_coef: float,
    num_rows: int,
    output_dir: str,
) -> None:
    """Write the first ``num_rows`` responses as ``<output_dir>/explain/response_000.csv``, … and ``index.html``.

    Called on all ranks with the same experience, after the update that it was for; rank 0 writes. Models and random
    numbers stay as they are.

    Raises:
        RuntimeError: a number of the run is not the one that plain Python finds; names response, token and column.
        UserError: the folder cannot be written.
    """
    traces = recompute(experience, shaping, collector.kl_kind, kl_coef)
    dtype = next(collector.engine.family.parameters()).dtype
    compare(experience, traces, collector.engine.family.config.vocab_size, tolerance(dtype))
    num_rows = min(num_rows, len(experience))
    num_summed = VOCABULARY_BUDGET // num_rows // collector.engine.family.config.vocab_size
    answers = []
    for row in range(num_rows):
        alone = experience.rows(slice(row, row + 1))
        after = after_update(collector, alone, traces[row], update, kl_coef, row, num_summed)
        answers.append(describe(collector.tokenizer, alone, traces[row], after))
    if collector.runtime.is_main:
        settings = dataclasses.asdict(shaping) | dataclasses.asdict(update)
        settings |= {"kl_kind": collector.kl_kind, "kl_coef": kl_coef, "temperature": collector.sampling.temperature}
        settings["num_summed"] = num_summed
        write_explanation(output_dir, answers, settings)


@torch.no_grad()
def after_update(
    collector: Collector,
    alone: Experience,
    trace: Trace,
    update: UpdateSpec,
    kl_coef: float,
    row: int,
    num_summed: int,
) -> dict[str, Floats]:
    """One response, without padding, under the models as they are now: columns with an entry per action.

    Sums over the vocabulary are checked for the first ``num_summed`` actions. All ranks call it together, for at
    ZeRO 3 a forward is a collective.

    Raises:
        RuntimeError: a number of the run differs from that of plain Python.
    """
    engine, ids, kind = collector.engine, alone.response_ids, update.kl_loss
    engine.eval()
    scored = collector.sampling.scored
    logits, ref_logits = (policy_logits(model, engine, alone) for model in (engine.actor, engine.ref))
    logprobs, ref_again = (token_logprobs(each, ids, **scored) for each in (logits, ref_logits))
    columns = {"new_logprob": logprobs, "ref_again": ref_again, "new_entropy": entropy_of(logits, **scored)}
    if kind is not None:
        exact = kind == "full"
        estimate = full_kl(logits, ref_logits, **scored) if exact else kl_penalty(logprobs, alone.ref_logprobs, kind)
        columns["new_kl"] = estimate
    if engine.critic is not None:
        columns["new_value"] = response_values(engine.critic, alone)[:, :-1]
    found = {name: [column[0, t].item() for t in trace.actions] for name, column in columns.items()}
    for k, t in enumerate(trace.actions[:num_summed]):
        adjusted = [_adjusted(each[0, t].tolist(), **scored) for each in (logits, ref_logits)]
        expected, slack = vocabulary_sums(adjusted[0], adjusted[1], int(ids[0, t]))
        if kind != "full":
            del expected["new_kl"]
        for name, number in expected.items():
            check(row, name, [t], [found[name][k]], [number], slack)
    limit = tolerance(next(engine.family.parameters()).dtype)
    check(row, "ref_logprob", trace.actions, trace.numbers["ref_logprob"], found.pop("ref_again"), limit)
    if kind is not None:
        pairs = zip(found["new_logprob"], trace.numbers["ref_logprob"], found["new_kl"], strict=True)
        for t, (new, ref, kl) in zip(trace.actions, pairs, strict=True):
            expected_kl = max(kl, 0.0) if kind == "full" else kl_of(new - ref, kind)
            slack = FEW * UNIT * ((1 + abs(new - ref)) * (abs(new - ref) + abs(kl)) + 32 * exact)
            check(row, "new_kl", [t], [kl], [expected_kl], slack)
        found["kl_loss"] = [kl_coef * kl for kl in found.pop("new_kl")]
    terms = [_policy_term(row, t, alone, logprobs, update) for t in trace.actions]
    if engine.critic is not None:
        values = columns["new_value"]
        terms = [
            term | _value_term(row, t, alone, values, update) for t, term in zip(trace.actions, terms, strict=True)
        ]
    return found | {name: [term[name] for term in terms] for name in (terms[0] if terms else {})}


def _adjusted(logits: Floats, temperature: float, banned_ids: tuple[int, ...]) -> Floats:
    """Of the distribution that is sampled from."""
    adjusted = [logit / temperature for logit in logits]
    for token in banned_ids:
        adjusted[token] = NEVER
    return adjusted


def vocabulary_sums(logits: Floats, ref_logits: Floats, token: int) -> tuple[dict[str, float], float]:
    """Log-probabilities of a token, entropy, KL(actor || reference) of one position; and how far float32 may be off:
    a sum over V terms errs by about sqrt(V) roundings."""
    logs = []
    for numbers in (logits, ref_logits):
        largest = max(numbers)
        normalizer = largest + math.log(math.fsum(math.exp(x - largest) for x in numbers))
        logs.append([x - normalizer for x in numbers])
    actor, ref = logs
    kept = [(math.exp(p), p, q) for p, q in zip(actor, ref, strict=True) if math.exp(p) > 0]  # banned tokens: 0
    sums = {
        "new_logprob": actor[token],
        "ref_again": ref[token],
        "new_entropy": -math.fsum(weight * p for weight, p, _ in kept),
        "new_kl": math.fsum(weight * (p - q) for weight, p, q in kept),
    }
    largest = max(abs(x) for _, p, q in kept for x in (p, q)) + max(map(abs, (max(logits), max(ref_logits))))
    return sums, (FEW + math.isqrt(len(logits))) * UNIT * (1 + largest)


def _policy_term(row: int, t: int, alone: Experience, logprobs: torch.Tensor, update: UpdateSpec) -> dict[str, float]:
    """Ratio, loss and whether a clip removes the gradient, of one token, as the run's loss function sees it."""
    new, old, advantages, mask = (
        x[:1, t : t + 1] for x in (logprobs, alone.logprobs, alone.advantages, alone.action_mask)
    )
    loss, stats = ppo_policy_loss(new, old, advantages, mask, update.cliprange, dual_clip=update.dual_clip)
    d, advantage = new.item() - old.item(), advantages.item()
    ratio = math.exp(min(d, MAX_LOG_RATIO))
    low, high = 1 - update.cliprange, 1 + update.cliprange
    unclipped, clipped = -advantage * ratio, -advantage * min(max(ratio, low), high)
    expected, removed = max(unclipped, clipped), clipped > unclipped
    bounds = [low, high]
    if update.dual_clip is not None:
        bounds.append(update.dual_clip)
        if advantage < 0 and expected > -advantage * update.dual_clip:
            expected, removed = -advantage * update.dual_clip, True
    slack = FEW * UNIT * (1 + abs(d)) * (1 + ratio)
    check(row, "ratio", [t], [stats["ratio_mean"].item()], [ratio], slack)
    check(row, "policy_loss", [t], [loss.item()], [expected], slack * abs(advantage))
    if all(abs(ratio - bound) > slack for bound in bounds):  # at the very edge both answers are right
        check(row, "clipped", [t], [stats["clip_fraction"].item()], [float(removed)], 0.0)
    return {"ratio": ratio, "clipped": float(removed), "policy_loss": loss.item()}


def _value_term(row: int, t: int, alone: Experience, values: torch.Tensor, update: UpdateSpec) -> dict[str, float]:
    """The clipped value and the loss of one token, as the run's loss function sees it."""
    new, old, returns, mask = (x[:1, t : t + 1] for x in (values, alone.values, alone.returns, alone.action_mask))
    loss, _ = ppo_value_loss(new, old, returns, mask, update.cliprange_value)
    value, before, target = new.item(), old.item(), returns.item()
    clipped = min(max(value, before - update.cliprange_value), before + update.cliprange_value)
    expected = max((value - target) ** 2, (clipped - target) ** 2) / 2
    largest = abs(value) + abs(before) + abs(target) + update.cliprange_value
    check(row, "value_loss", [t], [loss.item()], [expected], FEW * UNIT * largest**2)
    return {"clipped_value": clipped, "value_loss": loss.item()}


def describe(tokenizer: Any, alone: Experience, trace: Trace, after: dict[str, Floats]) -> Answer:
    """One response as the page shows it. Columns of the run hold the run's numbers; shares, deltas and advantages
    before whitening, which it does not keep, are those of plain Python."""
    kept = {column: getattr(alone, name)[0].tolist() for column, name in (GIVEN | CHECKED).items()}
    ids, inside = alone.response_ids[0].tolist(), alone.response_mask[0].tolist()
    rows: list[dict[str, Any]] = []
    for t, token_id in enumerate(ids):
        text = visible(tokenizer.decode([token_id]))
        text = f"⟦{text}⟧" if token_id in tokenizer.all_special_ids else text
        is_action = t in trace.actions
        rows.append({"position": t, "token_id": token_id, "token": text})
        rows[t] |= {"in_response": int(inside[t]), "is_action": int(is_action)}
        if is_action:
            k = trace.actions.index(t)
            rows[t] |= {name: numbers[k] for name, numbers in (trace.numbers | after).items()}
            rows[t] |= {name: numbers[t] for name, numbers in kept.items()}
    prompt = alone.input_ids[0, alone.attention_mask[0]].tolist()
    scores = {"score": trace.score, "clipped_score": trace.clipped_score, "final_score": trace.final_score}
    return Answer(tokenizer.decode(prompt), tokenizer.decode(ids), bool(alone.finished[0]), rows, scores | trace.notes)
