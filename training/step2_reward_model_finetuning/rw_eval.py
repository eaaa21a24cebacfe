"""Whether a reward model may be trusted: the quality report of step 2 for any reward model on any preferences.

    python training/step2_reward_model_finetuning/rw_eval.py --model_name_or_path output/reward --data_path toy

One process. ``--output_dir MODEL/quality`` leaves the report where step 3 looks for it before it starts. With a judge
and a policy the report says too what choosing the best of n answers by this model is worth.
"""

import os
from dataclasses import dataclass
from functools import partial

from dschat.config import flag, parse_config, require_not_negative, require_positive
from dschat.errors import UserError, run_before_imports, run_program
from dschat.flags import REMOVED, CurveFlags, EvaluationFlags
from dschat.rlhf.reward_specs import judge_spec
from dschat.rlhf.specs import CurveSpec

NO_LIMIT = 2**31 - 1  # of a dialogue's tokens


@dataclass(kw_only=True)
class Config(EvaluationFlags, CurveFlags):
    model_name_or_path: str = flag(help="a reward model: the directory of step 2, of an adapter too, or a hub name")
    data_path: list[str] = flag(help="preferences; of each source its test split where it has one, else all of it")
    max_eval_samples: int = flag(0, "take the first so many prompts; 0: all")
    max_seq_len: int = flag(0, "tokens of a whole dialogue; longer ones lose their earliest turns; 0: what fits")
    num_shown: int = flag(3, "print so many of the pairs that the model has wrong with the most confidence")
    policy_model_name_or_path: str | None = flag(None, "whose answers the model chooses from, for --judge")
    num_workers: int = flag(1, "processes that tokenise")
    output_dir: str | None = flag(None, "where quality.json and its pictures go; default: nowhere")

    def __post_init__(self) -> None:
        EvaluationFlags.__post_init__(self)
        CurveFlags.__post_init__(self)
        require_positive(self, "num_workers")
        require_not_negative(self, "max_seq_len", "max_eval_samples", "num_shown")
        if bool(self.judge) != bool(self.policy_model_name_or_path):
            raise UserError("--judge and --policy_model_name_or_path go together: the judge needs somebody's answers")

    def curve_spec(self) -> CurveSpec | None:
        if not (self.judge and self.policy_model_name_or_path):
            return None
        return CurveSpec(
            policy_path=self.policy_model_name_or_path,
            judge=self.judge,
            num_samples=self.judge_samples,
            max_new_tokens=self.judge_max_new_tokens,
            batch_size=self.batch_size,
            seed=self.seed,
        )


if __name__ == "__main__":  # help, and mistakes in flags, need not wait for the libraries below, which take seconds
    run_before_imports(partial(parse_config, Config, doc=__doc__, removed=REMOVED))

from dschat.data.sources import load_evaluation
from dschat.data.stages import tokenize_rankings
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.distributed import Runtime, quiet_libraries
from dschat.engine.micro_batches import MicroBatches
from dschat.models.load import check_context, max_positions, resolve_dtype
from dschat.models.rankings import ranking_facts, score_rankings
from dschat.report.progress import Console
from dschat.report.reward_quality import pairs_of_rankings, quality_tables, write_quality
from dschat.report.samples import short
from dschat.rlhf.judges import check_judge, load_scorer_of
from dschat.rlhf.reward_report import report_quality
from dschat.rlhf.samples import prompt_text

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def main(argv: list[str] | None = None) -> None:
    config = parse_config(Config, argv, doc=__doc__, removed=REMOVED)
    quiet_libraries()
    runtime = Runtime(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = resolve_dtype(config.dtype, runtime.device)
    console = Console()

    # Model
    spec = judge_spec(config.model_name_or_path)
    tokenizer = load_tokenizer(spec.target, config.chat_template)
    scorer = load_scorer_of(spec, tokenizer, dtype=dtype, device=runtime.device, normalize=False)
    check_context(scorer.model.config, config.max_seq_len, "--max_seq_len")

    # Data
    examples, dropped = load_evaluation(
        config.data_path,
        "preference",
        eval_fraction=config.eval_fraction,
        seed=config.seed,
        cache_dir=os.path.expanduser(config.data_output_path),
        skip_bad_records=config.skip_bad_records,
    )
    max_seq_len = config.max_seq_len or max_positions(scorer.model.config) or NO_LIMIT
    rows, cut = tokenize_rankings(examples, tokenizer, max_seq_len, config.num_workers)
    if config.max_eval_samples:
        rows = rows.select(range(min(config.max_eval_samples, len(rows))))
    reasons = "".join(f"\n  {count} × {reason}" for reason, count in (dropped + cut).items())
    console.print(f"data: {len(rows)} ranked prompts{reasons}")

    if config.judge:
        policy_tokenizer = load_tokenizer(str(config.policy_model_name_or_path))
        check_judge(config.judge, policy_tokenizer, [prompt_text(messages) for messages in rows["messages"]])

    # Evaluate
    assert tokenizer.pad_token_id is not None
    scores = score_rankings(scorer, rows, config.batch_size, tokenizer.pad_token_id, MicroBatches(runtime), console)
    place = {"dtype": dtype, "device": runtime.device}
    pairs = pairs_of_rankings(ranking_facts(rows), scores)
    quality = report_quality(scorer, tokenizer, rows, pairs, config.curve_spec(), **place)

    # Report
    console.print(confident_mistakes(rows, scores, tokenizer, config.num_shown))
    console.print(quality_tables(quality))
    if config.output_dir:
        write_quality(quality, config.output_dir)
        console.print(f"written to {config.output_dir}")


def confident_mistakes(
    rows: datasets.Dataset, scores: np.ndarray, tokenizer: PreTrainedTokenizerBase, count: int
) -> str:
    """The pairs that the model has wrong by the widest margin, as text: what it has not learned, or a wrong label."""
    found = []
    for number, ranks in enumerate(rows["ranks"][:]):
        for better, high in enumerate(ranks):
            for worse, low in enumerate(ranks):
                gap = scores[number, worse] - scores[number, better]
                if high < low and gap > 0:
                    found.append((gap, number, better, worse))
    lines = []
    for _, number, better, worse in sorted(found, reverse=True)[:count]:
        row = rows[number]
        lines += [short(prompt_text(row["messages"]))]
        for name, answer in (("chosen", better), ("rejected", worse)):
            text = tokenizer.decode(row["input_ids"][answer][row["prompt_len"] :], skip_special_tokens=True)
            lines.append(f"  {name} [{scores[number, answer]:+.2f}] {short(text)}")
        lines.append("")
    return "\n".join([f"wrong with the most confidence, of {len(found)} wrong pairs:", "", *lines]) if lines else ""


if __name__ == "__main__":
    run_program(main)
