#!/usr/bin/env bash
# Step 1 of facebook/opt-1.3b, for 1 GPU of 48 GB: DeepSpeed-Chat's batch of 16 x 8, its lr without LoRA.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --learning_rate 9.65e-6 --gradient_accumulation_steps 8 --gradient_checkpointing "$@"
