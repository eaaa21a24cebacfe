"""Rewards over HTTP: the reward source ``api`` asks a server what the responses of a rollout are worth.

A request is the one of LLaMA-Factory (``reward_model_type: api``) with two keys more, which a server may ignore:

    POST {"model": "reward", "messages": [text, …], "token_ids": [[id, …], …], "tokenizer": hash}
    ->   {"scores": [number or null, …]}

A text is a whole dialogue, prompt and response, with its special tokens. Where server and client have the same
tokenizer (the same hash), the ids save the way through text. `training/step2_reward_model_finetuning/serve.py` is the
other end. JSON has no NaN; what Python's json writes in its place, NaN and Infinity, is read as nan.
"""

import asyncio
import ipaddress
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

from dschat.data.records import Message
from dschat.data.stages import tokenizer_hash
from dschat.data.templates import encode_dialogue
from dschat.errors import UserError
from dschat.rlhf.rewards import Judged, Samples

import httpx2
from transformers import PreTrainedTokenizerBase

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds before the first retry and, after doubling, before any
TOO_MANY_REQUESTS = 429
PROBE = [Message(role="user", content="Hello"), Message(role="assistant", content="Hello")]


class ApiReward:
    """The reward source ``api``: one POST to ``url`` per ``batch_size`` responses, one after another.

    ``tokenizer`` is the actor's. A request has ``timeout`` seconds for everything from the connection to the last
    byte of the answer. No connection, no answer in time, HTTP 5xx and 429 are tried up to ``retries`` times more,
    after 0.5, 1, 2, … seconds; any other failure is final. Redirects are not followed. A proxy of the environment is
    used for other machines only.

    Raises:
        UserError: ``url`` is no http or https address.
    """

    name = "api"

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        timeout: float = 60.0,
        retries: int = 5,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self.url, self.tokenizer = url, tokenizer
        self.batch_size, self.timeout, self.retries = batch_size, timeout, retries
        self._tokenizer_hash = tokenizer_hash(tokenizer)
        self._trust_env = not _is_loopback(_host(url))
        self._sleep = sleep

    def __call__(self, samples: Samples) -> Judged:
        """The server's score of each response; None where it says null.

        Raises:
            UserError: the server gives no scores; the message says what came instead.
        """
        return Judged(asyncio.run(self._scores(samples.token_ids)))

    def check(self) -> None:
        """Let the server score one short dialogue, so that a wrong address shows before minutes of set-up.

        Raises:
            UserError: as a call does.
        """
        asyncio.run(self._scores([encode_dialogue(self.tokenizer, PROBE)[0]]))

    async def _scores(self, rows: list[list[int]]) -> list[float | None]:
        scores: list[float | None] = []
        async with httpx2.AsyncClient(timeout=None, follow_redirects=False, trust_env=self._trust_env) as client:
            for start in range(0, len(rows), self.batch_size):
                scores += await self._ask(client, rows[start : start + self.batch_size])
        return scores

    async def _ask(self, client: httpx2.AsyncClient, rows: list[list[int]]) -> list[float | None]:
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # "model" means nothing here, but LLaMA-Factory's own server insists on it
        request = {"model": "reward", "messages": texts, "token_ids": rows, "tokenizer": self._tokenizer_hash}
        wait = FIRST_WAIT
        for left in reversed(range(self.retries + 1)):
            try:
                async with asyncio.timeout(self.timeout):  # a total: a server that drips bytes meets it too
                    response = await client.post(self.url, json=request)
            except TimeoutError:
                problem = f"no whole answer within {self.timeout:g} s"
                mend = "allow more time or send fewer responses at once"
            except httpx2.RequestError as error:
                problem = f"no answer ({_line(str(error)) or type(error).__name__})"
                mend = "start the server, or correct the address"
            else:
                if response.status_code < 500 and response.status_code != TOO_MANY_REQUESTS:
                    return self._read(response, len(rows))
                problem, mend = _status(response), "the server's own log says why"
            if left:
                await self._sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        raise self._error(f"{problem}, tried {_times(self.retries + 1)}; {mend}")

    def _read(self, response: httpx2.Response, num_rows: int) -> list[float | None]:
        if response.is_redirect:
            where = _line(response.headers.get("location", "nowhere"))
            raise self._error(f"HTTP {response.status_code} to {where}; redirects are not followed, give that address")
        if not response.is_success:
            raise self._error(f"{_status(response)}; correct the address, or the request by what the server says")
        try:
            answer = json.loads(response.content, parse_int=float)
        except (ValueError, RecursionError):
            raise self._error(f"its answer is not JSON ({_line(response.text)!r}); correct the address") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise self._error(f'its answer has no list "scores" ({_line(response.text)}); correct the address')
        if len(scores) != num_rows:
            raise self._error(f"it gave {len(scores)} scores for {num_rows} responses; mend the server")
        return [self._score(score) for score in scores]

    def _score(self, score: Any) -> float | None:
        if score is not None and not isinstance(score, float):
            raise self._error(f"the score {_line(json.dumps(score))} is no number; mend the server")
        return score if score is None or math.isfinite(score) else math.nan

    def _error(self, problem: str) -> UserError:
        return UserError(f"reward server {self.url}: {problem}")


def _host(url: str) -> str:
    """The host that ``url`` names, checked as far as possible without asking the network."""
    try:
        parts = httpx2.URL(url)
        parts.host.encode("idna")
        valid = parts.scheme in ("http", "https") and parts.host and (parts.port or 0) <= 65535
    except (httpx2.InvalidURL, UnicodeError):
        valid = False
    if not valid:
        raise UserError(f"reward server {url!r}: no http or https address; expected one like http://127.0.0.1:8000/")
    return parts.host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _status(response: httpx2.Response) -> str:
    return f"HTTP {response.status_code} {_line(response.text)}".rstrip()


def _line(text: str) -> str:
    """The beginning of ``text`` on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:200]


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
