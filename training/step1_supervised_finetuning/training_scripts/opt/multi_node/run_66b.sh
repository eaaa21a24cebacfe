#!/usr/bin/env bash
# Step 1 of facebook/opt-66b, for 64 GPUs of 80 GB: 8 machines of 8.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --per_device_train_batch_size 4 --zero_stage 3 --learning_rate 9.65e-6 --weight_decay 0.1 \
    --num_train_epochs 2 --gradient_checkpointing "$@"
