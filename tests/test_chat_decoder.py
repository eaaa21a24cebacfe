"""The decoder behind chat and server: the rollout's tokens, whoever comes and goes; nothing is read twice."""

import queue
import random
import threading

from dschat.models.attention import use_fast_attention
from dschat.rlhf.rollout import Sampling, generate, row_uniforms
from inference.decoder import Decoder, TooManyWaiting
from inference.lanes import PlainLanes, Request, SlotLanes, open_lanes
from tests.families import tiny_model
from tests.ppo_parts import few_tokens

import pytest
import torch


def model_of(family, tokenizer, dtype=torch.float32):
    model = tiny_model(family, tokenizer).to(dtype)
    use_fast_attention(model)
    return model


def samplings(model, tokenizer):
    banned = few_tokens(tokenizer, model.config.vocab_size)
    kinds = ((12, 3.0, 0, 1.0), (9, 0.0, 0, 1.0), (14, 3.0, 5, 0.8))
    return [Sampling(*kind, banned_ids=banned) for kind in kinds]


def expected(model, tokenizer, request):
    ids = torch.tensor([request.prompt_ids])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return (
        generate(model, ids, torch.ones_like(ids), request.sampling, request.uniforms[None], **ends)
        .response_ids[0]
        .tolist()
    )


def drive(lanes, eos, waiting, admit):
    """Decode ``waiting``; before each step as many begin as ``admit`` says, while there is room."""
    found, active = {}, []
    while waiting or active:
        for _ in range(admit()):
            if waiting and len(active) < lanes.size:
                active.append(waiting.pop(0))
                lanes.begin(active[-1])
        for request, token, _ in lanes.step():
            found.setdefault(request, []).append(token)
            if token == eos or request.num_tokens == request.sampling.max_new_tokens:
                lanes.end(request)
                active.remove(request)
    return found


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_whoever_comes_and_goes_the_tokens_are_those_of_the_rollout(family, size, tokenizer):
    """Dialogues of several turns, each turn sampled in its own way, beginning at drawn moments in drawn order."""
    model, rng = model_of(family, tokenizer), random.Random(size)
    lanes = open_lanes(model, tokenizer.eos_token_id, size, 256, samplings(model, tokenizer)[0])
    assert isinstance(lanes, SlotLanes)
    dialogues = [[rng.randrange(4, 300) for _ in range(length)] for length in (1, 30, 7, 55, 12)]
    for turn in range(3):
        requests = []
        for number, ids in enumerate(dialogues):
            sampling = rng.choice(samplings(model, tokenizer))
            uniforms = row_uniforms(1, sampling.max_new_tokens, 10 * turn + number)[0]
            requests.append(Request(list(ids), sampling, uniforms))
        rng.shuffle(requests)
        found = drive(lanes, tokenizer.eos_token_id, list(requests), lambda: rng.randrange(3))
        for request in requests:
            assert found[request] == expected(model, tokenizer, request)
        dialogues = [r.prompt_ids + found[r] + [rng.randrange(4, 300) for _ in range(3)] for r in requests]


def test_a_turn_computes_only_what_is_new(tokenizer):
    model = model_of("llama", tokenizer)
    lanes = open_lanes(model, tokenizer.eos_token_id, 2, 256, samplings(model, tokenizer)[0])
    one, other = [list(range(start, start + 40)) for start in (10, 100)]
    sampling = Sampling(5, 0.0, banned_ids=few_tokens(tokenizer, model.config.vocab_size, eos=False))
    computed = []
    for _ in range(3):
        for dialogue in (one, other):
            before = lanes.num_prompt_tokens
            request = Request(list(dialogue), sampling, torch.zeros(5))
            answer = drive(lanes, tokenizer.eos_token_id, [request], lambda: 1)[request]
            assert answer == expected(model, tokenizer, request)
            dialogue += [*answer, 7, 8, 9]
            computed.append(lanes.num_prompt_tokens - before)
    assert computed == [39, 39, 3, 3, 3, 3]  # the last token of a prompt is fed by the first step


def test_in_half_precision_a_continued_prompt_agrees_with_a_forward(tokenizer):
    """Attention of our own kernel over a cache that holds more than the new tokens."""
    model = model_of("llama", tokenizer, torch.bfloat16)
    sampling = Sampling(4, 1.0, banned_ids=few_tokens(tokenizer, model.config.vocab_size, eos=False))
    lanes = SlotLanes(model, 1, 256)
    logprobs = []
    for known in (0, 20):
        ids = list(range(10, 50))
        if known:
            first = Request(ids[:known], sampling, torch.zeros(4))
            lanes.begin(first)
            lanes.end(first)
        request = Request(ids, sampling, torch.full((4,), 0.5))
        before = lanes.num_prompt_tokens
        lanes.begin(request)
        assert lanes.num_prompt_tokens - before == (39 if not known else 39 - known + 1)
        logprobs.append([lanes.step()[0][2] for _ in range(4)])
        lanes.end(request)
        lanes = SlotLanes(model, 1, 256)
    assert logprobs[0] == pytest.approx(logprobs[1], abs=0.1)


@pytest.mark.parametrize("family", ["bloom"])
def test_models_without_slots_are_decoded_in_loops(family, tokenizer):
    model = model_of(family, tokenizer)
    lanes = open_lanes(model, tokenizer.eos_token_id, 2, 256, samplings(model, tokenizer)[0])
    assert isinstance(lanes, PlainLanes) and "its attention is eager" in lanes.note
    requests = [
        Request([5, 6, 7 + n], sampling, row_uniforms(1, 14, n)[0])
        for n, sampling in enumerate(samplings(model, tokenizer))
    ]
    found = drive(lanes, tokenizer.eos_token_id, list(requests), lambda: 1)
    assert all(found[r] == expected(model, tokenizer, r) for r in requests)


def test_slots_that_disagree_with_the_model_are_not_used(tokenizer, monkeypatch):
    model = model_of("llama", tokenizer)
    monkeypatch.setattr(SlotLanes, "_prefill", lambda self, number, ids: self._rows[number].ids.extend(ids))
    lanes = open_lanes(model, tokenizer.eos_token_id, 1, 256, samplings(model, tokenizer)[0])
    assert isinstance(lanes, PlainLanes) and "nats away from a forward" in lanes.note


# The thread


class Slow:
    """Lanes that count: every answer is 1, 2, 3, …"""

    size, note = 2, ""

    def __init__(self):
        self.active, self.may_step, self.fault = [], threading.Event(), None

    def begin(self, request):
        if not request.prompt_ids:
            raise ValueError("no prompt")
        self.active.append(request)

    def step(self):
        self.may_step.wait(10)
        if self.fault:
            fault, self.fault = self.fault, None
            raise fault
        for request in self.active:
            request.num_tokens += 1
        return [(request, request.num_tokens, 0.0) for request in self.active]

    def end(self, request):
        self.active.remove(request)

    def prepare(self):
        return False


def ask(decoder, num_tokens=3, prompt=(1,)):
    got = queue.SimpleQueue()
    return decoder.submit(Request(list(prompt), Sampling(num_tokens), torch.zeros(num_tokens)), got.put), got


def rest(got):
    found = []
    while isinstance(token := got.get(timeout=10), int):
        found.append(token)
    return found, token


@pytest.fixture
def slow():
    decoder = Decoder(Slow(), eos_token_id=99, max_waiting=3)
    yield decoder
    decoder.lanes.may_step.set()
    decoder.close()


def test_a_full_queue_refuses_and_the_others_are_answered(slow):
    asked = [ask(slow) for _ in range(5)]
    with pytest.raises(TooManyWaiting, match="are waiting already"):
        for _ in range(2):
            ask(slow)
    slow.lanes.may_step.set()
    assert [rest(got) for _, got in asked] == [([1, 2, 3], None)] * 5
    assert rest(ask(slow)[1]) == ([1, 2, 3], None) and slow.load == (0, 0)


def test_an_answer_that_nobody_wants_makes_place(slow):
    (one, first), (_, second), (three, third), (_, fourth) = [ask(slow, 10**6 if n == 0 else 3) for n in range(4)]
    three.cancel()
    slow.lanes.may_step.set()
    assert rest(second) == ([1, 2, 3], None) and rest(third) == ([], None) and rest(fourth) == ([1, 2, 3], None)
    one.cancel()
    found, last = rest(first)
    assert last is None and found == list(range(1, len(found) + 1))
    assert rest(ask(slow)[1]) == ([1, 2, 3], None)


def test_an_error_reaches_those_it_concerns_and_the_decoder_goes_on(slow):
    slow.lanes.may_step.set()
    found, error = rest(ask(slow, prompt=())[1])
    assert found == [] and str(error) == "no prompt"
    slow.lanes.fault = RuntimeError("broken")
    found, error = rest(ask(slow)[1])
    assert found == [] and str(error) == "broken"
    assert rest(ask(slow)[1]) == ([1, 2, 3], None)
    assert slow.call(lambda: 1 + 1).result(10) == 2
    with pytest.raises(ZeroDivisionError):
        slow.call(lambda: 1 / 0).result(10)
