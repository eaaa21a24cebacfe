"""What both sides of a comparison with TRL are given: the settings, the models and the prompts of step 3, the flags of
steps 1 and 2, and how a batch is counted."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from dschat.config import parse_config
from dschat.data.prepare import StageRows, load_rows
from dschat.data.tokenizer import load_tokenizer

import datasets
import torch
from programs import PROGRAMS
from shapes import model_config, random_model, set_stops
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from turns import Facts

KINDS = {"sft": "sft", "reward": "ranking", "dpo": "preference"}  # of rows, for `load_rows`


def settings() -> argparse.Namespace:
    """Of a working process: what `versus.take_turns` put on its command line."""
    return argparse.Namespace(**json.loads(sys.argv[1]))


def ppo_models(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """actor, ref (the same weights), critic, reward."""
    models = {}
    for number, role in enumerate(("actor", "ref", "critic", "reward")):
        scorer = number > 1
        config = model_config((args.critic_size or args.size) if scorer else args.size, args.vocab_size)
        models[role] = random_model(config, dtype, args.seed + max(0, number - 1), scorer=scorer)
        if not scorer:
            set_stops(models[role], args.mean_length)
    return models


def program(stage: str) -> ModuleType:
    """The program of a stage, as a module."""
    spec = importlib.util.spec_from_file_location(stage, PROGRAMS[stage])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program_flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """Of a run that never gets to its end."""
    split = "1,0,0" if args.stage == "sft" else "0,1,0"
    steps = args.warmup + args.repeats + 1  # the last would save the model, and is not reached
    given = {
        "model_name_or_path": folder / "model",
        "data_path": args.data_path,
        "data_output_path": folder / f"cache-{args.stage}",
        "data_split": split,
        "eval_fraction": 0.01,
        "max_eval_samples": args.batch,
        "max_seq_len": args.max_seq_len,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "num_train_epochs": steps,
        "max_steps": steps,
        "learning_rate": args.learning_rate,
        "dtype": args.dtype,
        "seed": args.seed,
        "log_interval": 10,
        "output_dir": folder / "ours",
    }
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*flags, "--skip_bad_records"]


def stage_rows(args: argparse.Namespace) -> tuple[StageRows, PreTrainedTokenizerBase]:
    """The rows that the program of ``args.program_flags`` trains on, and the tokenizer."""
    config = parse_config(program(args.stage).Config, args.program_flags)
    tokenizer = load_tokenizer(config.model_name_or_path)
    return load_rows(config.data_spec(config.seed), KINDS[args.stage], tokenizer, config.max_seq_len), tokenizer


def trl_rows(stage: str, rows: datasets.Dataset) -> datasets.Dataset:
    """The token rows of our program in the columns that TRL's trainer takes as tokenised."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        if stage == "sft":
            pairs = zip(row["input_ids"], row["loss_mask"], strict=True)
            return {"input_ids": row["input_ids"], "labels": [i if learned else -100 for i, learned in pairs]}
        if stage == "reward":
            return {"chosen_ids": row["input_ids"][0], "rejected_ids": row["input_ids"][-1]}
        cut = row["prompt_len"]
        answers = {f"{name}_ids": row[f"{name}_ids"][cut:] for name in ("chosen", "rejected")}
        return {"prompt_ids": row["chosen_ids"][:cut], **answers}

    return datasets.Dataset.from_list([convert(row) for row in rows])


def data_size(rows: StageRows) -> list[int]:
    """[rows, tokens in all their sequences] to train on."""
    named = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.train.column_names]
    sequences = [item for name in named for item in rows.train[name][:]]
    flat = [ids for item in sequences for ids in (item if isinstance(item[0], list) else [item])]
    return [len(rows.train), sum(map(len, flat))]


def count_tokens(stage: str, attention_mask: torch.Tensor, scored: torch.Tensor) -> Facts:
    """Of one batch; ``scored`` (B, T) is True where the loss reads, in no place of a row that only fills up.

    real tokens, positions (with the padding), the lengths of the sequences, positions that need the head, rows.
    """
    is_real = scored.any(1)
    lengths = attention_mask[is_real].sum(1).tolist()
    return {
        "tokens": sum(lengths),
        "positions": attention_mask.numel(),
        "lengths": lengths,
        "projected": len(lengths) if stage == "reward" else int(scored.sum()),
        "rows": len(lengths) if stage == "sft" else len(lengths) // 2,
    }


def add_facts(parts: list[Facts]) -> Facts:
    """Of the micro-batches of a step."""
    return {name: sum((part[name] for part in parts[1:]), start=parts[0][name]) for name in parts[0]}
