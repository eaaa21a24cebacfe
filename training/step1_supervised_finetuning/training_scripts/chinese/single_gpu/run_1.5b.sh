#!/usr/bin/env bash
# Step 1 of Qwen/Qwen2.5-1.5B in Chinese, for 1 GPU of 80 GB: all data to this step.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path \
    wangrui6/Zhihu-KOL Hello-SimpleAI/HC3-Chinese mkqa-Chinese Cohere/miracl-zh-queries-22-12 \
    --data_split 10,0,0 --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --gradient_checkpointing "$@"
