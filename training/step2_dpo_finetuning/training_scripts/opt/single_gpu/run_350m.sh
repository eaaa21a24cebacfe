#!/usr/bin/env bash
# Step 2 by DPO of step 1's OPT-350m, for 1 GPU of 48 GB: learning rate, warm-up and 64 pairs a step as in the paper.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" --data_path Dahoas/rm-static \
    --learning_rate 1e-6 --num_warmup_steps 150 --gradient_accumulation_steps 4 "$@"
