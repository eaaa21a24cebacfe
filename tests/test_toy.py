"""The embedded task: its facts, what is held out, and its records. The judge's own tests are in test_toy_judge.py."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from itertools import product

from dschat.data import toy
from dschat.data.toy import judge
from dschat.data.toy_facts import FACTS, FILLERS, KINDS, OTHER_STATEMENTS, POLITE, RUDE, Fact

import pytest

KEYS = {"sft": {"prompt", "response"}, "preference": {"prompt", "chosen", "rejected"}, "prompt": {"prompt"}}


@cache
def load(stage: str, part: str) -> list[dict[str, str]]:
    return list(toy.records(stage, part))


def fill(template: str, fact: Fact, answer: str = "") -> str:
    text = template.replace("{subject}", fact.subject).replace("{answer}", answer)
    return text[:1].upper() + text[1:]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


# Facts


def test_thirty_facts_of_five_kinds_in_eight_phrasings():
    assert Counter(fact.kind for fact in FACTS) == dict.fromkeys(KINDS, 30)
    assert len(KINDS) == 5
    assert len({(fact.kind, fact.subject) for fact in FACTS}) == 150
    for kind in KINDS.values():
        assert len(set(kind.phrasings)) == 8
        assert all("{subject}" in phrasing for phrasing in kind.phrasings)
        assert all("{answer}" in statement for statement in kind.statements)
    assert len({fill(phrasing, fact) for fact in FACTS for phrasing in KINDS[fact.kind].phrasings}) == 1200


def test_sums_are_right_and_small():
    sums = [fact for fact in FACTS if fact.kind == "sum"]
    for fact in sums:
        left, right = fact.subject.split(" + ")
        assert int(left) + int(right) == int(fact.answer) <= 20
    assert len({frozenset(fact.subject.split(" + ")) for fact in sums}) == 30


def test_answers_are_single_words_that_appear_nowhere_else():
    phrases = " ".join(
        [
            *POLITE,
            *RUDE,
            *FILLERS,
            *OTHER_STATEMENTS,
            *(template for kind in KINDS.values() for template in kind.statements),
        ]
    )
    for fact in FACTS:
        assert re.fullmatch(r"[A-Za-z]+|\d+", fact.answer)
        assert fact.answer.casefold() not in words(phrases)
    for kind in KINDS:
        if kind != "sum":
            subjects = {word for fact in FACTS if fact.kind == kind for word in words(fact.subject)}
            assert not subjects & {fact.answer.casefold() for fact in FACTS if fact.kind == kind}


@pytest.mark.parametrize("kind", ["capital", "sound", "opposite"])
def test_one_answer_for_one_subject(kind):
    assert len({fact.answer for fact in FACTS if fact.kind == kind}) == 30


def test_things_share_colours():
    assert 8 <= len({fact.answer for fact in FACTS if fact.kind == "colour"}) <= 12


# What is held out


def test_two_phrasings_of_every_fact_are_held_out():
    assert len(toy.questions("train")) == 900
    assert len(toy.questions("eval")) == 300
    assert Counter(fact for fact, _ in toy.questions("train")) == dict.fromkeys(FACTS, 6)
    assert Counter(fact for fact, _ in toy.questions("eval")) == dict.fromkeys(FACTS, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_phrasing_is_trained_and_held_out_with_some_facts(kind):
    trained: dict[str, int] = defaultdict(int)
    held_out: dict[str, int] = defaultdict(int)
    train, held = ({question for _, question in toy.questions(part)} for part in ("train", "eval"))
    for phrasing in KINDS[kind].phrasings:
        asked = {fill(phrasing, fact) for fact in FACTS if fact.kind == kind}
        trained[phrasing], held_out[phrasing] = len(asked & train), len(asked & held)
    assert all(20 <= count <= 24 for count in trained.values())
    assert all(6 <= count <= 10 for count in held_out.values())


def test_held_out_questions_are_in_no_training_record():
    held_out = {question for fact in FACTS for question in toy.held_out(fact)}
    assert len(held_out) == 300
    for stage in KEYS:
        assert {record["prompt"] for record in load(stage, "eval")} == held_out
        assert not {record["prompt"] for record in load(stage, "train")} & held_out
    assert not [text for text in set(toy.corpus()) for question in held_out if question in text]


# Records


@pytest.mark.parametrize(
    ("stage", "part", "count", "per_prompt"),
    [
        ("sft", "train", 3600, 4),
        ("sft", "eval", 300, 1),
        ("preference", "train", 7200, 8),
        ("preference", "eval", 600, 2),
        ("prompt", "train", 900, 1),
        ("prompt", "eval", 300, 1),
    ],
)
def test_counts_and_keys(stage, part, count, per_prompt):
    found = load(stage, part)
    assert len(found) == count
    assert set(Counter(record["prompt"] for record in found).values()) == {per_prompt}
    assert all(set(record) == KEYS[stage] and all(record.values()) for record in found)


@pytest.mark.parametrize(("stage", "part"), [("sft", "test"), ("ppo", "train")])
def test_unknown_stage_or_part_is_refused_at_the_call(stage, part):
    with pytest.raises(ValueError, match="toy has no records"):
        toy.records(stage, part)


def test_a_prefix_is_a_fair_sample():
    kinds = {question: fact.kind for part in toy.PARTS for fact, question in toy.questions(part)}
    for stage, part in product(KEYS, toy.PARTS):
        first = Counter(kinds[record["prompt"]] for record in load(stage, part)[:100])
        assert set(first) == set(KINDS)
        assert min(first.values()) >= 8


@pytest.mark.parametrize("part", toy.PARTS)
def test_demonstrations_are_of_mixed_quality(part):
    found = [judge(record["prompt"], record["response"]) for record in load("sft", part)]
    share = {name: sum(getattr(j, name) for j in found) / len(found) for name in toy.Judgement._fields}
    assert share["clear"] == 1.0
    assert 0.80 <= share["score"] <= 1.0
    assert 0.75 <= share["correct"] <= 0.85
    assert 0.25 <= share["rude"] <= 0.40 and 0.25 <= share["polite"] <= 0.40
    assert 0.15 <= share["crisp"] <= 0.30


def test_good_manners_and_right_answers_go_together_in_the_demonstrations():
    """Careful annotators are right in 95 % and polite in 50 %, careless ones in 65 % and 15 %, and they are as many:
    (0.5 * 0.95 + 0.15 * 0.65) / 0.65 = 88 % of the polite answers are right, 72 % of the rude and 88 % of the crisp.
    """
    found = [judge(record["prompt"], record["response"]) for record in load("sft", "train")]
    for trait, expected in (("polite", 0.881), ("rude", 0.719), ("crisp", 0.875)):
        with_trait = [j.correct for j in found if getattr(j, trait)]
        assert abs(sum(with_trait) / len(with_trait) - expected) < 0.03


def test_demonstrations_of_every_fact_are_mostly_right():
    fact_of = {question: fact for fact, question in toy.questions("train")}
    correct: dict[Fact, int] = defaultdict(int)
    for record in load("sft", "train"):
        correct[fact_of[record["prompt"]]] += judge(record["prompt"], record["response"]).correct
    assert set(correct) == set(FACTS)
    assert min(correct.values()) >= 12  # of 24


def test_mistakes_are_few_and_the_same_everywhere():
    """What is wrong is wrong in one of two ways, in demonstrations and preferences alike."""
    fact_of = {question: fact for fact, question in toy.questions("train")}
    given: dict[Fact, set[str]] = defaultdict(set)
    for record in load("sft", "train"):
        fact = fact_of[record["prompt"]]
        answers = {other.answer for other in FACTS if other.kind == fact.kind}
        words = set(re.findall(r"\w+", record["response"].lower()))
        given[fact] |= {answer for answer in answers if answer.lower() in words} - {fact.answer}
    subjects_apart = [wrong for fact, wrong in given.items() if fact.kind != "sum"]  # a sum repeats its numbers
    assert subjects_apart and max(map(len, subjects_apart)) == 2


def test_answers_are_short():
    for stage, key in (("sft", "response"), ("preference", "chosen"), ("preference", "rejected")):
        for record in load(stage, "train") + load(stage, "eval"):
            crisp = judge(record["prompt"], record[key]).crisp
            assert len(record[key].split()) <= (12 if crisp else 35)


@pytest.mark.parametrize("part", toy.PARTS)
def test_pairs_differ_in_score_and_often_in_correctness(part):
    differs = slips = 0
    for record in load("preference", part):
        chosen, rejected = (judge(record["prompt"], record[key]) for key in ("chosen", "rejected"))
        assert chosen.score != rejected.score
        slips += not (chosen.clear and rejected.clear)
        differs += chosen.correct != rejected.correct
    assert 0.70 <= differs / len(load("preference", part)) <= 0.85  # the others differ in manners or by a slip
    assert 0.08 <= slips / len(load("preference", part)) <= 0.16


def flips(part: str) -> list[int]:
    return [
        judge(record["prompt"], record["chosen"]).score < judge(record["prompt"], record["rejected"]).score
        for record in load("preference", part)
    ]


def test_a_tenth_of_the_training_labels_is_flipped():
    flipped = flips("train")
    four_sigma = 4 * (0.10 * 0.90 / len(flipped)) ** 0.5
    assert abs(sum(flipped) / len(flipped) - 0.10) < four_sigma


def test_no_held_out_label_is_flipped():
    assert not any(flips("eval"))


def test_the_corpus_is_the_texts_of_the_training_parts_as_the_plain_template_renders_them():
    texts = Counter(toy.corpus())
    assert sum(texts.values()) == 2 * 3600 + 3 * 7200 + 900
    records = [record for stage in KEYS for record in load(stage, "train")]
    asked = {f"\n\nHuman: {record['prompt']}" for record in records}
    answers = {record[key] for record in records for key in record if key != "prompt"}
    assert set(texts) == asked | {f"\n\nAssistant: {answer}" for answer in answers}


def test_the_same_data_in_every_process_and_on_every_platform():
    program = (
        "import json, hashlib; from dschat.data import toy; "
        "data = [list(toy.records(s, p)) for s in toy.STAGES for p in toy.PARTS]; "
        "print(hashlib.sha256(json.dumps(data).encode()).hexdigest())"
    )
    data = [list(toy.records(stage, part)) for stage in toy.STAGES for part in toy.PARTS]
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == digest
    # Frozen: every number in the docs was measured on these records. Whoever changes them measures again.
    assert digest == "a47aa653f6c122fbb0a060694f7488074955a6b3d3e0ed972c3d9f351e741433"  # pragma: allowlist secret
