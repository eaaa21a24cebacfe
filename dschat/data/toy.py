"""The embedded task `toy`: a closed-domain assistant whose answers a person can read and a program can judge.

A hundred and fifty facts, thirty each of five kinds, are asked in eight phrasings each. Two phrasings of every fact
are held out, so that what is measured was never trained on, while every fact and every phrasing was. An answer is an
opening (polite, none, rude), a statement (right or wrong) and a tail (none, or a filler); demonstrations mix
all of them. Preferences compare two such answers as the judge would, with a tenth of the training labels flipped, as
people's are. Training never sees the judge itself; it scores held-out prompts.

Everything is drawn from fixed seeds: the same records in every run, on every platform.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from random import Random
from typing import NamedTuple

from dschat.data.toy_facts import FACTS, FILLERS, KINDS, OTHER_STATEMENTS, POLITE, RUDE, Fact

STAGES = ("sft", "preference", "prompt")
PARTS = ("train", "eval")
DEMONSTRATIONS_PER_PROMPT = 4
PAIRS_PER_PROMPT = 8
EVAL_PAIRS_PER_PROMPT = 2
FLIP_PROBABILITY = 0.10
NUM_MISTAKES = 2  # wrong answers that people give to a question

SAME_WORDING_PROBABILITY = 0.6
SLIP_PROBABILITY = 0.15


class Annotator(NamedTuple):
    """How somebody answers; the four choices are independent of each other."""

    correct: float
    rambling: float
    openings: dict[str, float]


# Two kinds of people wrote the demonstrations: manners, length and correctness go together, as in real data.
CAREFUL = Annotator(correct=0.95, rambling=0.7, openings={"polite": 0.5, "neutral": 0.35, "rude": 0.15})
CARELESS = Annotator(correct=0.65, rambling=0.9, openings={"polite": 0.15, "neutral": 0.35, "rude": 0.5})
# The words around two answers that differ in the fact alone: as a better assistant than the demonstrators would put
# them, so that the reward model can tell right from wrong where the policy is heading too.
COMPARED = Annotator(correct=1.0, rambling=0.35, openings={"polite": 0.5, "neutral": 0.35, "rude": 0.15})

Record = dict[str, str]


class Judgement(NamedTuple):
    """What the judge makes of one answer; `score` is between -0.5 and 2.0."""

    score: float
    correct: bool  # the right answer is given and no other answer of the same kind is
    polite: bool  # clear, with a polite opening
    rude: bool  # a rude phrase stands somewhere
    crisp: bool  # clear, without filler
    clear: bool  # reads as an answer: one statement, at most one opening before it, nothing but filler after it


def records(stage: str, part: str) -> Iterator[Record]:
    """The raw records of one stage ("sft", "preference", "prompt") and part ("train", "eval"), in a shuffled order."""
    if stage not in STAGES or part not in PARTS:
        raise ValueError(f"toy has no records for ({stage!r}, {part!r}); stages are {STAGES}, parts are {PARTS}")
    makers: dict[str, Callable[[str, Random], Iterator[Record]]] = {
        "sft": _demonstrations,
        "preference": _preferences,
        "prompt": _prompts,
    }
    return makers[stage](part, Random(10 * STAGES.index(stage) + PARTS.index(part)))


def corpus() -> Iterator[str]:
    """Every text of the training parts as the plain template renders it, for training a tokenizer."""
    for stage in STAGES:
        for record in records(stage, "train"):
            for key, text in record.items():
                yield f"\n\nHuman: {text}" if key == "prompt" else f"\n\nAssistant: {text}"


def held_out(fact: Fact) -> tuple[str, str]:
    """The two questions about `fact` that training never sees; which phrasings they are rotates from fact to fact."""
    index = FACTS.index(fact)
    phrasings = KINDS[fact.kind].phrasings
    first, second = (phrasings[(index + offset) % len(phrasings)] for offset in (0, 3))
    return _fill(first, fact.subject), _fill(second, fact.subject)


def questions(part: str) -> list[tuple[Fact, str]]:
    """The (fact, question) pairs of "train" (six phrasings a fact) or "eval" (the two held out), in a fixed order."""
    return [
        (fact, question)
        for fact in FACTS
        for question in _questions_about(fact)
        if (question in held_out(fact)) == (part == "eval")
    ]


def sample_answer(fact: Fact, rng: Random) -> str:
    """An answer by a careful or a careless annotator: right or wrong, polite, neutral or rude, crisp or rambling."""
    annotator = rng.choice((CAREFUL, CARELESS))
    answer = fact.answer if rng.random() < annotator.correct else rng.choice(_mistakes(fact))
    return _worded(fact, answer, _sample_wording(fact, annotator, rng))


def _sample_wording(fact: Fact, annotator: Annotator, rng: Random) -> tuple[str, str, str]:
    """Opening, statement template and tail, whatever the answer is."""
    (manner,) = rng.choices(list(annotator.openings), weights=list(annotator.openings.values()))
    openings = {"polite": POLITE, "neutral": ("",), "rude": RUDE}[manner]
    tail = rng.choice(FILLERS) if rng.random() < annotator.rambling else ""
    return rng.choice(openings), rng.choice(KINDS[fact.kind].statements), tail


def _worded(fact: Fact, answer: str, wording: tuple[str, str, str]) -> str:
    opening, statement, tail = wording
    return " ".join([opening, _fill(statement, fact.subject, answer), tail]).strip()


def judge(question: str, answer: str) -> Judgement:
    """Score an answer to one of the task's questions, from the two texts alone.

    | the answer is                       | score                                                    |
    |-------------------------------------|----------------------------------------------------------|
    | clear and correct                   | 1.0, + 0.5 polite, + 0.5 crisp, - 0.5 rude: 0.5 to 2.0   |
    | clear and wrong                     | 0.0, + 0.2 polite, + 0.2 crisp, - 0.5 rude: -0.5 to 0.4  |
    | not clear, but holds the one answer | 0.0                                                      |
    | not clear, and does not             | -0.5                                                     |

    So no manners make up for a wrong answer, and repetition, lists of candidates, word salad and mere politeness
    earn less than any honest correct answer. Upper and lower case are the same. Raises ValueError for a question that
    is not the task's.
    """
    fact = _facts_by_question().get(_normalise(question))
    if fact is None:
        raise ValueError(f"not a question of the toy task: {question!r}")
    text = _normalise(answer)
    opening, rest = _split_opening(text)
    statement, *fillers = (_without_stop(sentence) for sentence in re.split(r"(?<=[.!]) ", rest))
    clear = statement in _statements_about(fact) and _are_fillers(fillers)
    correct = _gives_only(fact, text)
    polite = clear and opening in _plain(POLITE)
    rude = any(re.search(rf"\b{phrase}\b", text) for phrase in _plain(RUDE))
    crisp = clear and not fillers
    if not clear:
        score = 0.0 if correct else -0.5
    elif correct:
        score = 1.0 + 0.5 * polite + 0.5 * crisp - 0.5 * rude
    else:
        score = 0.2 * polite + 0.2 * crisp - 0.5 * rude
    return Judgement(score, correct, polite, rude, crisp, clear)


def _demonstrations(part: str, rng: Random) -> Iterator[Record]:
    for fact, question in _shuffled(part, DEMONSTRATIONS_PER_PROMPT if part == "train" else 1, rng):
        yield {"prompt": question, "response": sample_answer(fact, rng)}


def _preferences(part: str, rng: Random) -> Iterator[Record]:
    for fact, question in _shuffled(part, PAIRS_PER_PROMPT if part == "train" else EVAL_PAIRS_PER_PROMPT, rng):
        better, worse = _ranked_pair(fact, rng)
        if part == "train" and rng.random() < FLIP_PROBABILITY:
            better, worse = worse, better
        yield {"prompt": question, "chosen": better, "rejected": worse}


def _prompts(part: str, rng: Random) -> Iterator[Record]:
    for _, question in _shuffled(part, 1, rng):
        yield {"prompt": question}


def _shuffled(part: str, times: int, rng: Random) -> Iterator[tuple[Fact, str]]:
    """Every question of the part `times` over, reshuffled each time, so that any prefix is a fair sample."""
    asked = questions(part)
    for _ in range(times):
        rng.shuffle(asked)
        yield from asked


def _ranked_pair(fact: Fact, rng: Random) -> tuple[str, str]:
    """Two answers of which the judge prefers the first: mostly the right and a wrong answer in the same words; some an
    answer and a slip of it, as models make them; else two demonstrations that do not score the same."""
    kind = rng.random()
    if kind < SAME_WORDING_PROBABILITY:
        wording = _sample_wording(fact, COMPARED, rng)
        return _worded(fact, fact.answer, wording), _worded(fact, rng.choice(_mistakes(fact)), wording)
    question = _questions_about(fact)[0]
    while True:
        first = sample_answer(fact, rng)
        slips = kind < SAME_WORDING_PROBABILITY + SLIP_PROBABILITY
        second = _slip(first, fact, rng) if slips else sample_answer(fact, rng)
        first_score, second_score = judge(question, first).score, judge(question, second).score
        if first_score != second_score:
            return (first, second) if first_score > second_score else (second, first)


def _slip(answer: str, fact: Fact, rng: Random) -> str:
    """The answer with a second opening, a second statement, a word twice or a word lost."""
    words = answer.split()
    place = rng.randrange(len(words))
    statement = rng.choice(KINDS[fact.kind].statements)
    return rng.choice(
        (
            f"{rng.choice(POLITE)} {answer}",
            f"{answer} {_fill(statement, fact.subject, rng.choice(_answers_of(fact.kind)))}",
            " ".join([*words[: place + 1], *words[place:]]),
            " ".join([*words[:place], *words[place + 1 :]]) or answer,
        )
    )


def _fill(template: str, subject: str, answer: str = "") -> str:
    text = template.format(subject=subject, answer=answer)
    return text[0].upper() + text[1:]


def _questions_about(fact: Fact) -> list[str]:
    return [_fill(phrasing, fact.subject) for phrasing in KINDS[fact.kind].phrasings]


@lru_cache
def _facts_by_question() -> dict[str, Fact]:
    return {_normalise(question): fact for fact in FACTS for question in _questions_about(fact)}


@lru_cache
def _answers_of(kind: str) -> tuple[str, ...]:
    """The different answers of a kind, in the order of the facts: a set's order would change from run to run."""
    return tuple(dict.fromkeys(fact.answer for fact in FACTS if fact.kind == kind))


def _wrong_answers(fact: Fact) -> list[str]:
    return [answer for answer in _answers_of(fact.kind) if answer != fact.answer]


def _mistakes(fact: Fact) -> tuple[str, ...]:
    """The wrong answers that people give: the next few of the kind. Errors are systematic, as people's are."""
    answers = _answers_of(fact.kind)
    place = answers.index(fact.answer)
    return tuple(answers[(place + step) % len(answers)] for step in range(1, NUM_MISTAKES + 1))


@lru_cache(maxsize=len(FACTS))
def _statements_about(fact: Fact) -> frozenset[str]:
    """Every statement about the fact's subject that the judge understands, right or wrong, as `_plain` texts."""
    templates = KINDS[fact.kind].statements + OTHER_STATEMENTS
    answers = _answers_of(fact.kind)
    return _plain(tuple(_fill(template, fact.subject, answer) for template in templates for answer in answers))


@lru_cache
def _plain(phrases: tuple[str, ...]) -> frozenset[str]:
    """The phrases as the judge compares them: in lower case, without the full stop."""
    return frozenset(_without_stop(_normalise(phrase)) for phrase in phrases)


def _normalise(text: str) -> str:
    return " ".join(text.casefold().split())


def _without_stop(sentence: str) -> str:
    return sentence[:-1] if sentence.endswith((".", "!")) else sentence


def _split_opening(text: str) -> tuple[str, str]:
    """`sure, paris.` -> `sure`, `paris.`; the opening is empty where there is none."""
    known = "|".join(_plain(POLITE + RUDE))
    match = re.match(rf"({known})[.!,] ", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _are_fillers(sentences: list[str]) -> bool:
    return len(set(sentences)) == len(sentences) and set(sentences) <= _plain(FILLERS)


def _gives_only(fact: Fact, text: str) -> bool:
    """Whether the right answer is among the words of the text, the subject's own left out, and no rival is."""
    without_subject = re.sub(rf"(?<!\w){re.escape(fact.subject.casefold())}(?!\w)", " ", text)
    words = set(re.findall(r"\w+", without_subject))
    rivals = {answer.casefold() for answer in _wrong_answers(fact)}
    if fact.kind == "sum":
        rivals |= {word for word in words if word.isdigit()} - {fact.answer}
    return fact.answer.casefold() in words and not words & rivals
