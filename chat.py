"""Talk to what was trained, in a terminal or through a pipe.

    python chat.py --path output/step3-models/toy/actor
    echo "What is RLHF?" | python chat.py --path output/step3-models/toy/actor --temperature 0

In a pipe every line is a message or a command; the answers alone go to stdout. /help lists the commands.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dschat.config import DTYPES, flag, parse_config
from dschat.errors import UserError, run_program

if TYPE_CHECKING:
    from dschat.data.records import Message
    from inference.chatbot import Chatbot, Reply

HELP = """\
/regen        another answer to your last message (with --temperature 0: the same)
/clear        forget the conversation; the system prompt stays
/system TEXT  from now on with this system prompt; without TEXT: with none
/save FILE    write the conversation as a record that --data_path reads (.json or .jsonl)
/help         this list
/quit         end, like Ctrl-D; Ctrl-C ends too, but while an answer comes it stops only the answer
A message that begins with / is sent when a space stands before it."""
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")  # a terminal would obey them
MIN_TEMPERATURE = 0.01  # below, logits / temperature leave the range of float32


@dataclass(kw_only=True)
class Config:
    path: str = flag(help="a policy directory (of step 1, dpo or step 3) or a hub name")
    max_new_tokens: int = flag(0, "longest answer; 0: 256 tokens, or half of the model's positions where that is less")
    temperature: float = flag(0.7, "0: always the likeliest token")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0: all")
    top_p: float = flag(1.0, "draw among the likeliest tokens of this total probability")
    system: str | None = flag(None, "system prompt")
    seed: int | None = flag(None, "the same seed and messages give the same answers; default: new ones every time")
    dtype: str = flag("auto", "of the weights; auto: bf16 on a GPU that has it, else fp32", choices=DTYPES)
    device: str = flag("auto", "cpu, cuda or cuda:N; auto: the GPU when there is one")
    chat_template: str = flag("auto", "auto: the one stored with the model, else plain Human/Assistant; plain; a file")
    trust_remote_code: bool = flag(False, "run the Python code that the model brings along, with your rights")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: expected at least 1, or 0 for the default")
        if self.top_k < 0:
            raise UserError(f"--top_k {self.top_k}: expected a number of tokens, or 0 for all")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature}: expected 0 (greedy) or at least {MIN_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: expected a probability above 0 and up to 1 (1: all tokens)")


class Session:
    """One conversation: its turns, its system prompt and the commands. ``num_refused``: messages without an answer."""

    def __init__(self, bot: "Chatbot", system: str = "", interactive: bool = False):
        self.bot = bot
        self.system = system
        self.interactive = interactive
        self.turns: list[tuple[str, str]] = []  # (message, answer)
        self.num_refused = 0
        self._num_dropped = 0
        self._saved: set[Path] = set()

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command. False: the conversation is over."""
        text = line.strip()
        if not line.startswith("/"):
            if text:
                self.answer(text, self.turns)
            return True
        command, _, rest = text.partition(" ")
        rest = rest.strip()
        match command:
            case "/quit":
                return False
            case "/help":
                note(HELP)
            case "/clear":
                self.turns = []
                note("the conversation is forgotten")
            case "/system":
                self.system = rest
                note("the system prompt is set" if rest else "no system prompt from now on")
            case "/regen" if self.turns:
                self.answer(self.turns[-1][0], self.turns[:-1])
            case "/regen":
                note("nothing to answer again yet")
            case "/save":
                self.save(rest)
            case _:
                note(f"unknown command {command}; /help lists them")
        return True

    def messages(self, turns: list[tuple[str, str]]) -> "list[Message]":
        """Turns that got no answer are left out: the model would learn from them to say nothing."""
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for message, answer in turns:
            if answer:
                messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        return messages

    def answer(self, message: str, earlier: list[tuple[str, str]]) -> None:
        """Stream the answer to ``message`` after the turns ``earlier``; both become the conversation."""
        try:
            reply = self.bot.reply([*self.messages(earlier), {"role": "user", "content": message}])
        except UserError as error:
            self.num_refused += 1
            note(f"error: {error}")
            return
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
        self.turns = [*earlier, (message, reply.text)]
        self._report(reply, stopped)

    def _report(self, reply: "Reply", stopped: bool) -> None:
        if reply.num_dropped != self._num_dropped:
            self._num_dropped = reply.num_dropped
            if reply.num_dropped:
                note(f"oldest turns left out because the context is full: {reply.num_dropped}")
        if stopped:
            note("stopped")
        elif not reply.finished:
            note(f"cut off after {self.bot.sampling.max_new_tokens} tokens; --max_new_tokens allows more")
        elif not reply.text:
            note("the model ended its answer without a word")

    def save(self, name: str) -> None:
        """One JSON object on one line, which is valid as .json and as .jsonl. Other people's files are left alone."""
        path = Path(name).expanduser().absolute()
        messages = self.messages(self.turns)
        if not name:
            note("give a file name: /save FILE")
        elif not any(answer for _, answer in self.turns):
            note("nothing to save yet")
        elif path.exists() and path not in self._saved:
            note(f"{path} exists; give another name")
        else:
            try:
                path.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
            except OSError as error:
                note(f"{path}: {error.strerror}")
                return
            self._saved.add(path)
            note(f"saved {len(messages)} messages to {path}")


def note(text: str) -> None:
    """What is not an answer: on stderr, dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def read_lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    import readline  # noqa: F401  from here on input() can edit and recall lines

    while True:
        try:
            line = input("you> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        yield line


def quiet_libraries() -> None:
    """The terminal is for the conversation. A download still shows its progress."""
    warnings.simplefilter("ignore")
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()


def open_chatbot(config: Config) -> "Chatbot":
    from dschat.rlhf.rollout import Sampling
    from inference.chatbot import load_chatbot

    return load_chatbot(
        config.path,
        Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p),
        seed=config.seed,
        dtype=config.dtype,
        device=config.device,
        chat_template=config.chat_template,
    )


def main() -> None:
    config = parse_config(Config, doc=__doc__)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdin.reconfigure(errors="replace")  # a broken byte is no reason to end
    sys.stdout.reconfigure(errors="replace")
    if interactive:
        note(f"loading {config.path}")
    quiet_libraries()
    bot = open_chatbot(config)
    if interactive:
        size = bot.model.num_parameters()
        note(f"{bot.model.config.model_type}, {size:,} parameters, {bot.model.dtype} on {bot.model.device}; /help")
    session = Session(bot, config.system or "", interactive)
    try:
        for line in read_lines(interactive):
            if not session.handle(line):
                break
    except BrokenPipeError:  # who reads our answers (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if session.num_refused and not interactive:
        raise UserError(f"messages that got no answer: {session.num_refused}")


if __name__ == "__main__":
    run_program(main)
