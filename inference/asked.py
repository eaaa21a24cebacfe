"""A request for an answer, as clients of OpenAI's API send it, read with care: what has no effect here is refused."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dschat.data.records import Message, RecordError, to_example
from dschat.errors import UserError
from dschat.rlhf.specs import Sampling
from inference.chatbot import Chatbot
from inference.gate import ApiError
from inference.limits import check_temperature, check_top_k, check_top_p

# Of no effect on an answer, and sent by clients as a matter of course.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
}
# Refused unless they ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions", "tool_choice", "function_call", "audio", "prediction"), (None, [], "none")),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (None, 0)),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
READ = {
    *(
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "n",
        "stop",
    ),
    *("stream", "stream_options"),
}
MAX_CHOICES = 16
MAX_STOP = 4


@dataclass(frozen=True)
class Asked:
    """What a request asks for, checked; ``sampling`` None: that of the server's flags."""

    messages: list[Message]
    sampling: Sampling
    fixed_length: bool  # the client named the longest answer
    seed: int | None
    count: int
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool


def read_request(body: dict[str, Any], default: Sampling, system: str, more: frozenset[str] = frozenset()) -> Asked:
    """``default``: what the request leaves open. ``system``: the system prompt of requests without one. ``more``: keys
    that the caller reads.

    Raises:
        ApiError: 400, with the key that is wrong.
    """
    for key, value in body.items():
        if key in NOTHING and not any(value == nothing for nothing in NOTHING[key]):
            raise ApiError(400, f"{key} is not supported by this server; leave it out", "unsupported", key)
        if key not in READ | IGNORED | more and key not in NOTHING:
            raise ApiError(400, f"unknown key {key!r}; known: {', '.join(sorted(READ))}", "unknown_key", key)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    named = body.get("max_completion_tokens", body.get("max_tokens"))
    sampling = Sampling(
        max_new_tokens=_number(named, "max_tokens", int, default.max_new_tokens, _at_least_one),
        temperature=_number(body.get("temperature"), "temperature", float, default.temperature, check_temperature),
        top_k=_number(body.get("top_k"), "top_k", int, default.top_k, check_top_k),
        top_p=_number(body.get("top_p"), "top_p", float, default.top_p, check_top_p),
    )
    return Asked(
        read_messages(body.get("messages"), system),
        sampling,
        named is not None,
        _number(body.get("seed"), "seed", int, None),
        _number(body.get("n"), "n", int, 1, _choices),
        _stop(body.get("stop")),
        _flag(body.get("stream"), "stream"),
        _flag(options.get("include_usage"), "stream_options.include_usage"),
    )


def read_messages(value: Any, system: str = "") -> list[Message]:
    """The dialogue, ending with a user's message; contents may be lists of text parts.

    Raises:
        ApiError: 400.
    """
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of {role, content}, the last one the user's", param="messages")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ApiError(400, f"message {number} is no object with role and content", param="messages")
        role, content = turn.get("role"), turn.get("content")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            raise ApiError(400, f"message {number}: role {role!r} is not system, user or assistant", param="messages")
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise ApiError(400, f"message {number}: content must be text", param="messages")
        turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise ApiError(400, "the last message must be the user's, and not empty", param="messages")
    if system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    try:
        return to_example({"messages": turns})["prompt"]
    except RecordError as error:
        raise ApiError(400, str(error), param="messages") from None


def fit(bot: Chatbot, asked: Asked) -> tuple[list[int], Sampling]:
    """The prompt's ids, and the sampling with an answer that fits behind it. Nothing is left out of the prompt.

    Raises:
        ApiError: 400, the context is too short.
    """
    ids, num_dropped = bot.prompt_ids(asked.messages, dataclasses.replace(asked.sampling, max_new_tokens=1))
    room = bot.context - len(ids)
    longest = asked.sampling.max_new_tokens
    if num_dropped or room < 1 or (asked.fixed_length and longest > room):
        wanted = f"{longest} tokens for the answer" if asked.fixed_length else "an answer"
        raise ApiError(
            400,
            f"the messages take {len(ids)} tokens{' and more' if num_dropped else ''} and the model has {bot.context} "
            f"positions, {wanted} included; shorten the conversation or lower max_tokens",
            "context_length_exceeded",
            "messages",
        )
    return ids, dataclasses.replace(asked.sampling, max_new_tokens=int(min(longest, room)))


def _number(value: Any, name: str, kind: type, default: Any, check: Callable[[Any, str], Any] | None = None) -> Any:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
        raise ApiError(400, f"{name} must be {'a whole' if kind is int else 'a'} number", param=name)
    try:
        return check(kind(value), name) if check else kind(value)
    except UserError as error:
        raise ApiError(400, str(error), param=name) from None


def _at_least_one(value: int, name: str) -> int:
    if value < 1:
        raise UserError(f"{name} {value}: expected at least 1")
    return value


def _choices(value: int, name: str) -> int:
    if not 1 <= value <= MAX_CHOICES:
        raise UserError(f"{name} {value}: expected 1 to {MAX_CHOICES}")
    return value


def _flag(value: Any, name: str) -> bool:
    if value not in (None, True, False):
        raise ApiError(400, f"{name} must be true or false", param=name)
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or len(texts) > MAX_STOP or not all(isinstance(t, str) and t for t in texts):
        raise ApiError(400, f"stop must be a text or a list of up to {MAX_STOP} texts", param="stop")
    return tuple(texts)
