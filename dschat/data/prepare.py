"""From --data_path to the token rows of a stage, in one call."""

from collections import Counter
from dataclasses import dataclass, field

from dschat.data.loader import MicroBatch, epoch_batches, split_by_tokens
from dschat.data.sources import load_stage_data
from dschat.data.specs import DataSpec
from dschat.data.stages import (
    tokenize_feedback,
    tokenize_preferences,
    tokenize_prompts,
    tokenize_rankings,
    tokenize_sft,
)
from dschat.errors import UserError

import datasets
from transformers import PreTrainedTokenizerBase

# kind of rows -> the stage whose examples they are made of, and how
KINDS = {
    "sft": ("sft", tokenize_sft),
    "ranking": ("preference", tokenize_rankings),
    "preference": ("preference", tokenize_preferences),
    "feedback": ("feedback", tokenize_feedback),
    "prompt": ("prompt", tokenize_prompts),
}


@dataclass
class StageRows:
    """Token rows to train on and held out, and what was dropped or cut, by reason."""

    train: datasets.Dataset
    eval: datasets.Dataset
    dropped: Counter[str] = field(default_factory=Counter)

    def require_held_out(self) -> None:
        """
        Raises:
            UserError: nothing is held out, so that nothing could be said of what was learned.
        """
        if not len(self.eval):
            raise UserError("no rows are left to evaluate on; give more --data_path, or --eval_data_path")

    def summary(self, noun: str) -> str:
        lines = [f"data: {len(self.train)} {noun} to train on, {len(self.eval)} held out"]
        return "\n".join(lines + [f"  {count} × {reason}" for reason, count in self.dropped.items()])

    def record(self) -> dict:
        """For run.json. The fingerprints change with any byte of the data, the template or the tokenizer."""
        return {
            "train": len(self.train),
            "eval": len(self.eval),
            "dropped": dict(self.dropped),
            "train_fingerprint": self.train._fingerprint,
            "eval_fingerprint": self.eval._fingerprint,
        }


def load_rows(spec: DataSpec, kind: str, tokenizer: PreTrainedTokenizerBase, max_len: int) -> StageRows:
    """The rows of ``kind``, a key of KINDS (`dschat.data.stages` says what is in them), of ``max_len`` tokens at most.

    Raises:
        UserError: a bad file or record, a stage left without data.
    """
    stage, tokenize = KINDS[kind]
    train, held_out, dropped = load_stage_data(
        spec.data_path,
        spec.eval_data_path,
        stage,
        spec.data_split,
        spec.eval_fraction,
        spec.seed,
        spec.cache_dir,
        spec.skip_bad_records,
    )
    train_rows, cut = tokenize(train, tokenizer, max_len, spec.num_workers)
    eval_rows, eval_cut = tokenize(held_out, tokenizer, max_len, spec.num_workers)
    if spec.max_eval_samples:
        eval_rows = eval_rows.select(range(min(spec.max_eval_samples, len(eval_rows))))
    return StageRows(train_rows, eval_rows, dropped + cut + eval_cut)


def training_batches(
    rows: datasets.Dataset,
    per_device_batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
    seed: int,
    num_epochs: int,
    max_steps: int,
    max_tokens: int = 0,
) -> list[list[MicroBatch]]:
    """The optimizer steps of a whole run for one rank, each epoch in an order of its own; 0 ``max_steps``: all.

    With ``max_tokens`` above 0 the rows of a step are cut into micro-batches by length (`split_by_tokens`).
    """

    def steps_of(rank: int) -> list[list[MicroBatch]]:
        place = (len(rows), per_device_batch_size, accumulation, rank, world_size, seed)
        steps = [step for epoch in range(num_epochs) for step in epoch_batches(*place, epoch)]
        return steps[:max_steps] if max_steps else steps

    if not max_tokens:
        return steps_of(rank)
    sizes = row_sizes(rows)
    everyone = zip(*map(steps_of, range(world_size)), strict=True)
    return [split_by_tokens(step, rank, sizes, max_tokens) for step in everyone]


def row_sizes(rows: datasets.Dataset) -> list[tuple[int, int]]:
    """Of each token row, how many sequences it makes in a batch and how long the longest is, in tokens."""
    if "chosen_ids" in rows.column_names:
        pairs = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
        return [(2, max(len(chosen), len(rejected))) for chosen, rejected in pairs]
    if "ranks" in rows.column_names:
        return [(len(answers), max(map(len, answers))) for answers in rows["input_ids"]]
    # Judged answers come with a mismatched one each, of about their length.
    return [(2 if "good" in rows.column_names else 1, len(ids)) for ids in rows["input_ids"]]
