"""Sampling, judging and scoring as step 3 calls them; scores that are not finite; the best evaluation so far."""

import dataclasses
import json
import math
from collections import Counter

from dschat.engine import distributed
from dschat.engine.distributed import Runtime, init_runtime
from dschat.engine.micro_batches import MicroBatches
from dschat.errors import UserError
from dschat.rlhf import experience, rollout
from dschat.rlhf.collect import BadScores, Collector, collect, judge, roll_out
from dschat.rlhf.evaluate import BestSoFar, HeldOut, best_of_n, evaluate_policy
from dschat.rlhf.experience import add_advantages
from dschat.rlhf.rewards import CombinedReward, Judged, Samples, Scores
from dschat.rlhf.samples import learned_tokens
from dschat.rlhf.slots import SlotDecoder
from tests.families import ragged_prompts
from tests.ppo_parts import ALONE, CPU, SIZES, TwoRanks, plain_models, sampling_for, shaping

import pytest
import torch

NAN, INF = math.nan, math.inf


class Rule:
    """A reward from text alone; some answers without a score, some tokens that do not count."""

    def __init__(self, name="rule", skip=0, masked=False, score=lambda prompt, ids: (sum(ids) % 17) / 4 - 2):
        self.name, self.skip, self.masked, self.score, self.seen = name, skip, masked, score, []

    def __call__(self, samples: Samples) -> Judged:
        scores, masks = [], []
        for ids, start, prompt in zip(samples.token_ids, samples.prompt_lens, samples.prompts, strict=True):
            response = ids[start:]
            self.seen.append(response)
            scores.append(None if self.skip and len(response) % self.skip == 0 else self.score(prompt, response))
            masks.append([t != 1 for t in range(len(response))] if self.masked else None)
        return Judged(scores, masks)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return plain_models("llama", tokenizer)


@pytest.fixture(scope="module")
def rows(tokenizer):
    ids, mask = ragged_prompts(tokenizer, SIZES)
    return [
        {
            "prompt_ids": ids[r, mask[r]].tolist(),
            "messages": [{"role": "user", "content": f"question {r}"}],
            "record": json.dumps({"masked_pattern": "s"} if r == 2 else {}),
        }
        for r in range(len(SIZES))
    ]


def collector_of(engine, tokenizer, *sources, runtime=ALONE, num_samples=1, batch=4, micro=4, kl="kl") -> Collector:
    weighted = [(source, weight) for weight, source in enumerate(sources, 1)]
    sampling = sampling_for(engine, tokenizer)
    return Collector(engine, CombinedReward(weighted), tokenizer, sampling, runtime, batch, micro, kl, num_samples)


def all_of(collector, rows, seed=3):
    rollout = roll_out(collector, rows, seed)
    samples, scores = judge(collector, rollout, rows)
    return (*collect(collector, rollout, samples, scores), samples, scores)


def test_what_is_learned_from(engine, rows, tokenizer):
    """The sum of the sources with their weights; no token of an answer that one of them cannot judge; nor those that
    a source or a record leaves out."""
    one, two = Rule("one", masked=True), Rule("two", skip=2)
    collector = collector_of(engine, tokenizer, one, two, num_samples=2)
    experience, by_source, samples, scores = all_of(collector, rows)
    assert len(experience) == 2 * len(SIZES) and by_source == scores.by_source
    assert samples.prompts == [f"question {i // 2}" for i in range(len(experience))]
    unscored = 0
    for i, (a, b) in enumerate(zip(by_source["one"], by_source["two"], strict=True)):
        size = int(experience.response_mask[i].sum())
        assert experience.response_ids[i, :size].tolist() == one.seen[i] == two.seen[i]
        if b is None:
            unscored += 1
            assert not experience.action_mask[i].any() and experience.scores[i] == 0 and not experience.scored[i]
        else:
            assert experience.scores[i].item() == pytest.approx(a + 2 * b)
            expected = [t != 1 for t in range(size)]
            if i // 2 != 2:  # the record of prompt 2 leaves out more
                assert experience.action_mask[i, :size].tolist() == expected
            else:
                assert (~experience.action_mask[i, :size] | torch.tensor(expected)).all()
        assert not experience.action_mask[i, size:].any()
    assert 0 < unscored < len(experience)


def test_a_pattern_of_the_record_leaves_out_the_tokens_of_its_matches(engine, rows, tokenizer):
    """Each token whose text overlaps a match; the end token stays."""
    collector = collector_of(engine, tokenizer, Rule())
    rollout = roll_out(collector, rows, 3)
    samples, scores = judge(collector, rollout, rows)
    row = 2
    letters = sorted({letter for letter in samples.responses[row] if letter.isascii() and letter.isalpha()})
    masks = {}
    for letter in letters:
        samples.records[row]["masked_pattern"] = letter
        masks[letter] = learned_tokens(rollout, samples, scores, tokenizer)[row]
    size = int(rollout.response_mask[row].sum())
    for letter, mask in masks.items():
        ids = rollout.response_ids[row, :size].tolist()
        expected = [letter not in tokenizer.decode([i], skip_special_tokens=True) for i in ids]
        assert mask[:size].tolist() == expected and not mask[size:].any(), letter
    assert any(not mask[:size].all() for mask in masks.values())


@pytest.mark.parametrize("with_slots", [False, True])
def test_what_memory_has_no_room_for_is_asked_in_portions(engine, rows, tokenizer, with_slots, monkeypatch, capsys):
    """Answers to one prompt at once fit, and two sequences of a forward: the same answers with the same numbers."""
    options = {"num_samples": 2, "batch": len(rows), "micro": 2 * len(rows)}
    collector = collector_of(engine, tokenizer, Rule(), **options)
    collector = dataclasses.replace(
        collector,
        decoder=SlotDecoder() if with_slots else None,
        memory=MicroBatches(ALONE),
        sampling_memory=MicroBatches(ALONE, unit="the answers to {} prompts"),
    )
    expected, *_ = all_of(collector, rows)
    plain, plain_decode, plain_logits = SlotDecoder.new_storage, rollout.decode, experience.policy_logits
    asked = Counter()

    def full(kind, number, limit):
        asked[kind, number <= limit] += 1
        if number > limit:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory"
            )

    def new_storage(decoder, model, num_slots, width):
        full("sampling", num_slots, 2)
        return plain(decoder, model, num_slots, width)

    def decode(model, ids, mask, sampling, uniforms, eos):
        full("sampling", len(uniforms), 2)
        return plain_decode(model, ids, mask, sampling, uniforms, eos)

    def policy_logits(model, engine, batch):
        full("scoring", len(batch.response_ids), 2)
        return plain_logits(model, engine, batch)

    monkeypatch.setattr(SlotDecoder, "new_storage", new_storage)
    monkeypatch.setattr(rollout, "decode", decode)
    monkeypatch.setattr(experience, "policy_logits", policy_logits)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # between which a decoder divides its slots
    found, *_ = all_of(collector, rows)
    assert asked["sampling", False] and asked["sampling", True] >= len(rows) // (len(rows) if with_slots else 1)
    assert asked["scoring", False] and asked["scoring", True] >= len(rows)
    said = capsys.readouterr().out
    assert f"out of memory on the answers to {len(rows)} prompts: they are halved" in said
    assert f"out of memory on a micro-batch of {2 * len(rows)} rows: they are halved" in said
    for field in dataclasses.fields(expected):
        ours, whole = getattr(found, field.name), getattr(expected, field.name)
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)
    all_of(collector, rows)
    assert not capsys.readouterr().out, "what has been halved stays so"


@pytest.mark.parametrize(("num_samples", "kl"), [(1, "kl"), (2, "full")])
def test_two_ranks_collect_what_one_does(engine, rows, tokenizer, num_samples, kl, monkeypatch):
    """Each with every second prompt: the same rows in the same order, the same scores, and so the same advantages."""
    options = {"num_samples": num_samples, "kl": kl}
    source = Rule(skip=2, masked=True)
    whole, expected, *_ = all_of(collector_of(engine, tokenizer, source, **options), rows)
    assert not whole.scored.all()
    how = shaping(estimator="rloo" if num_samples > 1 else "gae", group_size=num_samples)
    whole = add_advantages(whole, how, 0.1)
    monkeypatch.setattr(distributed, "dist", ranks := TwoRanks())

    def on(runtime: Runtime):
        collector = collector_of(engine, tokenizer, source, runtime=runtime, batch=2, micro=3, **options)
        return all_of(collector, rows[runtime.rank :: 2])[:2]

    for found, by_source in ranks.run(on):
        assert by_source == expected
        found = add_advantages(found, how, 0.1)
        for name in ("input_ids", "attention_mask", "response_ids", "response_mask", "action_mask", "finished"):
            assert getattr(found, name).equal(getattr(whole, name)), name
        for name in ("scores", "logprobs", "kl", "values", "final_values", "rewards", "advantages", "returns"):
            assert (getattr(found, name) - getattr(whole, name)).abs().max() < 1e-4, name


# --- scores that are not finite


def verdict(*scores: float | None) -> tuple[Samples, Scores]:
    size = len(scores)
    samples = Samples(
        prompts=[f"q{i}" for i in range(size)],
        responses=[f"a{i}" for i in range(size)],
        messages=[[{"role": "user", "content": f"q{i}"}] for i in range(size)],
        token_ids=[[1, 2, 3]] * size,
        prompt_lens=[1] * size,
        finished=[True] * size,
        records=[{}] * size,
    )
    total = torch.tensor([0.0 if s is None else s for s in scores])
    counts = torch.tensor([s is not None for s in scores])
    return samples, Scores(total, counts, {"rule": list(scores)}, [None] * size)


def test_bad_scores_are_counted_and_written_down_and_the_third_in_a_row_stops(tmp_path):
    bad = BadScores(str(tmp_path), ALONE)
    assert not bad.found(1, *verdict(1.0, None, -2.0)) and bad.number == 0 and not (tmp_path / "repro").exists()
    assert bad.found(2, *verdict(1.0, NAN)) and bad.found(3, *verdict(INF, 1.0))
    assert not bad.found(4, *verdict(1.0, 1.0))  # a good one between them
    assert bad.found(5, *verdict(-INF)) and bad.found(6, *verdict(NAN))
    assert bad.number == 4 and "rollout 6 skipped" in bad.message and str(tmp_path) in bad.message
    with pytest.raises(UserError, match="rollout 7 skipped: a score is not finite; .* 3.* in a row") as error:
        bad.found(7, *verdict(NAN))
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in (tmp_path / "repro").iterdir()) == [f"step_{i:06d}.json" for i in (2, 3, 5, 6, 7)]
    [row] = json.loads((tmp_path / "repro" / "step_000002.json").read_text())["rows"]
    assert row["prompt"] == "q1" and row["response"] == "a1" and row["scores"] == {"rule": "nan"}


def test_a_source_that_is_not_finite_counts_even_where_another_gives_no_score(tmp_path):
    samples, scores = verdict(None, 1.0)
    scores.by_source["other"] = [NAN, 1.0]
    assert BadScores(str(tmp_path), ALONE).found(1, samples, scores)


def test_a_bad_score_on_one_rank_skips_the_rollout_on_all(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "dist", ranks := TwoRanks())

    def on(runtime: Runtime):
        bad = BadScores(str(tmp_path), runtime)
        found = [bad.found(step, *verdict(NAN if runtime.rank and step == 2 else 1.0)) for step in (1, 2, 3)]
        return found, bad.number

    assert ranks.run(on) == [([False, True, False], 1)] * 2
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.json"))] == ["rank1/repro/step_000002.json"]


def test_a_rollout_without_any_score_is_bad_too_and_leaves_no_file(tmp_path, monkeypatch):
    bad = BadScores(str(tmp_path), ALONE)
    assert bad.found(1, *verdict(None, None)) and "no answer a score" in bad.message and not list(tmp_path.iterdir())
    assert not bad.found(2, *verdict(None, 1.0))
    monkeypatch.setattr(distributed, "dist", ranks := TwoRanks())  # a score on any rank is enough

    def on(runtime: Runtime):
        bad = BadScores(str(tmp_path), runtime)
        return [bad.found(1, *verdict(None, 1.0 if runtime.rank else None)), bad.found(2, *verdict(None))]

    assert ranks.run(on) == [[False, True]] * 2


# --- evaluation


def test_an_evaluation_by_hand(engine, rows, tokenizer):
    """The repeats at the end are not counted; a score that is missing or not finite has no part in the mean."""
    given = iter([2.0, None, INF, -1.0, 0.5, 100.0])
    source = Rule(score=lambda prompt, ids: next(given))
    metrics, found = evaluate_policy(collector_of(engine, tokenizer, source, num_samples=3), HeldOut(rows, 5), 0.5)
    assert [row["score"] for row in found] == [2.0, None, None, -1.0, 0.5]
    assert [row["prompt"] for row in found] == [f"question {i}" for i in range(5)]
    assert metrics["eval/score_mean"] == pytest.approx(0.5)
    assert all(row["kl"] != 0 for row in found)  # nor is that of an answer without a score: it moved all the same
    kl = sum(row["kl"] for row in found) / 5
    assert abs(kl) > 0.01 and metrics["eval/kl_per_seq"] == pytest.approx(kl, abs=1e-3)
    assert metrics["eval/objective"] == pytest.approx(0.5 - 0.5 * kl, abs=1e-3)
    assert metrics["eval/response_length"] == pytest.approx(sum(row["length"] for row in found) / 5)
    assert metrics["eval/finished_fraction"] == pytest.approx(sum(row["finished"] for row in found) / 5)


def test_an_evaluation_draws_the_same_answers_every_time_and_the_best_of_n_is_their_best(engine, rows, tokenizer):
    source = Rule(skip=5)
    collector = collector_of(engine, tokenizer, source)
    one, other = (evaluate_policy(collector, HeldOut(rows, 6), 0.0) for _ in range(2))
    assert one == other
    source.seen.clear()
    best = best_of_n(collector, HeldOut(rows, 5), 4)
    seen = [source.seen[i :: len(rows)] for i in range(5)]
    assert len(best) == 5 and all(len(answers) == 4 for answers in seen)
    for row, answers in zip(best, seen, strict=True):
        scores = [source.score("", ids) for ids in answers if len(ids) % 5]
        assert row["score"] == (pytest.approx(max(scores)) if scores else None)
    assert len({str(answers) for row in seen for answers in row}) > 5


def test_the_best_so_far_and_when_to_give_up():
    best = BestSoFar("objective", 2)
    found = [best.improves(i, {"eval/objective": x, "eval/score_mean": -x}) for i, x in enumerate([1, 3, 2, 3])]
    assert found == [True, True, False, False] and (best.step, best.value) == (1, 3)
    assert best.is_over  # an equal one is no better
    best = BestSoFar("score", 2)
    found = [best.improves(i, {"eval/score_mean": x}) for i, x in enumerate([NAN, 1.0, NAN, 2.0, 0.0])]
    assert found == [False, True, False, True, False] and best.step == 3 and not best.is_over
    patient = BestSoFar("score", 0)
    assert not any(patient.improves(i, {"eval/score_mean": -INF}) for i in range(5)) and not patient.is_over
    nothing = BestSoFar("none", 0)
    assert not nothing.improves(0, {"eval/score_mean": 1.0}) and nothing.name is None and not nothing.is_over


def test_runtime_of_one():
    """What the tests above call ALONE is what a program gets without a launcher."""
    assert init_runtime(0) == ALONE == Runtime(0, 1, CPU)
