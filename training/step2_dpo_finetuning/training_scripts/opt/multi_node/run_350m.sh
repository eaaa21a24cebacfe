#!/usr/bin/env bash
# Step 2 by DPO of facebook/opt-350m, for 64 GPUs of 80 GB: learning rate and warm-up of the paper.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --per_device_train_batch_size 2 --learning_rate 1e-6 --num_warmup_steps 150 "$@"
