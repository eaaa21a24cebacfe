"""The policy on held-out prompts: what it answers, how the reward model scores it, how far it moved."""

from collections.abc import Iterator
from dataclasses import dataclass

from dschat.data.loader import collate_prompts
from dschat.engine.deepspeed_engine import whole_model
from dschat.engine.distributed import Runtime, gather_objects
from dschat.functional import kl_penalty
from dschat.rlhf.experience import distinct_n, gather_experience, response_scores, response_tokens, score_rollout
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Rollout, Sampling, generate, row_uniforms

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVAL_SEED = (
    1_000_003  # every evaluation draws with the same numbers, so that two policies differ by their weights only
)


@dataclass
class HeldOut:
    """This rank's share of the held-out prompts. ``num_prompts`` counts the real ones of all ranks; the shares are
    filled up to equal size with repeats, which come last in global order and are cut off after gathering."""

    input_ids: torch.Tensor  # (B, P) left-padded
    attention_mask: torch.Tensor  # (B, P)
    questions: list[str]
    num_prompts: int


def held_out_prompts(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, runtime: Runtime) -> HeldOut:
    """This rank's every world_size-th prompt; repeats of the first fill the shares up to equal size."""
    num_prompts = len(rows)
    padded = [*range(num_prompts), *[0] * (-num_prompts % runtime.world_size)]
    mine = [rows[i] for i in padded[runtime.rank :: runtime.world_size]]
    batch = collate_prompts(mine, tokenizer.pad_token_id)
    return HeldOut(
        batch["input_ids"].to(runtime.device),
        batch["attention_mask"].to(runtime.device),
        [prompt_text(row["messages"]) for row in mine],
        num_prompts,
    )


def prompt_text(messages: list[dict[str, str]]) -> str:
    """A lone question as it is; a longer dialogue with its roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def evaluate_policy(
    engine: RLHFEngine,
    held_out: HeldOut,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    micro_batch_size: int,
    runtime: Runtime,
) -> tuple[dict[str, float], list[dict]]:
    """Sample one response per held-out prompt. Returns metrics (equal on all ranks) and a row per prompt."""
    engine.eval()
    real = held_out.num_prompts
    parts = []
    with whole_model(engine.actor, runtime.device) as actor:
        for rollout in _rollouts(actor, held_out, sampling, tokenizer, batch_size, runtime, EVAL_SEED):
            parts.append(score_rollout(engine, rollout, sampling, micro_batch_size))
    kl_rows, responses, scores, finished = [], [], [], []
    for part in parts:
        everyone = gather_experience(part, runtime, tokenizer.pad_token_id)
        kl = kl_penalty(everyone.logprobs, everyone.ref_logprobs, "kl") * everyone.action_mask
        kl_rows += kl.sum(1).tolist()
        responses += response_tokens(everyone.response_ids, everyone.action_mask)
        scores += everyone.scores.tolist()
        finished += everyone.finished.tolist()
    questions = gather_objects(held_out.questions, runtime)
    texts = decode_responses(tokenizer, responses)
    rows = [
        {"prompt": q, "response": t, "score": round(s, 4), "kl": round(k, 4), "length": len(r), "finished": f}
        for q, t, s, k, r, f in zip(questions, texts, scores, kl_rows, responses, finished, strict=True)
    ][:real]
    mean = {name: sum(row[name] for row in rows) / real for name in ("score", "kl", "length", "finished")}
    metrics = {
        "eval/score_mean": mean["score"],
        "eval/kl_per_seq": mean["kl"],
        "eval/response_length": mean["length"],
        "eval/finished_fraction": mean["finished"],
        "eval/distinct_2": distinct_n(responses[:real], 2),
    }
    return metrics, rows


@torch.no_grad()
def best_of_n(
    engine: RLHFEngine,
    held_out: HeldOut,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int,
    batch_size: int,
    runtime: Runtime,
) -> list[dict]:
    """The response that the reward model likes best out of ``n`` samples, a row per held-out prompt."""
    best_scores = torch.full((len(held_out.questions),), float("-inf"), device=runtime.device)
    best_texts = [""] * len(held_out.questions)
    with whole_model(engine.actor, runtime.device) as actor:
        for sample in range(n):
            start = 0
            seed = EVAL_SEED + 1 + sample
            for rollout in _rollouts(actor, held_out, sampling, tokenizer, batch_size, runtime, seed):
                scores = response_scores(engine.reward, rollout)
                texts = decode_responses(tokenizer, response_tokens(rollout.response_ids, rollout.action_mask))
                for i, (score, text) in enumerate(zip(scores, texts, strict=True), start):
                    if score > best_scores[i]:
                        best_scores[i], best_texts[i] = score, text
                start += len(texts)
    rows = [
        {"prompt": q, "response": t, "score": round(s, 4)}
        for q, t, s in zip(held_out.questions, best_texts, best_scores.tolist(), strict=True)
    ]
    return gather_objects(rows, runtime)[: held_out.num_prompts]


def decode_responses(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]) -> list[str]:
    """The text of each response, without its end token."""
    return [text.strip() for text in tokenizer.batch_decode(responses, skip_special_tokens=True)]


def _rollouts(
    actor: PreTrainedModel,
    held_out: HeldOut,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    runtime: Runtime,
    seed: int,
) -> Iterator[Rollout]:
    size = len(held_out.questions)
    uniforms = row_uniforms(size * runtime.world_size, sampling.max_new_tokens, seed)[
        runtime.rank :: runtime.world_size
    ]
    for start in range(0, size, batch_size):
        rows = slice(start, start + batch_size)
        yield generate(
            actor,
            held_out.input_ids[rows],
            held_out.attention_mask[rows],
            sampling,
            uniforms[rows],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
