"""The page in a real browser: open, send, stream, vote, blind, reload, and what a model says stays text."""

import re
import threading
import time
from types import SimpleNamespace

from dschat.data.records import to_example
from dschat.rlhf.rollout import Sampling
from dschat.server import address, listen
from inference.serving import create_app
from tests.browser import needs_browser, open_browser
from tests.chat_server import SCRIPT

import pytest
import uvicorn

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser():
    with open_browser() as found:
        yield found


@pytest.fixture
def page(browser, chat_server):
    """The page in a window of its own; at the end nothing may have gone wrong in it."""
    window = browser.new_context(viewport={"width": 1200, "height": 800})
    page, errors = window.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(chat_server.url)
    page.wait_for_selector("body[data-ready]")
    page.evaluate("document.getElementById('seed').value = 7")
    yield page
    window.close()
    assert [text for text in errors if "status of 400" not in text] == []


def send(page, text, last="Again"):
    """Send a message and wait until its answers are whole."""
    page.fill("#message", text)
    page.press("#message", "Enter")
    page.get_by_role("button", name=last).wait_for()


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def test_open_send_stream_vote_and_reload(page, chat_server):
    assert page.title() == "dschat"
    assert texts(page, "#left option") == ["policy", "script"] and page.input_value("#right") == "script"
    before = len(chat_server.records())
    send(page, "tell me a short story please")
    assert texts(page, ".name") == ["policy", "script"] and len(texts(page, ".score")) >= 1
    left = texts(page, ".text")[0]
    page.get_by_role("button", name="Left is better").click()
    page.get_by_text("Voted: left is better").wait_for()
    (record,) = chat_server.records()[before:]
    assert record["metadata"]["models"] == {"chosen": "policy", "rejected": "script"}
    assert record["chosen"] == left.strip() and to_example(record)["ranks"] == [1, 2]
    assert record["metadata"]["sampling"]["temperature"] == 1 and record["metadata"]["blind"] is False
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert texts(page, ".text")[0] == left and page.get_by_text("Voted: left is better").count() == 1
    send(page, "and another")
    assert len(texts(page, ".turn")) == 2
    page.get_by_role("button", name="New chat").click()
    assert texts(page, ".turn") == []


def test_an_answer_comes_in_pieces(page):
    page.evaluate(
        """() => { window.lengths = [];
        new MutationObserver(() => { const text = document.querySelectorAll(".text")[0];
            if (text) window.lengths.push(text.textContent.length); })
        .observe(document.getElementById("turns"), {childList: true, subtree: true, characterData: true}); }"""
    )
    pieces: set[int] = set()
    for _ in range(5):  # a busy browser may get the whole of so short an answer at once
        page.get_by_role("button", name="New chat").click()
        page.evaluate("window.lengths = []")
        send(page, "tell me a short story please")
        grown = page.evaluate("window.lengths")
        pieces |= {size for size in grown if 0 < size < max(grown)}
    assert pieces


def test_a_blind_comparison_tells_no_name_before_the_vote(page, chat_server):
    orders = set()
    page.check("#blind")
    for number in range(20):
        send(page, f"what is the colour of the sky {number}")
        card = page.locator(".turn").last
        assert "policy" not in card.inner_text() and "script" not in card.locator(".name").first.inner_text()
        assert card.locator(".score").count() == 0
        assert card.get_by_role("button", name="Token by token").count() == 0
        page.get_by_role("button", name="A tie").click()
        card.get_by_text("Voted: a tie").wait_for()
        names = card.locator(".name").all_inner_texts()
        assert sorted(names) == ["policy", "script"]
        assert (SCRIPT in card.locator(".text").all_inner_texts()[names.index("script")]) is True
        orders.add(tuple(names))
        record = chat_server.records()[-1]
        assert record["metadata"]["blind"] is True and record["ranks"] == [1, 1]
        if len(orders) == 2:
            break
    assert len(orders) == 2, "the order is drawn: twenty times the same is one in half a million"


def test_what_a_model_says_is_text_and_stop_stops(page):
    page.select_option("#left", "script")
    page.select_option("#right", "")
    send(page, "<script>window.hacked=1</script><b>hi</b>")
    assert SCRIPT in texts(page, ".text")[0] and "<b>hi</b>" in texts(page, ".mine p")[0]
    assert page.evaluate("window.hacked") is None and page.locator("main script, main img, main b").count() == 0
    page.click("#settings-button")
    page.fill("#max_tokens", "1500")
    page.fill("#message", "more")
    page.press("#message", "Enter")
    page.locator(".text").nth(1).filter(has_text=SCRIPT).wait_for()
    page.click("#stop")
    page.get_by_text("stopped").first.wait_for()
    size = len(texts(page, ".text")[1])
    time.sleep(0.3)
    assert len(texts(page, ".text")[1]) == size and page.locator("#send").is_visible()


def test_edit_again_copy_numbers_and_errors(page, chat_server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=chat_server.url)
    send(page, "once upon a time")
    send(page, "there was a king")
    page.get_by_role("button", name="Copy").first.click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".text").first.text_content()
    page.get_by_role("button", name="Token by token").first.click()
    page.locator(".token").first.wait_for()
    kinds = texts(page, ".numbers option")
    assert kinds[0].startswith("log-probability") and "reward up to this token" in kinds
    said = "".join(page.locator(".token").all_text_contents())
    plain = [re.sub(r"[^ -~]", "", text).strip() for text in (said, page.locator(".text").first.text_content())]
    assert plain[0].removesuffix("<|endoftext|>") == plain[1] != "", "but for characters of several tokens"
    assert re.search(r"log-probability \(nats\): -\d", page.locator(".token").first.get_attribute("title"))
    page.get_by_role("button", name="Edit").first.click()
    page.fill("#message", "twice upon a time")
    page.press("#message", "Enter")
    page.locator(".turn").nth(1).wait_for(state="detached")
    page.get_by_role("button", name="Again").wait_for()
    assert texts(page, ".mine p") == ["twice upon a time"]
    page.get_by_role("button", name="Again").click()
    page.get_by_role("button", name="Again").wait_for()
    assert len(texts(page, ".turn")) == 1
    page.evaluate("document.getElementById('max_tokens').value = 0")
    page.fill("#message", "too hot")
    page.press("#message", "Enter")
    page.get_by_text("max_tokens 0: expected at least 1").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_desktop_light_and_dark(scheme, browser, chat_server, page):
    page.emulate_media(color_scheme=scheme)
    for width in (1200, 390):
        page.set_viewport_size({"width": width, "height": 800})
        send(page, "a dog ran in the park " * 10)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        boxes = [page.locator(".answer").nth(n).bounding_box() for n in range(2)]
        side_by_side = boxes[0]["y"] == boxes[1]["y"]
        assert side_by_side == (width > 1000), "on a phone one stands below the other"
        bottom = page.locator("#composer").bounding_box()
        assert bottom["y"] + bottom["height"] <= 800
        page.get_by_role("button", name="New chat").click()
    back, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0))"
    )
    assert (back < ink) == (scheme == "dark")


def test_a_token_is_asked_for_or_comes_with_the_address(browser, tmp_path):
    bots = {"m": SimpleNamespace(sampling=Sampling(5), decoder=None)}
    app = create_app(bots, None, votes=tmp_path / "votes.jsonl", page=True, token="sesame", hosts=None)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        for how in ("asked", "address"):
            page = browser.new_context().new_page()
            page.goto(address(listener) + ("#token=sesame" if how == "address" else ""))
            if how == "asked":
                page.fill("#token", "wrong")
                page.press("#token", "Enter")
                page.wait_for_timeout(200)
                page.fill("#token", "sesame")
                page.press("#token", "Enter")
            page.wait_for_selector("body[data-ready]")
            assert texts(page, "#left option") == ["m"] and "sesame" not in page.url
            page.context.close()
    finally:
        server.should_exit = True
        thread.join(10)
