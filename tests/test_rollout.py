"""The sampler: its tokens, its distribution and its log-probabilities against transformers and plain arithmetic."""

import math

from dschat.functional import token_logprobs
from dschat.rlhf.rollout import Sampling, banned_token_ids, draw, generate, row_uniforms
from tests.families import ragged_prompts, tiny_model
from tests.ppo_parts import ends, few_tokens

import pytest
import torch

SIZES = (3, 9, 6, 1, 7, 4, 9, 2)
STEPS = 14
LARGEST_BELOW_ONE = 1 - 2**-24  # of float32


def short_answers(tokenizer, model, *, steps: int = STEPS, temperature: float = 3.0, eos: bool = True) -> Sampling:
    return Sampling(steps, temperature, banned_ids=few_tokens(tokenizer, model.config.vocab_size, eos=eos))


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_model("llama", tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return ragged_prompts(tokenizer, SIZES)


@pytest.fixture(scope="module")
def rollout(llama, prompts, tokenizer):
    sampling = short_answers(tokenizer, llama)
    result = generate(llama, *prompts, sampling, row_uniforms(len(SIZES), STEPS, 5), **ends(tokenizer))
    lengths = result.response_mask.sum(1)
    assert 0 < result.finished.sum() < len(SIZES) and len(set(lengths.tolist())) >= 4  # or these tests prove little
    return result


# --- against transformers


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_decoding_is_that_of_transformers(family, tokenizer):
    model = tiny_model(family, tokenizer)
    # A head of its own: one tied to the embeddings, untrained, repeats the last token for ever.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    ids, mask = ragged_prompts(tokenizer, SIZES)
    banned = banned_token_ids(tokenizer, model.config.vocab_size)

    def theirs(eos_token_id):
        options = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": list(banned)}
        options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": eos_token_id, "bos_token_id": None}
        return model.generate(input_ids=ids, attention_mask=mask.long(), **options)[:, ids.shape[1] :]

    # As the end of an answer, the token that the rows reach after the most different numbers of steps.
    endless = theirs(None).tolist()
    starts = {token: {row.index(token) for row in endless if token in row} for row in endless for token in row}
    eos = max(sorted(starts), key=lambda token: len(starts[token]))
    assert len(starts[eos]) >= 3
    expected = theirs(eos)

    sampling = Sampling(STEPS, temperature=0.0, banned_ids=banned)
    uniforms = torch.full((len(SIZES), STEPS), 0.5)
    ours = generate(model, ids, mask, sampling, uniforms, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    assert ours.response_ids.tolist() == expected.tolist()
    assert tokenizer.batch_decode(ours.response_ids) == tokenizer.batch_decode(expected)
    assert ours.finished.tolist() == [eos in row for row in expected.tolist()]


def test_every_sampled_token_is_the_one_its_random_number_points_at(llama, prompts, rollout, tokenizer):
    """Token by token without a cache, one row at a time, no padding, cumulative sums in Python."""
    ids, mask = prompts
    uniforms = row_uniforms(len(SIZES), STEPS, 5).tolist()
    kept = sorted(set(range(llama.config.vocab_size)) - set(few_tokens(tokenizer, llama.config.vocab_size)))
    for row in range(len(SIZES)):
        sequence = ids[row, mask[row]].tolist()
        for step in range(STEPS):
            with torch.no_grad():
                logits = llama(input_ids=torch.tensor([sequence])).logits[0, -1].tolist()
            weights = [math.exp((logits[i] - max(logits)) / 3.0) for i in kept]
            below, chosen = 0.0, None
            for token, weight in zip(kept, weights, strict=True):
                below += weight / sum(weights)
                if chosen is None and below > uniforms[row][step]:
                    chosen, probability = token, weight / sum(weights)
            assert rollout.response_mask[row, step]
            assert rollout.response_ids[row, step] == chosen
            assert rollout.logprobs[row, step].item() == pytest.approx(math.log(probability), abs=1e-4)
            sequence.append(chosen)
            if chosen == tokenizer.eos_token_id:
                break
        assert rollout.response_mask[row].sum() == step + 1
        assert rollout.finished[row] == (chosen == tokenizer.eos_token_id)


# --- the distribution


def counts(probabilities, sampling: Sampling, num: int = 800, scale: float = 1.0) -> list[int]:
    """How often each token is drawn by `num` evenly spaced random numbers."""
    logits = torch.tensor(probabilities).log() * scale
    uniforms = (torch.arange(num) + 0.5) / num
    tokens, _ = draw(logits.expand(num, -1), sampling, uniforms)
    return torch.bincount(tokens, minlength=len(probabilities)).tolist()


def test_a_grid_of_random_numbers_reproduces_the_probabilities():
    assert counts([0.125, 0.25, 0.0, 0.5, 0.125], Sampling(1)) == [100, 200, 0, 400, 100]


def test_temperature_shapes_what_is_drawn_and_what_is_reported():
    p = [0.125, 0.25, 0.5, 0.125]
    assert counts(p, Sampling(1, temperature=0.25), scale=0.25) == [100, 200, 400, 100]
    # At temperature 0.5 probabilities are squared: 1, 4, 16, 1 over 22.
    assert counts(p, Sampling(1, temperature=0.5), num=2200) == [100, 400, 1600, 100]
    tokens, logprobs = draw(torch.tensor([p]).log(), Sampling(1, temperature=0.5), torch.tensor([0.5]))
    assert tokens.tolist() == [2] and logprobs.item() == pytest.approx(math.log(16 / 22))


def test_greedy_takes_the_likeliest_and_reports_its_log_probability_at_temperature_1():
    logits = torch.tensor([[0.125, 0.25, 0.5, 0.125]]).log()
    for uniform in (0.0, 0.5, LARGEST_BELOW_ONE):
        tokens, logprobs = draw(logits, Sampling(1, temperature=0.0), torch.tensor([uniform]))
        assert tokens.tolist() == [2] and logprobs.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 2}, [0, 300, 400, 0, 0]),
        ({"top_k": 1}, [0, 0, 700, 0, 0]),
        ({"top_k": 5}, [35, 210, 280, 70, 105]),
        ({"top_k": 9}, [35, 210, 280, 70, 105]),
        ({"top_p": 0.65}, [0, 300, 400, 0, 0]),  # 0.4 is not enough, 0.7 is
        ({"top_p": 0.39}, [0, 0, 700, 0, 0]),
        ({"top_p": 1e-9}, [0, 0, 700, 0, 0]),
        # 0.4, 0.3, 0.15 over their sum 0.85 are 0.471, 0.353, 0.176: two of these reach 0.8. Of the original
        # numbers three are needed.
        ({"top_k": 3, "top_p": 0.8}, [0, 300, 400, 0, 0]),
    ],
)
def test_top_k_and_top_p_keep_the_sets_computed_by_hand(options, expected):
    p = [0.05, 0.3, 0.4, 0.1, 0.15]
    found = counts(p, Sampling(1, **options), num=700)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1
    assert [a > 0 for a in found] == [b > 0 for b in expected]


def test_log_probabilities_are_of_the_whole_distribution_even_with_top_k():
    logits = torch.tensor([[0.05, 0.3, 0.4, 0.1, 0.15]]).log()
    tokens, logprobs = draw(logits, Sampling(1, top_k=2, top_p=0.9), torch.tensor([0.9]))
    assert tokens.tolist() == [2] and logprobs.item() == pytest.approx(math.log(0.4))


@pytest.mark.parametrize("uniform", [0.0, 1e-30, 0.5, LARGEST_BELOW_ONE, 1 - 2**-53])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_token_without_probability_is_never_drawn(uniform, temperature):
    """Neither at the ends of the vocabulary nor inside; the last number is 1 once it is rounded to float32."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 5000, generator=generator)
    banned = (0, 1, 7, 2500, *range(4900, 5000))
    logits[:, [2, 3, 4899]] = float("-inf")
    tokens, logprobs = draw(
        logits, Sampling(1, temperature, banned_ids=banned), torch.full((64,), uniform, dtype=torch.float64)
    )
    assert not set(tokens.tolist()) & {*banned, 2, 3, 4899}
    assert torch.isfinite(logprobs).all() and (logprobs <= 0).all()


def test_banned_tokens_have_probability_0_and_the_others_share_the_rest():
    logits = torch.tensor([[[0.125, 0.25, 0.5, 0.125]]]).log()
    ids = torch.arange(4)[:, None]
    for temperature in (0.0, 1.0):
        scored = Sampling(1, temperature, banned_ids=(2,)).scored
        shares = token_logprobs(logits.expand(4, 1, 4), ids, **scored).exp()
        assert shares.flatten().tolist() == pytest.approx([0.25, 0.5, 0.0, 0.25])
    squares = token_logprobs(logits.expand(4, 1, 4), ids, **Sampling(1, 0.5, banned_ids=(2,)).scored).exp()
    assert squares.flatten().tolist() == pytest.approx([1 / 6, 4 / 6, 0.0, 1 / 6])
    assert logits[0, 0, 2] == math.log(0.5)  # what came in is untouched


def test_pad_and_the_rows_beyond_the_tokenizer_are_banned(tokenizer):
    size = len(tokenizer)
    assert banned_token_ids(tokenizer, size) == (tokenizer.pad_token_id,)
    assert set(banned_token_ids(tokenizer, size + 3)) == {tokenizer.pad_token_id, size, size + 1, size + 2}
    assert tokenizer.eos_token_id not in banned_token_ids(tokenizer, size + 3)


# --- rows


def test_a_response_does_not_depend_on_the_rows_around_it(llama, prompts, rollout, tokenizer):
    ids, mask = prompts
    uniforms = row_uniforms(len(SIZES), STEPS, 5)
    sampling = short_answers(tokenizer, llama)
    for row, size in enumerate(SIZES):
        alone = generate(
            llama,
            ids[row : row + 1, -size:],
            mask[row : row + 1, -size:],
            sampling,
            uniforms[[row]],
            **ends(tokenizer),
        )
        actions = rollout.response_mask[row]
        assert alone.response_ids[0].tolist() == rollout.response_ids[row, actions].tolist()
        assert alone.finished[0] == rollout.finished[row]
        assert (alone.logprobs[0] - rollout.logprobs[row, actions]).abs().max() < 1e-5
    order = torch.tensor([5, 0, 7, 2, 6, 1, 3, 4])
    shuffled = generate(llama, ids[order], mask[order], sampling, uniforms[order], **ends(tokenizer))
    assert shuffled.response_ids.equal(rollout.response_ids[order])
    assert (shuffled.logprobs - rollout.logprobs[order]).abs().max() < 1e-5


def test_what_stands_under_the_prompts_padding_changes_nothing(llama, prompts, rollout, tokenizer):
    ids, mask = prompts
    garbage = torch.where(mask, ids, torch.randint(0, len(tokenizer), ids.shape))
    sampling = short_answers(tokenizer, llama)
    other = generate(llama, garbage, mask, sampling, row_uniforms(len(SIZES), STEPS, 5), **ends(tokenizer))
    assert other.response_ids.equal(rollout.response_ids)
    assert (other.logprobs - rollout.logprobs).abs().max() < 1e-5


def test_the_stop_contract(prompts, rollout, tokenizer):
    """finished: ended with EOS. The mask includes EOS and nothing after it; there pads stand. Prompts are kept."""
    ids, mask = prompts
    assert rollout.input_ids.equal(ids) and rollout.attention_mask.equal(mask)
    assert rollout.response_mask.dtype == rollout.finished.dtype == torch.bool
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for row in range(len(SIZES)):
        response = rollout.response_ids[row].tolist()
        size = response.index(eos) + 1 if eos in response else len(response)
        assert rollout.finished[row] == (eos in response)
        assert rollout.response_mask[row].tolist() == [i < size for i in range(len(response))]
        assert response[size:] == [pad] * (len(response) - size) and pad not in response[:size]
        assert (rollout.logprobs[row, size:] == 0).all() and (rollout.logprobs[row, :size] < 0).all()
    assert rollout.response_mask.any(0).all()  # no column without an action


def test_an_empty_answer_is_one_action(llama, prompts, tokenizer):
    banned = tuple(i for i in range(llama.config.vocab_size) if i != tokenizer.eos_token_id)
    sampling = Sampling(STEPS, banned_ids=banned)
    empty = generate(llama, *prompts, sampling, row_uniforms(len(SIZES), STEPS, 0), **ends(tokenizer))
    assert empty.response_ids.tolist() == [[tokenizer.eos_token_id]] * len(SIZES)
    assert empty.response_mask.all() and empty.finished.all() and (empty.logprobs == 0).all()


def test_without_eos_the_answer_is_cut_and_not_finished(llama, prompts, tokenizer):
    sampling = short_answers(tokenizer, llama, steps=3, eos=False)
    cut = generate(llama, *prompts, sampling, row_uniforms(len(SIZES), 3, 0), **ends(tokenizer))
    assert cut.response_ids.shape == (len(SIZES), 3) and cut.response_mask.all() and not cut.finished.any()
    assert tokenizer.eos_token_id not in cut.response_ids and tokenizer.pad_token_id not in cut.response_ids


def test_eos_as_the_very_last_token_counts_as_finished(llama, prompts, rollout, tokenizer):
    row = int(rollout.finished.nonzero()[0])
    size = int(rollout.response_mask[row].sum())
    ids, mask = (part[row : row + 1] for part in prompts)
    uniforms = row_uniforms(len(SIZES), STEPS, 5)[[row]]
    for steps, finished in ((size, True), (size - 1, False)):
        if steps:
            sampling = short_answers(tokenizer, llama, steps=steps)
            shorter = generate(llama, ids, mask, sampling, uniforms, **ends(tokenizer))
            assert shorter.finished.tolist() == [finished] and shorter.response_mask.tolist() == [[True] * steps]


def test_rows_that_have_ended_cost_nothing(llama, prompts, tokenizer):
    """One forward per step over the rows still running, of one new token each, one row of logits each."""
    calls = []

    def record(_, __, inputs):
        calls.append((*inputs["input_ids"].shape, inputs["logits_to_keep"]))

    handle = llama.register_forward_pre_hook(record, with_kwargs=True)
    try:
        sampling = short_answers(tokenizer, llama, steps=60)
        result = generate(llama, *prompts, sampling, row_uniforms(len(SIZES), 60, 5), **ends(tokenizer))
    finally:
        handle.remove()
    running = result.response_mask.sum(0).tolist()
    assert result.finished.all() and len(running) < 60  # so that stopping early is tested too
    assert [call[0] for call in calls] == running and running[-1] < running[0] == len(SIZES)
    assert [call[1] for call in calls] == [max(SIZES)] + [1] * (len(calls) - 1)
    assert {call[2] for call in calls} == {1}
