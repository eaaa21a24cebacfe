"""The reward sources that run in this process: a reward model, and a function of the user's."""

import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dschat.data.records import Message
from dschat.data.stages import drop_first_turn
from dschat.data.templates import encode_answers, encode_prompt, neutralize
from dschat.engine.deepspeed_engine import unwrap
from dschat.engine.distributed import Runtime
from dschat.engine.micro_batches import MicroBatches
from dschat.errors import UserError
from dschat.models.load import max_positions
from dschat.models.packed import by_prompt
from dschat.models.scorer import Scorer, padding_gap, score_token_ids
from dschat.rlhf.rewards import Judged, Samples

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

ARGUMENTS = ("prompts", "responses", "token_ids", "finished", "messages", "records")
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class FullReward:
    """A sequence classifier with one label: its value at the last token of each response.

    A response goes to it as it was sampled where its tokenizer is the actor's. Otherwise (``reencodes``) the text goes
    through its own template and tokenizer; a dialogue that its context cannot hold then loses its earliest turns. What
    does not fit even so gets no score.

    Args:
        model: a `Scorer` or a DeepSpeed engine around one. At ZeRO 3 a call is a collective, with equally many
            responses on every rank.
        tokenizer: of the reward model.
        micro_batch_size: responses scored at once, those of similar length and to one prompt together.
        memory: halves that where it runs out; default: of one rank.
    """

    name = "full"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        actor_tokenizer: PreTrainedTokenizerBase,
        *,
        micro_batch_size: int,
        device: torch.device,
        memory: MicroBatches | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.memory = memory or MicroBatches(Runtime(0, 1, device))
        self.micro_batch_size, self.device = micro_batch_size, device
        self.reencodes = not same_encoding(tokenizer, actor_tokenizer)
        scorer = unwrap(model)
        assert isinstance(scorer, Scorer)
        self.limit = max_positions(scorer.model.config) or math.inf

    def __call__(self, samples: Samples) -> Judged:
        rows, fits = self._rows(samples)
        assert self.tokenizer.pad_token_id is not None
        order = by_prompt(range(len(rows)), samples.prompts, [len(row) for row in rows])
        ordered, prompts = [rows[i] for i in order], [samples.prompts[i] for i in order]
        pad_token_id = self.tokenizer.pad_token_id

        def ask() -> list[float]:
            size = self.memory.rows(self.micro_batch_size)
            return score_token_ids(self.model, ordered, pad_token_id, size, self.device, prompts)

        found = self.memory.ask(ask)
        scores = dict(zip(order, found, strict=True))
        return Judged([scores[i] if fit else None for i, fit in enumerate(fits)])

    def padding_gap(self, samples: Samples) -> float:
        """By how much padding changes the first few scores; see `dschat.models.scorer.padding_gap`."""
        rows, _ = self._rows(samples)
        assert self.tokenizer.pad_token_id is not None
        return padding_gap(self.model, rows, self.tokenizer.pad_token_id, self.device)

    def _rows(self, samples: Samples) -> tuple[list[list[int]], list[bool]]:
        """The ids that the model reads for each response, and whether its context holds them."""
        rows = samples.token_ids
        if self.reencodes:
            dialogues = zip(samples.messages, samples.responses, samples.finished, strict=True)
            rows = [self._encode(*dialogue) for dialogue in dialogues]
        fits = [len(row) <= self.limit for row in rows]
        # One token stands in for a row that does not fit: ranks must score equally many.
        return [row if fit else row[:1] for row, fit in zip(rows, fits, strict=True)], fits

    def _encode(self, messages: list[Message], response: str, finished: bool) -> list[int]:
        ids = encode_response(self.tokenizer, messages, response, finished)
        while len(ids) > self.limit and (messages := drop_first_turn(messages)):
            ids = encode_response(self.tokenizer, messages, response, finished)
        return ids


def encode_response(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], response: str, finished: bool
) -> list[int]:
    """The ids of a prompt and a response to it, by the tokenizer's own template.

    A finished response ends in the end token, as those that a reward model is trained on. An unfinished one ends where
    its text ends: neither the end token nor what the template puts in front of it is there. White space around the
    response is left out, as it is in all data.
    """
    response = response.strip()
    [(ids, _)] = encode_answers(tokenizer, messages, [response])
    if finished:
        return ids
    num_prompt = len(encode_prompt(tokenizer, messages))
    answer = ids[num_prompt:-1]
    text = neutralize(response, tokenizer)
    while answer and text in tokenizer.batch_decode([answer[:-1]], clean_up_tokenization_spaces=False)[0]:
        answer.pop()
    return ids[:num_prompt] + answer


def same_encoding(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both make the same ids of every dialogue: by vocabulary, merges, splitting, template, begin and end
    token. What does not matter: where it came from, how it pads and cuts, which token is the padding."""
    return _encoding(tokenizer) == _encoding(other)


def _encoding(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    parts = [tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        return parts + [backend[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
    added = [(i, str(token)) for i, token in tokenizer.added_tokens_decoder.items()]
    return [*parts, type(tokenizer).__name__, tokenizer.get_vocab(), added]


def span_mask(
    tokenizer: PreTrainedTokenizerBase,
    response_ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    response: str | None = None,
) -> list[bool]:
    """Which tokens of a response count when character ranges of its text do not: a bool per token, False inside.

    Token k covers the characters from len(decode(ids[:k])) to len(decode(ids[:k + 1])); any overlap with a span takes
    it out. Of a character made of several tokens every one covers it. The end token always counts.

    Args:
        response_ids: as sampled, with the end token if there is one.
        spans: [start, end) in characters of ``response``.
        response: the text, when white space around it was stripped; default: what the ids decode to.
    """
    ids, spans = list(response_ids), [(start, end) for start, end in spans if start < end]
    if not spans:
        return [True] * len(ids)
    shift = 0 if response is None else _decode(tokenizer, ids).find(response)
    if shift < 0:
        raise ValueError("the response is not what its token ids decode to")
    last = max(end for _, end in spans) + shift
    mask, prefix = [True] * len(ids), ""
    for k in range(len(ids)):
        start = len(prefix.rstrip(UNFINISHED))  # a character of which only some bytes are there begins again
        if start >= last:
            break
        prefix = _decode(tokenizer, ids[: k + 1])
        mask[k] = not any(start < b + shift and a + shift < len(prefix) for a, b in spans)
    if ids and ids[-1] == tokenizer.eos_token_id:
        mask[-1] = True
    return mask


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.batch_decode([ids], skip_special_tokens=True)[0]


class FunctionReward:
    """A Python function as a reward source.

    It is called with those of the keyword arguments prompts, responses, token_ids, finished, messages and records that
    its signature names (`Samples` says what they are; all of them for ``**kwargs``) and returns a list: for each
    response a number, None (no judgement) or {"score": number or None, "masked": [(start, end), …]}, where the ranges
    of characters of the response are left out of the loss.

    Args:
        target: ``module:name`` (also of the working directory) or ``path/file.py:name``.
        tokenizer: of the actor, for the ranges.

    Raises:
        UserError: there is no such function, or it wants other arguments.
    """

    def __init__(self, target: str, tokenizer: PreTrainedTokenizerBase):
        self.target, self.tokenizer = target, tokenizer
        place, _, function = target.rpartition(":")
        self.name = f"function:{function}"
        module = _import(target, place)
        self.file = module.__file__ or ""
        self.function: Any = getattr(module, function, None)
        if not callable(self.function):
            named = ", ".join(name for name, value in vars(module).items() if inspect.isfunction(value)) or "none"
            raise UserError(f"function {target}: {place} has no function {function}; its functions: {named}")
        self.arguments = _wanted(target, self.function)

    def __call__(self, samples: Samples) -> Judged:
        """
        Raises:
            UserError: the function raises, or returns something else than the above.
        """
        # Lists of its own: what a function does to them must not reach the rollout.
        given = {name: list(getattr(samples, name)) for name in self.arguments}
        try:
            answer = self.function(**given)
        except (Exception, SystemExit) as error:
            raise UserError(f"function {self.target} raised {_told(error, self.file)}") from error
        if not isinstance(answer, list):
            raise self._wrong(f"returned {type(answer).__name__}; return a list with a score for each response")
        if len(answer) != len(samples):
            raise self._wrong(f"returned {len(answer)} scores for {len(samples)} responses; return one for each")
        judged = [self._read(samples, row, item) for row, item in enumerate(answer)]
        return Judged([score for score, _ in judged], [mask for _, mask in judged])

    def _read(self, samples: Samples, row: int, item: Any) -> tuple[float | None, list[bool] | None]:
        if not isinstance(item, dict):
            return self._number(row, item), None
        if "score" not in item or item.keys() - {"score", "masked"}:
            keys = ", ".join(map(repr, item)) or "none"
            raise self._wrong(f"returned keys {keys} for response {row}; expected 'score' and, if wanted, 'masked'")
        score, spans, response = self._number(row, item["score"]), item.get("masked") or [], samples.responses[row]
        if not isinstance(spans, (list, tuple)) or not all(_is_span(span, len(response)) for span in spans):
            raise self._wrong(
                f"returned masked={_short(spans)} for response {row}; expected (start, end) pairs with 0 <= start <= "
                f"end <= {len(response)}, the length of the response"
            )
        ids = samples.token_ids[row][samples.prompt_lens[row] :]
        return score, span_mask(self.tokenizer, ids, spans, response) if spans else None

    def _number(self, row: int, score: Any) -> float | None:
        if score is None:
            return None
        if not isinstance(score, numbers.Real):
            raise self._wrong(
                f"returned {type(score).__name__} {_short(score)} for response {row}; expected a float, None or "
                "{'score': …, 'masked': […]}"
            )
        return float(score)

    def _wrong(self, problem: str) -> UserError:
        return UserError(f"function {self.target} {problem}")


def _import(target: str, place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())
            return importlib.import_module(place)
        path = Path(place).expanduser()
        if not path.is_file():
            raise UserError(f"function {target}: no such file {place}; relative paths start at {os.getcwd()}")
        spec = importlib.util.spec_from_file_location(f"dschat_reward_{path.stem}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"function {target}: {place} cannot be imported: {_told(error, place)}") from error


def _wanted(target: str, function: Callable) -> list[str]:
    """Of ARGUMENTS those that the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise UserError(f"function {target} has no signature to be seen; wrap it in a Python function") from None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = list(ARGUMENTS)
    else:
        taken = [
            p.name for p in parameters if p.name in ARGUMENTS and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
    for p in parameters:
        if p.default is p.empty and p.name not in taken and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise UserError(f"function {target} wants the argument {p.name}; it can have {', '.join(ARGUMENTS)}")
    return taken


def _told(error: BaseException, file: str) -> str:
    """ValueError: what it says (file.py line 12), on one line; the line is the last in ``file`` if one is there."""
    text, where, line = str(error), "", None
    if isinstance(error, SyntaxError):
        text, where, line = error.msg, error.filename or "", error.lineno
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if "importlib" not in f.filename]
        own = [f for f in frames if Path(f.filename).name == Path(file).name]
        if frames:
            where, line = (own or frames)[-1].filename, (own or frames)[-1].lineno
    return f"{type(error).__name__}: {_short(text)}" + (f" ({Path(where).name} line {line})" if where else "")


def _is_span(span: Any, size: int) -> bool:
    if not isinstance(span, (list, tuple)) or len(span) != 2 or not all(type(i) is int for i in span):
        return False
    return 0 <= span[0] <= span[1] <= size


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:200]}…"
