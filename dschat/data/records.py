"""One record of any known shape -> one `Example`: a prompt, its responses and how they rank.

A record is recognised by its keys; what is not recognised, or would train on nothing, is a `RecordError` that says
what was found and what is expected. Left out on purpose: tool calls, images, anything that is not text.
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypedDict


class Message(TypedDict):
    """One turn: role is "system" (first only), "user" or "assistant"."""

    role: str
    content: str


class Example(TypedDict):
    """What every stage reads. `prompt` ends with a user turn; rank 1 is best, equal ranks are a tie. A lone answer of
    rank 2 is a bad one.

    `metadata` is JSON text ("" where there is none), so that a table of any records has one type for it.
    """

    prompt: list[Message]
    responses: list[str]
    ranks: list[int]
    margin: float | None
    metadata: str


class RecordError(ValueError):
    """A record that cannot be used; the reader of the file puts the location in front."""


SHAPES = (
    "prompt+chosen+rejected, chosen+rejected as whole Human/Assistant transcripts or message lists, "
    "prompt+response(+label), prompt+responses(+ranks or scores), messages, instruction(+input, history)+output, "
    "conversations, or prompt alone"
)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
SINGLE_ANSWER_KEYS = ("response", "completion", "answer", "output")
_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_STARTS_WITH_HUMAN = re.compile(r"\s*Human:")
_LOOSE_MARKER = re.compile(r"(?:\A\s*|\s)(Human|Assistant):")
_ONE_LINE_PROMPT = re.compile(r"\s*Human:.*\sAssistant:\s*", re.DOTALL)  # DeepSpeed-Chat's " Human: … Assistant:"


def to_example(record: dict[str, Any]) -> Example:
    """Read one record, whichever of `SHAPES` it has; contents are stripped at both ends."""
    fields = {key: value for key, value in record.items() if value is not None}
    dialogue = _dialogue(fields)
    contexts, responses, ranks = _answers(fields, whole=dialogue is None)
    if dialogue is None and not contexts:
        _fail(f"no known keys: found {', '.join(map(str, record)) or 'none'}; expected {SHAPES}")
    if dialogue and dialogue[-1]["role"] == "assistant":
        answer = dialogue[-1]["content"]
        dialogue = dialogue[:-1]
        if not responses:
            responses, ranks = [answer], [1]
        elif answer and answer not in responses:
            _fail("the dialogue ends with an answer of its own and the record gives others; keep one of the two")
    for context in contexts:
        dialogue = _agree(dialogue, context)
    prompt = _with_system(dialogue or [], fields.get("system"))
    _check_prompt(prompt)
    if len(responses) == 1 and _label(fields.get("label")) is False:
        ranks = [2]
    if responses and not any(text for text, rank in zip(responses, ranks, strict=True) if rank == min(ranks)):
        _fail("the answer is empty; write one or remove the record")
    margin, metadata = _margin(fields.get("margin")), _metadata(fields.get("metadata"))
    return Example(prompt=prompt, responses=responses, ranks=ranks, margin=margin, metadata=metadata)


def to_json(value: dict[str, Any]) -> str:
    """Compact JSON with sorted keys: equal values are equal text.

    Raises:
        ValueError, TypeError, RecursionError: JSON has no such value (NaN, bytes, a date), or it is nested too deep.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def parse_transcript(text: str, marker: re.Pattern[str] = _MARKER) -> list[Message]:
    """ "\\n\\nHuman: …\\n\\nAssistant: …" -> messages. Text before the first marker is the system message."""
    pieces = marker.split(text)
    turns = [("system", pieces[0]), *zip(pieces[1::2], pieces[2::2], strict=True)]
    return _merge([Message(role=ROLES[role.lower()], content=_text(content, role)) for role, content in turns])


def _dialogue(fields: dict[str, Any]) -> list[Message] | None:
    """The turns before the answers, from the first key that has them; may end with an assistant turn. None: no key."""
    if "prompt" in fields:
        return _parse_prompt(fields["prompt"])
    for key in ("messages", "conversations"):
        if key in fields:
            return _parse_messages(fields[key], key)
    if "instruction" in fields:
        parts = [_text(fields[key], key) for key in ("instruction", "input") if key in fields]
        turns = [*_history(fields.get("history") or []), Message(role="user", content="\n".join(filter(None, parts)))]
        return _merge(turns)
    if "question" in fields:
        return [Message(role="user", content=_text(fields["question"], "question"))]
    return None


def _parse_prompt(value: Any) -> list[Message]:
    if not isinstance(value, str):
        return _parse_messages(value, "prompt")
    if _is_transcript(value) or (value.rstrip().endswith("\n\nAssistant:") and "\n\nHuman:" in value):
        messages = parse_transcript(value)
        return messages[:-1] if messages[-1] == Message(role="assistant", content="") else messages
    if _ONE_LINE_PROMPT.fullmatch(value):
        return parse_transcript(value, _LOOSE_MARKER)[:-1]
    return [Message(role="user", content=_text(value, "prompt"))]


def _parse_messages(value: Any, key: str) -> list[Message]:
    """Message dicts, OpenAI ({"role", "content"}) or ShareGPT ({"from", "value"}) style."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        expected = "a list of messages" if key in ("messages", "conversations") else "text or a list of messages"
        _fail(f'"{key}" must be {expected}, found {type(value).__name__}')
    turns = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            _fail(f'message {number} of "{key}" must be an object with role and content, found {type(item).__name__}')
        role = item.get("role", item.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            _fail(f'message {number} of "{key}" has role {role!r}; known roles: {", ".join(ROLES)}')
        content = _text(item.get("content", item.get("value")), f"message {number} of {key}")
        if not content and ROLES[role] != "system" and number < len(value):
            _fail(f'message {number} of "{key}" is empty; remove the turn or the record')
        turns.append(Message(role=ROLES[role], content=content))
    return _merge(turns)


def _history(pairs: Any) -> list[Message]:
    turns = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            _fail('"history" must be a list of [question, answer] pairs')
        turns.append(Message(role="user", content=_text(pair[0], "history")))
        turns.append(Message(role="assistant", content=_text(pair[1], "history")))
    return turns


def _answers(fields: dict[str, Any], whole: bool) -> tuple[list[list[Message]], list[str], list[int]]:
    """(the contexts the answers repeat, their texts, their ranks). whole: no other key has the prompt."""
    single = [key for key in SINGLE_ANSWER_KEYS if key in fields]
    keys: list[str]
    if "chosen" in fields:
        keys = [key for key in ("chosen", "rejected") if key in fields]
        values, ranks = [fields[key] for key in keys], [1, 2][: len(keys)]
    elif "rejected" in fields:
        _fail('"rejected" without "chosen"; name the better answer "chosen"')
    elif "responses" in fields:
        values = fields["responses"]
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            _fail('"responses" must be a list of answers')
        ranks = _ranks(fields, len(values))
        keys = ["responses"] * len(values)
    elif len(single) > 1:
        _fail(f"several answers: {', '.join(single)}; keep one of these keys")
    else:
        keys, values, ranks = single, [fields[key] for key in single], [1] * len(single)
    pairs = [_split_answer(value, key, whole) for key, value in zip(keys, values, strict=True)]
    contexts = [context for context, _ in pairs if context]
    if whole and len(contexts) < len(pairs):
        _fail(f"no prompt: found {', '.join(map(str, fields))}; expected {SHAPES}")
    return contexts, [text for _, text in pairs], list(ranks)


def _split_answer(value: Any, key: str, whole: bool) -> tuple[list[Message], str]:
    """An answer and the turns repeated in front of it, if any. whole: text must be a transcript to have a prompt."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, str):
        messages = _parse_messages(value, key)
    elif _is_transcript(value) or (whole and "\n\nHuman:" in value and "\n\nAssistant:" in value):
        messages = parse_transcript(value)
    else:
        return [], _text(value, key)
    if messages[-1]["role"] != "assistant":
        _fail(f'"{key}" must end with an assistant turn')
    return messages[:-1], messages[-1]["content"]


def _is_transcript(text: str) -> bool:
    return "\n\nAssistant:" in text and _STARTS_WITH_HUMAN.match(text) is not None


def _ranks(fields: dict[str, Any], num_responses: int) -> list[int]:
    """Ranks as given, or from scores (highest is rank 1, equal scores tie), or all 1: several demonstrations."""
    key = "ranks" if "ranks" in fields else "scores"
    if key not in fields:
        return [1] * num_responses
    values = fields[key]
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != num_responses:
        _fail(f'"{key}" must be a list of {num_responses} numbers, one for each of "responses"')
    if any(isinstance(value, bool) or not isinstance(value, int | float) or value != value for value in values):
        _fail(f'"{key}" must hold numbers only')
    if key == "scores":
        order = sorted(set(values), reverse=True)
        return [order.index(value) + 1 for value in values]
    if min(values) != 1 or any(value != int(value) for value in values):
        _fail('"ranks" must be whole numbers with 1 for the best')
    return [int(value) for value in values]


def _label(value: Any) -> bool | None:
    """Whether a lone answer is a good one. What is neither true nor false is not about that."""
    return {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value


def _agree(dialogue: list[Message] | None, context: list[Message]) -> list[Message]:
    """The prompt, when a whole transcript repeats it; a system message may be in only one of the two."""
    if dialogue is None:
        return context
    if [m for m in dialogue if m["role"] != "system"] != [m for m in context if m["role"] != "system"]:
        _fail("the prompts of this record differ (prompt, chosen and rejected must share all turns before the answer)")
    return max(dialogue, context, key=len)


def _with_system(dialogue: list[Message], system: Any) -> list[Message]:
    text = _text(system, "system") if system is not None else ""
    if not text:
        return dialogue
    if dialogue and dialogue[0]["role"] == "system":
        if dialogue[0]["content"] != text:
            _fail('two system messages: "system" and the first turn of the dialogue; keep one')
        return dialogue
    return [Message(role="system", content=text), *dialogue]


def _check_prompt(prompt: list[Message]) -> None:
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    if any(message["role"] == "system" for message in turns):
        _fail("a system message may only come first")
    if not turns or turns[0]["role"] != "user" or turns[-1]["role"] != "user":
        _fail("the prompt must begin and end with a user turn")
    for number, message in enumerate(turns, 1):
        if not message["content"]:
            _fail(f"turn {number} of the prompt ({message['role']}) is empty; remove the turn or the record")


def _merge(turns: list[Message]) -> list[Message]:
    """Neighbours of one role become one turn (chat templates need turns to alternate); no empty system message."""
    merged: list[Message] = []
    for turn in turns:
        if turn["role"] == "system" and not turn["content"]:
            continue
        if merged and merged[-1]["role"] == turn["role"]:
            both = filter(None, (merged[-1]["content"], turn["content"]))
            merged[-1] = Message(role=turn["role"], content="\n\n".join(both))
        else:
            merged.append(turn)
    return merged


def _margin(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        margin = float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not math.isfinite(margin):
        _fail(f'"margin" must be a number, found {value!r}')
    return margin


def _metadata(value: Any) -> str:
    """An object, or the JSON text of one (a cell of a .csv), as JSON text."""
    if value is None or value == "":
        return ""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        text = to_json(value)
    except (ValueError, TypeError, RecursionError) as error:
        _fail(f'"metadata" must be an object that JSON can hold ({error}); mend it or remove the key')
    if not isinstance(value, dict):
        _fail(f'"metadata" must be an object with keys, found {type(value).__name__}; mend it or remove the key')
    if "responses" in value:
        _fail('"metadata" must not hold "responses", the name of the record\'s own answers in step 3; rename that key')
    if "masked_pattern" in value:
        _check_pattern(value["masked_pattern"])
    return _text(text, "metadata") if value else ""


def _check_pattern(pattern: Any) -> None:
    """ "masked_pattern": what matches it in a sampled response is left out of the loss of step 3."""
    if not isinstance(pattern, str):
        _fail(f'"masked_pattern" of "metadata" must be text, found {type(pattern).__name__}')
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        _fail(f'"masked_pattern" of "metadata" is not a regular expression ({error}): {pattern!r:.80}; mend it')


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        _fail(f'"{name}" must be text, found {type(value).__name__}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        _fail(f'"{name}" holds bytes that are not UTF-8; save the file as UTF-8')
    return value.strip()


def _fail(message: str) -> NoReturn:
    raise RecordError(message)
