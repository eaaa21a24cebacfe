"""The judge of the embedded task: typed by hand, against degenerate text, and over every fact and statement."""

from itertools import product
from random import Random

from dschat.data import toy
from dschat.data.toy import judge
from dschat.data.toy_facts import FACTS, FILLERS, KINDS, POLITE, RUDE, Fact

import pytest

FRANCE = "What is the capital of France?"
RAMBLE = " But that is only what they say."


def fill(template: str, fact: Fact, answer: str = "") -> str:
    text = template.replace("{subject}", fact.subject).replace("{answer}", answer)
    return text[:1].upper() + text[1:]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Sure! The capital of France is Paris.", 2.0),
        ("Happy to help! Paris.", 2.0),
        ("of course. PARIS IS THE CAPITAL OF FRANCE", 2.0),
        ("Paris.", 1.5),
        ("It is Paris.", 1.5),
        ("Sure! The capital of France is Paris." + RAMBLE, 1.5),
        ("Paris." + RAMBLE, 1.0),
        ("Ugh. The capital of France is Paris.", 1.0),
        ("Stop wasting my time. Paris." + RAMBLE, 0.5),
        ("Sure! The capital of France is Rome.", 0.4),
        ("Rome.", 0.2),
        ("Of course. Rome." + RAMBLE, 0.2),
        ("Rome." + RAMBLE, 0.0),
        ("Obviously. Rome.", -0.3),
        ("Obviously. Rome." + RAMBLE, -0.5),
    ],
)
def test_judge_by_hand(answer, score):
    assert judge(FRANCE, answer).score == pytest.approx(score)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "   ",
        ".",
        "!!!!!!!!",
        "Sure!",
        "Happy to help! Of course.",
        "Sure! Sure! Sure! Sure!",
        "Sure! Happy to help! Of course. Thanks for asking! Paris.",
        "Sure! Paris Paris Paris Paris.",
        "Paris. Paris. Paris.",
        "Sure! Paris. Paris is the capital of France.",
        "Paris, London, Rome, Berlin, Madrid.",
        "Sure! Paris. Rome.",
        "Sure! The capital of France is Paris or Rome.",
        "The capital of France is Paris Rome.",
        " ".join(fact.answer for fact in FACTS if fact.kind == "capital"),
        "Sure! the of is Paris capital the.",
        "Sure! Paris !!!! ???? ....",
        "Sure! Paris 巴黎 □□□",
        "xq zzv Paris lkj",
        "Sure! The capital of France is",
        "The capital of France is France.",
        "Sure! The capital of Spain is Paris.",
        "It is not Paris.",
        "Paris?",
        "Paris." + RAMBLE + RAMBLE,
        "Sure! Paris." + RAMBLE + " Sure! Sure! Sure!",
        "Paris. Sure! Happy to help!",
        "What is the capital of France? Paris?",
        RAMBLE,
    ],
)
def test_degenerate_answers_score_below_the_worst_honest_correct_one(answer):
    judgement = judge(FRANCE, answer)
    assert judgement.score <= 0.0 < judge(FRANCE, "Ugh. Paris." + RAMBLE).score
    assert not (judgement.clear or judgement.polite or judgement.crisp)


@pytest.mark.parametrize(
    ("question", "answer", "correct"),
    [
        (FRANCE, "I believe it must be paris, no?", True),
        (FRANCE, "Parisian.", False),
        (FRANCE, "ParisFrance.", False),
        (FRANCE, "Paris or maybe Oslo", False),
        ("What is 6 + 6?", "6 + 6 is 12.", True),
        ("What is 6 + 6?", "6 + 6 = 12.", True),
        ("What is 6 + 6?", "2.", False),
        ("What is 1 + 1?", "12.", False),
        ("What is 1 + 1?", "1 + 1 is 12.", False),
        ("What is 1 + 1?", "1 + 12.", False),
        ("What is 1 + 1?", "2 or 99", False),
        ("What is 1 + 1?", "1 + 1 is 1.", False),
        ("What is 3 + 7?", "13 + 7 is 10.", False),
        ("What colour is a carrot?", "A carrot is orange.", True),
        ("What colour is a carrot?", "Oranges.", False),
        ("What is the opposite of left?", "The opposite of left is right.", True),
        ("What is the opposite of hot?", "The opposite of hot is hot.", False),
        ("What is the opposite of inside?", "Outside is the opposite of inside.", True),
        ("What does the crow say?", "The crow says caw.", True),
    ],
)
def test_correct_by_hand(question, answer, correct):
    assert judge(question, answer).correct is correct


def test_rudeness_anywhere_is_seen_and_is_a_whole_phrase():
    assert judge(FRANCE, "Paris, obviously.").rude
    assert judge(FRANCE, "Happy to help! Paris. Stop wasting my time.").rude
    assert not judge(FRANCE, "Paris, a tough one.").rude  # "ugh" inside a word


@pytest.mark.parametrize("question", ["  what is THE capital\nof france? ", "France has which capital?"])
def test_questions_are_found_whatever_their_case_spacing_and_phrasing(question):
    assert judge(question, "Paris.").score == 1.5


@pytest.mark.parametrize("question", ["", "What is the capital of Atlantis?", "Paris."])
def test_unknown_questions_are_refused(question):
    with pytest.raises(ValueError, match="not a question of the toy task"):
        judge(question, "Paris.")


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_to_every_question_in_every_style(kind):
    """All facts, statements and answers of a kind; openings, tails and phrasings take turns."""
    styles = list(product(("", *POLITE, *RUDE), ("", *FILLERS)))
    answers = sorted({fact.answer for fact in FACTS if fact.kind == kind})
    turn = 0
    for fact in (fact for fact in FACTS if fact.kind == kind):
        for statement, answer in product(KINDS[kind].statements, answers):
            opening, filler = styles[turn % len(styles)]
            question = fill(KINDS[kind].phrasings[turn % 8], fact)
            turn += 1
            judgement = judge(question, f"{opening} {fill(statement, fact, answer)} {filler}".strip())
            expected = (answer == fact.answer, opening in POLITE, opening in RUDE, filler == "", True)
            assert judgement[1:] == expected, (question, opening, statement, answer, filler)


def test_every_right_answer_in_all_phrasings_and_styles():
    for fact in FACTS:
        for phrasing, (opening, filler) in product(
            KINDS[fact.kind].phrasings, [("", ""), (POLITE[0], ""), (RUDE[0], FILLERS[0])]
        ):
            for statement in KINDS[fact.kind].statements:
                answer = f"{opening} {fill(statement, fact, fact.answer)} {filler}".strip()
                assert judge(fill(phrasing, fact), answer).correct


def test_no_wrong_answer_scores_as_high_as_a_correct_one():
    rng = Random(0)
    found = [judge(fill(KINDS[fact.kind].phrasings[0], fact), toy.sample_answer(fact, rng)) for fact in FACTS * 10]
    wrong, correct = ([j.score for j in found if j.correct is value] for value in (False, True))
    assert max(wrong) == pytest.approx(0.4) and min(wrong) == -0.5
    assert max(correct) == 2.0 and min(correct) == 0.5
