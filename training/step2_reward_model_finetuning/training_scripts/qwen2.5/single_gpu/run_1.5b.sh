#!/usr/bin/env bash
# Step 2 of Qwen/Qwen2.5-1.5B, for 1 GPU of 80 GB: 32 pairs a step.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --num_warmup_steps 10 \
    --gradient_checkpointing "$@"
