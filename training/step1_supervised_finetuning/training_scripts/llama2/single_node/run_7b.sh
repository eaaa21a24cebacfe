#!/usr/bin/env bash
# Step 1 of meta-llama/Llama-2-7b-hf, for 8 GPUs of 80 GB: DeepSpeed-Chat's hyper-parameters.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --per_device_train_batch_size 4 --zero_stage 3 --learning_rate 9.65e-6 --num_train_epochs 4 \
    --gradient_checkpointing "$@"
