"""The one renderer: messages -> token ids, with a mask of what is learned.

The chat template lives in the tokenizer, so it is saved with every model. A dialogue is rendered and tokenised in
segments (what comes before an answer, the answer), so that the ids in front of an answer are at training exactly
those that the model is given when it generates.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

from dschat.data.records import Message
from dschat.errors import UserError

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PLAIN_TEMPLATE = r"""
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{ message['content'] }}
{%- elif message['role'] == 'user' -%}{{ '\n\nHuman: ' + message['content'] }}
{%- else -%}{{ '\n\nAssistant:' + (' ' + message['content'] if message['content'] else '') + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}
""".strip()
_BOS = "{{- bos_token -}}\n"
_PLAIN_MARKER = re.compile(r"\n\n(?=(?:Human|Assistant):)")
_TEMPLATE_MARKERS = re.compile(r"<\|[^|<>\s]+\|>|\[/?[A-Z_]+\]|<</?SYS>>")


def ensure_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
    """Put a chat template into the tokenizer: "auto" (its own, else plain), "plain", or the path of a jinja file."""
    if chat_template == "plain" or (chat_template == "auto" and not tokenizer.chat_template):
        tokenizer.chat_template = (_BOS if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
    elif chat_template != "auto":
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat_template {chat_template}: cannot be read ({error}); pass auto, plain or a jinja file"
            ) from error
    _render(tokenizer, [Message(role="user", content="Hello")], add_generation_prompt=True)


def neutralize(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with a space inside everything that could forge a turn: special tokens and role markers."""
    return _break(text, _markers(tokenizer))


def _break(text: str, markers: tuple[str, ...]) -> str:
    if not {marker[0] for marker in markers}.isdisjoint(text):  # rare, and a vocabulary may have hundreds of markers
        for marker in markers:
            text = text.replace(marker, marker[0] + " " + marker[1:])
    return _PLAIN_MARKER.sub("\n\n ", text)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The ids from which the model generates its answer: `encode_dialogue` of messages + [answer] starts with them."""
    return _joined(_encode(tokenizer, _segments(tokenizer, _neutral(tokenizer, messages), generate=True)))[0]


def encode_dialogue(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(input_ids, loss_mask), both (T,). True: a token of an answer, up to and including its EOS.

    Template text after the EOS is not learned, and left out at the end of the dialogue.
    """
    if messages and messages[-1]["role"] == "assistant":
        return encode_answers(tokenizer, messages[:-1], [messages[-1]["content"]])[0]
    return _joined(_encode(tokenizer, _segments(tokenizer, _neutral(tokenizer, messages), generate=False)))


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answers: Sequence[str]
) -> list[tuple[list[int], list[bool]]]:
    """`encode_dialogue` of the prompt and each of the answers; the prompt is rendered and tokenised once."""
    turns = _neutral(tokenizer, prompt)
    segments = _segments(tokenizer, turns, generate=True)
    before = "".join(text for text, _ in segments)
    learned = []
    for turn in _neutral(tokenizer, [Message(role="assistant", content=answer) for answer in answers]):
        learned.append((_rest(_render(tokenizer, [*turns, turn], add_generation_prompt=False), before), True))
    pieces = _encode(tokenizer, segments + learned)
    prompt_ids, prompt_mask = _joined(pieces[: len(segments)])
    encoded = []
    for ids, num_learned in pieces[len(segments) :]:
        encoded.append((prompt_ids + ids[:num_learned], prompt_mask + [True] * num_learned))
    return encoded


def _neutral(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Message]:
    markers = _markers(tokenizer)
    return [Message(role=message["role"], content=_break(message["content"], markers)) for message in messages]


def _segments(tokenizer: PreTrainedTokenizerBase, messages: list[Message], generate: bool) -> list[tuple[str, bool]]:
    """(text, is it an answer): the rendered dialogue, cut in front of and after each answer."""
    segments, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(tokenizer, messages[:number], add_generation_prompt=True)
            after = _render(tokenizer, messages[: number + 1], add_generation_prompt=False)
            segments += [(_rest(before, done), False), (_rest(after, before), True)]
            done = after
    rest = _rest(_render(tokenizer, messages, add_generation_prompt=generate), done)
    return [*segments, (rest, False)]


def _encode(tokenizer: PreTrainedTokenizerBase, segments: list[tuple[str, bool]]) -> list[tuple[list[int], int]]:
    """(ids, how many of them are learned) of each segment: of an answer all up to its EOS, added where it has none."""
    eos = tokenizer.eos_token_id
    pieces = []
    for ids, (_, is_answer) in zip(_token_ids(tokenizer, [text for text, _ in segments]), segments, strict=True):
        if is_answer and eos not in ids:
            ids.append(eos)
        pieces.append((ids, ids.index(eos) + 1 if is_answer else 0))
    return pieces


def _joined(pieces: list[tuple[list[int], int]]) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for piece, num_learned in pieces:
        ids += piece
        mask += [True] * num_learned + [False] * (len(piece) - num_learned)
    return ids, mask


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of each text. Asked directly, the Rust tokenizer takes two thirds of the time, with the same result if
    the class of the tokenizer adds no step of its own and nobody left padding or truncation switched on."""
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
        and (backend := tokenizer.backend_tokenizer).encode_special_tokens == tokenizer.split_special_tokens
        and not (backend.padding or backend.truncation)
    ):
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    if messages and tokenizer.chat_template in (PLAIN_TEMPLATE, _BOS + PLAIN_TEMPLATE):
        return _render_plain(tokenizer, messages, add_generation_prompt)
    turns = cast(list[dict[str, str]], messages)
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a jinja error, or what the template itself raises about the roles
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"the chat template cannot render this ({problem}); use --chat_template plain") from error
    assert isinstance(text, str)
    return text


def _render_plain(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    """What PLAIN_TEMPLATE renders, without jinja, which takes as long over a dialogue as its tokenisation."""
    parts = [tokenizer.bos_token or ""] if str(tokenizer.chat_template).startswith(_BOS) else []
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            parts.append(content)
        elif message["role"] == "user":
            parts += ["\n\nHuman: ", content]
        else:
            parts += ["\n\nAssistant:", " " if content else "", content, tokenizer.eos_token]
    return "".join([*parts, "\n\nAssistant:" if add_generation_prompt else ""])


def _rest(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise UserError(
            "the chat template changes earlier turns when one is added, so training and generation would differ; "
            "use --chat_template plain"
        )
    return text[len(prefix) :]


def _markers(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Strings that are one special id, or that the template writes around turns; the longest first."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return _markers_of(tokenizer, template, len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=8)  # by all that changes them: listing hundreds of special tokens takes as long as a dialogue
def _markers_of(
    tokenizer: PreTrainedTokenizerBase, template: str, num_tokens: int, special_tokens: tuple[str, ...]
) -> tuple[str, ...]:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = {*special, *special_tokens, *_TEMPLATE_MARKERS.findall(template)}
    return tuple(sorted((marker for marker in found if marker), key=lambda marker: (-len(marker), marker)))


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
