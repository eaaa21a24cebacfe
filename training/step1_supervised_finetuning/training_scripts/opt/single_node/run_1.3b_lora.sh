#!/usr/bin/env bash
# Step 1 of facebook/opt-1.3b with LoRA, for 8 GPUs of 40 GB: DeepSpeed-Chat's hyper-parameters.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static Dahoas/full-hh-rlhf \
    Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets \
    --per_device_train_batch_size 8 --lora_dim 128 --lora_learning_rate 1e-3 --weight_decay 0.1 \
    --num_train_epochs 16 "$@"
