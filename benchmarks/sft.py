"""Step 1 on real dialogues: our program beside TRL's SFTTrainer, turn by turn, in real (unpadded) tokens per second.

    python benchmarks/sft.py --data_path hh-rlhf/train.jsonl
    python benchmarks/sft.py --data_path hh-rlhf/train.jsonl --versus trl --json sft.json             see trl_side.py

Both train a model with the same random weights on the same token rows, answers only in the loss.
"""

from dschat.errors import run_program

from supervised import compare

if __name__ == "__main__":
    run_program(lambda: compare("sft", __doc__))
