"""The preflight: its figures by hand and by brute force, its verdicts, the command, and step 3's first act."""

import json
import math
from pathlib import Path

from dschat.errors import UserError
from dschat.report import preflight as program
from dschat.report.preflight_figures import assemble, choose, figures, verdict
from dschat.report.preflight_text import preflight_text
from dschat.rlhf.preflight import describe
from dschat.rlhf.rollout import Sampling
from tests.programs import run

import pytest
import torch


def answer(text: str, score: float | None, entropy: list[float], finished: bool = True, ids: list[int] | None = None):
    columns = {"entropy": entropy, "top": [0.5] * len(entropy), "sampled": [0.25] * len(entropy)}
    columns |= {"plausible": [3.0] * len(entropy), "nucleus": [2.0] * len(entropy)}
    return {"text": text, "ids": ids or [1, 2, 3][: len(entropy)], "finished": finished, "score": score} | columns


def test_the_figures_by_hand():
    """Two prompts, two answers each: scores 1 and 3, 10 and 10."""
    answers = [
        answer("a", 1.0, [1.0, 2.0]),
        answer("b", 3.0, [3.0]),
        answer("c", 10.0, [0.5, 0.5, 0.5], finished=False),
        answer("c", 10.0, [1.0]),
    ]
    found = figures(answers, 2)
    assert found["entropy"] == pytest.approx((1 + 2 + 3 + 1.5 + 1) / 7)
    assert found["entropy_per_answer"] == pytest.approx((3 + 3 + 1.5 + 1) / 4)
    assert found["effective_answers"] == pytest.approx(math.exp(8.5 / 4))
    assert found["entropy_by_position"] == pytest.approx([(1 + 3 + 0.5 + 1) / 4, (2 + 0.5) / 2, 0.5])
    assert (found["score_mean"], found["finished"], found["distinct_answers"]) == (6.0, 0.75, 0.75)
    assert found["score_std_within"] == pytest.approx(math.sqrt((1 + 1 + 0 + 0) / 4))
    assert found["score_std_between"] == pytest.approx(4.0)  # of the means 2 and 10
    assert found["score_std"] ** 2 == pytest.approx(found["score_std_within"] ** 2 + found["score_std_between"] ** 2)
    assert found["normalised_scores"] == [5.0, 7.0, 6.0, 6.0]  # score - mean of the prompt + mean of all
    assert found["no_spread"] == 0.5 and found["unscored"] == 0.0
    assert found["distinct_1"] == pytest.approx(3 / 7) and found["length"] == 7 / 4
    assert found["plausible_tokens"] == 3.0 and found["nucleus_tokens"] == 2.0


def test_answers_without_a_score():
    found = figures([answer("a", None, [1.0]), answer("b", None, [1.0])], 2)
    assert found["score_mean"] is None and found["no_spread"] is None and found["unscored"] == 1.0
    assert verdict(found)[0] == "STOP" and "no finite score" in verdict(found)[1][0]
    assert json.dumps(assemble([{"name": "x", "path": "", "prompts": found, "training": None}]), allow_nan=False)


def test_what_a_distribution_is_like_by_brute_force():
    torch.manual_seed(0)
    logits, ids = 3 * torch.randn(2, 3, 11), torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = describe(logits, ids, Sampling(3, temperature=0.7, banned_ids=(0, 9)))
    for b in range(2):
        for r in range(3):
            weights = [0.0 if v in (0, 9) else math.exp(logits[b, r, v].item() / 0.7) for v in range(11)]
            p = [w / sum(weights) for w in weights]
            expected = {"entropy": -sum(x * math.log(x) for x in p if x), "top": max(p), "sampled": p[ids[b, r]]}
            total, size = 0.0, 0
            for x in sorted(p, reverse=True):
                total, size = total + x, size + 1
                if total >= 0.9:
                    break
            expected |= {"plausible": sum(x >= 0.01 for x in p), "nucleus": size}
            for name, value in expected.items():
                assert found[name][b, r].item() == pytest.approx(value, rel=1e-4), name


def healthy(**changes) -> dict:
    found = {"entropy": 0.5, "effective_answers": 300.0, "no_spread": 0.0, "finished": 1.0, "unscored": 0.0}
    return found | {"score_mean": 0.0, "score_std_within": 0.7} | changes


@pytest.mark.parametrize(
    ("changes", "level", "reason"),
    [
        ({}, "GO", ""),
        ({"no_spread": 0.72}, "WARN", "72% of prompts have no spread of reward: raise --temperature"),
        ({"no_spread": 0.95}, "STOP", "95% of prompts"),
        ({"effective_answers": 4.2}, "WARN", "chooses among 4.2 answers"),
        ({"effective_answers": 1.2}, "STOP", "too few to learn from"),
        ({"finished": 0.6}, "WARN", "only 60% of the answers end"),
        ({"finished": 0.0}, "STOP", "only 0% of the answers end before the limit"),
        ({"unscored": 0.25}, "WARN", "25% of the answers have no finite score"),
    ],
)
def test_the_verdict_and_its_reason(changes, level, reason):
    found, reasons = verdict(healthy(**changes))
    assert found == level and (reason in reasons[0] if reason else reasons == [])


def test_the_worst_reason_comes_first_and_memory_of_the_training_prompts_warns():
    found, reasons = verdict(healthy(no_spread=0.6, finished=0.0))
    assert found == "STOP" and "answers end" in reasons[0] and "no spread" in reasons[1]
    assert verdict(healthy(), healthy(entropy=0.4))[0] == "GO"
    found, [reason] = verdict(healthy(), healthy(entropy=0.2))
    assert found == "WARN" and "by heart" in reason


def test_which_checkpoint_to_start_from():
    def candidate(level: str, mean: float, spread: float) -> dict:
        return {"verdict": level, "prompts": healthy(score_mean=mean, score_std_within=spread)}

    early, late, best = candidate("GO", 0.0, 1.0), candidate("GO", 0.8, 0.1), candidate("WARN", 2.0, 1.0)
    assert choose([early, late])[0] == 0  # the better one has nowhere to go
    assert choose([late, best])[0] == 0 and "of those that are GO" in choose([late, best])[1]
    assert choose([best])[0] == 0


@pytest.fixture(scope="module")
def models(model_dirs, data_file, cache_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("preflight")
    (root / "rule.py").write_text("def size(responses):\n    return [len(text) / 10 for text in responses]\n")
    return {"sft": model_dirs("llama"), "rule": f"function:{root}/rule.py:size"}


def test_the_command_on_two_policies(models, model_dirs, data_file, cache_dir, tmp_path, capsys):
    argv = ["--model_name_or_path", models["sft"], model_dirs("gpt2"), "--reward", models["rule"], "--data_path"]
    argv += [data_file, "--sft_data_path", data_file, "--data_output_path", cache_dir, "--num_prompts", "3"]
    argv += ["--num_samples", "2", "--max_prompt_seq_len", "48", "--max_answer_seq_len", "4", "--dtype", "fp32"]
    argv += ["--eval_fraction", "0.2"]
    program.main([*argv, "--output_dir", str(tmp_path)])
    text, found = capsys.readouterr().out, json.loads((tmp_path / "preflight.json").read_text())
    assert found["verdict"] in ("WARN", "STOP") and "answers end before the limit" in found["reason"]
    assert [candidate["name"] for candidate in found["candidates"]] == ["llama", "gpt2"]
    for candidate in found["candidates"]:
        assert candidate["prompts"]["num_prompts"] == candidate["training"]["num_prompts"] == 3
        assert candidate["prompts"]["entropy"] > 1 and candidate["prompts"]["score_std"] > 0
    assert preflight_text(found) in text and f"start from {found['start_from']}" in text
    assert (tmp_path / "preflight.png").stat().st_size > 5_000
    with pytest.raises(UserError, match="--num_samples 1"):
        program.main([*argv[:-2], "--num_samples", "1"])
    with pytest.raises(UserError, match="no reward of step 3"):
        program.main([word if word != models["rule"] else "openai:http://127.0.0.1:9/v1#x" for word in argv])


def test_step_3_stops_at_a_policy_that_never_ends_unless_told_otherwise(
    models, data_file, cache_dir, tmp_path, capsys
):
    flags = {"actor_model_name_or_path": models["sft"], "reward": [models["rule"]], "max_answer_seq_len": 4,
             "advantage_estimator": "reinforce_pp", "max_steps": 1, "preflight_prompts": 4}  # fmt: skip
    with pytest.raises(UserError) as error:
        run("ppo", data_file, cache_dir, tmp_path / "stopped", preflight="stop", **flags)
    message = str(error.value)
    assert "answers end before the limit" in message and "--preflight warn" in message and "\n" not in message
    assert not (tmp_path / "stopped/actor").exists()
    saved = {}
    for mode in ("warn", "off"):
        out = Path(run("ppo", data_file, cache_dir, tmp_path / mode, preflight=mode, **flags))
        saved[mode] = (out / "actor/model.safetensors").read_bytes()
        assert (out / "preflight.json").is_file() == (mode == "warn")
    assert saved["warn"] == saved["off"], "the preflight changed what training computes"
    assert "preflight: STOP" in capsys.readouterr().out
