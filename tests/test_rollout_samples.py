"""Several answers to each prompt, batches of prompts, ranks: all sample what one row alone samples."""

from dschat.engine.distributed import Runtime
from dschat.functional import token_logprobs
from dschat.models.forward import response_logits
from dschat.rlhf.collect import Collector, roll_out
from dschat.rlhf.experience import sequences
from dschat.rlhf.rewards import CombinedReward
from dschat.rlhf.rlhf_engine import RLHFEngine
from dschat.rlhf.rollout import Rollout, Sampling, generate, generate_in_batches, row_uniforms
from tests.families import ragged_prompts, tiny_config, tiny_model
from tests.ppo_parts import CPU, ends, few_tokens

import pytest
import torch
import transformers

SIZES, STEPS, NUM = (3, 9, 6, 1), 12, 3


def few(model, tokenizer, steps: int = STEPS) -> Sampling:
    return Sampling(steps, 3.0, banned_ids=few_tokens(tokenizer, model.config.vocab_size))


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_model("llama", tokenizer)


@pytest.fixture(scope="module")
def sliding(tokenizer):
    """Attention over the last five tokens only, fewer than most prompts have; two key heads for four queries."""
    config = tiny_config("mistral", tokenizer)
    config.sliding_window = 5
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


def rows_of(rollout: Rollout) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


def sliding_or_tiny(family: str, tokenizer, sliding):
    return sliding if family == "sliding" else tiny_model(family, tokenizer)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "sliding"])
def test_several_answers_to_a_prompt_are_those_of_each_alone(family, tokenizer, sliding):
    """A row at a time, no padding, with the same random numbers; and what the trainer says of the same tokens."""
    model = sliding_or_tiny(family, tokenizer, sliding)
    ids, mask = ragged_prompts(tokenizer, SIZES)
    uniforms, sampling = row_uniforms(len(SIZES) * NUM, STEPS, 8), few(model, tokenizer)
    together = generate(model, ids, mask, sampling, uniforms, **ends(tokenizer))
    assert together.input_ids.shape == (len(SIZES) * NUM, max(SIZES))
    found = rows_of(together)
    assert len({len(row) for row in found}) >= 4 and len({tuple(row) for row in found}) > len(SIZES)
    for row in range(len(SIZES) * NUM):
        real = mask[row // NUM]
        prompt = ids[row // NUM, real][None]
        alone = generate(model, prompt, torch.ones_like(prompt).bool(), sampling, uniforms[[row]], **ends(tokenizer))
        assert found[row] == rows_of(alone)[0]
        assert together.finished[row] == alone.finished[0]
        assert together.input_ids[row].equal(ids[row // NUM]) and together.attention_mask[row].equal(real)
        actions = together.response_mask[row]
        assert (together.logprobs[row, actions] - alone.logprobs[0]).abs().max() < 1e-5
    with torch.no_grad():
        logits = response_logits(model, model, *sequences(together), together.response_ids.shape[1])
    trained = token_logprobs(logits, together.response_ids, **sampling.scored)
    assert (trained - together.logprobs)[together.response_mask].abs().max() < 1e-4


def calls_of(model, run) -> tuple[list[tuple[int, int]], Rollout]:
    """(rows, tokens) of every forward."""
    calls = []
    handle = model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    try:
        result = run()
    finally:
        handle.remove()
    return calls, result


def test_the_prompt_is_computed_once_for_all_its_answers(llama, tokenizer):
    ids, mask = ragged_prompts(tokenizer, SIZES)
    uniforms = row_uniforms(len(SIZES) * NUM, STEPS, 8)
    calls, rollout = calls_of(
        llama, lambda: generate(llama, ids, mask, few(llama, tokenizer), uniforms, **ends(tokenizer))
    )
    running = rollout.response_mask.sum(0).tolist()
    assert calls == [(len(SIZES), max(SIZES)), *[(rows, 1) for rows in running[1:]]]
    assert running[0] == len(SIZES) * NUM > running[-1]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_batches_of_prompts_change_nothing_and_hold_no_more(llama, tokenizer, batch_size, num_samples):
    ids, mask = ragged_prompts(tokenizer, SIZES)
    uniforms, sampling = row_uniforms(len(SIZES) * num_samples, STEPS, 8), few(llama, tokenizer)
    whole = generate(llama, ids, mask, sampling, uniforms, **ends(tokenizer))
    calls, parts = calls_of(
        llama,
        lambda: generate_in_batches(llama, ids, mask, sampling, uniforms, batch_size=batch_size, **ends(tokenizer)),
    )
    for name in ("input_ids", "attention_mask", "response_ids", "response_mask", "finished"):
        value = getattr(parts, name)
        assert value.equal(getattr(whole, name)) and value.dtype == getattr(whole, name).dtype, name
    assert (parts.logprobs - whole.logprobs).abs().max() < 1e-5
    assert max(rows for rows, _ in calls) <= batch_size * num_samples
    assert [rows for rows, tokens in calls if tokens == max(SIZES)] == [
        min(batch_size, len(SIZES) - start) for start in range(0, len(SIZES), batch_size)
    ]


# --- random numbers


def test_the_random_numbers_of_a_row_do_not_depend_on_the_number_of_ranks():
    whole = row_uniforms(12, 5, 3)
    assert whole.shape == (12, 5) and whole.dtype == torch.float32
    assert whole.equal(row_uniforms(12, 5, 3)) and not whole.equal(row_uniforms(12, 5, 4))
    assert len(set(whole.flatten().tolist())) == 60  # no row and no step repeats another
    assert row_uniforms(2, 2, 2**70 + 1).equal(row_uniforms(2, 2, 2**70 + 1))
    many = row_uniforms(1000, 100, 0)
    assert many.min() >= 0 and many.max() < 1 and many.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("world_size", "num_samples"), [(2, 1), (4, 1), (2, 3), (4, 2)])
def test_the_ranks_together_sample_what_one_rank_samples(llama, tokenizer, world_size, num_samples):
    """The roll-out of step 3, each rank with its prompts and no other; prompts come back interleaved, their answers
    as neighbours. So that the answers to a prompt are of its own random numbers, they are those of `generate`."""
    sizes = (*SIZES, 7, 4, 9, 2)
    ids, mask = ragged_prompts(tokenizer, sizes)
    rows = [{"prompt_ids": ids[r, mask[r]].tolist()} for r in range(len(sizes))]
    engine = RLHFEngine(llama, None, llama, llama)
    sampling = few(llama, tokenizer)

    def responses(rank, size):
        runtime = Runtime(rank, size, CPU)
        collector = Collector(engine, CombinedReward([]), tokenizer, sampling, runtime, 3, 4, "kl", num_samples)
        part = rows_of(roll_out(collector, rows[rank::size], 11))
        return [part[i : i + num_samples] for i in range(0, len(part), num_samples)]

    whole = responses(0, 1)
    uniforms = row_uniforms(len(sizes) * num_samples, STEPS, 11)
    plain = rows_of(generate(llama, ids, mask, sampling, uniforms, **ends(tokenizer)))
    assert [answer for group in whole for answer in group] == plain
    for rank in range(world_size):
        assert responses(rank, world_size) == whole[rank::world_size]
