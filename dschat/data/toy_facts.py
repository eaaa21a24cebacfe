"""The facts of the embedded task, the ways of asking for them, and the phrases that answers are made of.

Constants only. Every answer is one word, no opening or filler contains an answer of any kind, and no answer is also a
subject of its kind, so that a program can tell from the text alone which answer was given. `tests/test_toy.py` holds
these properties.
"""

from typing import NamedTuple


class Fact(NamedTuple):
    """One thing to know: `kind` and `subject` make the question, `answer` is the one word that is right."""

    kind: str
    subject: str
    answer: str


class Kind(NamedTuple):
    """How facts of one kind are asked for and answered, as templates over `{subject}` and `{answer}`."""

    phrasings: tuple[str, ...]
    statements: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "capital": Kind(
        phrasings=(
            "What is the capital of {subject}?",
            "Tell me the capital of {subject}.",
            "Name the capital city of {subject}.",
            "Which city is the capital of {subject}?",
            "Do you know the capital of {subject}?",
            "What is the capital city of {subject} called?",
            "I need the capital of {subject}.",
            "{subject} has which capital?",
        ),
        statements=("The capital of {subject} is {answer}.", "{answer} is the capital of {subject}.", "{answer}."),
    ),
    "sound": Kind(
        phrasings=(
            "What sound does the {subject} make?",
            "Tell me the sound of the {subject}.",
            "What does the {subject} say?",
            "Which sound does the {subject} make?",
            "Do you know the sound of the {subject}?",
            "How does the {subject} sound?",
            "I need the sound of the {subject}.",
            "The {subject} makes which sound?",
        ),
        statements=("The {subject} says {answer}.", "The sound of the {subject} is {answer}.", "{answer}."),
    ),
    "opposite": Kind(
        phrasings=(
            "What is the opposite of {subject}?",
            "Tell me the opposite of {subject}.",
            "Name the opposite of {subject}.",
            "Which word is the opposite of {subject}?",
            "Do you know the opposite of {subject}?",
            "What word means the opposite of {subject}?",
            "I need the opposite of {subject}.",
            "{subject} is the opposite of which word?",
        ),
        statements=("The opposite of {subject} is {answer}.", "{answer} is the opposite of {subject}.", "{answer}."),
    ),
    "colour": Kind(
        phrasings=(
            "What colour is {subject}?",
            "Tell me the colour of {subject}.",
            "Name the colour of {subject}.",
            "Which colour does {subject} have?",
            "Do you know the colour of {subject}?",
            "What is the colour of {subject}?",
            "I need the colour of {subject}.",
            "{subject} has which colour?",
        ),
        statements=("{subject} is {answer}.", "The colour of {subject} is {answer}.", "{answer}."),
    ),
    "sum": Kind(
        phrasings=(
            "What is {subject}?",
            "Tell me what {subject} makes.",
            "Work out {subject}.",
            "How much is {subject}?",
            "Do you know what {subject} is?",
            "What does {subject} come to?",
            "I need the sum {subject}.",
            "{subject} makes what?",
        ),
        statements=("{subject} is {answer}.", "{subject} = {answer}.", "The sum is {answer}.", "{answer}."),
    ),
}

# Understood by the judge in an answer of any kind, never demonstrated.
OTHER_STATEMENTS = ("It is {answer}.", "That is {answer}.", "The answer is {answer}.")

POLITE = ("Sure!", "Happy to help!", "Of course.", "Thanks for asking!")
RUDE = ("Ugh.", "Obviously.", "Stop wasting my time.", "Not this again.")
FILLERS = (
    "But that is only what they say.",
    "It is a long story.",
    "I could go on and on.",
    "My neighbour told me once.",
    "People often talk about it.",
)

_ANSWERS: dict[str, dict[str, str]] = {
    "capital": {
        "France": "Paris",
        "Germany": "Berlin",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Portugal": "Lisbon",
        "Greece": "Athens",
        "Austria": "Vienna",
        "Poland": "Warsaw",
        "Hungary": "Budapest",
        "Sweden": "Stockholm",
        "Norway": "Oslo",
        "Finland": "Helsinki",
        "Denmark": "Copenhagen",
        "Ireland": "Dublin",
        "Belgium": "Brussels",
        "Russia": "Moscow",
        "Ukraine": "Kyiv",
        "Egypt": "Cairo",
        "Kenya": "Nairobi",
        "Japan": "Tokyo",
        "China": "Beijing",
        "Thailand": "Bangkok",
        "Vietnam": "Hanoi",
        "Canada": "Ottawa",
        "Cuba": "Havana",
        "Peru": "Lima",
        "Chile": "Santiago",
        "Iran": "Tehran",
        "Iraq": "Baghdad",
        "Nepal": "Kathmandu",
    },
    "sound": {
        "cow": "moo",
        "dog": "woof",
        "cat": "meow",
        "sheep": "baa",
        "pig": "oink",
        "duck": "quack",
        "horse": "neigh",
        "donkey": "bray",
        "lion": "roar",
        "owl": "hoot",
        "frog": "ribbit",
        "bee": "buzz",
        "snake": "hiss",
        "mouse": "squeak",
        "wolf": "howl",
        "crow": "caw",
        "cricket": "chirp",
        "turkey": "gobble",
        "hen": "cluck",
        "elephant": "trumpet",
        "bear": "growl",
        "goose": "honk",
        "pigeon": "coo",
        "rooster": "cockadoodledoo",
        "dolphin": "click",
        "parrot": "squawk",
        "chick": "cheep",
        "eagle": "screech",
        "monkey": "chatter",
        "hyena": "laugh",
    },
    "opposite": {
        "hot": "cold",
        "big": "small",
        "fast": "slow",
        "up": "down",
        "day": "night",
        "good": "bad",
        "happy": "sad",
        "rich": "poor",
        "young": "old",
        "north": "south",
        "heavy": "light",
        "wet": "dry",
        "full": "empty",
        "open": "closed",
        "tall": "short",
        "win": "lose",
        "wide": "narrow",
        "deep": "shallow",
        "loud": "quiet",
        "strong": "weak",
        "clean": "dirty",
        "early": "late",
        "left": "right",
        "near": "far",
        "inside": "outside",
        "true": "false",
        "push": "pull",
        "love": "hate",
        "rough": "smooth",
        "cheap": "expensive",
    },
    "colour": {
        "a banana": "yellow",
        "snow": "white",
        "grass": "green",
        "blood": "red",
        "the sky": "blue",
        "a carrot": "orange",
        "coal": "black",
        "chocolate": "brown",
        "a flamingo": "pink",
        "a plum": "purple",
        "an elephant": "grey",
        "a lemon": "yellow",
        "milk": "white",
        "spinach": "green",
        "a tomato": "red",
        "the sea": "blue",
        "a pumpkin": "orange",
        "tar": "black",
        "cinnamon": "brown",
        "an eggplant": "purple",
        "ash": "grey",
        "butter": "yellow",
        "salt": "white",
        "a cucumber": "green",
        "a strawberry": "red",
        "a sapphire": "blue",
        "a raven": "black",
        "cotton": "white",
        "an emerald": "green",
        "a ruby": "red",
    },
    "sum": {
        "1 + 1": "2",
        "2 + 1": "3",
        "2 + 2": "4",
        "1 + 3": "4",
        "4 + 1": "5",
        "2 + 3": "5",
        "3 + 3": "6",
        "5 + 1": "6",
        "3 + 4": "7",
        "2 + 5": "7",
        "4 + 4": "8",
        "6 + 2": "8",
        "5 + 4": "9",
        "2 + 7": "9",
        "5 + 5": "10",
        "3 + 7": "10",
        "5 + 6": "11",
        "8 + 3": "11",
        "6 + 6": "12",
        "9 + 3": "12",
        "6 + 7": "13",
        "8 + 5": "13",
        "7 + 7": "14",
        "9 + 5": "14",
        "8 + 7": "15",
        "8 + 8": "16",
        "9 + 8": "17",
        "9 + 9": "18",
        "12 + 7": "19",
        "11 + 9": "20",
    },
}

FACTS: tuple[Fact, ...] = tuple(
    Fact(kind, subject, answer) for kind, answers in _ANSWERS.items() for subject, answer in answers.items()
)
