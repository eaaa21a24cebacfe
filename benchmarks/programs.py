"""Where the programs of the stages are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "sft": "step1_supervised_finetuning",
    "reward": "step2_reward_model_finetuning",
    "dpo": "step2_dpo_finetuning",
    "ppo": "step3_rlhf_finetuning",
}
PROGRAMS = {stage: ROOT / "training" / folder / "main.py" for stage, folder in FOLDERS.items()}
