"""A chat model as a judge, against a small server on this machine: what it is asked, what its replies are worth."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dschat.errors import UserError
from dschat.rlhf import chat_judge
from dschat.rlhf.chat_judge import ChatJudge, points_of
from dschat.rlhf.judges import check_judge, create_judge
from dschat.rlhf.rewards import Samples

import pytest
import torch


class Server(ThreadingHTTPServer):
    """Answers with what ``reply`` makes of the text that it is asked; the first ``failures`` requests with 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[dict, str]] = []
        self.reply, self.failures, self.status = (lambda text: "Points: 7"), 0, 200
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((request, self.headers.get("Authorization", "")))
        server.failures -= 1
        status = 503 if server.failures >= 0 else server.status
        content = server.reply(request["messages"][0]["content"])
        body = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(chat_judge, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def samples(*responses: str) -> Samples:
    messages = [[{"role": "user", "content": f"question {i}"}] for i in range(len(responses))]
    empty = [[1, 2]] * len(responses)
    prompts = [message[0]["content"] for message in messages]
    return Samples(prompts, list(responses), messages, empty, [1] * len(responses), [True] * len(responses), [{}] * 9)


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        ("Points: 7", 7.0),
        ("**Points:** 6.5 of 10", 6.5),
        ("8/10", 8.0),
        ("3", 3.0),
        ("points: 2 ... on reflection Points: 4", 4.0),
        ("Points: 11", None),
        ("good", None),
        ("between 3 and 5", None),
    ],
)
def test_the_points_of_a_reply(reply, points):
    assert points_of(reply) == points


def test_every_answer_is_asked_about_with_its_dialogue_and_gets_its_own_points(server, tokenizer):
    server.reply = lambda text: f"Points: {9 if 'assistant: good' in text else 1}"
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "batch_size": 2}
    judge = create_judge(f"openai:{server.url}#some-model", tokenizer, **options)
    answers = ["good one", "bad one", "ignore this", "good two"] * 5
    assert judge.for_model(tokenizer)(samples(*answers)).scores == [9.0, 1.0, 1.0, 9.0] * 5
    assert len(server.asked) == 20
    request, key = next(pair for pair in server.asked if "question 2\n" in pair[0]["messages"][0]["content"])
    assert request["model"] == "some-model" and request["temperature"] == 0 and key == "Bearer not-a-key"
    assert "user: question 2\nassistant: ignore this\n-----" in request["messages"][0]["content"]


def test_a_busy_server_is_asked_again_and_a_broken_one_named(server, tokenizer):
    server.failures = 2
    check_judge(f"openai:{server.url}#m", tokenizer, [])
    assert len(server.asked) == 3
    server.status = 401
    with pytest.raises(UserError, match="HTTP 401 .*correct the address, the model or OPENAI_API_KEY"):
        ChatJudge(f"{server.url}#m").check()
    server.status, server.failures = 200, 99
    with pytest.raises(UserError, match="HTTP 503 .*tried 5 times"):
        ChatJudge(f"{server.url}#m").check()


def test_a_model_that_cannot_judge_is_refused_and_a_single_lapse_has_no_score(server):
    server.reply = lambda text: "I like it"
    with pytest.raises(UserError, match=r"m gave no points \('I like it'\)"):
        ChatJudge(f"{server.url}#m")(samples("a", "b"))
    server.reply = lambda text: "Points: 5" if "assistant: a" in text else "no idea"
    assert ChatJudge(f"{server.url}#m")(samples("a", "b")) == [5.0, None]
    with pytest.raises(UserError, match="expected openai:URL#MODEL"):
        ChatJudge("http://127.0.0.1:1/v1")
