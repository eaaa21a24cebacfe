"""A policy that answers: model, template, history trimmed to the context, reply streamed as it is sampled."""

import bisect
import dataclasses
import functools
import math
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path

from dschat.data.records import Message
from dschat.data.templates import encode_prompt
from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError
from dschat.models.adapter_files import ADAPTER_CONFIG, adapter_base
from dschat.models.load import load_causal_lm, max_positions, resolve_dtype
from dschat.rlhf.rollout import banned_token_ids, row_uniforms
from dschat.rlhf.specs import Sampling
from inference.decoder import Decoder, Emit, Ticket, TooManyWaiting
from inference.lanes import Request, open_lanes
from inference.replies import Reply

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 256  # of an answer
LONGEST_CONTEXT = 4096  # for which steps are recorded in idle moments
MODEL_FILES = ("config.json", ADAPTER_CONFIG)  # either tells a model directory


class Chatbot:
    """Replies to message lists; keeps no history, but what it has read of a dialogue it does not read again.

    The n-th reply without a seed of its own depends on the chatbot's seed, on n and on the messages.

    Args:
        sampling: of every reply that does not bring another.
        num_slots: replies that are decoded together.
        max_waiting: replies that may wait for a place.

    Raises:
        UserError: the model's context has no room for a prompt beside ``sampling.max_new_tokens``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        seed: int | None = None,
        *,
        num_slots: int = 1,
        max_waiting: int = 100,
    ):
        banned = banned_token_ids(tokenizer, model.get_input_embeddings().num_embeddings)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sampling = dataclasses.replace(sampling, banned_ids=banned)
        self.context = max_positions(model.config) or math.inf
        if self.context <= sampling.max_new_tokens:
            raise UserError(
                f"--max_new_tokens {sampling.max_new_tokens} leaves no room for a message: the model has "
                f"{self.context} positions in all; give a smaller number"
            )
        longest = int(min(self.context, LONGEST_CONTEXT))
        self.lanes = open_lanes(self.model, tokenizer.eos_token_id, num_slots, longest, self.sampling)
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.decoder = Decoder(self.lanes, tokenizer.eos_token_id, max_waiting, size)
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed % 2**63)

    @property
    def note(self) -> str:
        """Why it is not decoded by the fast way, if so."""
        return self.lanes.note

    def prompt_ids(self, messages: Sequence[Message], sampling: Sampling | None = None) -> tuple[list[int], int]:
        """(the ids that the model reads, how many of the oldest turns are left out so that the answer fits too).

        Raises:
            UserError: the last message does not fit the context, or the template cannot render the dialogue.
        """
        return trim_history(self.tokenizer, messages, self.context - (sampling or self.sampling).max_new_tokens)

    def uniforms(self, count: int, num_tokens: int, seed: int | None = None) -> torch.Tensor:
        """(count, num_tokens): the random numbers of so many replies, by ``seed`` those of a rollout of that seed."""
        if seed is not None:
            return row_uniforms(count, num_tokens, seed)
        return torch.rand(count, num_tokens, generator=self._generator)

    def start(self, ids: list[int], uniforms: torch.Tensor, emit: Emit, sampling: Sampling | None = None) -> Ticket:
        """Have an answer to these ids decoded; ``emit`` gets its tokens, from another thread.

        Raises:
            TooManyWaiting: as many wait already as may.
        """
        chosen = dataclasses.replace(sampling or self.sampling, banned_ids=self.sampling.banned_ids)
        return self.decoder.submit(Request(ids, chosen, uniforms), emit)

    def reply(self, messages: Sequence[Message], sampling: Sampling | None = None) -> "Reply":
        """The answer to the last message, a user's, of a dialogue that may begin with a system message.

        Raises:
            UserError: see `prompt_ids`; TooManyWaiting is one too.
        """
        return self.replies(messages, 1, sampling)[0]

    def replies(self, messages: Sequence[Message], count: int, sampling: Sampling | None = None) -> "list[Reply]":
        """So many answers to the same message, decoded together as far as there are slots."""
        chosen = sampling or self.sampling
        ids, num_dropped = self.prompt_ids(messages, chosen)
        rows = self.uniforms(count, chosen.max_new_tokens)
        begun: list[Reply] = []
        try:
            for row in rows:
                begun.append(self._begin(ids, row, chosen, num_dropped))
        except TooManyWaiting:
            for reply in begun:
                reply.stop()
            raise
        return begun

    def _begin(self, ids: list[int], uniforms: torch.Tensor, sampling: Sampling, num_dropped: int) -> "Reply":
        """Its tokens are drawn from now on, whether or not anybody reads them."""
        drawn: queue.SimpleQueue[int | None | Exception] = queue.SimpleQueue()
        ticket = self.start(ids, uniforms, drawn.put, sampling)

        def tokens() -> Iterator[int]:
            try:
                while (token := drawn.get()) is not None:
                    if isinstance(token, Exception):
                        raise token
                    yield token
            finally:
                ticket.cancel()

        return Reply(tokens(), self.tokenizer, num_dropped, ticket.cancel)


def trim_history(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], budget: float
) -> tuple[list[int], int]:
    """(prompt ids, turns dropped): the newest whole turns whose prompt has at most ``budget`` tokens.

    A turn is a user message and what follows it. The system message and the last turn always stay.

    Raises:
        UserError: these two alone do not fit, or the template cannot render the dialogue.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    starts = [i for i, message in enumerate(messages) if message["role"] == "user"]

    @functools.cache
    def newest(num_turns: int) -> list[int]:
        return encode_prompt(tokenizer, [*system, *messages[starts[-num_turns] :]])

    def length(num_turns: int) -> int:
        return len(newest(num_turns))

    # From the newest turn on, so that a turn costs the same however much has been said before the context.
    bound = 1
    while bound < len(starts) and length(bound) <= budget:
        bound = min(2 * bound, len(starts))
    num_kept = bisect.bisect_right(range(1, bound + 1), budget, key=length)
    if not num_kept:
        raise UserError(
            f"the message takes {length(1)} tokens (with template and system prompt) and the model has room for "
            f"{budget} beside the answer; shorten it or lower --max_new_tokens"
        )
    return newest(num_kept), len(starts) - num_kept


def load_chatbot(
    path: str,
    sampling: Sampling,
    *,
    seed: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    chat_template: str = "auto",
    num_slots: int = 1,
    max_waiting: int = 100,
) -> Chatbot:
    """From a policy directory or a hub name, with the chat template that is stored with the model.

    ``sampling.max_new_tokens`` 0: DEFAULT_NEW_TOKENS, or half of the model's positions where that is less.

    Raises:
        UserError: no such directory, not a language model, a device that is not there.
    """
    _check_path(path)
    where = resolve_device(device)
    tokenizer = load_tokenizer(path, chat_template)
    model = load_causal_lm(path, tokenizer, dtype=resolve_dtype(dtype, where))
    if not sampling.max_new_tokens:
        room = (max_positions(model.config) or 2 * DEFAULT_NEW_TOKENS) // 2
        sampling = dataclasses.replace(sampling, max_new_tokens=min(DEFAULT_NEW_TOKENS, room))
    return Chatbot(model.to(where), tokenizer, sampling, seed, num_slots=num_slots, max_waiting=max_waiting)


def short_names(paths: Sequence[str]) -> list[str]:
    """A name for each path, without the folders that all of them begin with."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while len(parts) > 1 and len({part[: shared + 1] for part in parts}) == 1:
        shared += 1
    return [str(Path(*part[shared:])) if part[shared:] else path for part, path in zip(parts, paths, strict=True)]


def resolve_device(name: str) -> torch.device:
    """``auto``: the GPU when there is one.

    Raises:
        UserError: not auto, cpu, cuda or cuda:N, or no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (index.isdecimal() or name == "cuda")):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu or auto")
    return torch.device(name)


def _check_path(path: str) -> None:
    """Name the mistakes with local paths, which a hub look-up would report as something else."""
    where = Path(path)
    if path == "toy":
        raise UserError("--path toy: the embedded model has no trained weights; train it with python e2e_rlhf.py")
    if where.is_dir():
        if not (where / "config.json").is_file() and not adapter_base(path):
            inside = sorted({str(file.parent) for name in MODEL_FILES for file in where.glob(f"*/{name}")})
            hint = f"did you mean {' or '.join(inside)}?" if inside else "give a Hugging Face model directory"
            raise UserError(f"--path {path} holds no config.json; {hint}")
    elif where.exists():
        raise UserError(f"--path {path} is a file; give the model's directory")
    elif where.is_absolute() or len(where.parts) > 2 or path.startswith("."):
        raise UserError(f"--path {path}: no such directory")
