"""The page of `--web`: its three files, comparisons with hidden names, votes on them, and numbers token by token.

Hand-written HTML, CSS and JavaScript on the server that is there for the API anyway: nothing to install, build or
download, and it starts with the model. Gradio would bring some sixty packages and seconds of start-up, and could not
hide the names of a blind comparison from the browser without a server side of our own.
"""

import dataclasses
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.data.records import Message
from dschat.data.votes import TIE, Candidate
from dschat.errors import UserError
from inference.asked import read_request
from inference.gate import ApiError, json_response, read_object
from inference.openai_api import SSE_HEADERS, OpenAI, event
from inference.scores import AnswerScorer
from inference.session import describe
from inference.streams import Answers, Plan
from inference.token_numbers import token_numbers

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.routing import Route

FILES = Path(__file__).parent / "page"
MAX_COMPARISONS = 500  # kept for votes and numbers; the oldest go
BEST = {"left": 0, "right": 1, "tie": TIE}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass
class Comparison:
    """The answers of one or two models to the same dialogue, left to right."""

    prompt: list[Message]
    names: list[str]
    sampling: dict[str, Any]
    blind: bool
    texts: list[str] = field(default_factory=list)
    whole: bool = False
    voted: bool = False

    @property
    def hidden(self) -> bool:
        return self.blind and not self.voted


class Page:
    """The routes beside those of ``api``."""

    def __init__(self, api: OpenAI, scorer: AnswerScorer | None):
        self.api, self.scorer = api, scorer
        self._comparisons: OrderedDict[str, Comparison] = OrderedDict()

    def routes(self) -> list[Route]:
        return [
            Route("/", self.file),
            Route("/page/{name}", self.file),
            Route("/api/info", self.info),
            Route("/api/compare", self.compare, methods=["POST"]),
            Route("/api/vote", self.vote, methods=["POST"]),
            Route("/api/tokens", self.tokens, methods=["POST"]),
        ]

    async def file(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in {path.name for path in FILES.iterdir()}:
            raise ApiError(404, f"no such file {name!r}", "no_such_path")
        return FileResponse(FILES / name, headers=PAGE_HEADERS)

    async def info(self, request: Request) -> Response:
        first = next(iter(self.api.bots.values()))
        info = {"models": list(self.api.bots), "system": self.api.system, "sampling": describe(first.sampling)}
        return json_response(info | {"reward": self.scorer is not None, "votes": str(self.api.votes)})

    async def compare(self, request: Request) -> Response:
        """{"models": [one or two], "blind", "messages", sampling as in the API} -> server-sent events."""
        body = await read_object(request)
        names = body.get("models")
        if not isinstance(names, list) or not 1 <= len(names) <= 2:
            raise ApiError(400, "models must be a list of one or two names", param="models")
        bots = [self.api.bot(name) for name in names]
        blind = bool(body.get("blind")) and len(names) == 2
        if blind and secrets.randbelow(2):
            names, bots = names[::-1], bots[::-1]
        asked = read_request(
            body, bots[0].sampling, "", frozenset({"models", "blind"})
        )  # the page sends its own system prompt
        try:
            found = [await run_in_threadpool(bot.prompt_ids, asked.messages, asked.sampling) for bot in bots]
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        plans = []
        for bot, (ids, _) in zip(bots, found, strict=True):
            (row,) = bot.uniforms(1, asked.sampling.max_new_tokens, asked.seed)
            plans.append(Plan(bot, ids, row, asked.sampling))
        settings: dict[str, Any] = describe(asked.sampling) | {"seed": asked.seed}
        comparison = Comparison(asked.messages, names, settings, blind)
        events = self._events(Answers(plans), comparison, max(dropped for _, dropped in found))
        return StreamingResponse(events, media_type="text/event-stream", headers=SSE_HEADERS)

    async def vote(self, request: Request) -> Response:
        """{"id", "vote": left | right | tie} -> {"stored", "models", "scores"}: now the names may be known."""
        body = await read_object(request)
        comparison = self._comparison(body)
        if body.get("vote") not in BEST:
            raise ApiError(400, "vote must be left, right or tie", param="vote")
        if comparison.voted:
            raise ApiError(409, "there is a vote on this comparison already", "voted")
        if len(comparison.names) < 2 or not comparison.whole:
            raise ApiError(409, "a vote needs two whole answers", "not_whole")
        pairs = zip(comparison.names, comparison.texts, strict=True)
        candidates = [Candidate(name, text) for name, text in pairs]
        comparison.voted = True  # before the file is waited for: a second click finds it
        try:
            chosen = (BEST[body["vote"]], comparison.sampling)
            count = await self.api.store(comparison.prompt, candidates, *chosen, blind=comparison.blind)
        except ApiError:
            comparison.voted = False
            raise
        scores = [await self._score(comparison.prompt, text) for text in comparison.texts]
        return json_response({"stored": count, "models": comparison.names, "scores": scores})

    async def tokens(self, request: Request) -> Response:
        """{"id", "side"} -> the answer's tokens with what the models say of each; see `token_numbers`."""
        body = await read_object(request)
        comparison = self._comparison(body)
        if comparison.hidden:
            raise ApiError(403, "numbers would tell the models apart; vote first", "blind")
        side = body.get("side")
        if side not in range(len(comparison.texts)):
            raise ApiError(400, "side must be 0 or 1, of an answer that is whole", param="side")
        name = comparison.names[side]
        others = (
            [comparison.names[1 - side]] if len(comparison.names) == 2 else [n for n in self.api.bots if n != name]
        )
        found = await run_in_threadpool(
            token_numbers, self.api.bots, name, others[:1], self.scorer, comparison.prompt, comparison.texts[side]
        )
        return json_response(dataclasses.asdict(found))

    def _comparison(self, body: dict[str, Any]) -> Comparison:
        found = self._comparisons.get(str(body.get("id")))
        if found is None:
            raise ApiError(404, "no such comparison: it is too old, or the server was started again", "unknown_id")
        return found

    def _keep(self, comparison: Comparison) -> str:
        number = secrets.token_urlsafe(12)
        self._comparisons[number] = comparison
        while len(self._comparisons) > MAX_COMPARISONS:
            self._comparisons.popitem(last=False)
        return number

    async def _events(self, answers: Answers, comparison: Comparison, num_dropped: int) -> AsyncIterator[str]:
        names = None if comparison.hidden else comparison.names
        try:
            yield event({"id": self._keep(comparison), "models": names, "num_dropped": num_dropped})
            async for side, piece in answers:
                if piece is not None:
                    yield event({"side": side, "text": piece})
                    continue
                text = answers.texts[side]
                score = None if comparison.hidden else await self._score(comparison.prompt, text.text)
                done = {"finished": text.finished, "num_tokens": text.num_tokens, "score": score}
                yield event({"side": side, "done": done})
            comparison.texts = [text.text for text in answers.texts]
            comparison.whole = True
            yield event({"end": True})
        except Exception as error:  # the status is sent already: the stream says what happened
            yield event({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]})
        finally:
            comparison.texts = comparison.texts or [text.text for text in answers.texts]
            answers.close()

    async def _score(self, prompt: list[Message], text: str) -> float | None:
        if self.scorer is None or not text:
            return None
        return await run_in_threadpool(self.scorer.score, prompt, text)
