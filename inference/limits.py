"""What a flag, a command or a request may ask of the sampler. ``name`` is what the user called it."""

import math

from dschat.errors import UserError

MIN_TEMPERATURE = 0.01  # below, logits / temperature leave the range of float32


def check_temperature(value: float, name: str) -> float:
    """
    Raises:
        UserError: neither 0 nor a usable number.
    """
    if value != 0 and not MIN_TEMPERATURE <= value < math.inf:
        raise UserError(f"{name} {value}: expected 0 (greedy) or at least {MIN_TEMPERATURE}")
    return value


def check_top_p(value: float, name: str) -> float:
    """
    Raises:
        UserError: no probability above 0.
    """
    if not 0 < value <= 1:
        raise UserError(f"{name} {value}: expected a probability above 0 and up to 1 (1: all tokens)")
    return value


def check_top_k(value: int, name: str) -> int:
    """
    Raises:
        UserError: below 0.
    """
    if value < 0:
        raise UserError(f"{name} {value}: expected a number of tokens, or 0 for all")
    return value
