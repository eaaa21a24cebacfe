"""The server of `chat.py --serve` and `--web`: one process, the API, and the page where it is wanted."""

import ipaddress
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from dschat.server import address, listen, serve
from inference.chatbot import Chatbot
from inference.gate import ApiError, Gate, json_response
from inference.openai_api import OpenAI
from inference.scores import AnswerScorer
from inference.web import Page

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
PREPARE_SECONDS = 3.0  # a model, at most: so that the first answers do not wait for what a step is recorded for


def listen_safely(host: str, port: int, token: str | None) -> tuple[socket.socket, str | None]:
    """The socket, and the token that must be known; None where only this machine can ask and none was given.

    Raises:
        UserError: nobody can listen there.
    """
    token = token or os.environ.get("DSCHAT_TOKEN") or None
    listener = listen(host, port)
    if token is None and not _is_local(listener.getsockname()[0]):
        token = secrets.token_urlsafe(24)
    return listener, token


def create_app(
    bots: dict[str, Chatbot],
    scorer: AnswerScorer | None,
    *,
    votes: Path,
    page: bool,
    system: str = "",
    token: str | None = None,
    hosts: frozenset[str] | None = LOCAL_NAMES,
) -> Gate:
    """All routes behind the gate. Whatever goes wrong is answered as {"error": {"message", …}}."""
    api = OpenAI(bots, system, votes)
    routes = api.routes()
    if page:
        routes += Page(api, scorer).routes()

    async def health(request: Request) -> Response:
        load = {name: dict(zip(("running", "waiting"), bot.decoder.load, strict=True)) for name, bot in bots.items()}
        return json_response({"status": "ok", "models": load})

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            known = ", ".join(sorted({route.path for route in routes}))
            text = f"{request.method} {request.url.path}: {error.detail}; there are: {known}"
            error = ApiError(error.status_code, text, "no_such_path")
        assert isinstance(error, ApiError)
        return error.response()

    async def fail(request: Request, error: Exception) -> Response:  # the traceback is on the server's terminal
        return ApiError(500, " ".join(f"{type(error).__name__}: {error}".split())[:300], "failed").response()

    routes.append(Route("/health", health))
    handlers: Any = {ApiError: refuse, HTTPException: refuse, Exception: fail}
    return Gate(Starlette(routes=routes, exception_handlers=handlers), hosts, token)


def serve_models(
    bots: dict[str, Chatbot],
    scorer: AnswerScorer | None,
    listener: socket.socket,
    token: str | None,
    *,
    votes: Path,
    page: bool,
    system: str = "",
) -> None:
    """Answer until Ctrl-C or SIGTERM."""
    local = _is_local(listener.getsockname()[0])
    hosts = LOCAL_NAMES if local else None
    app = create_app(bots, scorer, votes=votes, page=page, system=system, token=token, hosts=hosts)
    for name, bot in bots.items():
        bot.decoder.prepare(PREPARE_SECONDS)
        print(f"{name}: up to {bot.lanes.size} answers at once{'; ' + bot.note if bot.note else ''}")
    url = address(listener)
    if page:
        print(f"page: {url}{f'#token={token}' if token else ''}")
    print(f"API:  {url}v1    models: {', '.join(bots)}{f'    api key: {token}' if token else ''}", flush=True)
    serve(app, listener)
    for bot in bots.values():
        bot.decoder.close()


def _is_local(host: str) -> bool:
    return ipaddress.ip_address(host.partition("%")[0]).is_loopback
