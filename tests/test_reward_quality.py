"""The report on a reward model: numbers by hand, brute force over subsets, simulations, corners, files."""

import itertools
import json
import math
from dataclasses import fields, replace

from dschat.errors import UserError
from dschat.report.reward_plots import _errors
from dschat.report.reward_quality import (
    ScoredPairs,
    best_of_n_curve,
    pairs_of_rankings,
    quality_tables,
    read_quality,
    reward_quality,
    weakness,
    write_quality,
)
from dschat.report.statistics import (
    clustered_interval,
    design_effect,
    expected_best_of_n,
    mean_interval,
    spearman,
    wilson_interval,
)

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.filterwarnings("error")
NAN, INF = math.nan, math.inf
PNGS = {"scores.png", "reliability.png", "accuracy_by.png"}


def scored(chosen, rejected, **other) -> ScoredPairs:
    """Pairs of one prompt each, of equal length, from one source, without margins; ``other`` replaces these."""
    n = len(chosen)
    given = {
        "chosen": chosen,
        "rejected": rejected,
        "chosen_len": np.full(n, 5),
        "rejected_len": np.full(n, 5),
        "source": ["toy"] * n,
        "num_turns": np.ones(n, dtype=int),
        "prompt": np.arange(n),
        "margin": np.full(n, NAN),
    } | other
    typed = {name: np.asarray(given[name], dtype=float) for name in ("chosen", "rejected", "margin")}
    whole = ("chosen_len", "rejected_len", "num_turns", "prompt")
    return ScoredPairs(**given | typed | {name: np.asarray(given[name], dtype=int) for name in whole})


def simulated(n: int = 400, skill: float = 1.0) -> ScoredPairs:
    """Score differences spread around ``skill``; lengths, margins, turns and sources of every kind."""
    rng = np.random.default_rng(0)
    return scored(
        rng.normal(skill, 1, n),
        rng.normal(0, 1, n),
        chosen_len=rng.integers(3, 40, n),
        rejected_len=rng.integers(3, 40, n),
        source=[("toy", "hh", r"数据/$\frac$.jsonl")[i % 3] for i in range(n)],
        num_turns=rng.integers(1, 8, n),
        margin=np.where(rng.random(n) < 0.5, NAN, rng.random(n)),
    )


def rows(bins):
    return [(bin["label"], bin["num_pairs"], bin["accuracy"]) for bin in bins]


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_wilson_interval_of_the_textbooks():
    # 7 of 10: (0.397, 0.892) in every table of score intervals; 0 of n: z^2 / (n + z^2).
    assert wilson_interval(7, 10) == pytest.approx((0.39677, 0.89220), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(3.5, 5.0) == pytest.approx(wilson_interval(7 / 2, 10 / 2))


def test_design_effect_by_hand():
    # Mean 0.6, deviations 0.4 0.4 | -0.6 0.4 | -0.6: sums 0.8, -0.2, -0.6; squares 1.04 over 1.2, which is below 1.
    values = np.array([1, 1, 0, 1, 0.0])
    assert design_effect(values, np.array([7, 7, 3, 3, 9])) == 1
    # Both wrong ones together: 0.8, 0.4, -1.2; squares 2.24 over 1.2.
    assert design_effect(values, np.array([7, 7, 3, 9, 3])) == pytest.approx(2.24 / 1.2)
    # Nothing to estimate from: full dependence, (2^2 + 3^2) / 5, and one cluster of 5.
    assert design_effect(np.ones(5), np.array([0, 0, 1, 1, 1])) == pytest.approx(13 / 5)
    assert design_effect(values, np.zeros(5)) == 5
    assert design_effect(np.ones(5), np.arange(5)) == 1
    assert design_effect(np.zeros(0), np.zeros(0)) == 1


def test_the_interval_of_single_pairs_is_wilsons_and_of_doubled_ones_that_of_half():
    values = np.array([1, 1, 0, 0.5, 1, 0, 1.0])
    expected = wilson_interval(4.5, 7)
    assert clustered_interval(values, np.arange(7)) == pytest.approx(expected, rel=1e-12)
    assert clustered_interval(values.repeat(2), np.arange(7).repeat(2)) == pytest.approx(expected, rel=1e-12)
    assert clustered_interval(np.ones(12), np.arange(4).repeat(3)) == pytest.approx(wilson_interval(4, 4))
    assert clustered_interval(np.zeros(0), np.zeros(0)) == (0, 1)


def test_mean_interval_by_hand():
    # Mean 2, variance ((1 + 0 + 1) / 2) = 1 over 3.
    reach = 1.959964 / math.sqrt(3)
    assert mean_interval(np.array([1.0, 2, 3])) == pytest.approx((2 - reach, 2 + reach))
    assert all(map(math.isnan, mean_interval(np.array([1.0]))))


def test_spearman_by_hand():
    assert spearman(np.array([1, 5, 3.0]), np.array([10, 1000, 20])) == pytest.approx(1)
    assert spearman(np.array([1, 5, 3.0]), np.array([9, 1, 2])) == pytest.approx(-1)
    # Ranks 0 1.5 1.5 3 and 0 1 2 3: centred products -1.5 * -1.5 + 0 + 0 + 1.5 * 1.5 over sqrt(4.5 * 5).
    assert spearman(np.array([0, 4, 4, 7.0]), np.array([1, 2, 3, 4])) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(spearman(np.ones(3), np.arange(3)))
    assert math.isnan(spearman(np.zeros(0), np.zeros(0)))


# ---- pairs of rankings ----------------------------------------------------------------------------------------------


def test_pairs_of_rankings_with_ties():
    records = [
        {"ranks": [2, 1, 2, 3], "lengths": [4, 5, 6, 7], "source": "a", "num_turns": 2, "margin": 0.0, "prompt": 5},
        {"ranks": [1, 1], "lengths": [1, 1], "source": "a", "num_turns": 1, "margin": 1.0, "prompt": 6},  # a tie
        {"ranks": [2, 1], "lengths": [8, 9], "source": "b", "num_turns": 3, "margin": 0.5, "prompt": 7},
    ]
    scores = np.array([[0.0, 1, 2, 3], [9, 9, NAN, NAN], [20, 21, NAN, INF]])
    pairs = pairs_of_rankings(records, scores)
    found = {(p, c, r) for p, c, r in zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)}
    assert found == {(5, 0, 3), (5, 1, 0), (5, 1, 2), (5, 1, 3), (5, 2, 3), (7, 21, 20)}
    assert len(pairs.chosen) == 6
    length_of = {0: 4, 1: 5, 2: 6, 3: 7, 20: 8, 21: 9}  # by score
    assert pairs.chosen_len.tolist() == [length_of[score] for score in pairs.chosen]
    assert pairs.rejected_len.tolist() == [length_of[score] for score in pairs.rejected]
    of_b = pairs.prompt == 7
    assert list(pairs.source) == ["b" if b else "a" for b in of_b]
    assert pairs.num_turns.tolist() == [3 if b else 2 for b in of_b]
    np.testing.assert_array_equal(pairs.margin, np.where(of_b, 0.5, NAN))
    assert pairs.chosen.dtype == pairs.margin.dtype == np.float64


def test_no_rankings_are_no_pairs():
    pairs = pairs_of_rankings([], np.zeros((0, 2)))
    assert all(len(getattr(pairs, field.name)) == 0 for field in fields(pairs))
    with pytest.raises(AssertionError, match="0 rows"):
        pairs_of_rankings([], np.zeros((1, 2)))


# ---- the report -----------------------------------------------------------------------------------------------------


def test_accuracy_and_counts_by_hand():
    # Right, wrong, a tie, right; two prompts.
    quality = reward_quality(scored([2, 0, 1, 5], [1, 3, 1, 1], prompt=[0, 0, 1, 1]))
    assert quality["accuracy"] == 2.5 / 4
    assert (quality["num_pairs"], quality["num_prompts"], quality["ties"], quality["num_bad"]) == (4, 2, 1, 0)
    assert quality["margin"] == (1 - 3 + 0 + 4) / 4
    # Deviations 0.375 -0.625 | -0.125 0.375: sums -0.25 and 0.25, squares 0.125 over 0.6875: less than independent.
    assert quality["num_effective_pairs"] == 4
    assert quality["ci95"] == pytest.approx(wilson_interval(2.5, 4))
    assert quality["baselines"]["chance"]["accuracy"] == 0.5
    assert quality["baselines"]["chance"]["ci95"] == pytest.approx([0.5 - 0.489991, 0.5 + 0.489991])


def test_pairs_of_one_prompt_that_agree_are_worth_fewer():
    rng = np.random.default_rng(1)
    single = scored(rng.normal(0.3, 1, 150), np.zeros(150))
    doubled = {field.name: np.repeat(getattr(single, field.name), 2, axis=0) for field in fields(single)}
    one, two = reward_quality(single), reward_quality(ScoredPairs(**doubled))
    assert two["num_effective_pairs"] == pytest.approx(150)
    assert two["ci95"] == pytest.approx(one["ci95"])
    assert two["baselines"]["chance"]["ci95"] == pytest.approx(one["baselines"]["chance"]["ci95"])
    assert two["accuracy"] == pytest.approx(one["accuracy"])


def test_chance_of_one_pair_covers_everything():
    assert reward_quality(scored([1], [0]))["baselines"]["chance"]["ci95"] == [0, 1]


@pytest.mark.parametrize("right", range(0, 41, 4))
def test_chance_covers_the_accuracy_exactly_when_its_interval_covers_a_half(right):
    quality = reward_quality(scored(np.arange(40) < right, np.full(40, 0.5)))
    low, high = quality["baselines"]["chance"]["ci95"]
    assert (low <= quality["accuracy"] <= high) == (quality["ci95"][0] <= 0.5 <= quality["ci95"][1])


def test_groups_by_hand():
    quality = reward_quality(
        scored(
            [1, 2, 0, 0, 3, 0, 7.0],
            [0, 0, 1, 3, 0, 0, 2.0],
            chosen_len=[9, 5, 3, 5, 5, 8, 5],
            rejected_len=[5, 6, 5, 5, 14, 5, 6],  # rejected - chosen: -4 1 2 0 9 -3 1, median size of the six 2.5
            source=["b", "a", "b", "b", "b", "b", "b"],
            num_turns=[1, 1, 2, 5, 9, 5, 1],
            margin=[0.5, NAN, 0.5, 2, 2, 2, NAN],
        )
    )
    by = quality["accuracy_by"]
    assert rows(by["length_difference"]) == [
        ("chosen longer by over 2", 2, 0.75),
        ("equal", 1, 0),
        ("rejected longer by 1 to 2", 3, pytest.approx(2 / 3)),
        ("rejected longer by over 2", 1, 1),
    ]
    assert rows(by["source"]) == [("a", 1, 1), ("b", 6, pytest.approx(3.5 / 6))]
    assert rows(by["num_turns"]) == [("1", 3, 1), ("2", 1, 0), ("5 or more", 3, 0.5)]
    assert rows(by["label_margin"]) == [("0.5", 2, 0.5), ("2", 3, 0.5)]
    assert rows(by["score_difference"]) == [("0", 1, 0.5), ("1", 2, 0.5), ("2", 1, 1), ("3", 2, 0.5), ("5", 1, 1)]
    assert by["source"][1]["ci95"] == pytest.approx(wilson_interval(3.5, 6))


def test_length_bins_where_one_token_is_usual():
    lengths = [5, 5, 5, 5, 5, 6, 4, 3, 9]
    quality = reward_quality(scored(np.ones(9), np.zeros(9), chosen_len=lengths))
    names = [(bin["label"], bin["num_pairs"]) for bin in quality["accuracy_by"]["length_difference"]]
    # Sizes that are not 0: 1 1 2 4, of which the median is 1.5.
    assert names == [
        ("chosen longer by over 1", 1),
        ("chosen longer by 1", 1),
        ("equal", 5),
        ("rejected longer by 1", 1),
        ("rejected longer by over 1", 1),
    ]


def test_many_values_fall_into_bins_of_equal_size():
    # Differences 1 to 10, all but the smallest two right.
    quality = reward_quality(scored([0, 0, *range(3, 11)], [1, 2, *[0] * 8], margin=np.arange(10.0, 0, -1)))
    expected = [("1 to 2.8", 2, 0), ("2.8 to 4.6", 2, 1), ("4.6 to 6.4", 2, 1), ("6.4 to 8.2", 2, 1)]
    assert rows(quality["accuracy_by"]["score_difference"]) == [*expected, ("8.2 to 10", 2, 1)]
    by_margin = quality["accuracy_by"]["label_margin"]
    assert [bin["num_pairs"] for bin in by_margin] == [2] * 5
    assert [bin["accuracy"] for bin in by_margin] == [1, 1, 1, 1, 0]
    # A value on an edge belongs to the bin above it, the largest to the last.
    edges = reward_quality(scored(np.arange(6), np.zeros(6)))["accuracy_by"]["score_difference"]
    assert [bin["num_pairs"] for bin in edges][:2] == [1, 1]
    assert edges[-1]["label"] == "4 to 5" and edges[-1]["num_pairs"] == 2
    # Ties in the values join their bins; every pair is in one.
    heaped = reward_quality(scored([*[1] * 20, *range(2, 12)], np.zeros(30)))["accuracy_by"]["score_difference"]
    assert sum(bin["num_pairs"] for bin in heaped) == 30
    assert len(heaped) < 5


def test_bins_of_one_prompt_know_that_they_depend_on_each_other():
    quality = reward_quality(scored(np.arange(6.0), [2.5] * 6, prompt=[0] * 6, source=["a"] * 3 + ["b"] * 3))
    (first, second) = quality["accuracy_by"]["source"]
    assert (first["accuracy"], second["accuracy"]) == (0, 1)
    assert second["ci95"] == pytest.approx(wilson_interval(1, 1))
    (bin,) = (bin for bin in quality["calibration"]["bins"] if bin["num_pairs"] == 2 and bin["confidence"] > 0.9)
    assert bin["ci95"] == pytest.approx(wilson_interval(0.5, 1))


def test_calibration_by_hand():
    # sigmoid of ln 2, ln 2, -ln 2 and ln 8 is 2/3, 2/3, 1/3 and 8/9: three are sure to 2/3, of which two are right.
    quality = reward_quality(scored(np.log([2, 2, 1, 8]), np.log([1, 1, 2, 1])))
    fit = quality["calibration"]
    assert rows(fit["bins"]) == [("0.65 to 0.70", 3, pytest.approx(2 / 3)), ("0.85 to 0.90", 1, 1)]
    assert [bin["confidence"] for bin in fit["bins"]] == pytest.approx([2 / 3, 8 / 9])
    assert fit["ece"] == pytest.approx((3 * 0 + 1 / 9) / 4)
    assert fit["log_loss"] == pytest.approx((2 * math.log(3 / 2) + math.log(3) + math.log(9 / 8)) / 4)
    assert fit["log_loss_of_chance"] == pytest.approx(0.693147, abs=1e-6)
    assert fit["bins"][0]["ci95"] == pytest.approx(wilson_interval(2, 3))


def test_scores_that_are_the_true_log_odds_are_calibrated_and_doubled_ones_are_not():
    rng = np.random.default_rng(2)
    logits = np.abs(rng.normal(0, 1.5, 40000))
    right = rng.random(len(logits)) < 1 / (1 + np.exp(-logits))
    chosen = np.where(right, logits, -logits)
    fit = reward_quality(scored(chosen, np.zeros(len(chosen))))["calibration"]
    assert fit["ece"] < 0.01
    assert sum(bin["num_pairs"] for bin in fit["bins"]) == 40000
    assert len(fit["bins"]) == 10
    doubled = reward_quality(scored(2 * chosen, np.zeros(len(chosen))))["calibration"]
    assert doubled["ece"] > 0.08
    assert doubled["log_loss"] > fit["log_loss"]


def test_scores_that_are_all_equal_have_the_loss_of_chance_and_no_error():
    quality = reward_quality(scored(np.full(9, 3.0), np.full(9, 3.0)))
    assert (quality["accuracy"], quality["ties"], quality["calibration"]["ece"]) == (0.5, 9, 0)
    assert quality["calibration"]["log_loss"] == pytest.approx(math.log(2))
    assert quality["length_correlation"] is None


@pytest.mark.parametrize("score", [0.0, -3.0, 3e38])
def test_one_score_for_all_has_a_histogram(score):
    scores = reward_quality(scored([score] * 3, [score] * 3))["scores"]
    assert np.all(np.diff(scores["edges"]) > 0)
    assert scores["edges"][0] < score < scores["edges"][-1]
    assert [sum(scores[name]["counts"]) for name in ("chosen", "rejected")] == [3, 3]
    assert scores["chosen"]["mean"] == pytest.approx(score)
    assert scores["chosen"]["std"] == pytest.approx(0, abs=1e-12 * abs(score))


def test_the_length_baseline_takes_the_better_rule():
    lengths = {"chosen_len": [2, 9, 9, 3, 4], "rejected_len": [1, 8, 1, 4, 4]}
    length = reward_quality(scored(np.ones(5), np.zeros(5), **lengths))["baselines"]["length"]
    assert (length["rule"], length["accuracy"]) == ("longer", 3.5 / 5)
    assert length["ci95"] == pytest.approx(wilson_interval(3.5, 5))
    swapped = {"chosen_len": lengths["rejected_len"], "rejected_len": lengths["chosen_len"]}
    length = reward_quality(scored(np.ones(5), np.zeros(5), **swapped))["baselines"]["length"]
    assert (length["rule"], length["accuracy"]) == ("shorter", 3.5 / 5)
    close = reward_quality(scored(np.ones(5), np.zeros(5), chosen_len=[6, 6, 4, 4, 4]))["baselines"]["length"]
    assert (close["rule"], close["accuracy"]) == ("shorter", 3 / 5)


def test_length_correlation_is_over_all_answers():
    # Lengths 1 2 3 4 and scores 1 2 4 3 over chosen and rejected: 1 - 6 * 2 / (4 * 15).
    quality = reward_quality(scored([1, 4], [2, 3], chosen_len=[1, 3], rejected_len=[2, 4]))
    assert quality["length_correlation"] == pytest.approx(0.8)


def test_score_distribution_by_hand():
    for sign, first, second in ((1, "chosen", "rejected"), (-1, "rejected", "chosen")):
        sides = ([1.0, 2, 3, 4, 5], [-1.0, -1, 0.05, 0, 0])[::sign]
        scores = reward_quality(scored(*sides))["scores"]
        assert scores[first]["mean"] == 3
        assert scores[first]["std"] == pytest.approx(math.sqrt(2))
        quantiles = {"0.05": 1.2, "0.25": 2, "0.5": 3, "0.75": 4, "0.95": 4.8}
        assert scores[first]["quantiles"] == pytest.approx(quantiles)
        assert scores["edges"] == pytest.approx([-1 + i / 5 for i in range(31)])
        assert scores[second]["counts"][0] == 2
        assert scores[second]["counts"][4] + scores[second]["counts"][5] == 3  # 0 is an edge
        assert scores[first]["counts"][-1] == 1  # the last edge belongs to its bin
        assert [sum(scores[name]["counts"]) for name in (first, second)] == [5, 5]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e39])
def test_scores_that_are_no_numbers_are_wrong_and_left_out_of_means(bad):
    quality = reward_quality(scored([2, bad, 5, 9], [1, 0, bad, bad]))
    assert (quality["accuracy"], quality["num_bad"], quality["ties"], quality["num_pairs"]) == (0.25, 3, 0, 4)
    assert quality["margin"] == 1
    assert quality["scores"]["chosen"]["mean"] == 2
    assert quality["scores"]["rejected"]["mean"] == 1
    assert quality["calibration"]["bins"][0]["num_pairs"] == 1
    assert rows(quality["accuracy_by"]["score_difference"]) == [("1", 1, 1)]
    assert rows(quality["accuracy_by"]["source"]) == [("toy", 4, 0.25)]
    assert quality["baselines"]["length"]["num_pairs"] == 4
    assert weakness(quality) == "3 of 4 held-out pairs have a score that is no finite number"


def test_huge_scores(tmp_path):
    huge = float(np.finfo(np.float32).max)
    quality = reward_quality(scored([huge, huge, -huge, 1], [-huge, huge, huge, 0]))
    assert quality["accuracy"] == 2.5 / 4
    assert quality["num_bad"] == 0
    assert quality["calibration"]["log_loss"] == pytest.approx(huge / 2)
    write_quality(quality, tmp_path)
    assert read_quality(tmp_path) == quality


def test_no_pairs(tmp_path):
    quality = reward_quality(scored([], []))
    assert (quality["num_pairs"], quality["num_prompts"], quality["accuracy"], quality["margin"]) == (0, 0, None, None)
    assert quality["ci95"] == [0, 1]
    assert quality["baselines"]["chance"]["ci95"] == [0, 1]
    assert quality["calibration"] == {"bins": [], "ece": None, "log_loss": None, "log_loss_of_chance": math.log(2)}
    assert quality["accuracy_by"] == {name: [] for name in quality["accuracy_by"]}
    assert weakness(quality) == "no held-out pairs to judge it by"
    assert quality_tables(quality).endswith("verdict: weak; no held-out pairs to judge it by")
    write_quality(quality, tmp_path)
    assert read_quality(tmp_path) == quality
    assert {path.name for path in tmp_path.iterdir()} == {"quality.json"}


def test_only_bad_pairs(tmp_path):
    quality = reward_quality(scored([NAN, INF], [0, 0]))
    assert (quality["accuracy"], quality["margin"], quality["scores"]["chosen"]) == (0, None, None)
    write_quality(quality, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"quality.json", "accuracy_by.png"}


def test_the_order_of_the_pairs_and_a_shift_of_all_scores_change_nothing():
    pairs = simulated()
    order = np.random.default_rng(3).permutation(len(pairs.chosen))
    shuffled = {field.name: np.asarray(getattr(pairs, field.name))[order] for field in fields(pairs)}
    one, two = reward_quality(pairs), reward_quality(ScoredPairs(**shuffled))
    for name, bins in one["accuracy_by"].items():
        assert rows(bins) == rows(two["accuracy_by"][name]), name
    assert one["ci95"] == pytest.approx(two["ci95"])
    assert one["calibration"]["ece"] == pytest.approx(two["calibration"]["ece"])
    shifted = reward_quality(replace(pairs, chosen=pairs.chosen + 8, rejected=pairs.rejected + 8))
    for name, bins in one["accuracy_by"].items():
        assert rows(bins) == rows(shifted["accuracy_by"][name]), name
    assert shifted["margin"] == pytest.approx(one["margin"])
    assert shifted["length_correlation"] == pytest.approx(one["length_correlation"])


# ---- weakness -------------------------------------------------------------------------------------------------------


def test_a_good_reward_model_is_not_weak():
    quality = reward_quality(simulated())
    assert weakness(quality) is None
    assert quality_tables(quality).splitlines()[-1] == "verdict: better than chance and than length alone"


def test_random_scores_are_weak():
    reasons = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        quality = reward_quality(scored(rng.normal(size=299), rng.normal(size=299)))
        reasons.append(weakness(quality) or "")
    assert sum(not reason for reason in reasons) <= 5  # by chance one in forty
    # 143 of 299 are right.
    quality = reward_quality(scored(np.arange(299) < 143, np.full(299, 0.5)))
    expected = "accuracy 0.48 (95 %: 0.42 to 0.53) on 299 held-out pairs cannot be told from chance"
    assert weakness(quality) == expected


@pytest.mark.parametrize(
    ("right", "reason"),
    [  # of 100; a half lies in Wilson's interval from 41 to 59
        (40, "below chance; chosen and rejected may be swapped"),
        (41, "cannot be told from chance"),
        (59, "cannot be told from chance"),
        (60, None),
    ],
)
def test_weak_where_the_interval_holds_a_half(right, reason):
    found = weakness(reward_quality(scored(np.arange(100) < right, np.full(100, 0.5))))
    assert (found is None) == (reason is None)
    assert reason is None or reason in found


def test_a_score_that_is_length_only_is_weak():
    rng = np.random.default_rng(5)
    chosen_len, rejected_len = rng.integers(20, 60, 300), rng.integers(10, 50, 300)
    for sign, rule in ((1, "longer"), (-1, "shorter")):
        sides = (chosen_len, rejected_len)[::sign]
        pairs = scored(sign * sides[0], sign * sides[1], chosen_len=sides[0], rejected_len=sides[1])
        quality = reward_quality(pairs)
        assert quality["accuracy"] == quality["baselines"]["length"]["accuracy"] > 0.7
        assert weakness(quality).endswith(f"is no better than taking the {rule} answer, {quality['accuracy']:.2f}")
        # One more right than length has.
        wrong = np.flatnonzero(pairs.chosen < pairs.rejected)[0]
        better = pairs.chosen.copy()
        better[wrong] = pairs.rejected[wrong] + 1
        assert weakness(reward_quality(replace(pairs, chosen=better))) is None


# ---- tables and files -----------------------------------------------------------------------------------------------


def test_tables_say_what_the_report_holds():
    curve = [{"n": 1, "judge": 0.25, "low": 0.125, "high": 0.375, "ceiling": 0.25, "num_prompts": 9}]
    curve.append({"n": 2, "judge": None, "low": None, "high": None, "ceiling": None, "num_prompts": 0})
    long = "a/very/long/path/to/the/pairs/of/somebody.jsonl"
    other = {"source": ["toy", long, long[-34:], long], "chosen_len": [7, 5, 5, 4], "margin": [1, 1, 2, NAN]}
    pairs = scored([3, 2, 0, 1.0], [1, 1, 1, 1.0], **other)
    text = quality_tables(reward_quality(pairs, padding_gap=2.5e-6, best_of_n=curve))
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert ["reward model", "4", "0.62 (0.22 to 0.91)"] in cells
    assert ["the longer answer", "4", "0.50 (0.15 to 0.85)"] in cells
    assert ["chance", "0.50 (0.01 to 0.99)"] in cells
    assert ["by source"] in cells
    assert ["…" + long[-33:], "2", "0.75 (0.20 to 0.97)"] in cells
    assert ["toy", "1", "1.00 (0.21 to 1.00)"] in cells
    assert [long[-34:], "1", "0.00 (0.00 to 0.79)"] in cells
    assert ["by margin of the label"] in cells
    assert ["by user turns"] not in cells  # one bin
    # Chosen 3 2 0 1, spread sqrt(5 / 4); ranks of scores 7 6 0 and five times 3, of lengths 7 0 and six times 3.5.
    assert (
        "scores: chosen +1.5 (std 1.12), rejected +1 (std 0), margin +0.5, rank correlation with length 0.50" in text
    )
    # Confidences sigmoid(2) and sigmoid(1) twice, one of these wrong, and a tie, which is never off.
    assert "calibration: expected error 0.145, loss 0.612 nats (a coin: 0.693)" in text
    assert "4 pairs of 4 prompts are worth 4 independent ones; ties 1" in text
    assert "padding moves a score by at most 2.5e-06" in text
    assert ["best of 1", "0.25 (0.12 to 0.38)", "0.25"] in cells
    assert ["best of 2", "-", "-"] in cells
    assert max(map(len, text.splitlines())) <= 119
    assert text.splitlines()[-1].startswith("verdict: weak; accuracy 0.62 (95 %: 0.22 to 0.91) on 4 held-out pairs")


def test_what_is_written_is_read(tmp_path):
    assert read_quality(tmp_path) is None
    assert read_quality(tmp_path / "nowhere") is None
    rng = np.random.default_rng(6)
    judged = rng.normal(size=(20, 8))
    curve = best_of_n_curve(judged + rng.normal(size=judged.shape), judged, [1, 2, 4, 8, 16])
    quality = reward_quality(simulated(), padding_gap=np.float32(1e-6), best_of_n=curve)
    folder = tmp_path / "new" / "quality"
    write_quality(quality, str(folder))
    assert read_quality(str(folder)) == quality
    assert {path.name for path in folder.iterdir()} == PNGS | {"quality.json", "best_of_n.png"}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert min(pixels.shape) > 400
        assert 0.02 < (pixels < 250).mean() < 0.6, path  # something is drawn, and not everywhere
    write_quality(reward_quality(simulated()), folder)  # a later report without a curve
    assert {path.name for path in folder.iterdir()} == PNGS | {"quality.json"}


def test_pictures_at_the_corners(tmp_path):
    # All right: the upper ends of some intervals miss 1 by rounding; no error bar may be negative.
    parts = [{"accuracy": 1, "ci95": wilson_interval(n, n)} for n in range(1, 41)]
    parts += [{"accuracy": 0, "ci95": (1e-17, 0.5)}]
    assert any(part["ci95"][1] < 1 for part in parts[:40])
    assert all(end >= 0 for ends in _errors(parts) for end in ends)
    # A curve over one prompt has no interval, one over no prompt no picture.
    for judged, pictures in ((np.arange(4.0).reshape(1, 4), PNGS | {"best_of_n.png"}), (np.zeros((0, 4)), PNGS)):
        curve = best_of_n_curve(judged, judged, [1, 2, 4])
        write_quality(reward_quality(simulated(), best_of_n=curve), tmp_path)
        assert {path.name for path in tmp_path.glob("*.png")} == pictures


def test_numbers_of_a_report_are_plain_json_without_nan():
    curve = [{"n": 1, "judge": np.float64(NAN), "low": -INF, "high": np.float32(0.5), "num_prompts": np.int64(3)}]
    quality = reward_quality(simulated(), padding_gap=NAN, best_of_n=curve)
    assert quality["padding_gap"] is None
    assert quality["best_of_n"] == [{"n": 1, "judge": None, "low": None, "high": 0.5, "num_prompts": 3}]
    assert json.loads(json.dumps(quality, allow_nan=False)) == quality


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"num_pairs": 3}', '{"num_pairs": "x"}', "\udcff"],
    ids=lambda text: text or "-",
)
def test_a_damaged_report_is_a_users_mistake(tmp_path, text):
    (tmp_path / "quality.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"quality\.json: not a report on a reward model; remove it"):
        read_quality(tmp_path)


def test_a_report_with_a_part_missing_is_damaged(tmp_path):
    whole = reward_quality(simulated())
    for name in ("accuracy", "ci95", "baselines", "num_bad", "scores"):
        (tmp_path / "quality.json").write_text(json.dumps({key: whole[key] for key in whole if key != name}))
        with pytest.raises(UserError):
            read_quality(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_quality(reward_quality(simulated()), tmp_path / "file" / "quality")


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    old = reward_quality(simulated())
    write_quality(old, tmp_path)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_quality(reward_quality(simulated(50)), tmp_path)
    assert read_quality(tmp_path) == old


# ---- best of n ------------------------------------------------------------------------------------------------------


def brute_force(rewards, judged, n) -> float:
    """The mean over all subsets of the judge's mean over the samples of the largest reward."""
    values = []
    for subset in itertools.combinations(range(len(rewards)), n):
        top = max(rewards[i] for i in subset)
        values.append(np.mean([judged[i] for i in subset if rewards[i] == top]))
    return float(np.mean(values))


@pytest.mark.parametrize("n", range(1, 8))
def test_expected_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(n)
    rewards, judged = rng.normal(size=7), rng.normal(size=7)
    assert expected_best_of_n(rewards, judged, n) == pytest.approx(brute_force(rewards, judged, n))
    assert expected_best_of_n(np.zeros(7), judged, n) == pytest.approx(judged.mean())


@pytest.mark.parametrize("n", range(1, 7))
def test_expected_best_of_n_with_ties_is_the_mean_over_all_orders(n):
    """Ties broken at random: the mean over all ways to tell the tied ones apart."""
    rewards, judged = np.array([0, 1, 1, 1, 2, 2.0]), np.array([5.0, 1, -2, 4, 0, 3])
    orders = [
        [0, *first, *last] for first in itertools.permutations((1, 2, 3)) for last in itertools.permutations((4, 5))
    ]
    expected = np.mean([brute_force(np.argsort(order), judged, n) for order in orders])
    assert expected_best_of_n(rewards, judged, n) == pytest.approx(expected)


def test_best_of_n_curve_by_hand():
    # Best of 2 of three: the top one in two subsets of three, the middle one in one.
    curve = best_of_n_curve(np.array([[1, 2, 3], [3, 2, 1.0]]), np.array([[3, 6, 9], [0, 3, 0.0]]), [1, 2, 3])
    assert [row["n"] for row in curve] == [1, 2, 3]
    assert [row["judge"] for row in curve] == pytest.approx([(6 + 1) / 2, (8 + 1) / 2, (9 + 0) / 2])
    assert [row["ceiling"] for row in curve] == pytest.approx([(6 + 1) / 2, (8 + 2) / 2, (9 + 3) / 2])
    # Prompts at 8 and 1: standard deviation 7 / sqrt 2, over sqrt 2.
    assert (curve[1]["low"], curve[1]["high"]) == pytest.approx((4.5 - 1.959964 * 3.5, 4.5 + 1.959964 * 3.5))
    assert all(row["num_prompts"] == 2 for row in curve)


def test_best_of_n_curve_leaves_out_what_has_no_score():
    rewards = np.array([[1, NAN, 3, 9.0], [4, 3, 2, 1]])
    judged = np.array([[5, 99, 7, INF], [1, 2, 3, 5.0]])
    curve = best_of_n_curve(rewards, judged, [1, 2, 3, 5])
    assert [row["judge"] for row in curve[:3]] == pytest.approx(
        [(6 + 2.75) / 2, (7 + brute_force(rewards[1], judged[1], 2)) / 2, brute_force(rewards[1], judged[1], 3)]
    )
    assert [row["num_prompts"] for row in curve] == [2, 2, 1, 0]
    assert (curve[2]["low"], curve[2]["high"]) == (None, None)
    assert curve[3] == {"n": 5, "judge": None, "low": None, "high": None, "ceiling": None, "num_prompts": 0}
    assert best_of_n_curve(np.zeros((0, 4)), np.zeros((0, 4)), [1])[0]["num_prompts"] == 0
    with pytest.raises(AssertionError, match="judgements"):
        best_of_n_curve(np.zeros((2, 4)), np.zeros((2, 1)), [1])


def test_a_reward_that_is_the_judge_reaches_the_ceiling_and_its_opposite_falls():
    judged = np.random.default_rng(7).normal(size=(30, 64))
    with_judge = best_of_n_curve(judged, judged, [1, 4, 16, 64])
    assert all(row["judge"] == row["ceiling"] for row in with_judge)
    assert with_judge[3]["judge"] == pytest.approx(judged.max(axis=1).mean())
    against = best_of_n_curve(-judged, judged, [1, 4, 16, 64])
    values = [row["judge"] for row in against]
    assert values == sorted(values, reverse=True)
    assert against[0]["judge"] == pytest.approx(judged.mean())


def test_many_samples():
    judged = np.random.default_rng(8).normal(size=(1, 1100))
    (row,) = best_of_n_curve(judged, judged, [550])  # C(1100, 550) is beyond any float
    assert judged.mean() < row["judge"] <= judged.max()
