#!/usr/bin/env bash
# Step 2 on the embedded task, from the model of step 1.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --learning_rate 1e-3 --num_warmup_steps 100 --num_train_epochs 3 --log_interval 10 \
    --per_device_eval_batch_size 100 --max_seq_len 128 --judge toy --judge_max_new_tokens 40 "$@"
