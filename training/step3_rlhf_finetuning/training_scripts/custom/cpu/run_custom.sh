#!/usr/bin/env bash
# Step 3 of any model directory on a CPU: as on one GPU, rollouts of 32 answers, fewer held-out prompts.
exec "$(dirname "$0")/../single_gpu/run_custom.sh" --per_device_generation_batch_size 32 \
    --per_device_training_batch_size 4 --no-actor_gradient_checkpointing --no-critic_gradient_checkpointing \
    --max_eval_samples 64 "$@"
