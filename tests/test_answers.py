"""Answers to dialogues: how they are made, the best of several, who judges them."""

import itertools
import json
import random
import statistics

from dschat.data import toy
from dschat.data.templates import encode_prompt
from dschat.data.tokenizer import train_tokenizer
from dschat.errors import UserError
from dschat.models.load import load_scorer, save_model
from dschat.models.lora import LoraSpec, add_lora, save_adapter
from dschat.models.scorer import Scorer, save_score_stats
from dschat.rlhf import answers, judges
from dschat.rlhf.answers import AnswerSpec, beam_answers, best_of, num_tokens, prompt_rows, sample_answers
from dschat.rlhf.judges import check_judge, create_judge, judge_spec
from dschat.rlhf.rewards import Samples
from dschat.rlhf.rollout import Sampling, banned_token_ids, draw, row_uniforms
from dschat.rlhf.specs import DECODINGS
from tests.conftest import SENTENCES
from tests.dialogues import user
from tests.families import tiny_config, tiny_model
from tests.ppo_parts import few_tokens, tiny_scorer

import pytest
import torch
import transformers

STEPS = 10
FP32, CPU = torch.float32, torch.device("cpu")
ON = {"dtype": FP32, "device": CPU, "batch_size": 3}


DIALOGUES = [user(text) for text in SENTENCES[:5]] + [user("hello", "yes?", SENTENCES[5])]


@pytest.fixture(scope="module")
def other_tokenizer():
    return train_tokenizer([f"Human and Assistant talk about {sentence}" for sentence in SENTENCES], 330)


@pytest.fixture(scope="module")
def llama(tokenizer):
    """Its end token is likely enough that some answers end and some do not."""
    model = tiny_model("llama", tokenizer)
    torch.manual_seed(3)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model


@pytest.fixture(scope="module")
def rows(tokenizer):
    return prompt_rows(tokenizer, DIALOGUES)


def few(tokenizer, model, steps=STEPS, temperature=3.0):
    return Sampling(steps, temperature, banned_ids=few_tokens(tokenizer, model.config.vocab_size))


def responses_of(samples):
    return [ids[size:] for ids, size in zip(samples.token_ids, samples.prompt_lens, strict=True)]


def theirs(model, tokenizer, dialogue, banned, **options):
    """Hugging Face's answer to one dialogue alone, without padding."""
    ids = torch.tensor([encode_prompt(tokenizer, dialogue)])
    options |= {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": list(banned), "bos_token_id": None}
    options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def ending_model(family, tokenizer, banned, **options):
    """A model whose answers to DIALOGUES partly end: of a few random heads the first."""
    for seed in range(30):
        model = tiny_model(family, tokenizer)
        generator = torch.Generator().manual_seed(seed)
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator))
        ended = [
            tokenizer.eos_token_id in theirs(model, tokenizer, dialogue, banned, **options) for dialogue in DIALOGUES
        ]
        if 1 < sum(ended) < len(ended):
            return model
    raise AssertionError("no such head")


# ---- making answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_is_that_of_transformers_token_for_token(family, tokenizer, rows):
    banned = few_tokens(tokenizer, len(tokenizer))
    model = ending_model(family, tokenizer, banned)
    expected = [theirs(model, tokenizer, dialogue, banned) for dialogue in DIALOGUES]
    samples = sample_answers(model, tokenizer, rows, Sampling(STEPS, 0.0, banned_ids=banned), 1, batch_size=4)
    assert responses_of(samples) == expected
    assert samples.finished == [tokenizer.eos_token_id in ids for ids in expected]
    assert num_tokens(samples) == [len(ids) for ids in expected]
    assert samples.responses == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert samples.messages == DIALOGUES
    assert samples.prompts[0] == SENTENCES[0] and samples.prompts[5].startswith("user: hello\nassistant: yes?\nuser: ")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_beam_search_is_that_of_transformers_and_of_nothing_the_model_brings(family, tokenizer, rows, monkeypatch):
    banned = few_tokens(tokenizer, len(tokenizer))
    monkeypatch.setattr(answers, "banned_token_ids", lambda *_: banned)
    model = ending_model(family, tokenizer, banned, num_beams=3)
    expected = [theirs(model, tokenizer, dialogue, banned, num_beams=3) for dialogue in DIALOGUES]
    greedy = [theirs(model, tokenizer, dialogue, banned) for dialogue in DIALOGUES]
    assert expected != greedy
    own = transformers.GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, length_penalty=-5.0, top_k=1)
    model.generation_config = own
    for batch_size in (1, 9, 100):  # 1, 3 and all prompts at once
        samples = beam_answers(model, tokenizer, rows, STEPS, 3, batch_size=batch_size)
        assert responses_of(samples) == expected
        assert samples.finished == [tokenizer.eos_token_id in ids for ids in expected]
    assert model.generation_config is own and 0 < sum(samples.finished) < len(rows)


def test_a_beam_that_holds_everything_finds_the_best_mean_log_probability(tokenizer, llama, rows, monkeypatch):
    """All sequences of up to three of two tokens and the end token, scored one by one."""
    eos, steps = tokenizer.eos_token_id, 3
    kept = [20, 31, eos]
    banned = tuple(set(range(len(tokenizer))) - set(kept))
    monkeypatch.setattr(answers, "banned_token_ids", lambda *_: banned)
    found = responses_of(beam_answers(llama, tokenizer, rows, steps, 8, batch_size=24))

    def mean_logprob(prompt, response):
        with torch.no_grad():
            logits = llama(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(response)), response].mean().item()

    ways = [[*start, eos] for size in range(steps) for start in itertools.product(kept[:2], repeat=size)]
    ways += [list(way) for way in itertools.product(kept[:2], repeat=steps)]
    for row, response in zip(rows, found, strict=True):
        scores = {tuple(way): mean_logprob(row["prompt_ids"], way) for way in ways}
        assert scores[tuple(response)] == pytest.approx(max(scores.values()), abs=1e-5)


def test_the_same_seed_gives_the_same_answers_in_any_portions(tokenizer, llama, rows):
    sampling = few(tokenizer, llama)
    whole = sample_answers(llama, tokenizer, rows, sampling, 7, num_samples=3, batch_size=100)
    for batch_size in (1, 4, 6):
        assert sample_answers(llama, tokenizer, rows, sampling, 7, num_samples=3, batch_size=batch_size) == whole
    assert sample_answers(llama, tokenizer, rows, sampling, 8, num_samples=3).token_ids != whole.token_ids
    assert len({tuple(ids) for ids in responses_of(whole)}) > 12 and 0 < sum(whole.finished) < 18


def test_every_sampled_token_is_drawn_with_the_number_of_its_place(tokenizer, llama, rows):
    """Without a cache, padding or batch: `draw` on the logits of the sequence so far."""
    sampling = few(tokenizer, llama)
    samples = sample_answers(llama, tokenizer, rows, sampling, 7, num_samples=2, batch_size=4)
    uniforms = row_uniforms(2 * len(rows), STEPS, 7)
    for i, response in enumerate(responses_of(samples)):
        ids = list(rows[i // 2]["prompt_ids"])
        assert samples.token_ids[i][: samples.prompt_lens[i]] == ids and samples.messages[i] == DIALOGUES[i // 2]
        for step, token in enumerate(response):
            with torch.no_grad():
                logits = llama(torch.tensor([ids])).logits[:, -1]
            assert draw(logits, sampling, uniforms[i : i + 1, step])[0].item() == token
            ids.append(token)


def test_padding_and_rows_without_a_token_are_never_said(tokenizer, rows):
    torch.manual_seed(0)
    config = tiny_config("llama", tokenizer)
    config.vocab_size += 8  # as models are, whose embedding is a multiple of something
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    likely = [tokenizer.pad_token_id, *range(len(tokenizer), config.vocab_size)]
    model.lm_head.weight.data[likely] = 50 * torch.sign(torch.randn(len(likely), 32))  # or minus that, whichever
    banned = set(banned_token_ids(tokenizer, config.vocab_size))
    assert banned == set(likely)
    with torch.no_grad():
        first = model(torch.tensor([rows[0]["prompt_ids"]])).logits[0, -1].argmax().item()
    assert first in banned
    for samples in (
        sample_answers(model, tokenizer, rows, Sampling(STEPS, 0.0), 1),
        sample_answers(model, tokenizer, rows, Sampling(STEPS), 1),
        beam_answers(model, tokenizer, rows, STEPS, 2),
    ):
        assert not banned & {token for response in responses_of(samples) for token in response}


def test_answers_are_made_without_dropout_whatever_mode_the_model_is_in(tokenizer):
    model = tiny_model("gpt2", tokenizer).train()
    rows = prompt_rows(tokenizer, DIALOGUES)
    sampling = few(tokenizer, model)
    first, second = (sample_answers(model.train(), tokenizer, rows, sampling, 1) for _ in range(2))
    assert first == second and not model.training


def test_records_go_to_the_judges_and_progress_is_shown(tokenizer, llama):
    records = [json.dumps({"number": i}) for i in range(len(DIALOGUES))]
    seen = []

    def track(batches):
        for batch in batches:
            seen.append([row["record"] for row in batch])
            yield batch

    rows = prompt_rows(tokenizer, DIALOGUES, records)
    samples = sample_answers(llama, tokenizer, rows, Sampling(2), 1, num_samples=2, batch_size=8, track=track)
    assert [record["number"] for record in samples.records] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert seen == [records[:4], records[4:]]
    beam_answers(llama, tokenizer, rows, 2, 2, batch_size=8, track=track)
    assert seen[2:] == seen[:2]
    with pytest.raises(ValueError):
        prompt_rows(tokenizer, DIALOGUES, records[:-1])


def test_no_prompts_give_no_answers(tokenizer, llama):
    samples = sample_answers(llama, tokenizer, [], Sampling(3), 1, num_samples=2)
    assert len(samples) == 0 and samples.token_ids == []
    assert best_of(samples, [], 2)[1] == []


def test_each_decoding_is_what_it_is_called(tokenizer, llama, rows):
    spec = AnswerSpec(few(tokenizer, llama), num_beams=2, best_of_n=3, seed=5, batch_size=6)
    made = {decoding: answers.answer(llama, tokenizer, rows, decoding, spec) for decoding in DECODINGS}
    greedy = Sampling(STEPS, 0.0, banned_ids=spec.sampling.banned_ids)
    assert made["greedy"] == sample_answers(llama, tokenizer, rows, greedy, 5)
    assert made["sample"] == sample_answers(llama, tokenizer, rows, spec.sampling, 5)
    assert made["best_of_n"] == sample_answers(llama, tokenizer, rows, spec.sampling, 5, num_samples=3)
    assert made["beam"] == beam_answers(llama, tokenizer, rows, STEPS, 2)


# ---- the best of n --------------------------------------------------------------------------------------------------


def samples_of(*responses, prompts=None):
    size = len(responses)
    ids = [[1, 2, *range(3, 3 + i % 3 + 1)] for i in range(size)]
    asked = prompts or ["q"] * size
    dialogues = [user(prompt) for prompt in asked]
    return Samples(asked, list(responses), dialogues, ids, [2] * size, [True] * size, [{"i": i} for i in range(size)])


def test_the_best_of_n_by_hand():
    samples = samples_of(*"abcdefghi")
    scores = [0.5, 2.0, 1.0, None, -3.0, None, None, None, None]
    best, kept = best_of(samples, scores, 3)
    assert best.responses == ["b", "e", "g"] and kept == [2.0, -3.0, None]
    assert best.token_ids == [samples.token_ids[i] for i in (1, 4, 6)] and [r["i"] for r in best.records] == [1, 4, 6]
    assert best_of(samples_of(*"abcd"), [1.0, 1.0, 0.0, 7.0], 2)[0].responses == ["a", "d"]  # the first of equals
    assert best_of(samples, scores, 1) == (samples, scores)


def test_the_best_of_n_is_the_maximum_of_every_group():
    generator = random.Random(0)
    for n in (1, 2, 5):
        scores = [generator.choice([None, generator.random()]) for _ in range(20 * n)]
        _, kept = best_of(samples_of(*map(str, range(20 * n))), scores, n)
        for group, score in enumerate(kept):
            given = [x for x in scores[group * n : (group + 1) * n] if x is not None]
            assert score == max(given, default=None)


# ---- judges ---------------------------------------------------------------------------------------------------------


def toy_samples():
    """Right and clear, wrong and clear, right in a sentence that is none, nothing."""
    (fact, question), (other, _) = [pair for pair in toy.questions("eval") if pair[0].kind == "colour"][:3:2]
    responses = [f"{fact.answer}.", f"{other.answer}.", f"{fact.answer} my friend or so", ""]
    return samples_of(*responses, prompts=[question] * 4)


def test_the_toy_judge_is_the_tasks_own(tokenizer):
    samples = toy_samples()
    verdicts = create_judge("toy", tokenizer, **ON)(samples)
    expected = [toy.judge(*pair) for pair in zip(samples.prompts, samples.responses, strict=True)]
    assert verdicts.scores == [judgement.score for judgement in expected]
    assert verdicts.correct == [judgement.correct for judgement in expected] == [True, False, True, False]
    assert [judgement.clear for judgement in expected] == [True, True, False, False]
    check_judge("toy", tokenizer, samples.prompts)
    for call in (
        lambda: create_judge("toy", tokenizer, **ON)(samples_of("x", prompts=["What is love?"])),
        lambda: check_judge("toy", tokenizer, ["What is love?"]),
    ):
        with pytest.raises(UserError, match="--judge toy: not a question of the toy task: 'What is love.'; ask"):
            call()


def function_file(tmp_path, body):
    path = tmp_path / "mine.py"
    path.write_text(body)
    return f"function:{path}"


def test_a_function_judges_and_what_is_no_number_is_no_score(tmp_path, tokenizer):
    body = "def size(responses):\n    return [float(len(x)) if x else None for x in responses]\n"
    body += "def odd(responses):\n    return [float('nan'), float('inf'), 1.0, 2.0]\n"
    spec = function_file(tmp_path, body)
    samples = samples_of("abc", "", "ab", "a")
    verdicts = create_judge(f"{spec}:size", tokenizer, **ON)(samples)
    assert verdicts.scores == [3.0, None, 2.0, 1.0] and verdicts.correct is None
    assert create_judge(f"{spec}:odd", tokenizer, **ON)(samples).scores == [None, None, 1.0, 2.0]
    # Several sources as step 3 adds them up; None where one has none.
    total = create_judge([f"0.5*{spec}:odd", f"-2*{spec}:size"], tokenizer, **ON)(samples)
    assert total.scores == [None, None, -3.5, -1.0]


@pytest.fixture(scope="module")
def reward_dir(tokenizer, tmp_path_factory):
    """A reward model as step 2 leaves it, scores 10 too high and twice too wide."""
    directory = str(tmp_path_factory.mktemp("reward"))
    save_model(tiny_scorer("llama", tokenizer, seed=2).model, tokenizer, directory)
    save_score_stats(directory, 10.0, 2.0)
    return directory


def plain_scores(directory, tokenizer, samples):
    """By transformers as it is, one response at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits.item() for ids in samples.token_ids]


def test_a_reward_model_judges_by_its_plain_path_too(reward_dir, tokenizer, llama, rows):
    samples = sample_answers(llama, tokenizer, rows, few(tokenizer, llama), 1)
    raw = plain_scores(reward_dir, tokenizer, samples)
    assert statistics.pstdev(raw) > 0.1
    for spec in (reward_dir, f"full:{reward_dir}", [reward_dir]):
        scores = create_judge(spec, tokenizer, **ON)(samples).scores
        assert scores == pytest.approx([(score - 10) / 2 for score in raw], abs=1e-4)
    assert create_judge(reward_dir, tokenizer, normalize=False, **ON)(samples).scores == pytest.approx(raw, abs=1e-4)
    check_judge(reward_dir, tokenizer, [])


def test_a_reward_model_from_elsewhere_has_no_statistics_and_judges_by_its_raw_scores(
    tokenizer, llama, rows, tmp_path
):
    save_model(tiny_scorer("llama", tokenizer, seed=2).model, tokenizer, str(tmp_path))
    samples = sample_answers(llama, tokenizer, rows, few(tokenizer, llama), 1)
    scores = create_judge(str(tmp_path), tokenizer, **ON)(samples).scores
    assert scores == pytest.approx(plain_scores(str(tmp_path), tokenizer, samples), abs=1e-4)


def test_an_adapter_judges_on_the_trunk_that_it_was_trained_on(
    model_dirs, tokenizer, llama, rows, tmp_path, monkeypatch
):
    base = model_dirs("gpt2")
    torch.manual_seed(1)
    classifier = load_scorer(base, tokenizer, dtype=FP32, dropout=0.0)
    add_lora(classifier, LoraSpec(4, 8))
    for name, parameter in classifier.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(classifier, tokenizer, str(tmp_path), base)
    save_score_stats(str(tmp_path), 1.0, 4.0)
    samples = sample_answers(llama, tokenizer, rows, few(tokenizer, llama), 1)
    with torch.no_grad():
        expected = []
        for ids in samples.token_ids:
            ids = torch.tensor([ids])
            expected.append((Scorer(classifier.eval())(ids, torch.ones_like(ids))[0, -1].item() - 1) / 4)
    for spec in (str(tmp_path), f"lora:{tmp_path}"):
        assert create_judge(spec, tokenizer, **ON)(samples).scores == pytest.approx(expected, abs=1e-4)
        check_judge(spec, tokenizer, [])
    checked = []
    monkeypatch.setattr(judges, "check_probes", lambda *given: checked.append(given))
    judge = create_judge(str(tmp_path), tokenizer, **ON)
    assert checked == [(str(tmp_path), judge.sources[0][0].model)], "that trunk and adapter belong together"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config.json cannot be read"):
        check_judge(str(tmp_path), tokenizer, [])


def test_one_reward_model_reads_the_answers_of_models_with_other_tokenizers(
    reward_dir, tokenizer, other_tokenizer, llama
):
    model = tiny_model("gpt2", other_tokenizer)
    rows = prompt_rows(other_tokenizer, DIALOGUES)
    samples = sample_answers(model, other_tokenizer, rows, Sampling(STEPS), 1)
    judge = create_judge(reward_dir, tokenizer, **ON)
    other = judge.for_model(other_tokenizer)
    assert other.sources[0][0].model is judge.sources[0][0].model, "one model in memory"
    assert other.sources[0][0].reencodes and not judge.sources[0][0].reencodes
    assert other(samples).scores == create_judge(reward_dir, other_tokenizer, **ON)(samples).scores
    assert judge.for_model(other_tokenizer).for_model(tokenizer)(samples).scores == judge(samples).scores


def test_a_function_is_imported_once_for_all_models(tmp_path, tokenizer, other_tokenizer):
    body = "import pathlib\nlog = pathlib.Path(__file__).with_name('log')\nlog.open('a').write('x')\n"
    body += "def score(responses):\n    return [{'score': 1.0, 'masked': [(0, 1)]} for _ in responses]\n"
    judge = create_judge(f"{function_file(tmp_path, body)}:score", tokenizer, **ON)
    other = judge.for_model(other_tokenizer)
    samples = sample_answers(
        tiny_model("gpt2", other_tokenizer), other_tokenizer, prompt_rows(other_tokenizer, DIALOGUES), Sampling(4), 1
    )
    assert other(samples).scores == [1.0] * len(DIALOGUES), "spans are looked up in that model's tokens"
    assert (tmp_path / "log").read_text() == "x"
    assert judge.sources[0][0].tokenizer is tokenizer and other.sources[0][0].tokenizer is other_tokenizer


def test_an_address_is_asked_with_the_tokens_of_each_model(tokenizer, other_tokenizer):
    judge = create_judge("api:http://127.0.0.1:9/", tokenizer, **ON)
    source, other = judge.sources[0][0], judge.for_model(other_tokenizer).sources[0][0]
    assert (source.url, source.tokenizer, source.batch_size) == ("http://127.0.0.1:9/", tokenizer, 3)
    assert (other.url, other.tokenizer, other.batch_size) == ("http://127.0.0.1:9/", other_tokenizer, 3)


def test_what_is_no_judge_is_found_before_anything_is_loaded(model_dirs, tokenizer, tmp_path):
    for spec, told in {
        model_dirs("gpt2"): "is a language model, not a reward model",
        "no/such/dir": "no/such/dir is neither a model directory nor a reachable hub name",
        f"{function_file(tmp_path, 'def f(): pass')}:g": "has no function g; its functions: f",
        "api:nothing": "nothing",
        "magic:x": "is no reward source",
        "lora:no/such/dir": "adapter_config.json cannot be read",
    }.items():
        for given in (spec, [spec]):
            with pytest.raises(UserError, match=told):
                check_judge(given, tokenizer, [])
    with pytest.raises(UserError, match="toy is not a trained reward model"):
        create_judge(["toy"], tokenizer, **ON)
    assert judge_spec("0.5*full:a").weight == 0.5 and judge_spec("a/b").kind == "full"
