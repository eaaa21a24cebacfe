#!/usr/bin/env bash
# Step 3 on the embedded task, from the models of steps 1 and 2.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --actor_learning_rate 1e-4 --critic_learning_rate 3e-4 --num_train_epochs 4 \
    --per_device_generation_batch_size 128 --per_device_training_batch_size 64 \
    --max_prompt_seq_len 64 --max_answer_seq_len 48 --best_of_n 8 --eval_interval 10 "$@"
