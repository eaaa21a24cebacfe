"""Whether a stage of e2e_rlhf.py has to run again, and why: what its output was made from, recorded beside it.

``stage.json`` says of a finished stage which flags, which code and which content of its inputs made which output.
While one of these differs the output is not what the command asks for. ``started.json`` says the same of a stage that
has not finished, so that it is continued only as what it was begun as.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dschat.report.metrics import write_whole

DONE, STARTED = "stage.json", "started.json"
# Of a folder these are no content: they tell of the run (times, events), or are made for people.
NO_CONTENT = {DONE, STARTED, "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "quality", "__pycache__"}
NO_CONTENT |= {"wandb", "report.html", "report.png", "preflight.json", "preflight.png", "alarms.json", "tokens.jsonl"}
NEW_CODE = "the code changed"
# Flags that change nothing of the output but where and how comfortably it is made.
NO_EFFECT = {
    *(
        "output_dir",
        "data_output_path",
        "num_workers",
        "show_batch",
        "log_interval",
        "num_shown",
        "stall_timeout",
        "trust_remote_code",
    ),
    *("preflight", "preflight_prompts", "preflight_samples", "report_to"),
    *("resume", "fresh", "checkpoint_interval", "keep_checkpoints", "reward_api_timeout", "reward_api_retries"),
}


@dataclass(frozen=True)
class MadeFrom:
    """What an output is a function of."""

    flags: dict[str, str]  # "--seed": "3"; what the command line leaves to the recipe or to the default is not here
    code: str  # hash of the program, the library and the recipes
    inputs: dict[str, str]  # "step 1", "data mine.jsonl" or another name for people: hash of the content


class Hashes:
    """SHA-256 of files and folders. A file whose size, time of change and inode are the recorded ones is not read."""

    def __init__(self, leave_out: Path):
        """``leave_out``: a folder that is no part of a folder around it, where the output itself lies."""
        self.leave_out = leave_out.resolve()
        self.known: dict[str, list[Any]] = {}  # path: [size, mtime_ns, inode, hash]

    def of(self, path: Path) -> str:
        """Of a file, or of the names and contents of a folder, hidden files and NO_CONTENT aside; "" for neither."""
        if not path.is_dir():
            return self._of_file(path) if path.is_file() else ""
        digest = hashlib.sha256()
        for file in sorted(self._files(path)):
            digest.update(f"{file.relative_to(path)}\0{self._of_file(file)}\n".encode())
        return digest.hexdigest()

    def _files(self, folder: Path) -> list[Path]:
        found = []
        for root, folders, files in os.walk(folder):
            here = Path(root)
            folders[:] = [name for name in folders if _counts(name) and (here / name).resolve() != self.leave_out]
            found += [here / name for name in files if _counts(name) and (here / name).is_file()]
        return found

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = self.known.get(str(path.resolve()))
        if entry is None or entry[:3] != stamp:
            with open(path, "rb") as file:
                entry = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
            self.known[str(path.resolve())] = entry
        return entry[3]


def _counts(name: str) -> bool:
    return not name.startswith(".") and name not in NO_CONTENT


class StageRecord:
    """The two files in the output directory of one stage."""

    def __init__(self, directory: Path, hashes: Hashes):
        self.directory, self.hashes, self.is_of_now = directory, hashes, False
        self.done, self.started = _read(directory / DONE), _read(directory / STARTED)
        hashes.known |= self.done.get("files", {})

    def is_done(self, made_from: MadeFrom) -> bool:
        """The output is whole and made from exactly this."""
        return (
            bool(self.done)
            and not changes(self.done["made_from"], made_from)
            and self.done["output"] == self.hashes.of(self.directory)
        )

    def why_again(self, made_from: MadeFrom) -> tuple[list[str], bool]:
        """For a stage that is not done: (why it runs again, whether it must start over instead of continuing). No
        reason: nothing is known of an earlier run.

        What an unfinished stage has done so far is lost only where it is not what is asked for now; whoever mends the
        code after a crash continues.
        """
        if self.started:
            reasons = changes(self.started["made_from"], made_from)
            still_old = self.started["anew"] and not self._has_saved_since_start()
            return reasons or ["it had not finished"], still_old or any(why != NEW_CODE for why in reasons)
        if self.done:
            return changes(self.done["made_from"], made_from) or ["its output was changed"], True
        return [], False

    def _has_saved_since_start(self) -> bool:
        checkpoints, started = self.directory / "checkpoints", self.directory / STARTED
        return checkpoints.is_dir() and checkpoints.stat().st_mtime_ns > started.stat().st_mtime_ns

    def start(self, made_from: MadeFrom, anew: bool) -> None:
        """To be called before the stage: the finished record stays until its output is replaced."""
        self.directory.mkdir(parents=True, exist_ok=True)
        begun = {"made_from": asdict(made_from), "anew": anew}
        write_whole(self.directory / STARTED, json.dumps(begun, indent=1) + "\n")

    def finish(self, made_from: MadeFrom, seconds: float, peak_rss_gb: float) -> None:
        """To be called when the stage has ended well."""
        self.done = {"made_from": asdict(made_from), "output": self.hashes.of(self.directory)}
        self.done |= {"seconds": seconds, "peak_rss_gb": peak_rss_gb, "files": self.hashes.known}
        write_whole(self.directory / DONE, json.dumps(self.done, indent=1) + "\n")
        (self.directory / STARTED).unlink(missing_ok=True)
        self.is_of_now = True


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or none of ours: then nothing is known
        return {}


def changes(recorded: dict[str, Any], now: MadeFrom) -> list[str]:
    """What differs, in words for people; nothing where nothing does."""
    old, new = recorded["flags"], now.flags
    found = [
        f"{name} {old.get(name, 'default')} -> {new.get(name, 'default')}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    if recorded["code"] != now.code:
        found.append(NEW_CODE)
    for name in sorted(recorded["inputs"].keys() & now.inputs.keys()):  # another input is another flag
        if recorded["inputs"][name] != now.inputs[name]:
            kind, _, which = name.partition(" ")
            found.append(f"the output of {name} changed" if kind == "step" else f"{kind} changed: {which}")
    return found


def named_paths(value: str) -> list[str]:
    """The paths of existing files and folders in the value of a flag: "data.jsonl:0.5", "0.5*full:DIR",
    "function:FILE.py:NAME"."""
    pieces = dict.fromkeys([value, *re.split(r"[:*]", value)])
    return [piece for piece in pieces if piece and Path(piece).expanduser().exists()]


def code_hash(root: Path, program: Path) -> str:
    """Of what a program can run: the library, its own folder and the recipes there."""
    digest = hashlib.sha256()
    for folder in (root / "dschat", program.parent):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".sh")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
