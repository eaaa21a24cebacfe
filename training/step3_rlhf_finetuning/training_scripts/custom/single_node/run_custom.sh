#!/usr/bin/env bash
# Step 3 of any model directory on all GPUs of one machine: optimizers and gradients sharded.
DSCHAT_LAUNCH=${DSCHAT_LAUNCH:-deepspeed} exec "$(dirname "$0")/../single_gpu/run_custom.sh" \
    --per_device_generation_batch_size 16 --gradient_accumulation_steps 1 \
    --actor_zero_stage 2 --critic_zero_stage 2 "$@"
