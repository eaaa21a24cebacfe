#!/usr/bin/env bash
# Step 3 of Qwen/Qwen2.5-7B with LoRA, for 1 GPU of 80 GB: rollouts of 64 answers.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --per_device_generation_batch_size 64 --per_device_training_batch_size 4 --gradient_accumulation_steps 8 \
    --actor_lora_dim 64 --critic_lora_dim 64 --actor_gradient_checkpointing --critic_gradient_checkpointing \
    --num_warmup_steps 10 "$@"
