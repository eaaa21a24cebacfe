#!/usr/bin/env bash
# Step 3 of Qwen/Qwen2.5-0.5B, for 1 GPU of 24 GB: rollouts of 32 answers.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_generation_batch_size 32 --per_device_training_batch_size 4 --gradient_accumulation_steps 4 \
    --actor_gradient_checkpointing --critic_gradient_checkpointing --actor_learning_rate 1e-6 \
    --num_warmup_steps 10 "$@"
