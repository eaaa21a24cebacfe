#!/usr/bin/env bash
# Step 1 of any model directory on a CPU: as on one GPU, 16 rows a step, in micro-batches by length.
exec "$(dirname "$0")/../single_gpu/run_custom.sh" \
    --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --max_tokens_per_batch 1024 \
    --no-gradient_checkpointing "$@"
