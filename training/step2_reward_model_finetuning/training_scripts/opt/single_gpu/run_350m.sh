#!/usr/bin/env bash
# Step 2 of facebook/opt-350m, for 1 GPU of 48 GB: DeepSpeed-Chat's hyper-parameters.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --learning_rate 5e-5 --weight_decay 0.1 --dropout 0 --gradient_accumulation_steps 4 "$@"
