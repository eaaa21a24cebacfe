"""The numbers of summary.json and the final tables, against numbers worked out by hand."""

import json
from typing import NamedTuple

from dschat.report.summary import (
    before_and_after,
    grade,
    read_answers,
    read_side_by_side,
    results_table,
    summarize,
    win_rate,
)

import pytest


class Verdict(NamedTuple):
    score: float
    correct: bool


def judge(question, answer):
    return Verdict(len(answer) - len(question), answer == question)


def rows(*responses, score=1.0):
    return [
        {"prompt": "abc"[:n], "response": text, "score": None if score is None else score * n}
        for n, text in enumerate(responses, 1)
    ]


def write(path, *lines):
    with open(path, "w") as file:
        for step, kind, group in lines:
            for row in group:
                file.write(json.dumps({"step": step, "kind": kind} | row) + "\n")
    return path


def test_a_win_counts_one_and_a_tie_half():
    # 2 wins, 1 tie, 1 loss: 2.5 of 4. Wilson with z² = 3.841459: centre (0.625 + 0.480182) / 1.960365 = 0.563764,
    # half width 1.959964 · sqrt(0.625 · 0.375 / 4 + 3.841459 / 64) / 1.960365 = 0.344338
    assert win_rate([2.0, 0.5, 1.0, -1.0], [1.0, 0.0, 1.0, 0.0]) == {
        "value": 0.625,
        "ci95": [0.2194, 0.9081],
        "num_prompts": 4,
    }
    assert win_rate([0.0, 0.0], [0.0, 0.0])["value"] == 0.5
    assert win_rate([0.0], [1.0])["value"] == 0.0


def test_scores_of_different_prompts_are_not_compared():
    with pytest.raises(ValueError):
        win_rate([1.0], [1.0, 2.0])


def test_answers_are_those_before_training_and_after_it(tmp_path):
    first, best, middle, last = rows("a"), rows("b"), rows("c"), rows("d")
    groups = [(0, "policy", first), (0, "best_of_4", best), (10, "policy", middle), (12, "policy", last)]
    write(tmp_path / "samples.jsonl", *groups)
    answers = read_answers(tmp_path)
    assert list(answers) == ["sft", "best_of_4", "ppo"]
    assert [answers[name][0]["response"] for name in answers] == ["a", "b", "d"]


def test_answers_to_other_prompts_are_refused(tmp_path):
    write(tmp_path / "samples.jsonl", (0, "policy", rows("a", "b")), (3, "policy", rows("b", "a")[::-1]))
    with pytest.raises(ValueError, match="the same prompts"):
        read_answers(tmp_path)
    write(tmp_path / "samples.jsonl", (0, "policy", rows("a", "b")))
    with pytest.raises(ValueError, match="before and after"):
        read_answers(tmp_path)


def side_by_side(tmp_path, *decodings, **values):
    """The answers of two models, graded as in ``values``: name -> four values, by model and prompt."""
    lines = []
    for decoding in decodings:
        for i, name in enumerate(("x/toy", "y/toy")):
            for k, row in enumerate(rows(f"{name} 1", f"{name} 2", score=None)):
                given = {
                    key: values[key][2 * i + k] if key in values else None for key in ("score", "judge", "correct")
                }
                lines.append({"model": name, "decoding": decoding} | row | given)
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_side_by_side(tmp_path)


def test_answers_of_two_models_side_by_side(tmp_path):
    graded = side_by_side(
        tmp_path, "sample", "greedy", judge=[1.0, 2.0, 3.0, None], correct=[True, False, True, False]
    )
    answers = [[row["response"] for row in graded[name].rows] for name in ("sft", "dpo")]
    assert answers == [["x/toy 1", "x/toy 2"], ["y/toy 1", "y/toy 2"]], "of the first decoding"
    assert [graded[name].scores for name in ("sft", "dpo")] == [[1.0, 2.0], [3.0, None]]
    assert [graded[name].correct for name in ("sft", "dpo")] == [[True, False], [True, False]]


def test_side_by_side_without_a_word_on_correctness_and_by_the_reward(tmp_path):
    runs, seconds = {"sft": {"metrics": {}}, "dpo": REWARD, "answers": {}}, {"total": 1.0}
    by_judge = side_by_side(tmp_path, "greedy", judge=[1.0, 1.0, 2.0, 2.0], score=[5.0, 5.0, 4.0, 4.0])
    summary = summarize(by_judge, runs, None, seconds, 1.0)
    assert summary["judge"] == {"sft": {"mean": 1.0}, "dpo": {"mean": 2.0}}
    assert summary["win_rate"]["dpo_vs_sft"]["value"] == 1.0 and "by" not in summary["win_rate"]["dpo_vs_sft"]
    header, _, sft, dpo = results_table(summary, by_judge).splitlines()[:4]
    assert header.split("  ")[0] == "held-out answers" and "judge" in header and "correct" not in header
    assert dpo.split()[:3] == ["DPO", "2.00", "+4.00"] and sft.split() == ["SFT", "1.00", "+5.00"]
    by_reward = side_by_side(tmp_path, "greedy", score=[5.0, 5.0, 4.0, 4.0])
    summary = summarize(by_reward, runs, None, seconds, 1.0)
    assert "judge" not in summary and summary["win_rate"]["dpo_vs_sft"]["by"] == "reward_model"
    assert "better means a higher score of the reward model" in results_table(summary, by_reward)


def graded(judge):
    answers = {"sft": rows("a", "a", score=1.0), "best_of_8": rows("x", "yy", score=3.0), "ppo": rows("aaa", "a")}
    return {name: grade(group, judge) for name, group in answers.items()}


def graded_dpo(judge):
    answers = {"sft": rows("a", "a", score=None), "dpo": rows("aaa", "a", score=None)}
    return {name: grade(group, judge) for name, group in answers.items()}


REWARD = {
    "metrics": {"eval/accuracy": 0.84, "eval/accuracy_low": 0.80123, "eval/accuracy_high": 0.88, "eval/num_pairs": 9.0}
}
RUNS = {"sft": {"metrics": {}}, "reward": REWARD, "ppo": {"metrics": {"eval/kl_per_seq": 3.14159}}}
QUALITY = {
    "accuracy": 0.84,
    "ci95": [0.8, 0.88],
    "num_pairs": 9,
    "num_bad": 0,
    "baselines": {"length": {"accuracy": 0.61239, "rule": "longer", "ci95": [0.5, 0.7]}},
    "calibration": {"ece": 0.04321},
}
SECONDS = {"sft": 88.06, "reward": 15.0, "ppo": 60.2, "total": 171.9}


def test_the_summary_of_a_judged_task():
    # lengths of answers minus lengths of prompts ("a", "ab"): sft 0 and -1, best 0 and 0, ppo 2 and -1
    assert summarize(graded(judge), RUNS, QUALITY, SECONDS, 1.93333) == {
        "seconds": {"sft": 88.1, "reward": 15.0, "ppo": 60.2, "total": 171.9},
        "reward_accuracy": {"value": 0.84, "ci95": [0.8012, 0.88], "num_pairs": 9},
        "reward_quality": {"weakness": None, "length_only_accuracy": 0.6124, "ece": 0.0432},
        "judge": {
            "sft": {"mean": -0.5, "correct": 0.5},
            "best_of_8": {"mean": 0.0, "correct": 0.0},
            "ppo": {"mean": 0.5, "correct": 0.0},
        },
        # a win and a tie are 1.5 of 2: 0.75 ± … as in the test above with n = 2
        "win_rate": {"ppo_vs_sft": {"value": 0.75, "ci95": [0.1979, 0.9733], "num_prompts": 2}},
        "kl_per_seq": 3.1416,
        "peak_rss_gb": 1.933,
    }


def test_a_reward_model_without_finite_scores_has_no_calibration():
    broken = QUALITY | {"num_bad": 9, "calibration": {"ece": None}}
    quality = summarize(graded(judge), RUNS, broken, SECONDS, 1.9)["reward_quality"]
    assert quality["ece"] is None and "no finite number" in quality["weakness"]


def test_without_a_judge_the_reward_model_decides():
    summary = summarize(graded(None), RUNS, None, SECONDS, 1.9)
    assert "judge" not in summary and "reward_quality" not in summary
    assert summary["win_rate"]["ppo_vs_sft"] == {
        "value": 0.5,
        "ci95": [0.0945, 0.9055],
        "num_prompts": 2,
        "by": "reward_model",
    }
    assert "no judge for this task" in results_table(summary, graded(None))


def test_the_table_has_a_line_for_each_policy_and_each_stage():
    summary = summarize(graded(judge), RUNS, QUALITY, SECONDS, 1.9)
    lines = {line[:24].strip(): line[24:].split("  ") for line in results_table(summary, graded(judge)).splitlines()}
    cells = {name: [cell.strip() for cell in line if cell.strip()] for name, line in lines.items()}
    assert cells["SFT"] == ["-0.50", "50%", "+1.50"]
    assert cells["best of 8 by the reward"][-4:] == ["0.00", "0%", "+4.50", "0.75 (0.20 to 0.97)"]
    assert cells["PPO"] == ["0.50", "0%", "+1.50", "0.75 (0.20 to 0.97)"]
    text = results_table(summary, graded(judge))
    assert "0.84 (0.80 to 0.88)" in text and " 3.14\n" in text and "no judge" not in text
    assert "lengths alone reach" in text and " 0.61\n" in text
    assert [line.split()[-1] for line in text.splitlines() if "seconds" in line] == ["88", "15", "60", "172"]


DPO_RUNS = {"sft": {"metrics": {}}, "dpo": REWARD, "answers": {}}


def test_dpo_has_an_accuracy_of_its_own_and_no_reward_model():
    answers = graded_dpo(judge)
    summary = summarize(answers, DPO_RUNS, None, {"sft": 1.0, "dpo": 2.0, "total": 3.0}, 1.0)
    assert summary == {
        "seconds": {"sft": 1.0, "dpo": 2.0, "total": 3.0},
        "dpo_accuracy": {"value": 0.84, "ci95": [0.8012, 0.88], "num_pairs": 9},
        "judge": {"sft": {"mean": -0.5, "correct": 0.5}, "dpo": {"mean": 0.5, "correct": 0.0}},
        "win_rate": {"dpo_vs_sft": {"value": 0.75, "ci95": [0.1979, 0.9733], "num_prompts": 2}},
        "peak_rss_gb": 1.0,
    }
    text = results_table(summary, answers)
    assert "DPO: accuracy on 9 held-out pairs (95 %)" in text and "reward model" not in text
    assert "\n  DPO [+2.00] aaa\n" in before_and_after(answers)


def test_dpo_without_a_judge_has_answers_only():
    answers = graded_dpo(None)
    summary = summarize(answers, DPO_RUNS, None, {"total": 3.0}, 1.0)
    assert "win_rate" not in summary and "judge" not in summary
    assert "no judge and no reward model for this task" in results_table(summary, answers)
    assert "SFT [no score] a" in before_and_after(answers)


def test_the_answers_shown_are_the_first_ones():
    long = {"prompt": "q", "response": "w " * 400, "score": 0.0}
    policies = {
        "sft": grade([*rows("a", "b", "c"), long] * 2, None),
        "ppo": grade([*rows("d", "e", "f"), long] * 2, None),
    }
    text = before_and_after(policies)
    assert text.startswith("The first 5 held-out prompts (not the best)")
    assert "\n\nabc\n  SFT [+3.00] c\n  PPO [+3.00] f\n" in text
    assert text.count("  SFT [") == 5 and max(map(len, text.splitlines())) < 180
    assert "first 3" in before_and_after({name: grade(rows("a", "b", "c"), None) for name in ("sft", "ppo")})
