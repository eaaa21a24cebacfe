#!/usr/bin/env bash
# Step 1 of Qwen/Qwen2.5-7B with LoRA, for 1 GPU of 80 GB: 64 dialogues a step.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 16 --lora_dim 64 --num_warmup_steps 10 \
    --gradient_checkpointing "$@"
