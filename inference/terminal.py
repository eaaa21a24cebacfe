"""The terminal side of the chat: a line editor, and answers in columns where there is a terminal; else plain text."""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from inference.replies import Reply
from inference.session import COMMANDS

Score = Callable[[str], float | None]
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")  # a terminal would obey them
FRAMES = 15  # a second


class PlainScreen:
    """For a pipe: answers on stdout, one after the other, everything else on stderr."""

    interactive = False

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def show(self, names: Sequence[str], replies: Sequence[Reply], score: Score) -> bool:
        if len(replies) == 1:
            return self._stream(replies[0], score)
        for name, reply in zip(names, replies, strict=True):
            for _ in reply:
                pass
            self._print(f"{self._title(name, score(reply.text))}: {reply.text}")
        return True

    def ranked(self, answers: Sequence[tuple[str, float | None]], names: Sequence[str]) -> None:
        for number, ((text, score), name) in enumerate(zip(answers, names, strict=True), 1):
            self._print(f"{number} {self._title(name, score)}: {text}")

    def _stream(self, reply: Reply, score: Score) -> bool:
        stopped = False
        try:
            print("bot> " if self.interactive else "", end="", flush=True)
            for piece in reply:
                print(piece.translate(CONTROL) if self.interactive else piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            stopped = True
        print(flush=True)
        found = None if stopped else score(reply.text)
        if found is not None:
            self.note(f"score {found:+.2f}")
        return not stopped

    def _print(self, text: str) -> None:
        print(text.translate(CONTROL) if self.interactive else text, flush=True)

    @staticmethod
    def _title(name: str, score: float | None) -> str:
        return name if score is None else f"{name} ({score:+.2f})"


class TerminalScreen(PlainScreen):
    """For people: dim notes, and a column for each of several models."""

    interactive = True

    def note(self, text: str) -> None:
        print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)

    def show(self, names: Sequence[str], replies: Sequence[Reply], score: Score) -> bool:
        if len(replies) == 1:
            return self._stream(replies[0], score)
        from rich.console import Console
        from rich.live import Live

        console, stopped = Console(), False
        readers = [threading.Thread(target=_read, args=(reply,), daemon=True) for reply in replies]
        for reader in readers:
            reader.start()
        titles = [f"{number} {name}" for number, name in enumerate(names, 1)]
        try:
            # While they come only what fits the screen is shown; then the whole of it, once.
            with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live:
                while any(reader.is_alive() for reader in readers):
                    live.update(_columns(titles, replies), refresh=True)
                    for reader in readers:
                        reader.join(1 / FRAMES / len(readers))
        except KeyboardInterrupt:
            stopped = True
            for reply in replies:
                reply.stop()
            for reader in readers:
                reader.join()
        for number, reply in enumerate(replies):
            titles[number] = self._title(titles[number], score(reply.text))
        console.print(_columns(titles, replies))
        return not stopped


def _read(reply: Reply) -> None:
    for _ in reply:
        pass


def _columns(titles: Sequence[str], replies: Sequence[Reply]) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True, show_lines=False)
    for title in titles:
        table.add_column(Text(title), ratio=1, overflow="fold")
    table.add_row(*(Text(reply.text.translate(CONTROL)) for reply in replies))
    return table


def read_lines(interactive: bool) -> Iterator[str]:
    """Messages and commands: lines of a pipe, or what is typed, which may have several lines."""
    if not interactive:
        yield from sys.stdin
        return
    session = _editor()
    while True:
        try:
            text = session.prompt("you> ")
        except (EOFError, KeyboardInterrupt):
            return
        yield text


def _editor() -> "PromptSession":  # noqa: F821
    """Enter sends, Alt-Enter begins a new line; pasted lines stay together. Arrows recall, Tab completes commands."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: "KeyPressEvent") -> None:  # noqa: F821
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: "KeyPressEvent") -> None:  # noqa: F821
        event.current_buffer.validate_and_handle()

    path = history_path()
    return PromptSession(
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        history=FileHistory(str(path)) if path else InMemoryHistory(),
        prompt_continuation="...  ",
    )


def history_path() -> Path | None:
    """The file of what was typed, for its user alone; None where it cannot be written."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "dschat" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError:
        return None
    return path
