"""The rollout engine: the tokens of the plain loop, whatever is in its slots, from the weights as they are."""

import threading
from contextlib import contextmanager

import dschat.rlhf.slots as module
from dschat.functional import token_logprobs
from dschat.models.attention import use_fast_attention
from dschat.models.forward import response_logits
from dschat.rlhf import decode_step
from dschat.rlhf.experience import sequences
from dschat.rlhf.rollout import Rollout, Sampling, generate, row_uniforms
from dschat.rlhf.rollout_engine import SLOTS, create_decoder, why_not_slots
from dschat.rlhf.slots import SlotDecoder
from dschat.rlhf.specs import HF
from tests.families import FAMILIES, ragged_prompts, tiny_config, tiny_model
from tests.ppo_parts import ends, few_tokens

import pytest
import torch
import transformers

SIZES, STEPS = (3, 9, 6, 1, 7, 4, 9, 2), 12


def fast_model(family, tokenizer):
    model = tiny_model(family, tokenizer)
    use_fast_attention(model)
    return model


@pytest.fixture
def llama(tokenizer):
    return fast_model("llama", tokenizer)


def few(model, tokenizer, **changes) -> Sampling:
    given = {"max_new_tokens": STEPS, "temperature": 3.0} | changes
    return Sampling(**given, banned_ids=few_tokens(tokenizer, model.config.vocab_size))


def assert_same(ours: Rollout, plain: Rollout) -> None:
    for name in ("input_ids", "attention_mask", "response_ids", "response_mask", "finished"):
        value = getattr(ours, name)
        assert value.equal(getattr(plain, name)) and value.dtype == getattr(plain, name).dtype, name
    assert ours.logprobs.dtype == torch.float32 and (ours.logprobs - plain.logprobs).abs().max() < 1e-5


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    with number_of_threads(request.param):
        yield request.param
        assert torch.get_num_threads() == request.param


@pytest.fixture
def one_thread():
    with number_of_threads(1):
        yield


@contextmanager
def number_of_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])
def test_every_family_samples_the_tokens_of_the_plain_loop(family, tokenizer):
    """Ragged prompts, three answers to each, fewer slots than answers; and the trainer says the same of them."""
    model = fast_model(family, tokenizer)
    assert why_not_slots(model) is None
    ids, mask = ragged_prompts(tokenizer, SIZES)
    uniforms, sampling = row_uniforms(len(SIZES) * 3, STEPS, 8), few(model, tokenizer)
    plain = generate(model, ids, mask, sampling, uniforms, **ends(tokenizer))
    assert len(set(plain.response_mask.sum(1).tolist())) > 3
    ours = SlotDecoder().generate(model, ids, mask, sampling, uniforms, batch_size=3, **ends(tokenizer))
    assert_same(ours, plain)
    with torch.no_grad():
        logits = response_logits(model, model, *sequences(ours), ours.response_ids.shape[1])
    trained = token_logprobs(logits, ours.response_ids, **sampling.scored)
    assert (trained - ours.logprobs)[ours.response_mask].abs().max() < 1e-4


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 20])
@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("kind", ["greedy", "filtered", "no_end"])
def test_any_number_of_slots_gives_the_same_tokens(llama, tokenizer, threads, batch_size, num_samples, kind):
    ids, mask = ragged_prompts(tokenizer, SIZES)
    sampling = {
        "greedy": few(llama, tokenizer, temperature=0.0),
        "filtered": few(llama, tokenizer, top_k=5, top_p=0.8),
        "no_end": Sampling(STEPS, 3.0, banned_ids=few_tokens(tokenizer, llama.config.vocab_size, eos=False)),
    }[kind]
    uniforms = row_uniforms(len(SIZES) * num_samples, STEPS, 2)
    plain = generate(llama, ids, mask, sampling, uniforms, **ends(tokenizer))
    decoder = SlotDecoder()
    for _ in range(2):  # the second time with steps that are recorded
        assert_same(
            decoder.generate(llama, ids, mask, sampling, uniforms, batch_size=batch_size, **ends(tokenizer)), plain
        )


def test_one_prompt_of_one_token_and_one_step(llama, tokenizer):
    ids = torch.tensor([[7]])
    sampling, uniforms = few(llama, tokenizer, max_new_tokens=1), row_uniforms(1, 1, 0)
    plain = generate(llama, ids, torch.ones_like(ids), sampling, uniforms, **ends(tokenizer))
    assert_same(
        SlotDecoder().generate(llama, ids, torch.ones_like(ids), sampling, uniforms, batch_size=1, **ends(tokenizer)),
        plain,
    )


def test_the_weights_are_those_of_the_moment(llama, tokenizer):
    """Changed where they are, as an optimizer does; then put elsewhere, as loading a checkpoint may do."""
    ids, mask = ragged_prompts(tokenizer, SIZES)
    uniforms, sampling, decoder = row_uniforms(len(SIZES), STEPS, 8), few(llama, tokenizer), SlotDecoder()
    seen = []
    for change in ("none", "in place", "elsewhere"):
        for number, parameter in enumerate(llama.parameters()):
            noise = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            if change == "in place":
                parameter.data.add_(noise)
            elif change == "elsewhere":
                parameter.data = parameter.data - 2 * noise
        ours = decoder.generate(llama, ids, mask, sampling, uniforms, batch_size=8, **ends(tokenizer))
        assert_same(ours, generate(llama, ids, mask, sampling, uniforms, **ends(tokenizer)))
        seen.append(ours.response_ids.tolist())
    assert seen[0] != seen[1] != seen[2]
    assert all(parameter.requires_grad for parameter in llama.parameters())


def recorded(decoder, monkeypatch) -> list[tuple[int, int]]:
    """(slots, columns of the cache) of every step."""
    found, step = [], decoder.step

    def counted(model, sampling, inputs):
        found.append((inputs[3].shape[0], inputs[3].shape[2]))
        return step(model, sampling, inputs)

    monkeypatch.setattr(decoder, "step", counted)
    return found


def test_what_is_finished_costs_nothing(llama, tokenizer, one_thread, monkeypatch):
    """Slots are refilled while prompts wait and become fewer then; the cache is read as far as it is filled."""
    monkeypatch.setattr(module, "_WIDTH", 8)
    ids, mask = ragged_prompts(tokenizer, SIZES * 4)
    uniforms, sampling, decoder = row_uniforms(32, STEPS, 8), few(llama, tokenizer), SlotDecoder()
    steps = recorded(decoder, monkeypatch)
    ours = decoder.generate(llama, ids, mask, sampling, uniforms, batch_size=4, **ends(tokenizer))
    tokens = int(ours.response_mask.sum())
    whole_batches = sum(4 * int(part.sum(1).max()) for part in ours.response_mask.split(4))
    assert tokens <= sum(slots for slots, _ in steps) < 0.9 * whole_batches
    assert {slots for slots, _ in steps} >= {4, 1} and {width for _, width in steps} >= {8, 16}
    assert max(width for _, width in steps) <= 24


def test_a_prompt_is_computed_once_for_all_its_answers(llama, tokenizer, one_thread):
    ids, mask = ragged_prompts(tokenizer, (5, 5))
    decoder, uniforms = SlotDecoder(), row_uniforms(6, STEPS, 8)
    given = (llama, ids, mask, few(llama, tokenizer), uniforms)
    decoder.generate(*given, batch_size=2, **ends(tokenizer))
    shapes = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decoder.generate(*given, batch_size=2, **ends(tokenizer))
    hook.remove()
    assert shapes == [(2, 4)]


# --- what cannot be decoded so


def test_models_that_need_the_plain_loop_say_why(tokenizer):
    assert why_not_slots(tiny_model("llama", tokenizer)) == "its attention is sdpa"
    assert why_not_slots(fast_model("bloom", tokenizer)) == "its attention is eager"
    config = tiny_config("mistral", tokenizer)
    config.sliding_window = 5
    sliding = transformers.AutoModelForCausalLM.from_config(config).eval()
    use_fast_attention(sliding)
    assert why_not_slots(sliding) == "some of its layers do not attend to all that came before"


def created(name, model, tokenizer, limit=1e-3):
    return create_decoder(name, model, few(model, tokenizer), limit=limit, **ends(tokenizer))


def test_create_decoder_takes_the_engine_that_agrees_with_the_model(llama, tokenizer, monkeypatch):
    decoder, line = created(SLOTS, llama, tokenizer)
    assert isinstance(decoder, SlotDecoder) and line is None
    assert created(HF, llama, tokenizer) == (None, None)
    decoder, line = created(SLOTS, tiny_model("llama", tokenizer), tokenizer)
    assert decoder is None and line == "rollout engine hf in place of slots: its attention is sdpa"

    def late(self, keys, values, where):
        plain(self, keys, values, (where[0], where[1], (where[2] - 1).clamp(min=0)))

    plain = decode_step._SlotLayer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(decode_step._SlotLayer, "__init__", late)
        decoder, line = created(SLOTS, llama, tokenizer)
    assert decoder is None and "nats away from a forward of the model" in line
    with monkeypatch.context() as patch:
        patch.setattr(module, "traced", lambda *_: 1 / 0)
        decoder, line = created(SLOTS, llama, tokenizer)
    assert decoder is None and line == "rollout engine hf in place of slots: division by zero"


def test_a_sampler_that_disagrees_with_the_model_ends_the_run(llama, tokenizer):
    """Not even the plain loop is within minus one nat."""
    with pytest.raises(RuntimeError, match="nats away from a forward"):
        created(HF, llama, tokenizer, limit=-1.0)


def test_a_recording_that_gives_other_numbers_is_refused(llama, tokenizer, monkeypatch):
    trace = torch.jit.trace

    def wrong(step, inputs, **options):
        traced = trace(step, inputs, **options)
        return lambda *given: (traced(*given)[0] + 1, traced(*given)[1])

    monkeypatch.setattr(torch.jit, "trace", wrong)
    decoder, line = created(SLOTS, llama, tokenizer)
    assert decoder is None and "gives other numbers than the model" in line


def test_what_a_thread_raises_reaches_the_caller(llama, tokenizer, threads, monkeypatch):
    def broken(*_):
        raise ValueError(threading.current_thread().name)

    monkeypatch.setattr(module._Slots, "fill", broken)
    ids, mask = ragged_prompts(tokenizer, SIZES)
    with pytest.raises(ValueError, match="MainThread" if threads == 1 else "ThreadPoolExecutor"):
        SlotDecoder().generate(
            llama, ids, mask, few(llama, tokenizer), row_uniforms(8, STEPS, 8), batch_size=8, **ends(tokenizer)
        )
