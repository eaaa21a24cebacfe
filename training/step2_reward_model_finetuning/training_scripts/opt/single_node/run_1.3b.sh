#!/usr/bin/env bash
# Step 2 of facebook/opt-1.3b, for 8 GPUs of 40 GB: as step 1.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --per_device_train_batch_size 4 --zero_stage 2 --learning_rate 9.65e-6 --weight_decay 0.1 --dropout 0 "$@"
