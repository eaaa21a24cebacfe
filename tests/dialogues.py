"""Dialogues as tests ask them."""

import itertools


def user(*texts):
    """A dialogue: questions, with answers between them."""
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
