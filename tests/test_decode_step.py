"""Recorded steps: CUDA graphs give the tokens of the plain loop, or are given up with a word."""

import dschat.rlhf.slots as slots
from dschat.rlhf.rollout import Sampling, generate, row_uniforms
from dschat.rlhf.rollout_engine import SLOTS, create_decoder
from dschat.rlhf.slots import SlotDecoder
from tests.fake_graphs import FakeGraph, as_on_a_gpu
from tests.families import FAMILIES, ragged_prompts
from tests.ppo_parts import ends, few_tokens
from tests.test_slots import assert_same, fast_model

import pytest
import torch

SIZES, STEPS = (3, 9, 6, 1, 7, 4, 9, 2), 24


@pytest.fixture
def work(tokenizer):
    """A model, and what `generate` takes."""
    return job("llama", tokenizer)


def job(family, tokenizer, **changes):
    model = fast_model(family, tokenizer)
    given = {"max_new_tokens": STEPS, "temperature": 3.0} | changes
    sampling = Sampling(**given, banned_ids=few_tokens(tokenizer, model.config.vocab_size))
    return model, *ragged_prompts(tokenizer, SIZES), sampling, row_uniforms(len(SIZES) * 2, STEPS, 8)


def on_a_gpu(decoder, work, tokenizer, batch_size=3):
    with as_on_a_gpu() as graphs:
        return decoder.generate(*work, batch_size=batch_size, **ends(tokenizer)), list(graphs)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_every_family_decodes_in_graphs(family, tokenizer, recwarn):
    work, decoder = job(family, tokenizer), SlotDecoder()
    ours, graphs = on_a_gpu(decoder, work, tokenizer)
    assert_same(ours, generate(*work, **ends(tokenizer)))
    assert graphs and sum(graph.replays for graph in graphs) > STEPS
    assert {graph.pool for graph in graphs} == {(0, 0)}  # one, made before any of them
    assert decoder.problem == "" and not [w for w in recwarn if "CUDA graphs" in str(w.message)]


def test_each_rollout_has_graphs_of_its_own(work, tokenizer):
    """As its cache is elsewhere, and the weights may be: at ZeRO 3 they are a copy."""
    decoder = SlotDecoder()
    for _ in range(3):
        ours, graphs = on_a_gpu(decoder, work, tokenizer)
        assert_same(ours, generate(*work, **ends(tokenizer)))
        assert graphs
        for parameter in work[0].parameters():
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("batch_size", [1, 5, 20])
@pytest.mark.parametrize("kind", ["greedy", "filtered", "short"])
@pytest.mark.parametrize("look_every", [5, 8])
def test_looking_seldom_changes_no_token(tokenizer, batch_size, kind, look_every, monkeypatch):
    monkeypatch.setattr(slots, "_LOOK_EVERY", look_every)
    monkeypatch.setattr(slots, "_WIDTH", 8)
    changes = {
        "greedy": {"temperature": 0.0},
        "filtered": {"top_k": 5, "top_p": 0.8},
        "short": {"max_new_tokens": 3},
    }[kind]
    work = job("gpt2", tokenizer, **changes)
    ours, _ = on_a_gpu(SlotDecoder(), work, tokenizer, batch_size)
    assert_same(ours, generate(*work, **ends(tokenizer)))


def test_between_looks_nobody_asks_the_gpu(work, tokenizer, monkeypatch):
    """As many questions as there are looks, beginnings and ends, and none per step."""
    questions = []
    monkeypatch.setattr(
        torch.Tensor, "__bool__", lambda x, plain=torch.Tensor.__bool__: questions.append(1) or plain(x)
    )
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x, plain=torch.Tensor.__int__: questions.append(1) or plain(x))
    steps, step = [], slots._Slots.step
    monkeypatch.setattr(slots._Slots, "step", lambda self: steps.append(len(questions)) or step(self))
    one = work[3].__class__(STEPS, 3.0, banned_ids=few_tokens(tokenizer, work[0].config.vocab_size, eos=False))
    on_a_gpu(SlotDecoder(), (*work[:3], one, work[4]), tokenizer, 20)
    for start in range(0, STEPS, 8):
        asked = {steps[number] - steps[start] for number in range(start + 3, start + 8)}
        assert len(asked) == 1, "a step asked the GPU"


def test_a_graph_that_gives_other_numbers_is_given_up(work, tokenizer, monkeypatch):
    replay = FakeGraph.replay

    def wrong(graph):
        replay(graph)
        graph.operations[-1][-1].sub_(1.0)  # the log-probabilities, which the last operation makes

    monkeypatch.setattr(FakeGraph, "replay", wrong)
    decoder = SlotDecoder()
    with pytest.warns(UserWarning, match="without CUDA graphs.*other numbers"):
        ours, graphs = on_a_gpu(decoder, work, tokenizer)
    assert_same(ours, generate(*work, **ends(tokenizer)))
    assert len(graphs) == 1 and "other numbers" in decoder.problem
    ours, graphs = on_a_gpu(decoder, work, tokenizer)
    assert_same(ours, generate(*work, **ends(tokenizer)))
    assert graphs == []


def test_a_model_that_asks_the_gpu_is_decoded_plainly_and_a_line_says_so(work, tokenizer):
    model, sampling = work[0], work[3]
    asks = model.model.layers[0].register_forward_pre_hook(lambda _, given: given if given[0].isnan().any() else None)
    with as_on_a_gpu(), pytest.warns(UserWarning, match="without CUDA graphs.*not permitted"):
        decoder, line = create_decoder(SLOTS, model, sampling, limit=1e-3, **ends(tokenizer))
    assert isinstance(decoder, SlotDecoder) and line.startswith("decoding without CUDA graphs: aten.")
    ours, graphs = on_a_gpu(decoder, work, tokenizer)
    asks.remove()
    assert graphs == []
    assert_same(ours, generate(*work, **ends(tokenizer)))


def test_the_start_up_check_is_made_with_graphs(work, tokenizer):
    with as_on_a_gpu() as graphs:
        decoder, line = create_decoder(SLOTS, work[0], work[3], limit=1e-3, **ends(tokenizer))
    assert isinstance(decoder, SlotDecoder) and line is None and sum(graph.replays for graph in graphs) > 2


def test_no_graph_outlives_a_rollout_that_fails(work, tokenizer, monkeypatch):
    decoder, calls, fill = SlotDecoder(), [], slots._Slots.fill

    def fails(self, *given):
        calls.append(len(decoder._steps))
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        fill(self, *given)

    monkeypatch.setattr(slots._Slots, "fill", fails)
    with pytest.raises(torch.OutOfMemoryError):
        on_a_gpu(decoder, work, tokenizer)
    assert calls[1] > 0 and decoder._steps == {} and decoder._graphs is None
