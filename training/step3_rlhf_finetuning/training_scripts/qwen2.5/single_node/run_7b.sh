#!/usr/bin/env bash
# Step 3 of Qwen/Qwen2.5-7B, for 8 GPUs of 80 GB: rollouts of 128 answers.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_training_batch_size 8 --actor_zero_stage 3 \
    --critic_zero_stage 3 --actor_gradient_checkpointing --critic_gradient_checkpointing \
    --actor_learning_rate 1e-6 --num_warmup_steps 10 "$@"
