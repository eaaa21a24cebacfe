#!/usr/bin/env bash
# Step 3 of facebook/opt-1.3b with LoRA, for 8 GPUs of 40 GB: DeepSpeed-Chat's hyper-parameters.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_generation_batch_size 8 --per_device_training_batch_size 8 --actor_zero_stage 2 \
    --critic_zero_stage 2 --actor_lora_dim 128 --critic_lora_dim 128 --num_warmup_steps 100 --kl_coef 0.1 "$@"
