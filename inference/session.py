"""A conversation in the terminal: its turns, its commands, and the votes that become training data."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dschat.data.records import Message, RecordError, to_example
from dschat.data.votes import TIE, Candidate, append_vote, vote_record
from dschat.errors import UserError
from dschat.rlhf.specs import Sampling
from inference.chatbot import Chatbot
from inference.limits import check_temperature
from inference.replies import Reply
from inference.scores import AnswerScorer

MAX_BEST = 64  # answers of /best N
COMMANDS = {
    "/vote": ("N|tie", "store which answer is best; the conversation goes on with it"),
    "/best": ("N", "N answers of each model to your last message, the best by the reward first"),
    "/retry": ("", "another answer to your last message (with /temp 0: the same)"),
    "/regen": ("", "the same as /retry"),
    "/undo": ("", "take your last message and its answers back"),
    "/system": ("TEXT", "from now on with this system prompt; without TEXT: with none"),
    "/temp": ("X", "sampling temperature from now on; 0: always the likeliest token"),
    "/save": ("FILE", "write the conversation as a record that --data_path reads (.json or .jsonl)"),
    "/load": ("FILE", "go on with a conversation from such a file (its first record)"),
    "/clear": ("", "forget the conversation; the system prompt stays"),
    "/help": ("", "this list"),
    "/quit": ("", "end, like Ctrl-D; Ctrl-C while an answer comes stops only the answer"),
}
HELP = "".join(f"{f'{name} {what}':14} {text}\n" for name, (what, text) in COMMANDS.items())
HELP += "A message that begins with / is sent when a space stands before it."


class Screen(Protocol):
    """Where answers appear."""

    def note(self, text: str) -> None: ...

    def show(self, names: Sequence[str], replies: Sequence[Reply], score: Callable[[str], float | None]) -> bool:
        """Stream the replies, with the score of each when it is whole. False: the user stopped them."""

    def ranked(self, answers: Sequence[tuple[str, float | None]], names: Sequence[str]) -> None:
        """Answers that stand beside each other, the first being number 1."""


@dataclass
class Turn:
    """A message, the answers to it, and which of them the conversation goes on with."""

    message: str
    answers: list[Candidate]
    kept: int = 0


class Session:
    """One conversation with several models, which all see the same turns: a message and the answer that was kept.

    Args:
        bots: the models by name.
        votes: the file for /vote.
    """

    def __init__(
        self,
        bots: dict[str, Chatbot],
        screen: Screen,
        *,
        votes: Path = Path("votes.jsonl"),
        system: str = "",
        scorer: AnswerScorer | None = None,
    ):
        self.bots, self.screen, self.votes, self.system, self.scorer = bots, screen, votes, system, scorer
        self.turns: list[Turn] = []
        self.num_refused = 0  # messages without an answer
        self.temperature: float | None = None  # None: that of the flags
        self._num_dropped = 0
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "/vote": self.vote,
            "/best": self.best,
            "/retry": self.retry,
            "/regen": self.retry,
            "/undo": self.undo,
            "/system": self.set_system,
            "/temp": self.set_temperature,
            "/save": self.save,
            "/load": self.load,
            "/clear": self.clear,
            "/help": lambda _: screen.note(HELP),
        }

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command. False: the conversation is over."""
        text = line.strip()
        if not line.startswith("/"):
            if text:
                self.answer(text, self.turns)
            return True
        command, _, rest = text.partition(" ")
        if command == "/quit":
            return False
        if command in self._commands:
            self._commands[command](rest.strip())
        else:
            self.screen.note(f"unknown command {command}; /help lists them")
        return True

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Turns that got no answer are left out: the model would learn from them to say nothing."""
        messages = [Message(role="system", content=self.system)] if self.system else []
        for turn in turns:
            if turn.answers[turn.kept].content:
                messages.append(Message(role="user", content=turn.message))
                messages.append(Message(role="assistant", content=turn.answers[turn.kept].content))
        return messages

    def sampling(self, bot: Chatbot) -> Sampling:
        if self.temperature is None:
            return bot.sampling
        return dataclasses.replace(bot.sampling, temperature=self.temperature)

    def answer(self, message: str, earlier: list[Turn]) -> None:
        """Stream the answers to ``message`` after the turns ``earlier``; all that becomes the conversation."""
        prompt = [*self.messages(earlier), Message(role="user", content=message)]
        begun = self._begin(prompt, 1)
        if begun is None:
            self.num_refused += 1
            return
        names, replies = list(begun), [reply for (reply,) in begun.values()]
        whole = self.screen.show(names, replies, lambda text: self._score(prompt, text))
        answers = [Candidate(name, reply.text) for name, reply in zip(names, replies, strict=True)]
        self.turns = [*earlier, Turn(message, answers)]
        self._report(replies, stopped=not whole)

    def best(self, rest: str) -> None:
        if not (rest.isdecimal() and 2 <= int(rest) <= MAX_BEST):
            return self.screen.note(f"give a number from 2 to {MAX_BEST}: /best 4")
        if not self.turns:
            return self.screen.note("nothing to answer again yet")
        message, earlier = self.turns[-1].message, self.turns[:-1]
        prompt = [*self.messages(earlier), Message(role="user", content=message)]
        found: list[tuple[Candidate, float | None]] = []
        begun = self._begin(prompt, int(rest))
        if begun is None:
            return
        try:
            for name, drawn in begun.items():
                for text in dict.fromkeys("".join(reply) for reply in drawn):  # the same text once
                    found.append((Candidate(name, text), self._score(prompt, text)))
        except KeyboardInterrupt:
            stop(begun)
            return self.screen.note("stopped")
        found.sort(key=lambda one: (one[1] is not None, one[1] or 0.0), reverse=True)
        self.turns = [*earlier, Turn(message, [candidate for candidate, _ in found])]
        self.screen.ranked([(candidate.content, score) for candidate, score in found], [c.model for c, _ in found])
        if self.scorer is None:
            self.screen.note("in no order: there is no --reward to judge them")

    def vote(self, rest: str) -> None:
        if not self.turns or len(self.turns[-1].answers) < 2:
            return self.screen.note("nothing to choose from: give several --path, or ask for /best N first")
        turn = self.turns[-1]
        if not (rest == "tie" or (rest.isdecimal() and 1 <= int(rest) <= len(turn.answers))):
            return self.screen.note(f"say which answer is best: /vote 1 to {len(turn.answers)}, or /vote tie")
        best = TIE if rest == "tie" else int(rest) - 1
        prompt = [*self.messages(self.turns[:-1]), Message(role="user", content=turn.message)]
        bot = self.bots[turn.answers[0].model]
        try:
            record = vote_record(prompt, turn.answers, best, describe(self.sampling(bot)), blind=False)
            count = append_vote(self.votes, record)
        except UserError as error:
            return self.screen.note(f"error: {error}")
        turn.kept = max(best, 0)
        self.screen.note(f"stored in {self.votes}, which has {count} votes")

    def retry(self, _: str) -> None:
        if self.turns:
            self.answer(self.turns[-1].message, self.turns[:-1])
        else:
            self.screen.note("nothing to answer again yet")

    def undo(self, _: str) -> None:
        if self.turns:
            self.screen.note(f"taken back: {self.turns.pop().message[:60]}")
        else:
            self.screen.note("nothing to take back yet")

    def clear(self, _: str) -> None:
        self.turns = []
        self.screen.note("the conversation is forgotten")

    def set_system(self, rest: str) -> None:
        self.system = rest
        self.screen.note("the system prompt is set" if rest else "no system prompt from now on")

    def set_temperature(self, rest: str) -> None:
        try:
            self.temperature = check_temperature(float(rest), "/temp")
        except (ValueError, UserError) as error:
            self.screen.note(str(error) if isinstance(error, UserError) else "give a number: /temp 0.7")
        else:
            self.screen.note(f"temperature {self.temperature:g} from now on")

    def save(self, name: str) -> None:
        """One JSON object on one line, which is valid as .json and as .jsonl. Other people's files are left alone."""
        path = Path(name).expanduser().absolute()
        messages = self.messages(self.turns)
        if not name:
            self.screen.note("give a file name: /save FILE")
        elif not any(message["role"] == "assistant" for message in messages):
            self.screen.note("nothing to save yet")
        elif path.exists() and path not in self._saved:
            self.screen.note(f"{path} exists; give another name")
        else:
            try:
                path.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
            except OSError as error:
                return self.screen.note(f"{path}: {error.strerror}")
            self._saved.add(path)
            self.screen.note(f"saved {len(messages)} messages to {path}")

    def load(self, name: str) -> None:
        from dschat.data.readers import reader_of  # which imports datasets: seconds, for those who ask

        path = Path(name).expanduser()
        try:
            if not name or not path.is_file():
                return self.screen.note(f"no such file: {path}" if name else "give a file name: /load FILE")
            where, record = next(iter(reader_of(path)(str(path))), (f"{path}:1", RecordError("the file is empty")))
            if isinstance(record, RecordError):
                raise UserError(f"{where}: {record}")
            example = to_example(record)
        except (UserError, RecordError, OSError) as error:
            return self.screen.note(f"error: {error}")
        messages = list(example["prompt"])
        self.system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        texts = [message["content"] for message in messages]
        first = next(iter(self.bots))
        answers = [*texts[1::2], *example["responses"][:1]]
        self.turns = [
            Turn(text, [Candidate(first, answer)]) for text, answer in zip(texts[::2], answers, strict=False)
        ]
        self.screen.note(f"{len(self.turns)} turns from {path}; the next message goes on from there")

    def _begin(self, prompt: Sequence[Message], count: int) -> dict[str, list[Reply]] | None:
        """So many replies of each model; None, and a note, where one of them cannot answer."""
        begun: dict[str, list[Reply]] = {}
        try:
            for name, bot in self.bots.items():
                begun[name] = bot.replies(prompt, count, self.sampling(bot))
        except UserError as error:
            stop(begun)
            self.screen.note(f"error: {error}")
            return None
        return begun

    def _score(self, prompt: Sequence[Message], text: str) -> float | None:
        return self.scorer.score(prompt, text) if self.scorer and text else None

    def _report(self, replies: Sequence[Reply], stopped: bool) -> None:
        num_dropped = max(reply.num_dropped for reply in replies)
        if num_dropped != self._num_dropped:
            self._num_dropped = num_dropped
            if num_dropped:
                self.screen.note(f"oldest turns left out because the context is full: {num_dropped}")
        if stopped:
            return self.screen.note("stopped")
        for name, reply in zip(self.bots, replies, strict=True):
            who = f"{name}: " if len(replies) > 1 else ""
            if not reply.finished:
                limit = self.bots[name].sampling.max_new_tokens
                self.screen.note(f"{who}cut off after {limit} tokens; --max_new_tokens allows more")
            elif not reply.text:
                self.screen.note(f"{who}the model ended its answer without a word")


def stop(begun: dict[str, list[Reply]]) -> None:
    for replies in begun.values():
        for reply in replies:
            reply.stop()


def describe(sampling: Sampling) -> dict[str, float]:
    """The settings of an answer as they are kept with a vote."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p")
    return {name: getattr(sampling, name) for name in names}
