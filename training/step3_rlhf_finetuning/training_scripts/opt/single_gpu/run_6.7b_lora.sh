#!/usr/bin/env bash
# Step 3 of facebook/opt-6.7b with LoRA, for 1 GPU of 80 GB: DeepSpeed-Chat's hyper-parameters.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_training_batch_size 8 --gradient_accumulation_steps 16 \
    --generation_batches 8 --actor_lora_dim 128 --critic_lora_dim 128 --actor_gradient_checkpointing \
    --critic_gradient_checkpointing --num_warmup_steps 100 --kl_coef 0.1 "$@"
