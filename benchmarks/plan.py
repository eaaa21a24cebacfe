"""The plan of --dry_run beside the measured peak of the same run, on this machine's CPU.

    python benchmarks/plan.py                       all configurations, a table
    python benchmarks/plan.py --only sft reward     those whose name begins so; a whole name: that one

Models have random weights; every row of the data is as long as the limit, all of it answer, which is what a plan
assumes. The measured figure is rank 0's ru_maxrss.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dschat.data.templates import encode_answers, encode_prompt
from dschat.data.tokenizer import train_tokenizer
from dschat.models.load import save_model
from dschat.models.lora import LoraSpec, add_lora

import torch
from programs import PROGRAMS
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

# width, layers, vocabulary
SHAPES = {"small": (256, 4, 4096), "middle": (512, 8, 16000), "large": (768, 8, 16000), "deep": (640, 12, 8000)}
LENGTH = 256


@dataclass(frozen=True)
class Case:
    stage: str
    size: str
    num_ranks: int = 1
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [f"{name} {value}" if value is not True else name for name, value in self.flags.items()]
        ranks = f", {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return f"{self.stage} {self.size}{ranks}: {', '.join(words)}"


def rows(number: int, **more: Any) -> dict[str, Any]:
    """The flags of a case of step 1, 2 or DPO."""
    return {"per_device_train_batch_size": number} | more


def answers(number: int, **more: Any) -> dict[str, Any]:
    """Those of step 3, which samples 16 at once."""
    return {"per_device_training_batch_size": number} | more


LORA = {"actor_lora_dim": 16, "critic_lora_dim": 16}


def stages(stage: int) -> dict[str, int]:
    return {"actor_zero_stage": stage, "critic_zero_stage": stage}


FITTED = [  # engine/memory_plan.py's RUNNING_LIBRARIES is fitted to the first
    Case("sft", "small", flags=rows(4)),
    Case("sft", "large", flags=rows(4)),
    Case("sft", "large", flags=rows(16, gradient_checkpointing=True)),
    Case("sft", "large", 2, rows(2, gradient_accumulation_steps=2, zero_stage=2)),
    Case("sft", "large", 2, rows(2, zero_stage=3)),
    Case("sft", "large", flags=rows(4, lora_dim=16)),
]
MENDED = [  # looked at while the arithmetic was mended
    Case("sft", "large", flags=rows(2, dtype="bf16")),
    Case("reward", "large", flags=rows(4)),
    Case("dpo", "large", flags=rows(2)),
    Case("ppo", "middle", flags=answers(8)),
    Case("ppo", "middle", flags=answers(8, **LORA)),
    Case("ppo", "middle", 2, answers(4, **stages(2))),
]
HELD_OUT = [
    Case("sft", "middle", flags=rows(8, dtype="bf16", gradient_checkpointing=True)),
    Case("sft", "deep", flags=rows(8, dtype="bf16")),
    Case("reward", "deep", flags=rows(6, dtype="bf16")),
    Case("reward", "middle", 2, rows(4, zero_stage=1)),
    Case("dpo", "deep", flags=rows(4, dtype="bf16", gradient_checkpointing=True)),
    Case("dpo", "middle", 2, rows(2, zero_stage=3, dtype="bf16")),
    Case("ppo", "deep", flags=answers(4, dtype="bf16")),
    Case("ppo", "deep", flags=answers(4, share_trunk=True, **LORA)),
    Case("ppo", "deep", 2, answers(4, **stages(3))),
    Case("ppo", "deep", 2, answers(4, offload=True, **stages(2))),
]
CASES = [*FITTED, *MENDED, *HELD_OUT]


WORDS = [first + second for first in "bcdfghklmn" for second in "aeiou"]  # each becomes one token


def tokenizer_of_words() -> PreTrainedTokenizerBase:
    return train_tokenizer(["\n\nHuman: " + " ".join(WORDS) + "\n\nAssistant: " + " ".join(WORDS)] * 20, 600)


def save_shape(size: str, tokenizer: PreTrainedTokenizerBase, folder: Path, kind: str) -> str:
    """``kind``: model, scorer, or adapter, a reward adapter on the model, which is there."""
    width, layers, vocabulary = SHAPES[size]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = (LlamaForCausalLM if kind == "model" else LlamaForSequenceClassification)(config)
    if kind == "adapter":
        add_lora(model, LoraSpec(LORA["critic_lora_dim"]))
    save_model(model, tokenizer, str(folder / kind), str(folder / "model") if kind == "adapter" else None)
    return str(folder / kind)


def save_data(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[str, str]:
    """Two files: rows of LENGTH tokens, most of them answer; and prompts of half of that."""

    def words(number: int, size: int) -> str:
        digits = [WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(3)]
        return " ".join([*digits, *[WORDS[0]] * (size - 3)])

    def size(prompt: str, answer: str) -> int:
        [(ids, _)] = encode_answers(tokenizer, [{"role": "user", "content": prompt}], [answer])
        return len(ids)

    missing = LENGTH - size(words(0, 3), words(0, 3))
    prompt = LENGTH // 2 - len(encode_prompt(tokenizer, [{"role": "user", "content": words(0, 3)}]))
    paths = folder / "rows.jsonl", folder / "prompts.jsonl"
    with open(paths[0], "w") as file, open(paths[1], "w") as other:
        for number in range(48):
            answers = {"chosen": words(1, 3 + missing), "rejected": words(2, 3 + missing)}
            file.write(json.dumps({"prompt": words(number, 3)} | answers) + "\n")
            other.write(json.dumps({"prompt": words(number, 3 + prompt)}) + "\n")
    assert size(words(9, 3), words(1, 3 + missing)) == LENGTH
    return str(paths[0]), str(paths[1])


def command(case: Case, folder: Path) -> list[str]:
    tokenizer = tokenizer_of_words()
    dialogues, prompts = save_data(tokenizer, folder)
    flags: dict[str, Any] = {"dtype": "fp32", "max_steps": 2, "checkpoint_interval": 0, "output_dir": folder / "out"}
    flags |= {"data_output_path": folder / "cache", "seed": 1}
    model = save_shape(case.size, tokenizer, folder, "model")
    if case.stage == "ppo":
        reward = save_shape(case.size, tokenizer, folder, "adapter" if "share_trunk" in case.flags else "scorer")
        flags |= {"actor_model_name_or_path": model, "critic_model_name_or_path": reward, "data_path": prompts}
        flags |= {"max_prompt_seq_len": LENGTH // 2, "max_answer_seq_len": LENGTH // 2, "max_eval_samples": 8}
        flags |= {"per_device_generation_batch_size": 16, "data_split": "0,0,1", "normalize_reward": False}
    else:
        flags |= {"model_name_or_path": model, "data_path": dialogues, "max_seq_len": LENGTH, "max_eval_samples": 4}
        flags |= {"per_device_eval_batch_size": 2, "data_split": "1,0,0" if case.stage == "sft" else "0,1,0"}
    words = [sys.executable, str(PROGRAMS[case.stage])]
    for name, value in (flags | case.flags).items():
        words += (
            [f"--{name}", str(value)] if not isinstance(value, bool) else [f"--{name}" if value else f"--no-{name}"]
        )
    return words


def run_ranks(words: list[str], num_ranks: int, folder: Path) -> tuple[str, float]:
    """What rank 0 prints, and the most memory that it had, in bytes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    ranks = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(num_ranks):
        env = {name: str(value) for name, value in (ranks | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        with open(folder / f"rank{rank}.log", "w") as log:
            output = {"stdout": log, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen(words, env=os.environ | (env if num_ranks > 1 else {}), **output))
    used = [os.wait4(process.pid, 0) for process in processes]
    text = (folder / "rank0.log").read_text()
    for process, (_, status, _) in zip(processes, used, strict=True):
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, text[-3000:]
    return text, used[0][2].ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(case: Case) -> tuple[float, float, str]:
    """GB planned and measured, and the phase that the plan calls fullest."""
    with tempfile.TemporaryDirectory(prefix="plan-") as name:
        folder = Path(name)
        words = command(case, folder)
        text, _ = run_ranks([*words, "--dry_run"], case.num_ranks, folder)
        found = re.search(r"peak of a rank: ([\d.]+) GB.* in '(.*)';", text)
        assert found, text
        _, peak = run_ranks(words, case.num_ranks, folder)
    return float(found[1]), peak / 1e9, found[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="of the configurations, those that begin so")
    args = parser.parse_args()
    print("| run | plan, GB | measured, GB | plan / measured | fullest |\n|---|---|---|---|---|")
    for case in (case for case in CASES if case.name.startswith(tuple(args.only))):
        planned, measured, phase = compare(case)
        line = f"| {case.name} | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} | {phase} |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
