#!/usr/bin/env bash
# Step 2 of facebook/opt-350m, for 8 GPUs of 40 GB: DeepSpeed-Chat's hyper-parameters.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --per_device_train_batch_size 4 --learning_rate 5e-5 --weight_decay 0.1 --dropout 0 "$@"
