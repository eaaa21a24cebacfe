"""Step 2, served: a reward model over HTTP, the other end of step 3's `--reward api:URL`.

    python training/step2_reward_model_finetuning/serve.py --model_name_or_path output/reward --port 8000
    curl http://127.0.0.1:8000/ -d '{"messages": ["\\n\\nHuman: 2 + 2?\\n\\nAssistant: 4<|endoftext|>"]}'

POST / or /v1/rewards takes {"messages": […]} and gives {"scores": […]}, a number for each. A message is a rendered
dialogue (text, special tokens and all, tokenised as it is) or a list of {"role", "content"} turns, which goes through
the chat template. {"token_ids": [[…], …], "tokenizer": hash} beside it saves the way through text where the hash is
that of this model's tokenizer. What cannot be scored is answered by status 400 and {"error": …}. GET /health tells
whether the server is up. Models of other programs can ask too: LLaMA-Factory's `reward_model_type: api` does.
"""

import json
import math
import threading
from dataclasses import dataclass
from functools import partial
from typing import Any

from dschat.config import DTYPES, flag, parse_config
from dschat.errors import UserError, run_before_imports, run_program
from dschat.flags import TRUST_HELP

MAX_REQUEST_BYTES = 64 * 2**20


@dataclass(kw_only=True)
class Config:
    model_name_or_path: str = flag(help="a reward model: the output of step 2, or a hub name")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's, for anyone who reaches them")
    port: int = flag(8000, "port to listen on; 0: a free one")
    dtype: str = flag("auto", "of the weights; auto: bf16 on a GPU that has it, else fp32", choices=DTYPES)
    normalize_reward: bool = flag(True, "scores to mean 0 and std 1 by the statistics of step 2")
    trust_remote_code: bool = flag(False, TRUST_HELP)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: expected a number from 0 (a free port) to 65535")


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__))

from dschat.data.records import Message, RecordError, to_example
from dschat.data.stages import tokenizer_hash
from dschat.data.templates import encode_dialogue
from dschat.data.tokenizer import load_tokenizer
from dschat.models.load import load_trained_scorer, max_positions, resolve_dtype
from dschat.models.scorer import Scorer, score_token_ids
from dschat.report.progress import Console
from dschat.server import address, listen, serve

import torch
import transformers
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    listener = listen(config.host, config.port)  # first: whoever asks while the model is loaded waits in its queue

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(config.dtype, device)
    tokenizer = load_tokenizer(config.model_name_or_path)
    scorer = load_trained_scorer(
        config.model_name_or_path, tokenizer, dtype=dtype, normalize=config.normalize_reward, device=device
    )
    judge = Judge(scorer.eval(), tokenizer, device)

    Console().print(f"{config.model_name_or_path} is ready; for step 3: --reward api:{address(listener)}")
    serve(create_app(judge, config.model_name_or_path), listener)


class Judge:
    """Scores one request at a time, as one batch: the bits do not depend on who else asks."""

    def __init__(self, scorer: Scorer, tokenizer: transformers.PreTrainedTokenizerBase, device: torch.device):
        self.scorer, self.tokenizer, self.device = scorer, tokenizer, device
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        embeddings: Any = scorer.model.get_input_embeddings()
        self.vocab_size: int = embeddings.num_embeddings
        self.num_positions = max_positions(scorer.model.config) or math.inf
        self._lock = threading.Lock()

    def scores(self, body: bytes) -> list[float]:
        """The answer to a request.

        Raises:
            UserError: it is not by the protocol, or a dialogue does not fit the model.
        """
        with self._lock:
            rows = self._rows(body)
            if not rows:
                return []
            return score_token_ids(self.scorer, rows, self.tokenizer.pad_token_id, len(rows), self.device)

    def _rows(self, body: bytes) -> list[list[int]]:
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the request is not JSON ({error})") from None
        if not isinstance(request, dict):
            raise UserError('the request is no JSON object; expected {"messages": [...]}')
        if "token_ids" in request and request.get("tokenizer") == self.tokenizer_hash:
            key, encode = "token_ids", self._checked_ids
        else:
            key, encode = "messages", self._encode
        if not isinstance(request.get(key), list):
            raise UserError(f'the request has no list "{key}"')
        rows = []
        for number, item in enumerate(request[key]):
            try:
                rows.append(self._fitting(encode(item)))
            except (UserError, RecordError, UnicodeEncodeError) as error:
                raise UserError(f"{key}[{number}]: {error}") from None
        return rows

    def _checked_ids(self, item: Any) -> list[int]:
        if not isinstance(item, list) or not all(type(i) is int and 0 <= i < self.vocab_size for i in item):
            raise UserError(f"expected a list of token ids from 0 to {self.vocab_size - 1}")
        return item

    def _encode(self, item: Any) -> list[int]:
        if isinstance(item, str):  # rendered already: what spells a special token is one, and none is added
            item.encode()  # half a surrogate pair, which JSON can spell, is no text
            return self.tokenizer(item, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        if not isinstance(item, list):
            raise UserError("expected a text or a list of {role, content} turns")
        example = to_example({"messages": item})
        if not example["responses"]:
            raise UserError("the dialogue ends without an answer to score; the last turn must be the assistant's")
        answer = Message(role="assistant", content=example["responses"][0])
        return encode_dialogue(self.tokenizer, [*example["prompt"], answer])[0]

    def _fitting(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UserError("it has no tokens")
        if len(ids) > self.num_positions:
            raise UserError(f"it has {len(ids)} tokens but the model has {self.num_positions} positions; shorten it")
        return ids


def create_app(judge: Judge, name: str) -> Starlette:
    """The routes. Whatever goes wrong is answered as {"error": one line}."""

    async def rewards(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_REQUEST_BYTES:
                raise HTTPException(413, f"the request is larger than {MAX_REQUEST_BYTES} bytes; send fewer dialogues")
        try:
            return reply({"scores": await run_in_threadpool(judge.scores, bytes(body))})
        except UserError as error:
            raise HTTPException(400, str(error)) from None

    async def health(request: Request) -> Response:
        return reply({"status": "ok", "model": name})

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return reply({"error": error.detail}, error.status_code)

    async def fail(request: Request, error: Exception) -> Response:  # the traceback is on the server's terminal
        return reply({"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}, 500)

    routes = [Route(path, rewards, methods=["POST"]) for path in ("/", "/v1/rewards")]
    handlers: Any = {HTTPException: refuse, Exception: fail}
    return Starlette(routes=[*routes, Route("/health", health)], exception_handlers=handlers)


def reply(content: dict[str, Any], status: int = 200) -> Response:
    """JSON by Python's json, which has NaN where the standard has nothing."""
    return Response(json.dumps(content), status, media_type="application/json")


if __name__ == "__main__":
    run_program(main)
