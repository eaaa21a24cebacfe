"""Rewards and judges as the command line names them."""

import math
from dataclasses import dataclass
from pathlib import Path

from dschat.errors import UserError
from dschat.models.adapter_files import ADAPTER_CONFIG

TOY, OPENAI = "toy", "openai"  # judges that are no reward
KINDS = ("full", "lora", "api", "function")
ACCEPTED = (
    "full:PATH, lora:PATH, api:URL, function:module:name or function:path/file.py:name, with a weight other than 0 in "
    "front if wanted: 0.5*full:PATH"
)


@dataclass(frozen=True)
class RewardSpec:
    """One source as the command line names it."""

    kind: str  # of KINDS
    target: str  # a path, an address, module:name
    weight: float = 1.0


def parse_reward(spec: str) -> RewardSpec:
    """``full:PATH``, ``lora:PATH``, ``api:URL``, ``function:module:name``; with a weight in front, ``0.5*full:PATH``.

    A negative weight makes a penalty.

    Raises:
        UserError: anything else, or a weight of 0, nan or infinity.
    """
    weight, rest = 1.0, spec.strip()
    factor, star, after = rest.partition("*")
    if star and ":" not in factor:  # a path or an address may hold a * too
        rest = after.strip()
        try:
            weight = float(factor)
        except ValueError:
            raise UserError(f"reward {spec!r}: {factor!r} is no weight; give {ACCEPTED}") from None
        if weight == 0 or not math.isfinite(weight):
            raise UserError(
                f"reward {spec!r}: a weight of {weight:g} is of no use; leave the source out or correct it"
            )
    kind, _, target = rest.partition(":")
    place, _, name = target.rpartition(":")
    if kind not in KINDS or not target or (kind == "function" and not (place and name.isidentifier())):
        raise UserError(f"reward {spec!r} is no reward source; give {ACCEPTED}")
    return RewardSpec(kind, target, weight)


def judge_spec(text: str) -> RewardSpec:
    """`parse_reward` of the text, or openai:URL#MODEL; of a plain path the directory says whether it is a whole model
    or an adapter."""
    if text.startswith(f"{OPENAI}:"):
        return RewardSpec(OPENAI, text.removeprefix(f"{OPENAI}:"))
    if ":" in text:
        return parse_reward(text)
    return RewardSpec("lora" if (Path(text) / ADAPTER_CONFIG).is_file() else "full", text)
