#!/usr/bin/env bash
# Step 3 of any model directory on the machines of /job/hostfile: everything of all four models sharded.
DSCHAT_LAUNCH=${DSCHAT_LAUNCH:-deepspeed} exec "$(dirname "$0")/../single_gpu/run_custom.sh" \
    --per_device_generation_batch_size 16 --gradient_accumulation_steps 1 \
    --actor_zero_stage 3 --critic_zero_stage 3 "$@"
