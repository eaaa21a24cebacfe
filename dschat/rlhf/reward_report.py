"""Everything that the quality report says of a reward model, from its scores of ranked answers."""

from collections.abc import Sequence

from dschat.data.records import Message
from dschat.data.tokenizer import load_tokenizer
from dschat.models.load import load_causal_lm
from dschat.models.scorer import padding_gap
from dschat.report.reward_quality import Quality, ScoredPairs, best_of_n_curve, reward_quality
from dschat.rlhf.answers import prompt_rows, sample_answers
from dschat.rlhf.judges import create_judge
from dschat.rlhf.reward_sources import FullReward
from dschat.rlhf.specs import CurveSpec, Sampling

import datasets
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

NUM_PROMPTS = 100


def report_quality(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    pairs: ScoredPairs,
    curve: CurveSpec | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Quality:
    """`reward_quality` of the scored ``pairs`` of ``rows`` (`dschat.data.stages.tokenize_rankings`), with the effect
    of padding and, where ``curve`` says how, what choosing the best of n answers is worth. A collective."""
    assert tokenizer.pad_token_id is not None
    first = [ids for row in rows.select(range(min(4, len(rows)))) for ids in row["input_ids"]]
    gap = padding_gap(model, first, tokenizer.pad_token_id, device)
    best = best_of_n(model, tokenizer, rows["messages"][:], curve, dtype=dtype, device=device) if curve else None
    return reward_quality(pairs, padding_gap=gap, best_of_n=best)


def best_of_n(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[list[Message]],
    spec: CurveSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict]:
    """`best_of_n_curve` over n = 1, 2, 4, … N on the first `NUM_PROMPTS` different dialogues.

    ``model`` is the `Scorer` or its engine, ``tokenizer`` its own. Every rank does the same, so that at ZeRO 3, where
    scoring is a collective, all bring the same rows.
    """
    distinct = list({str(messages): messages for messages in dialogues}.values())[:NUM_PROMPTS]
    policy_tokenizer = load_tokenizer(spec.policy_path)
    policy = load_causal_lm(spec.policy_path, policy_tokenizer, dtype=dtype, dropout=0.0)
    samples = sample_answers(
        policy.to(device),  # type: ignore[arg-type]
        policy_tokenizer,
        prompt_rows(policy_tokenizer, distinct),
        Sampling(spec.max_new_tokens),
        spec.seed,
        num_samples=spec.num_samples,
        batch_size=spec.batch_size,
    )
    del policy
    reward = FullReward(model, tokenizer, policy_tokenizer, micro_batch_size=spec.batch_size, device=device)
    judge = create_judge(spec.judge, policy_tokenizer, dtype=dtype, device=device, batch_size=spec.batch_size)
    shape = len(distinct), spec.num_samples
    rewards, judged = (  # None, no score, becomes nan
        np.array(scores, dtype=np.float64).reshape(shape) for scores in (reward(samples).scores, judge(samples).scores)
    )
    return best_of_n_curve(rewards, judged, [2**power for power in range(spec.num_samples.bit_length())])
