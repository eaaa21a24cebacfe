"""Votes on disk: what was reported as stored is there, and every stage can train on it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from dschat.data.records import to_example
from dschat.data.sources import load_examples
from dschat.data.stages import tokenize_preferences, tokenize_rankings
from dschat.data.votes import TIE, Candidate, append_vote, vote_record
from dschat.errors import UserError
from tests.conftest import ROOT

import pytest

PROMPT = [{"role": "user", "content": "2 + 2?"}]
FOUR, FIVE, SIX = Candidate("a", "4"), Candidate("b", "5"), Candidate("c", "6")
SAMPLING = {"temperature": 0.7, "seed": 3}


def vote(best, *candidates, prompt=PROMPT):
    return vote_record(prompt, candidates, best, SAMPLING, blind=True)


def test_a_vote_is_a_record_with_its_circumstances():
    record = vote(1, FIVE, FOUR)
    assert (record["chosen"], record["rejected"]) == ("4", "5") and record["prompt"] == PROMPT
    metadata = record["metadata"]
    assert metadata["models"] == {"chosen": "a", "rejected": "b"} and metadata["sampling"] == SAMPLING
    assert metadata["blind"] is True and metadata["time"].endswith("+00:00")
    assert to_example(vote(0, FOUR, FIVE, SIX))["ranks"] == [1, 2, 2]
    tie = to_example(vote(TIE, FOUR, FIVE))
    assert tie["ranks"] == [1, 1] and json.loads(tie["metadata"])["models"] == ["a", "b"]


@pytest.mark.parametrize(
    ("best", "candidates", "prompt", "expected"),
    [
        (0, [FOUR], PROMPT, "two answers or more"),
        (2, [FOUR, FIVE], PROMPT, "number 3"),
        (0, [FOUR, Candidate("b", " 4\n")], PROMPT, "the same text"),
        (0, [Candidate("a", " "), FIVE], PROMPT, "cannot be learned from: the answer is empty"),
        (0, [FOUR, FIVE], [{"role": "user", "content": ""}], "cannot be learned from"),
        (0, [FOUR, FIVE], [{"role": "user", "content": "\ud800"}], "not UTF-8"),
    ],
)
def test_a_vote_that_teaches_nothing_is_refused(best, candidates, prompt, expected):
    with pytest.raises(UserError, match=expected):
        vote(best, *candidates, prompt=prompt)


def test_votes_train_directly(tmp_path, tokenizer, cache_dir):
    """A mixed file: pairs, a tie, one of three. What cannot be a pair is counted, not lost in silence."""
    file = tmp_path / "votes.jsonl"
    for number in range(20):
        prompt = [{"role": "user", "content": f"{number} + 2?"}]
        kind = [vote(0, FOUR, FIVE, prompt=prompt), vote(TIE, FOUR, FIVE, prompt=prompt)]
        kind.append(vote(2, FOUR, FIVE, SIX, prompt=prompt))
        assert append_vote(file, kind[number % 3]) == number + 1
    dataset, left_out = load_examples([str(file)], "train", "preference", cache_dir=cache_dir, seed=0)
    rankings, dropped = tokenize_rankings(dataset, tokenizer, 64)
    pairs, _ = tokenize_preferences(dataset, tokenizer, 64)
    kinds = Counter(len(row["input_ids"]) for row in rankings)
    assert kinds[2] and kinds[3] and set(kinds) == {2, 3} and len(pairs) == kinds[2] + 2 * kinds[3]
    assert not dropped and len(rankings) == 13 and sum(left_out.values()) == 7, left_out


@pytest.mark.parametrize("torn", [b'{"prompt": "a", "cho', b"\xff\xfe", b'{"a": "' + b"x" * 200_000])
def test_a_torn_line_costs_no_vote(torn, tmp_path):
    file = tmp_path / "votes.jsonl"
    append_vote(file, vote(0, FOUR, FIVE))
    with open(file, "ab") as out:
        out.write(torn)
    assert append_vote(file, vote(1, FOUR, FIVE)) == 2
    assert [json.loads(line)["chosen"] for line in file.read_text().splitlines()] == ["4", "5"]
    file.write_bytes(file.read_bytes()[:-1])  # whole, but for its end
    assert append_vote(file, vote(0, FOUR, SIX)) == 3


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--votes .*votes\.jsonl: .*; the vote is not stored"):
        append_vote(tmp_path / "file" / "votes.jsonl", vote(0, FOUR, FIVE))


WRITER = """
import sys
from pathlib import Path
from dschat.data.votes import Candidate, append_vote, vote_record
for number in range(10**6):
    prompt = [{"role": "user", "content": sys.argv[2] + str(number)}]
    append_vote(Path(sys.argv[1]), vote_record(prompt, [Candidate("a", "yes" * 3000), Candidate("b", "no")], 0, {}))
    print(number, flush=True)
"""


def test_a_killed_process_has_stored_what_it_reported(tmp_path):
    """Two writers of one file, both killed: every line is whole, and what each reported is there, in order."""
    file = tmp_path / "votes.jsonl"
    command = [sys.executable, "-c", WRITER, str(file)]
    writers = {
        name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for name in ("one", "two")
    }
    time.sleep(1.0)
    reported = {}
    for name, process in writers.items():
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        reported[name] = 1 + len(process.stdout.read().split())
        process.wait()
    append_vote(file, vote(0, FOUR, FIVE))
    records = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for name, count in reported.items():
        own = [r["prompt"][0]["content"] for r in records if r["prompt"][0]["content"].startswith(name)]
        assert len(own) in (count, count + 1) and own == [f"{name}{number}" for number in range(len(own))]
