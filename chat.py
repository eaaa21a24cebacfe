"""Talk to what was trained: in a terminal, through a pipe, on a page in the browser, or as a server for programs.

    python chat.py --path output/step3-models/toy/actor
    python chat.py --path output/step3-models/toy/actor output/actor-models/toy --reward output/reward-models/toy
    python chat.py --path output/step3-models/toy/actor output/actor-models/toy --web
    python chat.py --path output/step3-models/toy/actor --serve
    echo "What is RLHF?" | python chat.py --path output/step3-models/toy/actor --temperature 0

Several models answer side by side. In a pipe every line is a message or a command; the answers alone go to stdout.
/help lists the commands. docs/chat.md has the rest.
"""

import gc
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dschat.config import DTYPES, flag, parse_config, require_not_negative, require_positive
from dschat.errors import UserError, run_program
from inference.limits import check_temperature, check_top_k, check_top_p

if TYPE_CHECKING:
    from inference.chatbot import Chatbot
    from inference.scores import AnswerScorer


@dataclass(kw_only=True)
class Config:
    path: list[str] = flag(help="policy directories (of step 1, dpo or step 3) or hub names; side by side")
    reward: str | None = flag(None, "a reward model (of step 2, or a hub name) whose score stands beside each answer")
    max_new_tokens: int = flag(0, "longest answer; 0: 256 tokens, or half of the model's positions where that is less")
    temperature: float = flag(0.7, "0: always the likeliest token")
    top_k: int = flag(0, "draw among the k likeliest tokens; 0: all")
    top_p: float = flag(1.0, "draw among the likeliest tokens of this total probability")
    system: str | None = flag(None, "system prompt")
    seed: int | None = flag(None, "the same seed and messages give the same answers; default: new ones every time")
    votes: str = flag("votes.jsonl", "file for votes, which --data_path of step 2 and dpo reads")
    web: bool = flag(False, "serve a page for the browser, and the API")
    serve: bool = flag(False, "serve the API of OpenAI: /v1/chat/completions and /v1/models")
    host: str = flag("127.0.0.1", "address of --web and --serve; any but this machine's own asks for a token")
    port: int = flag(8080, "port of --web and --serve; 0: a free one")
    token: str | None = flag(None, "who asks must know it; default: $DSCHAT_TOKEN, else made up with --host")
    num_slots: int = flag(8, "answers of a model that are decoded together")
    max_waiting: int = flag(100, "requests to a model that may wait for a slot; more are refused")
    dtype: str = flag("auto", "of the weights; auto: bf16 on a GPU that has it, else fp32", choices=DTYPES)
    device: str = flag("auto", "cpu, cuda or cuda:N; auto: the GPU when there is one")
    chat_template: str = flag("auto", "auto: the one stored with the model, else plain Human/Assistant; plain; a file")
    trust_remote_code: bool = flag(False, "run the Python code that the model brings along, with your rights")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: expected at least 1, or 0 for the default")
        check_top_k(self.top_k, "--top_k")
        check_temperature(self.temperature, "--temperature")
        check_top_p(self.top_p, "--top_p")
        require_positive(self, "num_slots")
        require_not_negative(self, "max_waiting")
        if len({os.path.normpath(path) for path in self.path}) < len(self.path):
            raise UserError(f"--path {' '.join(self.path)}: one of them stands there twice")
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: expected a number from 0 (a free port) to 65535")


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


def open_chatbots(config: Config) -> "dict[str, Chatbot]":
    from dschat.rlhf.specs import Sampling
    from inference.chatbot import load_chatbot, short_names

    bots = {
        name: load_chatbot(
            path,
            Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p),
            seed=config.seed,
            dtype=config.dtype,
            device=config.device,
            chat_template=config.chat_template,
            num_slots=config.num_slots,
            max_waiting=config.max_waiting,
        )
        for name, path in zip(short_names(config.path), config.path, strict=True)
    }
    gc.freeze()  # as `run_program` does, before the libraries were there
    gc.enable()
    return bots


def open_scorer(config: Config) -> "AnswerScorer | None":
    from inference.chatbot import resolve_device
    from inference.scores import load_answer_scorer

    return load_answer_scorer(config.reward, config.dtype, resolve_device(config.device)) if config.reward else None


def talk(config: Config) -> None:
    """The conversation of the terminal or the pipe."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdin.reconfigure(errors="replace")  # a broken byte is no reason to end
    sys.stdout.reconfigure(errors="replace")
    if interactive:
        print(f"loading {', '.join(config.path)}", file=sys.stderr)
    quiet_libraries()
    from inference.session import Session
    from inference.terminal import PlainScreen, TerminalScreen, read_lines

    bots, scorer = open_chatbots(config), open_scorer(config)
    screen = TerminalScreen() if interactive else PlainScreen()
    if interactive:
        for name, bot in bots.items():
            size = f"{bot.model.num_parameters():,} parameters, {bot.model.dtype} on {bot.model.device}"
            screen.note(f"{name}: {bot.model.config.model_type}, {size}" + (f"; {bot.note}" if bot.note else ""))
        screen.note("/help lists the commands; Alt-Enter begins a new line")
    session = Session(bots, screen, votes=Path(config.votes), system=config.system or "", scorer=scorer)
    try:
        for line in read_lines(interactive):
            if not session.handle(line):
                break
    except BrokenPipeError:  # who reads our answers (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if session.num_refused and not interactive:
        raise UserError(f"messages that got no answer: {session.num_refused}")


def main() -> None:
    config = parse_config(Config, doc=__doc__)
    gc.disable()  # until the models are there: see `run_before_imports`
    if config.web or config.serve:
        from inference.serving import listen_safely, serve_models

        listener, token = listen_safely(config.host, config.port, config.token)  # before models are loaded for it
        quiet_libraries()
        bots, scorer = open_chatbots(config), open_scorer(config)
        options = {"votes": Path(config.votes), "page": config.web, "system": config.system or ""}
        serve_models(bots, scorer, listener, token, **options)
    else:
        talk(config)


if __name__ == "__main__":
    run_program(main)
