#!/usr/bin/env bash
# Step 3 of facebook/opt-30b with LoRA, for 8 GPUs of 80 GB with the reward model of facebook/opt-350m: DeepSpeed-Chat's
# hyper-parameters.
exec ${DSCHAT_LAUNCH:-deepspeed} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_generation_batch_size 2 --generation_batches 4 --per_device_training_batch_size 4 --actor_zero_stage 3 \
    --critic_zero_stage 3 --actor_lora_dim 128 --critic_lora_dim 128 --actor_gradient_checkpointing \
    --critic_gradient_checkpointing --num_warmup_steps 100 --kl_coef 0.1 "$@"
