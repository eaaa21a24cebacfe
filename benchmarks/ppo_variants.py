"""PPO's variants on the embedded task, side by side: from the same SFT and reward model, by the task's judge.

    python benchmarks/ppo_variants.py                            seeds 1, 2, 3; half an hour of two cores
    python benchmarks/ppo_variants.py --seeds 1 --only "gae;rloo"

Steps 1 and 2 run once per seed, by the recipes. Each variant changes the recipe of step 3 by the flags in VARIANTS;
all train on the same number of answers. A run that is there already is not run again.
"""

from pathlib import Path

from dschat.data.toy import judge
from dschat.report.progress import table
from dschat.report.summary import PPO, SFT, grade, read_answers, read_run, win_rate

from toy_runs import folder, train_all

RECIPE = "step3_rlhf_finetuning/training_scripts/toy/cpu/run_toy.sh"
# Four answers to each of 25 prompts are as many as one to each of 100.
GROUPS = "--num_samples_per_prompt 4 --per_device_generation_batch_size 25 --max_steps 45"
VARIANTS = {
    "gae": "",
    "gae, ppo_epochs 1": "--ppo_epochs 1",
    "gae, ppo_epochs 4": "--ppo_epochs 4",
    "rloo": f"--advantage_estimator rloo {GROUPS}",
    "grpo": f"--advantage_estimator grpo --kl_in loss --kl_penalty k3 {GROUPS}",
    "reinforce_pp": "--advantage_estimator reinforce_pp",
}


def row(output: Path, seed: int, variant: str) -> list[str]:
    target = output / f"seed{seed}" / folder(variant)
    graded = {name: grade(rows, judge) for name, rows in read_answers(target).items()}
    won = win_rate(graded[PPO].scores, graded[SFT].scores)
    means = [sum(graded[name].scores) / len(graded[name].scores) for name in (SFT, PPO)]
    correct = [sum(graded[name].correct) / len(graded[name].correct) for name in (SFT, PPO)]
    record = read_run(target)
    return [
        variant,
        str(seed),
        f"{won['value']:.2f} ({won['ci95'][0]:.2f} to {won['ci95'][1]:.2f})",
        f"{means[0]:.2f} -> {means[1]:.2f}",
        f"{correct[0]:.0%} -> {correct[1]:.0%}",
        f"{record['metrics']['eval/kl_per_seq']:.1f}",
        f"{record['seconds']:.0f}",
    ]


def main() -> None:
    programs = {name: (RECIPE, f"--best_of_n 0 {flags}") for name, flags in VARIANTS.items()}
    output, seeds, variants = train_all(__doc__, programs, "ppo-variants")
    header = ["variant", "seed", "better than SFT (95 %)", "judge", "correct", "KL", "seconds"]
    print(table(header, [row(output, seed, variant) for variant in variants for seed in seeds]))


if __name__ == "__main__":
    main()
