"""Our side, and TRL's where it is asked for, turn by turn: each is a working process, our_side.py and trl_side.py."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dschat.errors import UserError

from harness import require_same
from machine import versions
from turns import Facts, Side, interleave

TRL_VERSION = "1.12.0"  # the last with a PPO trainer


def add_trl_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--versus", choices=("trl",), help="the same work by TRL, turn by turn; see trl_side.py")
    made.add_argument("--trl_settings", type=json.loads, default={}, help="JSON: settings of TRL's config to change")


def require_trl() -> None:
    """
    Raises:
        UserError: TRL is not there, or is another version than the one that is compared with.
    """
    found = versions().get("trl")
    if found != TRL_VERSION:
        raise UserError(
            f"--versus trl needs trl {TRL_VERSION}, found {found or 'none'}: {sys.executable} -m pip install "
            f"trl=={TRL_VERSION}"
        )


def take_turns(
    args: argparse.Namespace, given: dict[str, Any], same: list[str]
) -> tuple[dict[str, list[Facts]], dict[str, list[Facts]]]:
    """`interleave` of the working processes, which get ``args`` and what is ``given`` beside; in every round the facts
    named in ``same`` must be."""
    workers = {"dschat": "our_side.py"} | ({"trl": "trl_side.py"} if args.versus else {})
    settings = vars(args) | {"turns": args.warmup + args.repeats} | given
    with tempfile.TemporaryDirectory(prefix="turns-") as folder:
        line = json.dumps(settings | {"folder": folder}, default=str)
        sides = {
            name: Side(name, [str(Path(__file__).with_name(worker)), line], Path(folder, f"{name}.log"))
            for name, worker in workers.items()
        }
        calls = {name: side.turn for name, side in sides.items()}
        try:
            return interleave(calls, args.warmup, args.repeats, lambda facts: require_same(facts, same))
        finally:
            for side in sides.values():
                side.stop()
