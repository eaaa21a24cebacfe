#!/usr/bin/env bash
# Step 1 of any model directory on one GPU: 32 dialogues a step.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --gradient_checkpointing \
    --num_warmup_steps 10 "$@"
