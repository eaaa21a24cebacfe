"""Evaluation where memory does not suffice for its micro-batches: the same figures, in smaller ones."""

import json

from dschat.errors import UserError
from dschat.models import rankings
from dschat.rlhf import answer_logprobs
from tests import programs

import pytest
import torch


def of_step_0(folder) -> dict[str, float]:
    line = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return {name: value for name, value in line.items() if name.startswith("eval/")}


def limit(monkeypatch, stage, rows):
    """Passes without a gradient of more than so many rows do not fit. Returns the sizes of all of them."""
    module = {"sft": programs.program("sft"), "reward": rankings, "dpo": answer_logprobs}[stage]
    name = {"sft": "token_logits", "reward": "ranking_scores", "dpo": "score_answers"}[stage]
    plain, sizes = getattr(module, name), []

    def limited(*given):
        batch = given[2] if stage == "sft" else next(x for x in given if isinstance(x, dict))["input_ids"]
        if not torch.is_grad_enabled():
            sizes.append(len(batch) // (1 if stage == "sft" else 2))
            if sizes[-1] > rows:
                raise torch.OutOfMemoryError
        return plain(*given)

    monkeypatch.setattr(module, name, limited)
    return sizes


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_evaluation_halves_its_micro_batches(stage, model_dirs, data_file, cache_dir, tmp_path, monkeypatch, capsys):
    flags = {"model_name_or_path": model_dirs("llama"), "max_steps": 1, "eval_interval": 0}
    programs.run(stage, data_file, cache_dir, tmp_path / "plain", **flags)
    sizes = limit(monkeypatch, stage, 2)
    programs.run(stage, data_file, str(tmp_path / "cache"), tmp_path / "limited", **flags)
    assert max(sizes) > 2 >= max(sizes[-3:])  # of the evaluation after the step, which begins where the first ended
    said = capsys.readouterr().out
    assert said.count("rows in evaluation: they are halved from here on") == 2
    assert ("rows for the reference: they are halved from here on" in said) == (stage == "dpo")
    plain, limited = of_step_0(tmp_path / "plain"), of_step_0(tmp_path / "limited")
    assert len(plain) > 1 and limited == pytest.approx(plain, rel=1e-5, abs=1e-5, nan_ok=True)


def test_a_row_that_does_not_fit_ends_the_run_with_its_cause(model_dirs, data_file, cache_dir, tmp_path, monkeypatch):
    limit(monkeypatch, "sft", 0)
    with pytest.raises(UserError, match="out of memory on 1 rows in evaluation; shorten them"):
        programs.run("sft", data_file, cache_dir, tmp_path / "none", model_name_or_path=model_dirs("llama"))
