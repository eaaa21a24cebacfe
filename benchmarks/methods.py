"""DPO and its relatives, PPO and best-of-n on the embedded task, side by side: by the task's judge.

    python benchmarks/methods.py                            seeds 1, 2, 3; an hour of two cores
    python benchmarks/methods.py --seeds 1 --only "dpo;kto"

Steps 1 and 2 run once per seed, by the recipes; every method starts from the same SFT model and, where it needs one,
the same reward model. One answer of each to the same 300 held-out prompts, drawn with the same random numbers at
temperature 1, is compared with the SFT model's. A run that is there already is not run again.
"""

import json
import sys
from pathlib import Path

from dschat.report.progress import table
from dschat.report.summary import read_run, win_rate

from programs import ROOT
from toy_runs import run, train_all

DPO = "step2_dpo_finetuning/training_scripts/toy/cpu/run_toy.sh"
PPO = "step3_rlhf_finetuning/training_scripts/toy/cpu/run_toy.sh"
MAIN = "step2_dpo_finetuning/main.py"
SIZES = "--per_device_train_batch_size 32 --per_device_eval_batch_size 100 --max_seq_len 128 --num_warmup_steps 20"
# name -> program below training/, and its flags; those of ipo to orpo were chosen on seed 1
METHODS = {
    "ppo": (PPO, "--best_of_n 0"),
    "dpo": (DPO, ""),
    "ipo": (MAIN, f"{SIZES} --loss_type ipo --learning_rate 3e-4"),
    "kto": (MAIN, f"{SIZES} --loss_type kto --learning_rate 5e-4 --beta 0.5"),
    "simpo": (MAIN, f"{SIZES} --loss_type simpo --learning_rate 3e-4"),
    "orpo": (MAIN, f"{SIZES} --loss_type orpo --learning_rate 5e-4 --orpo_lambda 1"),
}
BEST = "best of 8"


def ask(output: Path, seed: int, methods: list[str]) -> list[list[str]]:
    """A table row for each method, and for the best of 8 answers of the SFT model by the reward model."""
    base = output / f"seed{seed}"
    paths = [base / "actor-models/toy", *(base / name / ("actor" if name == "ppo" else "") for name in methods)]
    program = [sys.executable, str(ROOT / "training/step1_supervised_finetuning/prompt_eval.py")]
    given = [
        "--data_path",
        "toy",
        "--num_prompts",
        "0",
        "--num_shown",
        "0",
        "--judge",
        "toy",
        "--max_new_tokens",
        "40",
    ]
    given += ["--batch_size", "100", "--seed", str(seed), "--reward", str(base / "reward-models/toy")]
    for part, models in (("each", paths), ("best", paths[:1])):
        decoding = ["sample", "best_of_n"] if part == "best" else ["sample"]
        command = [*program, "--model_name_or_path", *map(str, models), "--decoding", *decoding, *given]
        run([*command, "--output_dir", str(base / f"answers-{part}")], base / f"answers-{part}.log", 2)
    each = json.loads((base / "answers-each/summary.json").read_text())["answers"]
    best = json.loads((base / "answers-best/summary.json").read_text())["answers"][1]
    with open(base / "answers-best/answers.jsonl") as file:
        answers = [json.loads(line) for line in file]
    by = {kind: [row["judge"] for row in answers if row["decoding"] == kind] for kind in ("sample", "best_of_n")}
    best["win_rate"] = win_rate(by["best_of_n"], by["sample"])
    seconds = [read_run(path.parent if path.name == "actor" else path)["seconds"] for path in paths]
    named = zip(["sft", *methods], each, seconds, strict=True)
    return [row(seed, *entry) for entry in named] + [row(seed, BEST, best, None)]


def row(seed: int, name: str, found: dict, seconds: float | None) -> list[str]:
    won = found.get("win_rate")
    return [
        name,
        str(seed),
        f"{won['value']:.2f} ({won['ci95'][0]:.2f} to {won['ci95'][1]:.2f})" if won else "",
        f"{found['judge']:.2f}",
        f"{found['correct']:.0%}",
        f"{found['num_tokens']:.1f}",
        "" if seconds is None else f"{seconds:.0f}",
    ]


def main() -> None:
    output, seeds, methods = train_all(__doc__, METHODS, "methods")
    rows = [found for seed in seeds for found in ask(output, seed, methods)]
    order = ["sft", *methods, BEST]
    rows.sort(key=lambda cells: (order.index(cells[0]), cells[1]))
    header = ["method", "seed", "better than SFT (95 %)", "judge", "correct", "tokens", "seconds of training"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
