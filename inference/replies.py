"""Token ids to text while they come."""

from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class ReplyText:
    """What was said so far. ``finished``: ended by itself, with EOS, or at one of the texts ``stop``, which is not
    part of the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.text = ""
        self.num_tokens = 0  # the end token included
        self.finished = False
        self._eos, self._stop = tokenizer.eos_token_id, [text for text in stop if text]
        self._stream = TextStream(tokenizer)
        self._held = ""  # could be the beginning of a stop text
        self._cut = False  # at a stop text

    def push(self, token_id: int) -> str:
        """What can be shown after this token; nothing more once it is ``finished``."""
        if self.finished:
            return ""
        self.num_tokens += 1
        if token_id == self._eos:
            self.finished = True
            return ""
        return self._say(self._stream.push(token_id))

    def end(self) -> str:
        """The rest, when no token comes any more."""
        if self._cut:
            return ""
        piece = self._say(self._stream.flush())
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _say(self, new: str) -> str:
        new = self._held + new
        found = [place for text in self._stop if (place := new.find(text)) >= 0]
        if found:
            new, self._held, self.finished, self._cut = new[: min(found)], "", True, True
        else:
            size = max((n for text in self._stop for n in range(1, len(text)) if new.endswith(text[:n])), default=0)
            new, self._held = new[: len(new) - size], new[len(new) - size :]
        self.text += new
        return new


class Reply:
    """Iterate once for the pieces of text. ``text`` is what was said so far; ``finished``: ended by itself, with EOS.

    ``num_dropped`` is the number of oldest turns that the model did not see because they no longer fit. ``stop`` may
    be called from any thread: no more tokens are drawn.
    """

    def __init__(
        self,
        token_ids: Iterator[int],
        tokenizer: PreTrainedTokenizerBase,
        num_dropped: int = 0,
        stop: Callable[[], None] = lambda: None,
    ):
        self.num_dropped, self.stop = num_dropped, stop
        self._said = ReplyText(tokenizer)
        self._pieces = self._read(token_ids)

    @property
    def text(self) -> str:
        return self._said.text

    @property
    def finished(self) -> bool:
        return self._said.finished

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _read(self, token_ids: Iterator[int]) -> Iterator[str]:
        for token_id in token_ids:
            if piece := self._said.push(token_id):
                yield piece
            if self.finished:
                break
        if piece := self._said.end():
            yield piece


class TextStream:
    """Token ids in, stable text out: the pieces joined are the decoded text of all ids, stripped at both ends.

    A character whose bytes are spread over several tokens comes out once it is whole, white space once something
    follows it. Only the ids since the last piece but one are decoded again: the ones in front let a tokenizer that
    drops a leading space see that this is not the beginning.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # already out
        self._waiting: list[int] = []
        self._started = False
        self._space = ""

    def push(self, token_id: int) -> str:
        self._waiting.append(token_id)
        new = self._new_text()
        if not new or new.endswith(UNFINISHED):
            return ""
        self._context, self._waiting = self._waiting, []
        return self._without_outer_space(new)

    def flush(self) -> str:
        """What still waits, be it half a character."""
        return self._without_outer_space(self._new_text()) if self._waiting else ""

    def _new_text(self) -> str:
        return self._decode(self._context + self._waiting)[len(self._decode(self._context)) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _without_outer_space(self, text: str) -> str:
        text = self._space + text if self._started else text.lstrip()
        piece = text.rstrip()
        self._space = text[len(piece) :]
        self._started = self._started or bool(piece)
        return piece
