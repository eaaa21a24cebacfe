#!/usr/bin/env bash
# Step 1 of Qwen/Qwen2.5-7B, for 8 GPUs of 80 GB: 64 dialogues a step.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --per_device_train_batch_size 8 --zero_stage 3 --num_warmup_steps 10 --gradient_checkpointing "$@"
