#!/usr/bin/env bash
# Step 1 of facebook/opt-6.7b with LoRA, for 1 GPU of 80 GB: DeepSpeed-Chat's hyper-parameters.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 16 --lora_dim 128 --gradient_checkpointing "$@"
