"""Who says how good an answer is: the reward sources of step 3, and the embedded task's own judge."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError
from dschat.models.adapter_files import ADAPTER_CONFIG
from dschat.models.load import POLICY, load_config, load_trained_scorer, model_role
from dschat.models.scorer import STATS_FILE, Scorer, check_probes, load_score_stats
from dschat.rlhf.chat_judge import ChatJudge
from dschat.rlhf.reward_api import ApiReward
from dschat.rlhf.reward_sources import FullReward, FunctionReward
from dschat.rlhf.reward_specs import OPENAI, TOY, RewardSpec, judge_spec
from dschat.rlhf.rewards import CombinedReward, RewardSource, Samples

import torch
from transformers import PreTrainedTokenizerBase


@dataclass
class Verdicts:
    """What a judge says of B answers."""

    scores: list[float | None]  # None: no judgement, or one that is not finite
    correct: list[bool] | None = None  # None: the judge does not tell right from wrong


class Judge(Protocol):
    def __call__(self, samples: Samples) -> Verdicts: ...

    def for_model(self, tokenizer: PreTrainedTokenizerBase) -> "Judge":
        """The same judge for the answers of a model with another tokenizer; nothing is loaded again."""
        ...


class ToyJudge:
    """The embedded task's judge, which training never sees."""

    def __call__(self, samples: Samples) -> Verdicts:
        """
        Raises:
            UserError: a prompt is none of the task's questions.
        """
        verdicts = list(map(_toy_verdict, samples.prompts, samples.responses))
        return Verdicts([verdict.score for verdict in verdicts], [verdict.correct for verdict in verdicts])

    def for_model(self, tokenizer: PreTrainedTokenizerBase) -> "ToyJudge":
        return self


class PointsJudge:
    """A chat model that gives points."""

    def __init__(self, target: str):
        self.chat = ChatJudge(target)

    def __call__(self, samples: Samples) -> Verdicts:
        """
        Raises:
            UserError: the server fails.
        """
        return Verdicts(self.chat(samples))

    def for_model(self, tokenizer: PreTrainedTokenizerBase) -> "PointsJudge":
        return self


class RewardJudge:
    """The weighted sum of reward sources as a judge."""

    def __init__(self, sources: Sequence[tuple[RewardSource, float]]):
        self.sources = sources

    def __call__(self, samples: Samples) -> Verdicts:
        """
        Raises:
            UserError: a source fails.
        """
        given = CombinedReward(self.sources)(samples)
        pairs = zip(given.total.tolist(), given.counts.tolist(), strict=True)
        return Verdicts([total if counted and math.isfinite(total) else None for total, counted in pairs])

    def for_model(self, tokenizer: PreTrainedTokenizerBase) -> "RewardJudge":
        return RewardJudge([(_with_tokenizer(source, tokenizer), weight) for source, weight in self.sources])


def create_judge(
    specs: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    normalize: bool = True,
) -> Judge:
    """``toy``, ``openai:URL#MODEL`` (`ChatJudge`), or the sum of what step 3 takes as ``--reward``, for the answers of
    a model with this tokenizer.

    A plain path is a reward model. Scores are (raw - mean) / std, with ``normalize``, where the model's directory has
    these statistics.

    Raises:
        UserError: no such judge, or it cannot be loaded.
    """
    if specs == TOY:
        return ToyJudge()
    parsed = [judge_spec(text) for text in ([specs] if isinstance(specs, str) else specs)]
    if parsed[0].kind == OPENAI:
        return PointsJudge(parsed[0].target)
    sources = []
    for spec in parsed:
        source: RewardSource
        if spec.kind in ("full", "lora"):
            own = load_tokenizer(spec.target)
            scorer = load_scorer_of(spec, own, dtype, device, normalize)
            source = FullReward(scorer, own, tokenizer, micro_batch_size=batch_size, device=device)
        elif spec.kind == "api":
            source = ApiReward(spec.target, tokenizer, batch_size=batch_size)
        else:
            source = FunctionReward(spec.target, tokenizer)
        sources.append((source, spec.weight))
    return RewardJudge(sources)


def check_judge(specs: str | Sequence[str], tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> None:
    """Find out, before any model answers, what `create_judge` or the judge's first call would stumble over.

    Of a reward model the config alone is read. ``questions`` are `Samples.prompts` to come.

    Raises:
        UserError: no such judge; not a reward model; no such server or function; questions that the judge cannot know.
    """
    if specs == TOY:
        for question in questions:
            _toy_verdict(question, "")
        return
    for spec in map(judge_spec, [specs] if isinstance(specs, str) else specs):
        if spec.kind == "lora":
            _adapter_base(spec.target)
        elif spec.kind == "api":
            ApiReward(spec.target, tokenizer, batch_size=1).check()
        elif spec.kind == OPENAI:
            ChatJudge(spec.target).check()
        elif spec.kind == "function":
            FunctionReward(spec.target, tokenizer)
        elif spec.target != TOY and model_role(spec.target, load_config(spec.target)) == POLICY:
            raise UserError(f"{spec.target} is a language model, not a reward model; give the directory of step 2")


def _toy_verdict(question: str, answer: str) -> Any:
    from dschat.data import toy  # only those who ask for the embedded task pay for making it

    try:
        return toy.judge(question, answer)
    except ValueError as error:
        raise UserError(f"--judge toy: {error}; ask those of --data_path toy, or choose another judge") from None


def load_scorer_of(
    spec: RewardSpec, own: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device, normalize: bool
) -> Scorer:
    """The reward model of a ``full`` or ``lora`` source, whole, and normalised only where it has statistics.

    Raises:
        UserError: another kind of source, or it cannot be loaded.
    """
    if spec.kind not in ("full", "lora"):
        raise UserError(f"{spec.kind}:{spec.target} is no reward model; give the directory of one, or a hub name")
    normalize = normalize and (Path(spec.target) / STATS_FILE).is_file()
    if spec.kind == "full":
        return load_trained_scorer(spec.target, own, dtype=dtype, normalize=normalize, device=device)
    from dschat.models.adapters import load_merged_scorer  # PEFT takes a second to import

    model = load_merged_scorer(spec.target, _adapter_base(spec.target), own, dtype=dtype)
    scorer = Scorer(model, *(load_score_stats(spec.target) if normalize else (0.0, 1.0))).to(device)
    if normalize:
        check_probes(spec.target, scorer)
    return scorer


def _adapter_base(directory: str) -> str:
    """The trunk that the adapter was trained on."""
    path = Path(directory) / ADAPTER_CONFIG
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); give the output of step 2 with --lora_dim") from None


def _with_tokenizer(source: Any, tokenizer: PreTrainedTokenizerBase) -> RewardSource:
    if isinstance(source, FullReward):
        batch: dict[str, Any] = {"micro_batch_size": source.micro_batch_size, "device": source.device}
        return FullReward(source.model, source.tokenizer, tokenizer, **batch)
    if isinstance(source, ApiReward):
        return ApiReward(source.url, tokenizer, batch_size=source.batch_size)
    other = copy.copy(source)
    other.tokenizer = tokenizer
    return other
