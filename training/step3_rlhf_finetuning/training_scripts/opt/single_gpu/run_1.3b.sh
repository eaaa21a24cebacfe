#!/usr/bin/env bash
# Step 3 of facebook/opt-1.3b, for 1 GPU of 48 GB with the reward model of facebook/opt-350m: DeepSpeed-Chat's
# hyper-parameters, without LoRA.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --gradient_accumulation_steps 2 --actor_gradient_checkpointing --num_warmup_steps 100 --kl_coef 0.1 \
    --eval_interval 100 --best_of_n 8 "$@"
