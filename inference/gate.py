"""Who may ask the server, and how much: host, origin, token, size. Every refusal is JSON with a reason."""

import hmac
import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

MAX_REQUEST_BYTES = 2**19
MAX_DRAINED_BYTES = 2**26  # of a request that is too large: read to its end, so that its sender can hear why
PUBLIC = frozenset({"/", "/page/chat.js", "/page/chat.css", "/health"})  # hold no secret


class ApiError(Exception):
    """What is wrong with a request, in the shape that clients of OpenAI's API read."""

    def __init__(self, status: int, message: str, code: str = "invalid_request", param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def response(self) -> Response:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.status == 429:
            headers["Retry-After"] = "1"
        return json_response({"error": error}, self.status, headers)


class Gate:
    """ASGI middleware: lets a request through that comes from where it may.

    A page elsewhere in the user's browser can send requests here, by a name that it made point to this machine (DNS
    rebinding) or as a form (CSRF). So the Host must be one of ``hosts``, an Origin must be that Host, and what is
    posted must be JSON, which no form can send. Behind a token the Host may be any: no such page knows the token.

    Args:
        hosts: names and addresses, without port, by which the server may be called; None: any.
        token: what `Authorization: Bearer` must say but for PUBLIC paths; None: nothing.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: Collection[str] | None, token: str | None):
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        try:
            if scope["type"] == "http":
                self._check(Request(scope))
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            raise ApiError(403, f"this server answers to {names} only, not to {host!r}; see --host", "wrong_host")
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"requests from pages of {origin!r} are refused", "wrong_origin")
        if self.token is not None and request.url.path not in PUBLIC:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
                found = "a wrong token" if given else "no token"
                raise ApiError(401, f"{found}; send the header Authorization: Bearer TOKEN", "invalid_api_key")
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "send JSON, with the header Content-Type: application/json", "not_json")


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object that was posted.

    Raises:
        ApiError: too large, not UTF-8, not JSON or no object.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_DRAINED_BYTES:
            break
        if size <= MAX_REQUEST_BYTES:
            body += chunk
    if size > MAX_REQUEST_BYTES:
        raise ApiError(
            413, f"the request is larger than {MAX_REQUEST_BYTES} bytes; shorten the conversation", "too_large"
        )
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the request is not UTF-8 (byte {error.start + 1})", "not_utf8") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON ({error})", "not_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request is no JSON object with keys", "not_json")
    return value


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON that any client can read; half a surrogate pair is written as JSON spells it."""
    text = json.dumps(content, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
