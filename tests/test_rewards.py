"""Reward sources: what the command line names, reward models, functions, their sum, and what is written of a NaN."""

import copy
import json
import math
import random

from dschat.data.templates import encode_prompt
from dschat.data.tokenizer import load_tokenizer, train_tokenizer
from dschat.engine.deepspeed_engine import create_frozen_model
from dschat.engine.distributed import init_runtime
from dschat.errors import UserError
from dschat.models.attention import use_fast_attention
from dschat.models.scorer import Scorer, score_token_ids
from dschat.rlhf.reward_sources import FullReward, FunctionReward, encode_response, same_encoding, span_mask
from dschat.rlhf.reward_specs import RewardSpec, parse_reward
from dschat.rlhf.rewards import CombinedReward, Judged, Samples, Scores, reward_metrics, write_repro
from tests.conftest import SENTENCES
from tests.families import count_tokens, tiny_config

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

CPU = torch.device("cpu")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def classifier(tokenizer, seed: int = 3, **changes):
    """A tiny plain Hugging Face reward model with dropout, so that training mode shows."""
    torch.manual_seed(seed)
    config = tiny_config("gpt2", tokenizer)
    config.num_labels, config.resid_pdrop = 1, 0.3
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


@torch.no_grad()
def plain_score(model, ids: list[int]) -> float:
    """What transformers itself says of one dialogue without padding."""
    return model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits.item()


def samples_of(tokenizer, answers: list[str], unfinished: tuple[int, ...] = ()) -> Samples:
    messages = [[{"role": "user", "content": SENTENCES[i % len(SENTENCES)]}] for i in range(len(answers))]
    prompts = [encode_prompt(tokenizer, turns) for turns in messages]
    token_ids = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = [] if row in unfinished else [tokenizer.eos_token_id]
        token_ids.append(prompt + tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + end)
    return Samples(
        prompts=[turns[0]["content"] for turns in messages],
        responses=[f" {answer}" for answer in answers],
        messages=messages,
        token_ids=token_ids,
        prompt_lens=[len(prompt) for prompt in prompts],
        finished=[row not in unfinished for row in range(len(answers))],
        records=[{"row": row} for row in range(len(answers))],
    )


ANSWERS = ["the answer is blue", "I do not know", "yes", "once upon a time there was a king who sat on a mat", "no"]


@pytest.fixture(scope="module")
def samples(tokenizer):
    made = samples_of(tokenizer, ANSWERS, unfinished=(1,))
    assert len({len(ids) for ids in made.token_ids}) >= 4  # ragged
    return made


@pytest.fixture(scope="module")
def other_tokenizer():
    """Another vocabulary, another template, whose end token is not the end of its turns."""
    made = train_tokenizer(["a different corpus altogether, the quick brown fox"] * 3, 280)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


# --- the command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full:output/reward", RewardSpec("full", "output/reward", 1.0)),
        ("0.5*full:out/reward", RewardSpec("full", "out/reward", 0.5)),
        ("-2 * lora:a b", RewardSpec("lora", "a b", -2.0)),
        ("1e-1*api:http://h:80/a*b", RewardSpec("api", "http://h:80/a*b", 0.1)),
        ("full:odd*name", RewardSpec("full", "odd*name", 1.0)),
        ("function:pack.age:judge", RewardSpec("function", "pack.age:judge", 1.0)),
        (" function:dir/my file.py:judge ", RewardSpec("function", "dir/my file.py:judge", 1.0)),
    ],
)
def test_a_source_is_read_from_the_command_line(text, expected):
    assert parse_reward(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "full", "full:", "best:path", "path/to/reward", "function:name", "function:file.py:", "function::name"]
    + ["function:file.py:not a name", "0*full:p", "-0.0*full:p", "nan*full:p", "inf*full:p", "x*full:p", "*full:p"]
    + ["2*", "0.5full:p", "2*3*full:p"],
)
def test_any_other_text_is_refused(text):
    with pytest.raises(UserError) as error:
        parse_reward(text)
    one_line(error, repr(text), "weight")


def test_the_refusal_names_what_is_accepted():
    with pytest.raises(UserError) as error:
        parse_reward("best:path")
    one_line(error, "full:PATH", "lora:PATH", "api:URL", "function:module:name", "file.py:name", "0.5*full:PATH")


# --- scoring token ids


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 50])
def test_padded_scores_are_those_of_transformers_one_by_one(tokenizer, samples, micro_batch_size):
    model = classifier(tokenizer)
    expected = [(plain_score(model, ids) - 0.25) / 2 for ids in samples.token_ids]
    scorer = Scorer(model, mean=0.25, std=2.0).train()
    scores = score_token_ids(scorer, samples.token_ids, tokenizer.pad_token_id, micro_batch_size, CPU)
    assert scores == pytest.approx(expected, abs=1e-6) and len(set(scores)) == len(scores)
    assert all(type(score) is float for score in scores)
    assert not any(module.training for module in scorer.modules())


class Spy(torch.nn.Module):
    """Records what it is called with; the value of a position is its token id."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, input_ids, attention_mask):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append((input_ids.tolist(), attention_mask.int().tolist()))
        return input_ids.float()


def test_rows_are_padded_on_the_right_to_the_longest_of_their_micro_batch():
    spy = Spy()
    assert score_token_ids(spy, [[5, 6], [7], [8, 9, 7, 5], [7, 7]], 7, 2, CPU) == [6.0, 7.0, 5.0, 7.0]
    assert spy.calls == [
        ([[5, 6], [7, 7]], [[1, 1], [1, 0]]),
        ([[8, 9, 7, 5], [7, 7, 7, 7]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
    ]
    assert score_token_ids(spy, [], 7, 2, CPU) == []
    with pytest.raises(ValueError, match="without tokens"):
        score_token_ids(spy, [[5], []], 7, 2, CPU)


# --- a reward model


def full(model, tokenizer, actor_tokenizer, micro_batch_size: int = 2) -> FullReward:
    scorer = model if not hasattr(model, "score") else Scorer(model)
    return FullReward(scorer, tokenizer, actor_tokenizer, micro_batch_size=micro_batch_size, device=CPU)


def test_with_the_actors_tokenizer_the_sampled_ids_are_scored_as_they_are(tokenizer, samples):
    """Also where they are not what the tokenizer would make of the text."""
    model = classifier(tokenizer)
    sampled = copy.deepcopy(samples)
    by_letter = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "yes"]
    sampled.token_ids[2] = sampled.token_ids[2][: sampled.prompt_lens[2]] + by_letter + [tokenizer.eos_token_id]
    source = full(model, copy.deepcopy(tokenizer), tokenizer)
    assert not source.reencodes and source.name == "full"
    judged = source(sampled)
    assert judged.scores == pytest.approx([plain_score(model, ids) for ids in sampled.token_ids], abs=1e-6)
    assert judged.masks == []


def test_answers_that_memory_has_no_room_for_are_scored_in_smaller_portions(tokenizer, samples, capsys):
    scorer = Scorer(classifier(tokenizer))
    source = FullReward(scorer, tokenizer, tokenizer, micro_batch_size=len(samples.token_ids), device=CPU)
    expected, sizes = source(samples).scores, []

    def limited(_, given):
        sizes.append(len(given[0]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError

    scorer.register_forward_pre_hook(limited)
    assert source(samples).scores == pytest.approx(expected, abs=1e-5)
    assert sizes[0] == len(samples.token_ids) and sizes[-len(samples.token_ids) :] == [1] * len(samples.token_ids)
    assert "out of memory" in capsys.readouterr().out


def test_a_prompt_is_computed_once_for_its_answers_in_a_micro_batch(tokenizer, samples):
    model, few = classifier(tokenizer), copy.deepcopy(samples)
    use_fast_attention(model)
    size, prompt = few.prompt_lens[0], few.token_ids[0][: few.prompt_lens[0]]
    for row in (2, 4):  # the first prompt's too
        few.token_ids[row] = prompt + [40 + row] + few.token_ids[row][few.prompt_lens[row] :]
        few.prompts[row], few.messages[row], few.prompt_lens[row] = few.prompts[0], few.messages[0], size
    expected = [plain_score(model, ids) for ids in few.token_ids]
    num_tokens, sizes = sum(map(len, few.token_ids)), count_tokens(model.base_model)
    assert full(model, tokenizer, tokenizer, 5)(few).scores == pytest.approx(expected, abs=1e-6)
    few.prompts[2] = few.prompts[4] = "another"  # they share it with each other, wherever that prompt is
    assert full(model, tokenizer, tokenizer, 5)(few).scores == pytest.approx(expected, abs=1e-6)
    assert sizes == [num_tokens - 2 * size, num_tokens - size]


def test_a_model_sharded_by_deepspeed_scores_the_same(tokenizer, samples):
    runtime = init_runtime(0)
    model = classifier(tokenizer)
    expected = [plain_score(model, ids) for ids in samples.token_ids]
    engine = create_frozen_model(Scorer(model), zero_stage=3, dtype=torch.float32, device=runtime.device)
    assert full(engine, tokenizer, tokenizer)(samples).scores == pytest.approx(expected, abs=1e-6)


def test_with_another_tokenizer_the_text_is_scored_by_the_models_own(tokenizer, other_tokenizer, samples):
    """The rendered text is spelled out here. The finished end in the model's end token, the unfinished do not."""
    model = classifier(other_tokenizer)
    source = full(model, other_tokenizer, tokenizer, micro_batch_size=3)
    assert source.reencodes
    expected = []
    for row, answer in enumerate(ANSWERS):
        text = f"<|im_start|>user\n{samples.prompts[row]}<|im_end|>\n<|im_start|>assistant\n{answer}"
        text += "<|im_end|>\n<|endoftext|>" if samples.finished[row] else ""
        expected.append(plain_score(model, other_tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert source(samples).scores == pytest.approx(expected, abs=1e-6)


def test_by_the_plain_template_too(other_tokenizer, tokenizer):
    """The actor speaks ChatML, the reward model does not."""
    model = classifier(tokenizer)
    samples = samples_of(other_tokenizer, ANSWERS, unfinished=(0,))
    expected = []
    for row, answer in enumerate(ANSWERS):
        text = f"\n\nHuman: {samples.prompts[row]}\n\nAssistant: {answer}" + ("<|endoftext|>" if row else "")
        expected.append(plain_score(model, tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert full(model, tokenizer, other_tokenizer)(samples).scores == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("response", ["", "yes", "yes\n", " a <|im_end|> b", "ends in <|endoftext|>", "half \ufffd"])
def test_an_unfinished_response_ends_with_its_text(tokenizer, other_tokenizer, response):
    messages = [{"role": "user", "content": "go on"}]
    for tok in (tokenizer, other_tokenizer):
        prompt = encode_prompt(tok, messages)
        whole, cut = (encode_response(tok, messages, response, finished) for finished in (True, False))
        assert whole[: len(cut)] == cut and cut[: len(prompt)] == prompt
        special = {tok.eos_token_id, tok.convert_tokens_to_ids("<|im_end|>")}
        assert whole[-1] == tok.eos_token_id and whole[len(prompt) :].count(tok.eos_token_id) == 1
        assert not special & set(cut[len(prompt) :])  # what the response spells is no end either
        text = tok.decode(cut[len(prompt) :])
        assert text.replace(" ", "") == response.strip().replace(" ", "")


def test_what_the_context_cannot_hold_loses_turns_and_then_its_score(tokenizer, other_tokenizer, samples):
    model = classifier(other_tokenizer)
    source = full(model, other_tokenizer, tokenizer, micro_batch_size=2)
    long = copy.deepcopy(samples)
    earlier = [{"role": "user", "content": "long " * 300}, {"role": "assistant", "content": "ok"}]
    long.messages[0] = earlier + long.messages[0]
    long.messages[3] = [{"role": "user", "content": "long " * 300}]
    short, found = source(samples).scores, source(long).scores
    assert found[3] is None
    assert [found[i] for i in (0, 1, 2, 4)] == pytest.approx([short[i] for i in (0, 1, 2, 4)], abs=1e-6)
    calls = []
    source.model.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    source(long)
    assert calls == [2, 2, 1]  # as many as on the other ranks
    limited = full(classifier(tokenizer, n_positions=24), tokenizer, tokenizer)
    scores = limited(samples).scores
    assert [score is None for score in scores] == [len(ids) > 24 for ids in samples.token_ids]
    assert 0 < sum(score is None for score in scores) < len(scores)


def permuted(tokenizer) -> PreTrainedTokenizerFast:
    """The same tokens and merges, the same size, two ids exchanged."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = backend["model"]["vocab"]
    a, b = "e", "t"  # in every text
    vocab[a], vocab[b] = vocab[b], vocab[a]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(backend)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )
    made.chat_template = tokenizer.chat_template
    return made


def test_tokenizers_are_compared_by_what_they_make_of_text(tokenizer, tmp_path):
    other = permuted(tokenizer)
    assert len(other) == len(tokenizer) and other.get_vocab().keys() == tokenizer.get_vocab().keys()
    assert not same_encoding(other, tokenizer)

    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert same_encoding(loaded, tokenizer)
    loaded.pad_token = loaded.eos_token
    loaded(["a b c", "a"], padding=True, truncation=True, max_length=2)  # leaves its mark in the backend
    loaded.padding_side = "left"
    assert same_encoding(loaded, tokenizer)

    changes = []
    for change in ("template", "eos", "token", "lower"):
        changed = load_tokenizer(str(tmp_path))
        if change == "template":
            changed.chat_template = CHATML
        elif change == "eos":
            changed.eos_token = "t"
        elif change == "token":
            changed.add_tokens(["quokka"])
        else:
            changed.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
        changes.append(same_encoding(changed, tokenizer))
    assert changes == [False] * 4


def test_a_permuted_vocabulary_gives_the_score_of_the_text(tokenizer, samples):
    """The size says nothing: without the comparison these ids would be scored as they are."""
    other = permuted(tokenizer)
    model = classifier(other)
    scores = full(model, other, tokenizer)(samples).scores
    texts = [tokenizer.decode(ids) for ids in samples.token_ids]
    ids = [other(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ids != samples.token_ids
    assert scores == pytest.approx([plain_score(model, row) for row in ids], abs=1e-6)


# --- character ranges


def test_the_tokens_of_a_span(tokenizer):
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (" the", " answer", " is", " blue")]
    assert [len(part) for part in ids] == [1, 1, 1, 1]
    ids = [part[0] for part in ids] + [tokenizer.eos_token_id]
    text = " the answer is blue"
    assert tokenizer.decode(ids[:-1]) == text
    start = text.index("answer")
    T, F = True, False
    assert span_mask(tokenizer, ids, []) == [T, T, T, T, T]
    assert span_mask(tokenizer, ids, [(start, start + 6)]) == [T, F, T, T, T]
    assert span_mask(tokenizer, ids, [(start + 2, start + 3)]) == [T, F, T, T, T]  # any overlap
    assert span_mask(tokenizer, ids, [(start + 2, start + 7)]) == [T, F, F, T, T]  # and the space of the next
    assert span_mask(tokenizer, ids, [(start - 1, start)]) == [T, F, T, T, T]
    assert span_mask(tokenizer, ids, [(start, start)]) == [T, T, T, T, T]
    assert span_mask(tokenizer, ids, [(0, 1), (15, 16)]) == [F, T, T, F, T]
    assert span_mask(tokenizer, ids, [(0, 4), (15, 16)]) == [F, T, T, F, T]  # the second token begins at 4
    assert span_mask(tokenizer, ids, [(0, len(text))]) == [F, F, F, F, T]
    assert span_mask(tokenizer, ids[:-1], [(0, len(text))]) == [F, F, F, F]  # unfinished: no end token
    # of the stripped text
    assert span_mask(tokenizer, ids, [(0, 3)], text.strip()) == [F, T, T, T, T]
    assert span_mask(tokenizer, ids, [(3, 4)], text.strip()) == [T, F, T, T, T]
    with pytest.raises(ValueError, match="not what its token ids decode to"):
        span_mask(tokenizer, ids, [(0, 1)], "something else")


def test_every_token_of_a_character_covers_it(tokenizer):
    text = "a\u20ac\U0001f600b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 1 + 3 + 4 + 1
    T, F = True, False
    assert span_mask(tokenizer, ids, [(1, 2)]) == [T, F, F, F, T, T, T, T, T]
    assert span_mask(tokenizer, ids, [(2, 3)]) == [T, T, T, T, F, F, F, F, T]
    assert span_mask(tokenizer, ids, [(3, 4)]) == [T] * 8 + [F]
    cut = [*ids[:3], tokenizer.eos_token_id]  # ended inside a character
    assert span_mask(tokenizer, cut, [(1, 2)]) == [T, F, F, T]


@given(st.text(alphabet="ab the\u00e9\u20ac", max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_spans_against_the_bytes_of_each_token(tokenizer, text, data):
    """The tokenizer is byte-level: the bytes that a token stands for are known without decoding a prefix."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = data.draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, len(text))), max_size=3))
    owners = [i for i, letter in enumerate(text) for _ in letter.encode()]  # byte -> character
    expected, done = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        covered = owners[done : done + len(token)]  # a byte is one letter of the token's name
        done += len(token)
        expected.append(not any(start <= letter < end for letter in covered for start, end in spans))
    assert span_mask(tokenizer, ids, spans) == expected


# --- functions


def function(tmp_path, body: str, tokenizer, name: str = "judge") -> FunctionReward:
    file = tmp_path / "mine.py"
    file.write_text(body, encoding="utf-8")
    return FunctionReward(f"{file}:{name}", tokenizer)


def test_a_function_gets_what_its_signature_names(tmp_path, tokenizer, samples):
    source = function(
        tmp_path,
        "def judge(responses, *, finished, records, unknown=1):\n"
        "    assert unknown == 1\n"
        "    scores = [len(r) if f else None for r, f in zip(responses, finished)]\n"
        "    records.clear()\n"
        "    return scores\n",
        tokenizer,
    )
    assert source.name == "function:judge"
    judged = source(samples)
    assert judged.scores == [
        float(len(r)) if f else None for r, f in zip(samples.responses, samples.finished, strict=True)
    ]
    assert None in judged.scores and all(type(s) in (float, type(None)) for s in judged.scores)
    assert len(samples.records) == len(ANSWERS)  # it cleared a list of its own


def test_with_kwargs_it_gets_everything(tmp_path, tokenizer, samples):
    source = function(
        tmp_path, "def judge(**given):\n    seen.update(given)\n    return [True] * 5\nseen = {}\n", tokenizer
    )
    assert source(samples).scores == [1.0] * 5
    seen = source.function.__globals__["seen"]
    assert seen.keys() == {"prompts", "responses", "token_ids", "finished", "messages", "records"}
    assert all(value == getattr(samples, name) for name, value in seen.items())


def test_a_module_of_the_working_directory(tmp_path, tokenizer, samples, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def judge(prompts):\n    return [0.5] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    source = FunctionReward("my_own_rewards:judge", tokenizer)
    assert source(samples).scores == [0.5] * 5


def test_nan_is_passed_on_and_spans_become_masks(tmp_path, tokenizer, samples):
    source = function(
        tmp_path,
        "def judge(responses):\n"
        "    return [float('nan'), {'score': 2}, {'score': None, 'masked': []},\n"
        "            {'score': -1.5, 'masked': [(1, 5), [6, 10]]}, float('-inf')]\n",
        tokenizer,
    )
    judged = source(samples)
    assert math.isnan(judged.scores[0]) and judged.scores[1:] == [2.0, None, -1.5, -math.inf]
    assert [mask is None for mask in judged.masks] == [True, True, True, False, True]
    assert samples.responses[3].startswith(" once upon")
    ids = samples.token_ids[3][samples.prompt_lens[3] :]
    kept = [i for i, counts in zip(ids, judged.masks[3], strict=True) if counts]
    assert tokenizer.decode(kept) == " a time there was a king who sat on a mat<|endoftext|>"


BAD_ANSWERS = {
    "return 3.0": ("returned float", "list"),
    "return (1.0,) * 5": ("returned tuple", "list"),
    "return None": ("returned NoneType", "list"),
    "return [1.0] * 4": ("4 scores for 5 responses",),
    "return []": ("0 scores for 5 responses",),
    "return [1.0, 'high'] + [1.0] * 3": ("returned str high for response 1", "float"),
    "return [1j] * 5": ("complex",),
    "return [{'value': 1.0}] * 5": ("'value'", "'score'"),
    "return [{'score': 1.0, 'mask': []}] * 5": ("'mask'", "'masked'"),
    "return [{'score': 'x'}] * 5": ("returned str x for response 0",),
    "return [{'score': 1.0, 'masked': [(0, 999)]}] * 5": ("(0, 999)", "response 0", "19"),
    "return [{'score': 1.0, 'masked': [(-1, 2)]}] * 5": ("(-1, 2)",),
    "return [{'score': 1.0, 'masked': [(3, 2)]}] * 5": ("(3, 2)",),
    "return [{'score': 1.0, 'masked': [(0, 1.5)]}] * 5": ("(0, 1.5)",),
    "return [{'score': 1.0, 'masked': (0, 1)}] * 5": ("(0, 1)", "pairs"),
    "return [{'score': 1.0, 'masked': 'abc'}] * 5": ("abc", "pairs"),
}


@pytest.mark.parametrize("body", BAD_ANSWERS)
def test_a_wrong_answer_is_named(tmp_path, tokenizer, samples, body):
    source = function(tmp_path, f"def judge(responses):\n    {body}\n", tokenizer)
    with pytest.raises(UserError) as error:
        source(samples)
    one_line(error, "mine.py:judge", *BAD_ANSWERS[body])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise ValueError('two\\nlines')", "raised ValueError: two lines (mine.py line 3)"),
        ("json.loads('{')", "(mine.py line 3)"),  # not the line of the library
        ("raise SystemExit(0)", "raised SystemExit: 0 (mine.py line 3)"),
    ],
)
def test_a_function_that_raises_is_told_with_its_line(tmp_path, tokenizer, samples, body, told):
    source = function(tmp_path, f"import json\ndef judge(responses):\n    {body}\n", tokenizer)
    with pytest.raises(UserError) as error:
        source(samples)
    one_line(error, "mine.py:judge", told)


@pytest.mark.parametrize(
    ("body", "name", "parts"),
    [
        ("def judge(x): pass", "other", ("no function other", "judge")),
        ("judge = 3", "judge", ("no function judge", "none")),
        ("def judge(responses, tests): pass", "judge", ("argument tests", "records")),
        ("def judge(responses, /): pass", "judge", ("argument responses",)),
        (
            "import no_such_module_at_all\ndef judge(): pass",
            "judge",
            ("cannot be imported", "line 1", "no_such_module"),
        ),
        ("def judge(:", "judge", ("cannot be imported", "SyntaxError", "mine.py line 1")),
        ("import sys; sys.exit(0)", "judge", ("cannot be imported", "SystemExit")),
    ],
)
def test_a_missing_or_unsuitable_function_is_refused_at_the_start(tmp_path, tokenizer, body, name, parts):
    with pytest.raises(UserError) as error:
        function(tmp_path, body, tokenizer, name)
    one_line(error, "mine.py", *parts)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("no/such/file.py:judge", ("no such file",)),
        ("no_such_module_at_all:judge", ("cannot be imported", "No module named")),
        ("math:judge", ("no function judge",)),
    ],
)
def test_a_missing_file_or_module_is_refused_at_the_start(tokenizer, target, parts):
    with pytest.raises(UserError) as error:
        FunctionReward(target, tokenizer)
    one_line(error, f"function {target}", *parts)


# --- several sources


class Fixed:
    def __init__(self, name: str, scores: list, masks: list | None = None):
        self.name, self.judged = name, Judged(scores, masks or [])

    def __call__(self, samples: Samples) -> Judged:
        return self.judged


def test_the_weighted_sum_and_what_has_no_score(samples):
    one = Fixed("full", [1.0, 2.0, None, math.nan, 5.0])
    two = Fixed("function:f", [10.0, None, 3.0, None, -math.inf])
    scores = CombinedReward([(one, 0.5), (two, -2.0)])(samples)
    assert scores.total.dtype == torch.float32 and scores.counts.dtype == torch.bool
    assert scores.total.tolist() == [0.5 - 20.0, 0.0, 0.0, 0.0, math.inf]
    assert scores.counts.tolist() == [True, False, False, False, True]
    assert scores.by_source == {"full": one.judged.scores, "function:f": two.judged.scores}
    assert scores.masks == [None] * 5


def test_names_are_unique_and_sources_are_asked_in_order(samples):
    asked = []

    class Counted(Fixed):
        def __call__(self, samples):
            asked.append(self.judged.scores[0])
            return super().__call__(samples)

    kinds = ["full", "api", "full", "full", "api"]
    combined = CombinedReward([(Counted(kind, [float(i)] * 5), 10.0**i) for i, kind in enumerate(kinds)])
    scores = combined(samples)
    assert [*scores.by_source] == ["full", "api", "full#2", "full#3", "api#2"]
    assert asked == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert scores.total.tolist() == [43210.0] * 5


def test_the_masks_of_all_sources_hold(samples):
    sizes = [len(ids) - size for ids, size in zip(samples.token_ids, samples.prompt_lens, strict=True)]
    generator = random.Random(0)
    masks = [[[generator.random() < 0.5 for _ in range(size)] for size in sizes] for _ in range(2)]
    masks[0][1] = masks[1][1] = masks[0][2] = masks[1][3] = None
    sources = [Fixed("a", [1.0] * 5, masks[0]), Fixed("b", [1.0] * 5), Fixed("c", [1.0] * 5, masks[1])]
    found = CombinedReward([(source, 1.0) for source in sources])(samples).masks
    assert found[1] is None and found[2] == masks[1][2] and found[3] == masks[0][3]
    expected = [masks[0][0][i] and masks[1][0][i] for i in range(sizes[0])]
    assert found[0] == expected and expected not in (masks[0][0], masks[1][0])


def test_a_source_that_does_not_answer_for_each_response_is_named(samples):
    sizes = [len(ids) - size for ids, size in zip(samples.token_ids, samples.prompt_lens, strict=True)]
    good = Fixed("full", [1.0] * 5)
    cases = [
        (Fixed("full", [1.0] * 4), "full#2 gave 4 scores for 5 responses"),
        (Fixed("api", [1.0] * 5, [None] * 6), "api gave 6 masks for 5 responses"),
        (Fixed("api", [1.0] * 5, [None, [True] * (sizes[1] + 1), None, None, None]), f"{sizes[1] + 1} for response 1"),
    ]
    for bad, told in cases:
        with pytest.raises(UserError) as error:
            CombinedReward([(good, 1.0), (bad, 1.0)])(samples)
        one_line(error, told)


def test_metrics_by_hand():
    found = reward_metrics(
        {"a": [1.0, None, 3.0, 5.0, math.nan, -math.inf, None, None], "b": [None, math.nan], "c": []}
    )
    assert found == {
        "rewards/a/none_fraction": 3 / 8,
        "rewards/a/score_mean": 3.0,
        "rewards/a/score_std": pytest.approx(math.sqrt(8 / 3)),
        "rewards/b/none_fraction": 0.5,
        "rewards/c/none_fraction": 0.0,
    }
    assert all(type(value) is float for value in found.values())


def test_scores_that_are_not_finite_are_written_down(tmp_path, samples):
    by_source = {"full": [1.0, math.nan, 2.0, math.inf, None], "api": [1.0, 1.0, 1.0, None, 4.0]}
    totals = torch.tensor([2.0, math.nan, math.inf, 0.0, 0.0])  # the third: too large for float32 only as a sum
    scores = Scores(totals, torch.ones(5, dtype=torch.bool), by_source, [None] * 5)
    path = write_repro(str(tmp_path / "out"), 12, samples, scores)
    assert path == tmp_path / "out" / "repro" / "step_000012.json"
    assert [file.name for file in path.parent.iterdir()] == ["step_000012.json"]  # nothing half written beside it
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["step"] == 12
    assert [row["scores"] for row in found["rows"]] == [
        {"full": "nan", "api": "1.0"},
        {"full": "2.0", "api": "1.0"},
        {"full": "inf", "api": "None"},
    ]
    assert [row["total"] for row in found["rows"]] == ["nan", "inf", "0.0"]
    for row, number in zip(found["rows"], (1, 2, 3), strict=True):
        for key, values in (
            ("prompt", samples.prompts),
            ("response", samples.responses),
            ("finished", samples.finished),
        ):
            assert row[key] == values[number]
        assert row["token_ids"] == samples.token_ids[number] and row["messages"] == samples.messages[number]


def test_an_old_record_stays_whole_when_writing_fails(tmp_path, samples, monkeypatch):
    bad = Scores(torch.full((5,), math.nan), torch.ones(5, dtype=torch.bool), {"full": [math.nan] * 5}, [None] * 5)
    path = write_repro(str(tmp_path), 1, samples, bad)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    samples = copy.deepcopy(samples)
    samples.responses[0] = "changed"
    with pytest.raises(UserError) as error:
        write_repro(str(tmp_path), 1, samples, bad)
    one_line(error, str(path), "No space left on device", "--output_dir")
    assert path.read_bytes() == before
