#!/usr/bin/env bash
# Step 1 of rinna/japanese-gpt-neox-3.6b with LoRA, for 1 GPU of 40 GB: all data to this step.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path \
    mkqa-Japanese Cohere/miracl-ja-queries-22-12 lmqg/qg_jaquad lmqg/qag_jaquad \
    --data_split 10,0,0 --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --lora_dim 64 \
    --gradient_checkpointing "$@"
