"""`/v1/chat/completions` and `/v1/models`, as OpenAI's API reference has them, and `/v1/votes` beside them."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dschat.data.votes import TIE, Candidate, append_vote, vote_record
from dschat.errors import UserError
from inference.asked import Asked, fit, read_messages, read_request
from inference.chatbot import Chatbot
from inference.gate import ApiError, json_response, read_object
from inference.streams import Answers, Plan

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

BEST = {"first": 0, "second": 1, "tie": TIE}
SSE_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class OpenAI:
    """The routes for the models ``bots`` by name.

    Args:
        paths: of the models, by which they may be called too.
        votes: the file for votes.
    """

    def __init__(self, bots: dict[str, Chatbot], system: str, votes: Path):
        self.bots, self.system, self.votes = bots, system, votes
        self.started = int(time.time())
        self._storing = asyncio.Lock()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/votes", self.vote, methods=["POST"]),
        ]

    def bot(self, name: Any) -> Chatbot:
        """
        Raises:
            ApiError: 404, there is no such model.
        """
        if not isinstance(name, str) or name not in self.bots:
            raise ApiError(404, f"no model {name!r}; there are: {', '.join(self.bots)}", "model_not_found", "model")
        return self.bots[name]

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._describe(name) for name in self.bots]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.bot(name)
        return json_response(self._describe(name))

    async def complete(self, request: Request) -> Response:
        body = await read_object(request)
        bot = self.bot(body.get("model"))
        asked = read_request(body, bot.sampling, self.system)
        try:
            ids, sampling = await run_in_threadpool(fit, bot, asked)
        except UserError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "messages") from None
        rows = bot.uniforms(asked.count, sampling.max_new_tokens, asked.seed)
        answers = Answers([Plan(bot, ids, row, sampling, asked.stop) for row in rows])
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body["model"]}
        if asked.stream:
            events = self._events(answers, asked, head)
            return StreamingResponse(events, media_type="text/event-stream", headers=SSE_HEADERS)
        await unless_gone(request, answers)
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": text.text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop" if text.finished else "length",
            }
            for number, text in enumerate(answers.texts)
        ]
        return json_response(head | {"object": "chat.completion", "choices": choices, "usage": _usage(answers)})

    async def vote(self, request: Request) -> Response:
        """{"messages", "first": {"model", "content"}, "second": …, "vote": first | second | tie, "sampling": {…}}"""
        body = await read_object(request)
        if unknown := body.keys() - {"messages", "first", "second", "vote", "sampling"}:
            raise ApiError(400, f"unknown key {min(unknown)!r}", "unknown_key", min(unknown))
        if body.get("vote") not in BEST:
            raise ApiError(400, "vote must be first, second or tie", param="vote")
        sampling = body.get("sampling", {})
        if not isinstance(sampling, dict):
            raise ApiError(400, "sampling must be an object", param="sampling")
        candidates = [_candidate(body.get(name), name) for name in ("first", "second")]
        prompt = read_messages(body.get("messages"), self.system)
        count = await self.store(prompt, candidates, BEST[body["vote"]], sampling)
        return json_response({"stored": count})

    async def store(self, prompt: Any, candidates: list[Candidate], best: int, sampling: Any, **more: Any) -> int:
        """The number of votes in the file now.

        Raises:
            ApiError: 400, the vote teaches nothing; 507, it cannot be written.
        """
        try:
            record = vote_record(prompt, candidates, best, sampling, **more)
        except (UserError, ValueError, TypeError) as error:
            raise ApiError(400, str(error), "useless_vote") from None
        async with self._storing:
            try:
                return await run_in_threadpool(append_vote, self.votes, record)
            except UserError as error:
                raise ApiError(507, str(error), "not_stored") from None

    async def _events(self, answers: Answers, asked: Asked, head: dict[str, Any]) -> AsyncIterator[str]:
        def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            more = {"usage": None} if asked.with_usage else {}
            return event(head | {"object": "chat.completion.chunk", "choices": [choice]} | more)

        try:
            for number in range(len(answers.texts)):
                yield chunk(number, {"role": "assistant", "content": ""})
            async for number, piece in answers:
                if piece is not None:
                    yield chunk(number, {"content": piece})
                else:
                    yield chunk(number, {}, "stop" if answers.texts[number].finished else "length")
            if asked.with_usage:
                yield event(head | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(answers)})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already: the stream says what happened
            message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            yield event({"error": {"message": message, "type": "server_error", "param": None, "code": "failed"}})
        finally:
            answers.close()

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "dschat"}


async def unless_gone(request: Request, answers: Answers) -> None:
    """Read the answers to the end; when the client goes away meanwhile, their slots are free again."""
    reading = asyncio.ensure_future(answers.whole())
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            return reading.result()
        raise ApiError(499, "the client is gone", "gone")
    finally:
        answers.close()
        for task in (reading, leaving):
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(answers: Answers) -> dict[str, int]:
    prompt, drawn = len(answers.plans[0].ids), sum(text.num_tokens for text in answers.texts)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


def _candidate(value: Any, name: str) -> Candidate:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("model", "content")):
        raise ApiError(400, f"{name} must be an object with model and content", param=name)
    return Candidate(value["model"], value["content"])
