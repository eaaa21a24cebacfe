#!/usr/bin/env bash
# Step 2 by DPO of Qwen/Qwen2.5-0.5B, for 1 GPU of 24 GB: 32 pairs a step.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 16 --learning_rate 1e-6 --num_warmup_steps 10 \
    --gradient_checkpointing "$@"
