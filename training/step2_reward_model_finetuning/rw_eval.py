"""Whether a reward model may be trusted: the quality report of step 2 for any reward model on any preferences.

    python training/step2_reward_model_finetuning/rw_eval.py --model_name_or_path output/reward --data_path toy

One process. ``--output_dir MODEL/quality`` leaves the report where step 3 looks for it before it starts. With a judge
and a policy the report says too what choosing the best of n answers by this model is worth.
"""

import os
from dataclasses import dataclass

from dschat.config import DTYPES, flag, parse_config, require_not_negative, require_positive
from dschat.data.sources import load_evaluation
from dschat.data.stages import tokenize_rankings
from dschat.data.tokenizer import load_tokenizer
from dschat.engine.distributed import Runtime, quiet_libraries
from dschat.errors import UserError, run_program
from dschat.flags import REMOVED
from dschat.models.load import check_context, max_positions, resolve_dtype
from dschat.models.rankings import ranking_facts, score_rankings
from dschat.report.progress import Console
from dschat.report.reward_quality import pairs_of_rankings, quality_tables, write_quality
from dschat.report.samples import short
from dschat.rlhf.judges import check_judge, judge_spec, load_scorer_of
from dschat.rlhf.reward_report import CurveSpec, report_quality
from dschat.rlhf.samples import prompt_text

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2**31 - 1  # of a dialogue's tokens


@dataclass(kw_only=True)
class Config:
    model_name_or_path: str = flag(help="a reward model: the directory of step 2, of an adapter too, or a hub name")
    data_path: list[str] = flag(help="preferences; of each source its test split where it has one, else all of it")
    eval_fraction: float = flag(
        0.0, "of a source without a test split take only what the stages hold out at this fraction and seed; 0: all"
    )
    seed: int = flag(1234, "of eval_fraction, and of the answers for --judge")
    max_eval_samples: int = flag(0, "take the first so many prompts; 0: all")
    max_seq_len: int = flag(0, "tokens of a whole dialogue; longer ones lose their earliest turns; 0: what fits")
    num_shown: int = flag(3, "print so many of the pairs that the model has wrong with the most confidence")
    judge: str | None = flag(
        None, "toy, function:FILE.py:NAME, api:URL or full:PATH: judges --policy_model_name_or_path's answers"
    )
    policy_model_name_or_path: str | None = flag(None, "whose answers the model chooses from, for --judge")
    judge_samples: int = flag(8, "answers to a prompt for the best-of-n curve of --judge")
    judge_max_new_tokens: int = flag(128, "tokens of such an answer at most")
    output_dir: str | None = flag(None, "where quality.json and its pictures go; default: nowhere")
    batch_size: int = flag(16, "prompts with all their answers scored at once")
    dtype: str = flag("auto", "of the weights; auto: bf16 on a GPU that has it, else fp32", choices=DTYPES)
    chat_template: str = flag("auto", "auto: the model's own, else plain Human/Assistant; plain; or a jinja file")
    data_output_path: str = flag("~/.cache/dschat", "folder of the tokenised data, keyed by content")
    num_workers: int = flag(1, "processes that tokenise")
    skip_bad_records: bool = flag(
        False, "drop and count records that cannot be read, instead of stopping at the first"
    )

    def __post_init__(self) -> None:
        require_positive(self, "judge_samples", "judge_max_new_tokens", "batch_size", "num_workers")
        require_not_negative(self, "max_seq_len", "max_eval_samples", "num_shown")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction {self.eval_fraction}: expected at least 0 and below 1")
        if bool(self.judge) != bool(self.policy_model_name_or_path):
            raise UserError("--judge and --policy_model_name_or_path go together: the judge needs somebody's answers")
        if not self.judge and (self.judge_samples, self.judge_max_new_tokens) != (8, 128):
            raise UserError("--judge_samples and --judge_max_new_tokens need --judge")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("rw_eval.py is one process; start it with python, without a launcher")

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
    scores = score_rankings(scorer, rows, config.batch_size, tokenizer.pad_token_id, runtime, console)
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
