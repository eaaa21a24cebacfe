"""Step 2 on real preferences: our program beside TRL's RewardTrainer, turn by turn, in real tokens per second.

    python benchmarks/reward.py --data_path hh-rlhf/train.jsonl
    python benchmarks/reward.py --data_path hh-rlhf/train.jsonl --versus trl --json reward.json       see trl_side.py

Both train a model with the same random weights on the same pairs of token rows.
"""

from dschat.errors import run_program

from supervised import compare

if __name__ == "__main__":
    run_program(lambda: compare("reward", __doc__))
