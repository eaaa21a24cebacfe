"""Step 2 as a whole: ranked answers, the options of its loss, the report that it leaves, and rw_eval.py."""

import json
import math
from pathlib import Path

from dschat.data.loader import collate_rankings
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.distributed import Runtime
from dschat.engine.micro_batches import MicroBatches
from dschat.errors import UserError
from dschat.models.load import load_scorer
from dschat.models.rankings import ranking_facts, ranking_scores, score_rankings
from dschat.models.scorer import Scorer
from dschat.report.progress import Console
from dschat.report.reward_quality import read_quality
from tests import programs
from tests.conftest import SENTENCES
from tests.families import FAMILIES

import datasets
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

ALONE = Runtime(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def rankings_file(tmp_path_factory) -> str:
    """Records of two, three and four ranked answers, some with ties, some of two turns."""
    path = tmp_path_factory.mktemp("rankings") / "ranked.jsonl"
    lines = []
    for i in range(40):
        size = 2 + i % 3
        answers = [f"{SENTENCES[(i + k) % 8]} {i}" for k in range(size)]
        prompt = [{"role": "user", "content": f"question {i}"}]
        if i % 5 == 0:
            prompt = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, *prompt]
        lines.append({"prompt": prompt, "responses": answers, "ranks": [1, 2, 2, 3][:size]})
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture(scope="module")
def base(model_dirs) -> str:
    return model_dirs("gpt2")


def first_line(directory: Path) -> dict:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return next(line for line in map(json.loads, lines) if "loss" in line)


def loss_by_hand(base: str, rows, seed: int, smoothing: float = 0.0, center: float = 0.0) -> float:
    """Ouyang et al. 2022, eq. 1, one dialogue at a time and pair by pair."""
    tokenizer = load_tokenizer(base)
    torch.manual_seed(seed)  # of the new head
    scorer = Scorer(load_scorer(base, tokenizer, dtype=torch.float32)).eval()
    total = []
    for row in rows:
        with torch.no_grad():
            scores = [scorer(torch.tensor([ids]), torch.ones(1, len(ids)))[0, -1].item() for ids in row["input_ids"]]
        terms = []
        for better, high in zip(scores, row["ranks"], strict=True):
            for worse, low in zip(scores, row["ranks"], strict=True):
                if high < low:
                    gap = torch.tensor(better - worse, dtype=torch.float64)
                    term = -(1 - smoothing) * logsigmoid(gap) - smoothing * logsigmoid(-gap)
                    terms.append(term.item() + center * (better + worse) ** 2)
        total.append(sum(terms) / len(terms))
    return sum(total) / len(total)


def rows_of(path: str, base: str, cache_dir: str):
    from dschat.data.prepare import DataSpec, load_rows

    spec = DataSpec((path,), (), "0,1,0", 0.2, 7, cache_dir, False, 1, 0)
    return load_rows(spec, "ranking", load_tokenizer(base), 64)


@pytest.mark.parametrize(("smoothing", "center"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.5)])
def test_the_first_loss_is_that_of_the_paper(smoothing, center, rankings_file, base, cache_dir, tmp_path):
    flags = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "max_steps": 1, "dropout": 0}
    flags |= {"label_smoothing": smoothing, "center_rewards_coefficient": center, "data_split": "0,1,0"}
    programs.run("reward", rankings_file, cache_dir, tmp_path, model_name_or_path=base, **flags)
    rows = rows_of(rankings_file, base, cache_dir).train
    assert len(rows) == 32, "one step takes all of them"
    expected = loss_by_hand(base, rows, 7, smoothing, center)
    line = first_line(tmp_path)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert 0 < line["accuracy"] < 1


def test_accumulation_and_ragged_lists_change_nothing(rankings_file, base, cache_dir, tmp_path):
    lines = []
    for name, size, accumulation in (("a", 16, 1), ("b", 3, 6), ("c", 1, 16)):
        flags = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        flags |= {"dropout": 0, "data_split": "0,1,0", "center_rewards_coefficient": 0.01}
        if size * accumulation != 16:
            flags["max_eval_samples"] = 4
        programs.run("reward", rankings_file, cache_dir, tmp_path / name, model_name_or_path=base, **flags)
        lines.append(first_line(tmp_path / name))
    for key in ("loss", "accuracy", "grad_norm"):
        assert lines[0][key] == pytest.approx(lines[2][key], rel=1e-4), key
    assert math.isfinite(lines[1]["loss"]), "a batch of 18 with a ragged end"


def test_scores_of_a_batch_stand_where_their_ranks_do(rankings_file, base, cache_dir):
    data = rows_of(rankings_file, base, cache_dir)
    scorer = Scorer(load_scorer(base, load_tokenizer(base), dtype=torch.float32)).eval()
    rows = [data.train[i] for i in range(6)]
    with torch.no_grad():
        scores = ranking_scores(scorer, collate_rankings(rows, 6, 0))
        for i, row in enumerate(rows):
            for k, ids in enumerate(row["input_ids"]):
                alone = scorer(torch.tensor([ids]), torch.ones(1, len(ids)))[0, -1]
                assert scores[i, k].item() == pytest.approx(alone.item(), abs=1e-5)
            assert (scores[i, len(row["ranks"]) :] == 0).all()
    everything = [score_rankings(scorer, data.eval, size, 0, MicroBatches(ALONE), Console(False)) for size in (3, 50)]
    assert everything[0].shape == (len(data.eval), 4) and everything[0].dtype == np.float64
    assert np.allclose(everything[0], everything[1], atol=1e-5, equal_nan=True)
    assert (np.isfinite(everything[0]).sum(1) == list(map(len, data.eval["ranks"]))).all()


def test_the_facts_of_a_ranking(rankings_file, base, cache_dir):
    rows = rows_of(rankings_file, base, cache_dir).train
    facts = ranking_facts(rows)
    tokenizer = load_tokenizer(base)
    for row, fact in zip(rows, facts, strict=True):
        assert fact["num_turns"] == (2 if row["messages"][0]["content"] == "hi" else 1)
        assert (fact["ranks"], fact["source"], fact["margin"]) == (row["ranks"], rankings_file, 0.0)
        answers = [tokenizer.decode(ids[row["prompt_len"] :]) for ids in row["input_ids"]]
        assert all(text.endswith(tokenizer.eos_token) for text in answers)
        assert fact["lengths"] == [len(ids) - row["prompt_len"] for ids in row["input_ids"]]


def test_pairs_of_one_question_depend_on_each_other(base, cache_dir, tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}], "prompt_len": 1, "ranks": [1, 2], "source": "s"}
    row |= {"margin": 0.0, "input_ids": [[1, 2], [1, 3]]}
    other = row | {"messages": [{"role": "user", "content": "r"}]}
    facts = ranking_facts(datasets.Dataset.from_list([row, other, row, other, row]))
    assert [fact["prompt"] for fact in facts] == [0, 1, 0, 1, 0]


# --- the report


@pytest.fixture(scope="module")
def reward_dir(rankings_file, base, cache_dir, tmp_path_factory) -> Path:
    judge = tmp_path_factory.mktemp("judge") / "judge.py"
    judge.write_text("def short(responses):\n    return [-len(text) for text in responses]\n")
    flags = {"data_split": "0,1,0", "judge": f"function:{judge}:short", "judge_samples": 4, "judge_max_new_tokens": 6}
    directory = tmp_path_factory.mktemp("rm") / "reward"
    programs.run("reward", rankings_file, cache_dir, directory, model_name_or_path=base, **flags)
    return directory


def test_step_2_leaves_its_report(reward_dir):
    quality = read_quality(reward_dir / "quality")
    run = json.loads((reward_dir / "run.json").read_text())
    assert quality["accuracy"] == run["metrics"]["eval/accuracy"] and quality["num_pairs"] > quality["num_prompts"]
    assert quality["padding_gap"] < 1e-4
    assert [row["n"] for row in quality["best_of_n"]] == [1, 2, 4]
    names = {path.name for path in (reward_dir / "quality").iterdir()}
    assert names == {"quality.json", "scores.png", "reliability.png", "accuracy_by.png", "best_of_n.png"}
    assert {bin["label"] for bin in quality["accuracy_by"]["num_turns"]} == {"1", "2"}


def rw_eval(*flags: object) -> None:
    programs.load("step2_reward_model_finetuning/rw_eval.py").main([str(flag) for flag in flags])


def test_rw_eval_finds_what_step_2_found(reward_dir, rankings_file, cache_dir, tmp_path, capsys):
    flags = ["--data_path", rankings_file, "--data_output_path", cache_dir, "--eval_fraction", 0.2, "--seed", 7]
    flags += ["--max_seq_len", 64, "--batch_size", 8, "--output_dir", tmp_path / "q"]
    rw_eval("--model_name_or_path", reward_dir, *flags)
    own, found = read_quality(reward_dir / "quality"), read_quality(tmp_path / "q")
    for name in ("accuracy", "num_pairs", "margin", "scores", "calibration"):
        assert json.dumps(found[name]) == json.dumps(own[name]), name
    assert found["best_of_n"] is None and not (tmp_path / "q" / "best_of_n.png").exists()
    out = capsys.readouterr().out
    assert "verdict: " in out and "wrong with the most confidence" in out and "  chosen [" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judge", "toy"], "--judge and --policy_model_name_or_path go together"),
        (["--judge_samples", "3"], "--judge_samples and --judge_max_new_tokens need --judge"),
        (["--max_seq_len", "9999"], "has 256 positions"),
        (["--eval_fraction", "1"], "--eval_fraction 1.0: expected"),
    ],
)
def test_rw_eval_refuses(flags, message, reward_dir, rankings_file, cache_dir):
    given = ["--model_name_or_path", reward_dir, "--data_path", rankings_file, "--data_output_path", cache_dir]
    with pytest.raises(UserError, match=message):
        rw_eval(*given, *flags)


def test_rw_eval_refuses_a_policy_and_a_file_without_preferences(base, reward_dir, tmp_path, cache_dir):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "hi", "response": "yo"}\n')
    with pytest.raises(UserError, match="is a language model, not a reward model"):
        rw_eval("--model_name_or_path", base, "--data_path", path, "--data_output_path", cache_dir)
    with pytest.raises(UserError, match="nothing left for the preference stage, 1 with no preference"):
        rw_eval("--model_name_or_path", reward_dir, "--data_path", path, "--data_output_path", cache_dir)


# --- the gate of step 3


@pytest.fixture
def quality(reward_dir):
    """Writes what the report is to say; the old one comes back."""
    path = reward_dir / "quality" / "quality.json"
    before = path.read_text()

    def write(**changes):
        path.write_text(json.dumps(json.loads(before) | changes))
        return path

    yield write
    path.write_text(before)


WEAK = {"accuracy": 0.55, "ci95": [0.49, 0.60], "num_pairs": 299}
GOOD = {"accuracy": 0.9, "ci95": [0.85, 0.95], "num_pairs": 299}


def length_baseline(accuracy: float) -> dict:
    return {
        "length": {"rule": "longer", "accuracy": accuracy, "ci95": [0, 1], "num_pairs": 9},
        "chance": {"accuracy": 0.5, "ci95": [0.4, 0.6]},
    }


def step_3(reward_dir, base, data_file, cache_dir, output, **flags):
    models = {"actor_model_name_or_path": base, "critic_model_name_or_path": str(reward_dir)}
    given = models | {"max_steps": 1, "allow_weak_reward_model": False} | flags
    programs.run("ppo", data_file, cache_dir, output, **given)


def test_step_3_refuses_a_weak_reward_model_unless_told(
    reward_dir, base, data_file, cache_dir, tmp_path, quality, capsys
):
    quality(**WEAK)
    mend = "train a better one, or pass --allow_weak_reward_model"
    with pytest.raises(UserError, match=rf"too weak .* 0.55 \(95 %: 0.49 to 0.60\) on 299 .* chance; {mend}"):
        step_3(reward_dir, base, data_file, cache_dir, tmp_path)
    quality(**GOOD, baselines=length_baseline(0.93))
    with pytest.raises(UserError, match="no better than taking the longer answer, 0.93"):
        step_3(reward_dir, base, data_file, cache_dir, tmp_path)
    with pytest.raises(UserError, match="too weak"):
        step_3(reward_dir, base, data_file, cache_dir, tmp_path, reward=[f"0.5*full:{reward_dir}"])
    capsys.readouterr()
    step_3(reward_dir, base, data_file, cache_dir, tmp_path, allow_weak_reward_model=True)
    assert "weak, and used all the same: accuracy 0.90" in capsys.readouterr().out


def test_step_3_uses_a_good_one_and_says_what_it_does_not_know(
    reward_dir, base, data_file, cache_dir, tmp_path, quality, capsys
):
    path = quality(**GOOD, baselines=length_baseline(0.6))
    step_3(reward_dir, base, data_file, cache_dir, tmp_path)
    assert f"{reward_dir}: accuracy 0.90 (95 %: 0.85 to 0.95)\n" in capsys.readouterr().out
    path.unlink()
    step_3(reward_dir, base, data_file, cache_dir, tmp_path / "again")
    assert f"{reward_dir}: nothing is known of its quality; rw_eval.py" in capsys.readouterr().out
    path.write_text("{")
    with pytest.raises(UserError, match="quality.json: not a report"):
        step_3(reward_dir, base, data_file, cache_dir, tmp_path / "third")


def test_a_report_goes_with_its_model(rankings_file, base, cache_dir, tmp_path, monkeypatch):
    report = tmp_path / "quality" / "quality.json"
    report.parent.mkdir()
    report.write_text("{}")
    with pytest.raises(UserError):
        programs.run("reward", str(tmp_path / "no.jsonl"), cache_dir, tmp_path, model_name_or_path=base)
    assert report.exists(), "the model it tells of is still there"

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(programs.program("reward"), "report_quality", killed)
    flags = {"model_name_or_path": base, "data_split": "0,1,0"}
    with pytest.raises(KeyboardInterrupt):
        programs.run("reward", rankings_file, cache_dir, tmp_path, **flags)
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "run.json").is_file()
    assert not report.exists(), "it would tell of another model"


def test_a_judge_that_cannot_judge_is_found_out_before_training(rankings_file, base, reward_dir, cache_dir, tmp_path):
    flags = {"model_name_or_path": base, "data_split": "0,1,0", "judge": "toy"}
    with pytest.raises(UserError, match="--judge toy: "):
        programs.run("reward", rankings_file, cache_dir, tmp_path, **flags)
    assert not (tmp_path / "metrics.jsonl").exists()
    given = ["--model_name_or_path", reward_dir, "--data_path", rankings_file, "--data_output_path", cache_dir]
    with pytest.raises(UserError, match="--judge toy: "):
        rw_eval(*given, "--judge", "toy", "--policy_model_name_or_path", base)


# --- other tools


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_gives_the_same_score_on_either_side_of_padding(family, model_dirs, tokenizer, tmp_path):
    from dschat.models.load import save_model

    ours = Scorer(load_scorer(model_dirs(family), tokenizer, dtype=torch.float32, dropout=0.0)).eval()
    save_model(ours.model, tokenizer, str(tmp_path))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    texts = [
        "\n\nHuman: hi\n\nAssistant: yes<|endoftext|>",
        "\n\nHuman: a longer one, please\n\nAssistant: no<|endoftext|>",
    ]
    for side in ("right", "left"):
        batch = load_tokenizer(str(tmp_path))(
            texts, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt"
        )
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            if side == "left" and family == "gpt2":  # the one whose positions are counted from the left edge
                given["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            plain = theirs(**given).logits.squeeze(-1)
            mask = batch["attention_mask"].bool()
            values = ours(batch["input_ids"], mask)
        last = [int(row.nonzero().max()) for row in mask]
        assert torch.allclose(plain, values[range(2), last], atol=1e-5), side
