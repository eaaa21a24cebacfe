"""Rewards over HTTP: the client against servers that fail in every way, the server against such clients, and both."""

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from dschat.data.stages import tokenizer_hash
from dschat.data.templates import encode_dialogue
from dschat.data.tokenizer import load_tokenizer
from dschat.errors import UserError, run_program
from dschat.models.load import load_scorer, load_trained_scorer, save_model
from dschat.models.scorer import save_score_stats, score_token_ids
from dschat.rlhf.reward_api import ApiReward
from dschat.rlhf.rewards import Samples
from tests.conftest import ROOT

import httpx2
import pytest
import torch
from tokenizers.processors import TemplateProcessing

PROGRAM = ROOT / "training" / "step2_reward_model_finetuning" / "serve.py"
SIZES = (3, 17, 1, 40, 8)
CPU = torch.device("cpu")
CHAT = [{"role": "user", "content": "tell me a story"}, {"role": "assistant", "content": "once upon a time"}]


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(4, len(tokenizer), (size,), generator=generator).tolist() for size in SIZES]
    return [ids[:-1] + [tokenizer.eos_token_id] for ids in drawn]


def samples_of(rows: list[list[int]]) -> Samples:
    size = len(rows)
    return Samples([""] * size, [""] * size, [[]] * size, rows, [0] * size, [True] * size, [{}] * size)


# --- the client, against a server that answers by a script


class Fake:
    """A server on loopback. Each request gets the next of ``answers``, the last one for ever."""

    def __init__(self, answers):
        self.answers, self.requests = list(answers), []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.requests.append(body)
                answer = fake.answers[min(len(fake.requests), len(fake.answers)) - 1]
                with contextlib.suppress(OSError):  # the client may have gone
                    answer(self, body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.stop = threading.Event()
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.server.stop.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fake():
    opened = []

    def start(*answers) -> Fake:
        opened.append(Fake(answers))
        return opened[-1]

    yield start
    for server in opened:
        server.close()


def says(body, status=200, **headers):
    """An answer with this body: text as it is, anything else as JSON."""
    content = (body if isinstance(body, str) else json.dumps(body)).encode()

    def answer(handler, _):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def sizes(handler, body):
    says({"scores": [len(ids) for ids in body["token_ids"]]})(handler, body)


def hangs(handler, _):
    handler.server.stop.wait(10)


def drips(handler, _):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    for _ in range(500):
        handler.wfile.write(b"X-A: b\r\n")
        handler.server.stop.wait(0.02)


def drips_its_body(handler, _):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\n")
    for _ in range(500):
        handler.wfile.write(b" ")
        handler.server.stop.wait(0.02)


def hangs_up(handler, _):
    handler.connection.shutdown(socket.SHUT_RDWR)


class Client(ApiReward):
    """An `ApiReward` whose waits are noted and take no time."""

    def __init__(self, url, tokenizer, batch_size=8, timeout=10.0, retries=2):
        self.waits = []

        async def sleep(seconds):
            self.waits.append(seconds)

        super().__init__(url, tokenizer, batch_size=batch_size, timeout=timeout, retries=retries, sleep=sleep)


def fails(client: ApiReward, rows: list[list[int]]) -> str:
    with pytest.raises(UserError) as error:
        client(samples_of(rows))
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.isprintable()
    assert message.startswith(f"reward server {client.url}: ") and "; " in message
    return message


def test_a_request_holds_text_and_ids_and_the_scores_keep_their_order(fake, tokenizer, rows):
    server = fake(sizes)
    client = Client(server.url, tokenizer, batch_size=2)
    judged = client(samples_of(rows))
    assert judged.scores == list(SIZES) and judged.masks == []
    assert [request["token_ids"] for request in server.requests] == [rows[:2], rows[2:4], rows[4:]]
    for request in server.requests:
        assert request["tokenizer"] == tokenizer_hash(tokenizer)
        assert isinstance(request["model"], str)  # LLaMA-Factory's server refuses a request without
        for text, ids in zip(request["messages"], request["token_ids"], strict=True):
            assert text.endswith(tokenizer.eos_token)
            assert text == tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))
    assert client.name == "api" and client.waits == []


def test_the_text_is_not_tidied_up(fake, tokenizer, monkeypatch):
    """Even where the tokenizer was stored with the wish for it."""
    wish = "clean_up_tokenization_spaces"
    monkeypatch.setattr(tokenizer, wish, True)
    monkeypatch.setattr(tokenizer, f"{wish}_for_bpe_even_though_it_will_corrupt_output", True)
    server = fake(sizes)
    text = "\n\nHuman: well , I do n't know . . .\n\nAssistant: ok !<|endoftext|>"
    Client(server.url, tokenizer)(samples_of([tokenizer(text)["input_ids"]]))
    assert server.requests[0]["messages"] == [text]


def test_null_is_no_judgement_and_what_is_not_finite_is_nan(fake, tokenizer, rows):
    server = fake(says('{"scores": [null, 3, NaN, -Infinity, 1' + "0" * 400 + "]}"))
    scores = Client(server.url, tokenizer)(samples_of(rows)).scores
    assert scores[:2] == [None, 3.0] and isinstance(scores[1], float)
    assert all(math.isnan(score) for score in scores[2:])


@pytest.mark.parametrize("bad", [says("busy", 500), says("slow down", 429), hangs_up], ids=["500", "429", "hang-up"])
def test_a_failure_that_passes_is_tried_again(fake, tokenizer, rows, bad):
    server = fake(bad, bad, sizes)
    client = Client(server.url, tokenizer)
    assert client(samples_of(rows)).scores == list(SIZES)
    assert client.waits == [0.5, 1.0] and len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


def test_every_request_has_retries_of_its_own(fake, tokenizer, rows):
    bad = says("busy", 503)
    client = Client(fake(bad, bad, sizes, bad, sizes, sizes).url, tokenizer, batch_size=2)
    assert client(samples_of(rows)).scores == list(SIZES)
    assert client.waits == [0.5, 1.0, 0.5]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (says("out of\n \x1b[31mmemory", 500), "HTTP 500 out of [31mmemory, tried"),
        (says("", 502), "HTTP 502,"),
        (says("<h1>later</h1>", 429), "HTTP 429 <h1>later</h1>"),
        (hangs_up, "no answer (Server disconnected"),
    ],
    ids=["500", "502", "429", "hang-up"],
)
def test_a_failure_that_lasts_is_one_line(fake, tokenizer, rows, bad, told):
    server = fake(bad)
    client = Client(server.url, tokenizer)
    message = fails(client, rows)
    assert told in message and "tried 3 times" in message
    assert client.waits == [0.5, 1.0] and len(server.requests) == 3


@pytest.mark.parametrize("slow", [hangs, drips, drips_its_body])
def test_the_time_limit_is_on_the_whole_answer(fake, tokenizer, rows, slow):
    start = time.monotonic()
    message = fails(Client(fake(slow).url, tokenizer, timeout=0.2, retries=1), rows)
    assert "no whole answer within 0.2 s, tried 2 times" in message and "more time" in message
    assert 0.4 <= time.monotonic() - start < 8


def test_the_waits_double_up_to_half_a_minute(fake, tokenizer, rows):
    client = Client(fake(says("", 500)).url, tokenizer, retries=9)
    assert "tried 10 times" in fails(client, rows)
    assert client.waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_no_server_is_one_line(tokenizer, rows):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    client = Client(url, tokenizer, retries=0)
    message = fails(client, rows)
    assert "no answer" in message and "tried once" in message and "start the server" in message
    with pytest.raises(UserError, match="start the server"):
        client.check()


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (says("It works!"), "not JSON ('It works!')"),
        (says(""), "not JSON"),
        (says("[" * 100_000), "not JSON"),
        (says([1, 2, 3, 4, 5]), 'no list "scores" ([1, 2'),
        (says({"rewards": [1]}), 'no list "scores" ({"rewards"'),
        (says({"scores": 3}), 'no list "scores"'),
        (says({"scores": [1, 2, 3, 4]}), "4 scores for 5 responses"),
        (says({"scores": [1, 2, 3, 4, 5, 6]}), "6 scores for 5 responses"),
        (says({"scores": [1, 2, "3", 4, 5]}), 'score "3" is no number'),
        (says({"scores": [1, 2, True, 4, 5]}), "score true is no number"),
        (says({"scores": [[1], [2], [3], [4], [5]]}), "score [1.0] is no number"),
        (says("", 307, Location="/elsewhere"), "HTTP 307 to /elsewhere; redirects are not followed"),
        (says({"scores": [1, 2, 3, 4, 5]}, 301, Location="http://other/"), "HTTP 301 to http://other/"),
        (says({"scores": [1, 2, 3, 4, 5]}, 304), "HTTP 304"),
        (says("Not\nFound", 404), "HTTP 404 Not Found"),
        (says({"error": "it has 300 tokens"}, 400), 'HTTP 400 {"error": "it has 300 tokens"}'),
    ],
)
def test_a_failure_that_stays_is_not_tried_again(fake, tokenizer, rows, bad, told):
    server = fake(bad)
    client = Client(server.url, tokenizer)
    assert told in fails(client, rows)
    assert client.waits == [] and len(server.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "localhost",
        "ftp://host/",
        "file:///etc/passwd",
        "http://",
        "http:///path",
        "http://[::1",
        "http://host:99999/",
        "http://a..b/",
        "http://host\n/",
        "",
    ],
)
def test_only_http_addresses_are_taken(tokenizer, url):
    with pytest.raises(UserError) as error:
        Client(url, tokenizer)
    assert "no http or https address" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert Client("https://host.example/rewards", tokenizer).url == "https://host.example/rewards"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_is_for_other_machines_only(fake, tokenizer, rows, monkeypatch, host):
    proxy, server = fake(sizes), fake(sizes)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert Client(server.url.replace("127.0.0.1", host), tokenizer)(samples_of(rows)).scores == list(SIZES)
    assert len(server.requests) == 1 and not proxy.requests
    assert Client("http://reward.invalid/", tokenizer)(samples_of(rows)).scores == list(SIZES)
    assert len(proxy.requests) == 1


def test_the_check_sends_one_whole_dialogue(fake, tokenizer):
    server = fake(sizes, says("", 404))
    client = Client(server.url, tokenizer)
    client.check()
    [request] = server.requests
    [ids] = request["token_ids"]
    assert ids[-1] == tokenizer.eos_token_id and "Human: Hello" in request["messages"][0]
    with pytest.raises(UserError, match="HTTP 404"):
        client.check()


# --- the server, in this process


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reward_dir(model_dirs, tokenizer, tmp_path_factory) -> str:
    """A reward model with statistics that matter."""
    directory = str(tmp_path_factory.mktemp("reward"))
    torch.manual_seed(0)
    save_model(load_scorer(model_dirs("llama"), tokenizer, dtype=torch.float32), tokenizer, directory)
    save_score_stats(directory, 0.5, 3.0)
    return directory


@pytest.fixture(scope="module")
def open_app(serve, reward_dir):
    """What `main` would serve, given these flags."""

    def build(*flags):
        served = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serve, "serve", lambda app, listener: (served.append(app), listener.close()))
            serve.main(["--model_name_or_path", reward_dir, "--port", "0", "--dtype", "fp32", *flags])
        return served[0]

    return build


@pytest.fixture(scope="module")
def app(open_app):
    return open_app()


@pytest.fixture(scope="module")
def expected(reward_dir, tokenizer):
    """Scores of rows in one batch, in this process."""
    scorer = load_trained_scorer(reward_dir, tokenizer, dtype=torch.float32, normalize=True)
    return lambda rows: score_token_ids(scorer, rows, tokenizer.pad_token_id, len(rows), CPU)


def ask(app, path="/", **request) -> httpx2.Response:
    """One request to an app or, given an address, to a server: a POST of ``json`` or ``content``, else a GET."""

    async def once():
        transport = None if isinstance(app, str) else httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        base = app if isinstance(app, str) else "http://app"
        async with httpx2.AsyncClient(transport=transport, base_url=base, trust_env=False, timeout=60) as client:
            return await client.request("POST" if request else "GET", path, **request)

    return asyncio.run(once())


def scores(app, path="/", **request) -> list[float]:
    response = ask(app, path, json=request)
    assert response.status_code == 200, response.text
    assert list(response.json()) == ["scores"]
    return response.json()["scores"]


@pytest.mark.parametrize("path", ["/", "/v1/rewards"])
def test_strings_are_scored_as_they_are(app, tokenizer, expected, path):
    texts = ["\n\nHuman: hi\n\nAssistant: the cat<|endoftext|>", "<|endoftext|>", "no template at all"]
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert plain[0].count(tokenizer.eos_token_id) == 1 and plain[1] == [tokenizer.eos_token_id]
    assert scores(app, path, model="reward", messages=texts) == expected(plain)


def test_rendered_text_keeps_its_special_tokens_and_gets_none(serve, reward_dir):
    """Also with a tokenizer that would split them, and with one that puts a BOS in front."""
    tokenizer = load_tokenizer(reward_dir)
    tokenizer.split_special_tokens = True
    assert len(tokenizer("<|endoftext|>")["input_ids"]) > 1
    scorer = load_trained_scorer(reward_dir, tokenizer, dtype=torch.float32, normalize=True)
    judge = serve.Judge(scorer, tokenizer, CPU)
    assert judge._encode("hi<|endoftext|>")[-1] == tokenizer.eos_token_id

    other = load_tokenizer(reward_dir)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert other("hi")["input_ids"][0] == 0
    assert serve.Judge(scorer, other, CPU)._encode("hi")[0] != 0


def test_turns_go_through_the_template_up_to_the_end_token(app, tokenizer, expected):
    forged = [{"role": "user", "content": "a\n\nAssistant: b<|endoftext|>"}, {"role": "assistant", "content": "c"}]
    rows = [encode_dialogue(tokenizer, dialogue)[0] for dialogue in (CHAT, forged)]
    assert all(ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id for ids in rows)
    assert scores(app, messages=[CHAT, forged]) == expected(rows)


def test_ids_are_used_when_the_tokenizer_is_the_same(app, tokenizer, expected, rows):
    texts = ["other", "words", "for", "each", "row"]
    own = tokenizer_hash(tokenizer)
    from_text = expected([tokenizer(text)["input_ids"] for text in texts])
    assert scores(app, messages=texts, token_ids=rows, tokenizer=own) == expected(rows)
    assert scores(app, token_ids=rows, tokenizer=own) == expected(rows)
    assert scores(app, messages=texts, token_ids=rows, tokenizer="another") == from_text
    assert scores(app, messages=texts, token_ids=rows) == from_text
    assert scores(app, messages=texts, tokenizer=own) == from_text


def test_a_request_is_one_batch(app, serve, rows, tokenizer, monkeypatch):
    seen = []
    score = serve.score_token_ids
    monkeypatch.setattr(serve, "score_token_ids", lambda *given: seen.append(given[1:4]) or score(*given))
    scores(app, token_ids=rows, tokenizer=tokenizer_hash(tokenizer))
    assert seen == [(rows, tokenizer.pad_token_id, len(rows))]
    assert scores(app, messages=[]) == [] and len(seen) == 1


def test_raw_scores_on_demand(app, open_app):
    [normal] = scores(app, messages=[CHAT])
    [raw] = scores(open_app("--no-normalize_reward"), messages=[CHAT])
    assert (raw - 0.5) / 3.0 == pytest.approx(normal, abs=1e-6) and abs(raw - normal) > 1e-3


def test_the_type_of_the_weights_is_chosen(app, open_app):
    [full], [half] = scores(app, messages=[CHAT]), scores(open_app("--dtype", "bf16"), messages=[CHAT])
    assert full != half and full == pytest.approx(half, abs=0.2)


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (b"what?", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([1], "no JSON object"),
        ({}, 'no list "messages"'),
        ({"messages": "text"}, 'no list "messages"'),
        ({"messages": ["a", 3]}, "messages[1]: expected a text or a list"),
        ({"messages": ["a", ""]}, "messages[1]: it has no tokens"),
        ({"messages": ["\ud800"]}, "messages[0]: "),
        ({"messages": CHAT}, "messages[0]: expected a text or a list"),
        ({"messages": [CHAT[:1]]}, "messages[0]: the dialogue ends without an answer"),
        (
            {"messages": [[{"role": "judge", "content": "a"}]]},
            "messages[0]: message 1 of \"messages\" has role 'judge'",
        ),
        ({"messages": [[]]}, "messages[0]: "),
        ({"messages": ["a", "the cat " * 400]}, "messages[1]: it has"),
        ({"token_ids": [[1], 2]}, "token_ids[1]: expected a list of token ids from 0 to"),
        ({"token_ids": [[1], []]}, "token_ids[1]: it has no tokens"),
        ({"token_ids": [[1], [-1]]}, "token_ids[1]: expected"),
        ({"token_ids": [[1], [True]]}, "token_ids[1]: expected"),
        ({"token_ids": [[1, 10**6]]}, "token_ids[0]: expected"),
        ({"token_ids": [[1] * 257]}, "token_ids[0]: it has 257 tokens but the model has 256 positions"),
        ({"token_ids": {}}, 'no list "token_ids"'),
    ],
    ids=str,
)
def test_a_clients_mistake_is_400_and_one_line(app, tokenizer, request_, told):
    if isinstance(request_, dict) and "token_ids" in request_:
        request_ = request_ | {"tokenizer": tokenizer_hash(tokenizer)}
    response = ask(app, content=request_ if isinstance(request_, bytes) else json.dumps(request_).encode())
    assert response.status_code == 400
    [message] = response.json().values()
    assert list(response.json()) == ["error"] and told in message and len(message.splitlines()) == 1


def test_the_first_token_too_many_is_refused(app, tokenizer):
    assert len(scores(app, token_ids=[[1] * 256], tokenizer=tokenizer_hash(tokenizer))) == 1


def test_every_other_failure_is_json_too(app, serve, monkeypatch, capfd):
    assert (ask(app, "/nowhere").status_code, ask(app).status_code) == (404, 405)
    assert list(ask(app, "/nowhere").json()) == list(ask(app).json()) == ["error"]
    monkeypatch.setattr(serve, "MAX_REQUEST_BYTES", 100)
    response = ask(app, json={"messages": ["a" * 100]})
    assert response.status_code == 413 and "larger than 100 bytes" in response.json()["error"]
    assert len(scores(app, messages=["a" * 50])) == 1

    def broken(*_):
        raise RuntimeError("CUDA out\nof memory")

    monkeypatch.setattr(serve, "score_token_ids", broken)
    response = ask(app, json={"messages": ["a"]})
    assert response.status_code == 500 and response.json() == {"error": "RuntimeError: CUDA out of memory"}


def test_a_score_that_is_not_a_number_is_passed_on(app, serve, monkeypatch):
    monkeypatch.setattr(serve, "score_token_ids", lambda *_: [math.nan, 1.5])
    assert ask(app, json={"messages": ["a", "b"]}).text == '{"scores": [NaN, 1.5]}'


def test_one_forward_at_a_time_and_health_meanwhile(app, serve, reward_dir, monkeypatch):
    running, at_once, go_on = [], [], threading.Event()

    def score(model, rows, *_):
        running.append(1)
        at_once.append(len(running))
        go_on.wait(5)
        running.pop()
        return [0.0] * len(rows)

    monkeypatch.setattr(serve, "score_token_ids", score)

    async def busy():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://app", timeout=None) as client:
            jobs = [asyncio.create_task(client.post("/", json={"messages": ["a"]})) for _ in range(3)]
            while not at_once:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # time for the other two
            health = await asyncio.wait_for(client.get("/health"), 5)
            assert not any(job.done() for job in jobs)
            go_on.set()
            assert [(await job).json() for job in jobs] == [{"scores": [0.0]}] * 3
            return health

    assert asyncio.run(busy()).json() == {"status": "ok", "model": reward_dir}
    assert at_once == [1, 1, 1]


# --- the program


def exit_code(serve, *argv) -> int:
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: serve.main(list(argv)))
    return ended.value.code


def test_a_port_in_use_is_told_before_a_model_is_loaded(serve, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert exit_code(serve, "--model_name_or_path", "/nowhere", "--port", port) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --host 127.0.0.1 --port {port}: Address already in use")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "65536"], "--port 65536: expected a number"),
        (["--host", "no.such.host.invalid", "--port", "0"], "--host no.such.host.invalid"),
        (["--port", "0"], "/nowhere: no tokenizer"),
    ],
)
def test_a_users_mistake_is_one_line(serve, capsys, flags, told):
    assert exit_code(serve, "--model_name_or_path", "/nowhere", *flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize(
    ("name", "told"), [(("127.0.0.1", 80), "127.0.0.1"), (("::1", 80, 0, 0), "[::1]"), (("0.0.0.0", 80), None)]
)
def test_the_address_to_give_step_3(serve, name, told):
    class Listener:
        def getsockname(self):
            return name

    assert serve.address(Listener()) == f"http://{told or socket.gethostname()}:80/"


def test_the_keyboard_ends_the_server(serve, app):
    """Returns, which `run_program` makes exit code 0, instead of raising KeyboardInterrupt."""
    listener = serve.listen("127.0.0.1", 0)
    url = serve.address(listener)
    answers = []

    def use_and_interrupt():
        answers.append(ask(url, "/health").status_code)
        os.kill(os.getpid(), signal.SIGINT)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    thread = threading.Thread(target=use_and_interrupt)
    thread.start()
    try:
        serve.serve(app, listener)
    except KeyboardInterrupt:
        pytest.fail("the keyboard's signal came through")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        thread.join()
    assert answers == [200]


def test_client_and_server_give_the_bits_of_the_model_in_process(reward_dir, tokenizer, rows, expected):
    command = [sys.executable, str(PROGRAM), "--model_name_or_path", reward_dir, "--port", "0", "--dtype", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        url = re.search(r"--reward api:(http://127\.0\.0\.1:\d+/)$", line.rstrip())[1]
        assert ask(url, "/health").json() == {"status": "ok", "model": reward_dir}
        client = ApiReward(url, load_tokenizer(reward_dir), batch_size=3)
        client.check()
        assert client(samples_of(rows)).scores == expected(rows[:3]) + expected(rows[3:])
        client.batch_size = len(rows)
        assert client(samples_of(rows)).scores == expected(rows)
        response = ask(url, content=b"[" * (64 * 2**20 + 1))
        assert response.status_code == 413 and "67108864 bytes" in response.json()["error"]
        with pytest.raises(UserError, match=r"HTTP 400 .*token_ids\[0\]: it has 300 tokens but the model has 256"):
            client(samples_of([[5] * 300]))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")
