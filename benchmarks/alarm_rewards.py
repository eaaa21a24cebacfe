"""Rewards with a hole in them, for alarms.py: what a policy finds when it is paid for the wrong thing."""


def thanks(responses: list[str]) -> list[float]:
    """A point for every "thanks"."""
    return [float(text.lower().count("thanks")) for text in responses]


def words(responses: list[str]) -> list[float]:
    """A point for every ten words, whatever they say."""
    return [len(text.split()) / 10 for text in responses]


def sameness(responses: list[str]) -> list[float]:
    """A point for each answer that begins as "Sure! The"."""
    return [float(text.startswith("Sure! The")) for text in responses]
