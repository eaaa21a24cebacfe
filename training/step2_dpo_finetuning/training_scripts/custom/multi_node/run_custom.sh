#!/usr/bin/env bash
# Step 2 by DPO of any model directory on the machines of /job/hostfile: weights, gradients and optimizer sharded.
DSCHAT_LAUNCH=${DSCHAT_LAUNCH:-deepspeed} exec "$(dirname "$0")/../single_gpu/run_custom.sh" \
    --gradient_accumulation_steps 1 --zero_stage 3 "$@"
