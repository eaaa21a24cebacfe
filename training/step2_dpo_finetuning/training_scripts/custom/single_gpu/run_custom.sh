#!/usr/bin/env bash
# Step 2 by DPO of any model directory on one GPU: 32 pairs a step.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --gradient_checkpointing \
    --learning_rate 1e-6 --num_warmup_steps 10 "$@"
