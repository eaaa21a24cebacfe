#!/usr/bin/env bash
# Step 3 of any model directory on one GPU: rollouts of 64 answers in minibatches of 32, four models in memory.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --per_device_generation_batch_size 64 --per_device_training_batch_size 8 --gradient_accumulation_steps 4 \
    --actor_gradient_checkpointing --critic_gradient_checkpointing --actor_learning_rate 1e-6 \
    --num_warmup_steps 10 --eval_interval 25 --best_of_n 8 "$@"
