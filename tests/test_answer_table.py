"""The answers of several models side by side, the table of what they come to, and the files; by hand."""

import json
import math

from dschat.report.answer_table import Answered, answers_table, save_answers, side_by_side, summarize_answers
from dschat.report.summary import win_rate
from tests.dialogues import user


def group(model, decoding="greedy", responses=("a", "b"), **given):
    facts = {"num_tokens": [2, 5], "finished": [True, False], "scores": None, "judged": None, "correct": None}
    return Answered(model, decoding, list(responses), **(facts | given))


GROUPS = [
    group("sft", judged=[1.0, 0.0], correct=[True, False], scores=[0.5, None]),
    group("sft", "sample", judged=[2.0, 2.0], correct=[True, True], scores=[None, None]),
    group("dpo", judged=[1.0, 1.0], correct=[True, True], scores=[-9.0, -9.0], num_tokens=[3, 3]),
    group("dpo", "sample", judged=[1.5, None], correct=[False, False], scores=[0.1, 0.2], finished=[True, True]),
]


def test_the_summary_by_hand():
    rows = summarize_answers(GROUPS)
    assert rows[0] == {
        "model": "sft",
        "decoding": "greedy",
        "num_tokens": 3.5,
        "finished": 0.5,
        "score": 0.5,
        "judge": 0.5,
        "correct": 0.5,
        "win_rate": None,
    }
    assert rows[1]["score"] is None and rows[1]["judge"] == 2.0 and rows[1]["win_rate"] is None
    # A tie and a win against sft greedy; a loss against sft sample, whose other prompt has no judgement.
    assert rows[2]["win_rate"] == win_rate([1.0, 1.0], [1.0, 0.0]) | {"by": "judge"}
    assert rows[2]["win_rate"]["value"] == 0.75 and rows[2]["win_rate"]["num_prompts"] == 2
    assert rows[3]["win_rate"]["value"] == 0.0 and rows[3]["win_rate"]["num_prompts"] == 1
    assert rows[3]["judge"] == 1.5 and rows[3]["finished"] == 1.0


def test_without_a_judge_the_reward_decides_and_without_both_nobody():
    first, second = group("sft", scores=[0.0, 1.0]), group("dpo", scores=[1.0, 0.0])
    assert summarize_answers([first, second])[1]["win_rate"] | {"ci95": 0} == {
        "value": 0.5,
        "ci95": 0,
        "num_prompts": 2,
        "by": "reward",
    }
    rows = summarize_answers([group("sft"), group("dpo")])
    assert [r["win_rate"] for r in rows] == [None, None] and rows[0]["judge"] is rows[0]["correct"] is None
    # No prompt has two scores.
    assert (
        summarize_answers([group("sft", scores=[None, 1.0]), group("dpo", scores=[1.0, None])])[1]["win_rate"] is None
    )
    json.dumps(summarize_answers(GROUPS), allow_nan=False)


def test_the_table_has_the_columns_that_were_asked_for():
    lines = answers_table(summarize_answers(GROUPS)).splitlines()
    columns = ["answers by", "tokens", "finished", "reward", "judge", "correct", "better than sft (95 %)"]
    assert lines[0].split("  ") and [c.strip() for c in lines[0].split("  ") if c.strip()] == columns
    assert lines[2].split() == ["sft", "greedy", "3.5", "50%", "+0.50", "+0.50", "50%"]
    assert lines[4].startswith("dpo greedy") and lines[4].endswith("0.75 (0.20 to 0.97)")
    bare = answers_table(summarize_answers([group("sft"), group("dpo")])).splitlines()
    assert bare[0].split() == ["answers", "by", "tokens", "finished"]
    assert bare[3].split() == ["dpo", "greedy", "3.5", "50%"]


def test_answers_stand_side_by_side_and_are_wrapped():
    groups = [group("sft", responses=["word " * 20, "x"], judged=[1.5, None]), group("dpo", responses=["short", "y"])]
    lines = side_by_side("1. Why?", groups, 0, 80).splitlines()
    assert lines[:3] == ["1. Why?", "", "sft greedy" + " " * 31 + "dpo greedy"]
    assert lines[3] == "[judge +1.50, 2 tokens]" + " " * 18 + "[2 tokens]"
    assert lines[4:] == ["word " * 8 + " short", "word " * 7 + "word", "word word word word"]
    # In a narrow terminal one below the other.
    narrow = side_by_side("1. Why?", groups, 1, 30).splitlines()
    assert narrow[:6] == ["1. Why?", "", "sft greedy", "[judge none, 5 tokens, cut", "off]", "x"]
    assert narrow[6:] == ["", "dpo greedy", "[5 tokens, cut off]", "y"]


def test_columns_are_even():
    groups = [group(name) for name in "abcd"]

    def names(width):
        lines = side_by_side("q", groups, 0, width).splitlines()
        return [line.split()[::2] for line in lines if "greedy" in line]

    assert names(120) == names(70) == [["a", "b"], ["c", "d"]]  # never three and one
    assert names(142) == [["a", "b", "c", "d"]] and names(69) == [["a"], ["b"], ["c"], ["d"]]
    assert max(map(len, side_by_side("q " * 100, groups, 0, 75).splitlines())) <= 75


def test_wide_characters_and_what_a_terminal_would_obey():
    chinese = "春眠不觉晓处处闻啼鸟" * 6  # 120 cells in columns of 36
    groups = [group("a", responses=[chinese, ""]), group("b", responses=["one\n\ntwo\x1b[31m red\x07", ""])]
    lines = side_by_side("q", groups, 0, 74).splitlines()
    assert lines[4:] == [
        chinese[:18] + "  one",
        chinese[18:36],
        chinese[36:54] + "  two\ufffd[31m red\ufffd",
        chinese[54:],
    ]
    assert side_by_side("q", groups, 1, 74).splitlines()[2].startswith("a greedy")


def test_files_are_whole(tmp_path):
    groups = [group("a", judged=[0.5, math.pi], correct=[True, False]), group("b", scores=[None, 2.0])]
    save_answers(str(tmp_path), groups, ["p", "q"], [user("p"), user("q")], {"名": 1})
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(x["model"], x["prompt"]) for x in lines] == [("a", "p"), ("a", "q"), ("b", "p"), ("b", "q")]
    assert lines[1] == {
        "model": "a",
        "decoding": "greedy",
        "prompt": "q",
        "messages": user("q"),
        "response": "b",
        "finished": False,
        "num_tokens": 5,
        "score": None,
        "judge": math.pi,
        "correct": False,
    }
    assert (lines[3]["score"], lines[3]["judge"], lines[3]["correct"]) == (2.0, None, None)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"名": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "summary.json"]
