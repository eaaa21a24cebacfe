"""Several answers at once for a program that waits for none: the bridge from the decoders' threads to asyncio."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from dschat.rlhf.specs import Sampling
from inference.chatbot import Chatbot
from inference.decoder import Ticket, TooManyWaiting
from inference.gate import ApiError
from inference.replies import ReplyText

from torch import Tensor


@dataclass
class Plan:
    """One answer to be: what `Chatbot.start` takes, and texts at which it ends."""

    bot: Chatbot
    ids: list[int]
    uniforms: Tensor
    sampling: Sampling
    stop: tuple[str, ...] = ()


class Answers:
    """The answers to ``plans``, begun together: all or none. Iterate once for (number of the answer, piece of text);
    the piece is None when that answer is whole. What is not read to its end must be closed.

    Raises:
        ApiError: 429, as many requests wait already as may.
    """

    def __init__(self, plans: Sequence[Plan]):
        self.plans = plans
        self.texts = [ReplyText(plan.bot.tokenizer, plan.stop) for plan in plans]
        self._loop = asyncio.get_running_loop()
        self._drawn: asyncio.Queue[tuple[int, int | None | Exception]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        try:
            for number, plan in enumerate(plans):
                emit = partial(self._emit, number)
                self._tickets.append(plan.bot.start(plan.ids, plan.uniforms, emit, plan.sampling))
        except TooManyWaiting as error:
            self.close()
            raise ApiError(429, f"{error}; try again in a moment", "overloaded") from None

    def _emit(self, number: int, token: int | None | Exception) -> None:
        if not self._loop.is_closed():  # at the end of the server nobody is left to tell
            self._loop.call_soon_threadsafe(self._drawn.put_nowait, (number, token))

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | None]]:
        left = set(range(len(self.plans)))
        try:
            while left:
                number, token = await self._drawn.get()
                if number not in left:
                    continue  # tokens after a stop text
                text = self.texts[number]
                if isinstance(token, Exception):
                    raise token
                if token is not None and (piece := text.push(token)):
                    yield number, piece
                if token is None or text.finished:
                    left.remove(number)
                    self._tickets[number].cancel()
                    if piece := text.end():
                        yield number, piece
                    yield number, None
        finally:
            self.close()

    async def whole(self) -> None:
        """Read all to the end: the result is in ``texts``."""
        async for _ in self:
            pass

    def close(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()
