"""DPO on real preferences: our program beside TRL's DPOTrainer, turn by turn, in real (unpadded) tokens per second.

    python benchmarks/dpo.py --data_path hh-rlhf/train.jsonl
    python benchmarks/dpo.py --data_path hh-rlhf/train.jsonl --versus trl --json dpo.json             see trl_side.py

Both train a model with the same random weights on the same pairs of token rows. Both ask the reference about every
pair before training (TRL: precompute_ref_log_probs); the ratio is of training and reference together, an epoch of one.
"""

from dschat.errors import run_program

from supervised import compare

if __name__ == "__main__":
    run_program(lambda: compare("dpo", __doc__))
