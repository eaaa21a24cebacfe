#!/usr/bin/env bash
# Step 2 by DPO of facebook/opt-6.7b with LoRA, for 1 GPU of 80 GB: as step 1.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 16 --num_warmup_steps 150 --lora_dim 128 \
    --gradient_checkpointing "$@"
