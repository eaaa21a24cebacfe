#!/usr/bin/env bash
# Step 2 by DPO of any model directory on a CPU: as on one GPU, in smaller micro-batches, 16 rows a step.
exec "$(dirname "$0")/../single_gpu/run_custom.sh" \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --no-gradient_checkpointing "$@"
