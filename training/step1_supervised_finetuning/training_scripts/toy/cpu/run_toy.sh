#!/usr/bin/env bash
# Step 1 on the embedded task with the embedded model of 0.6 million parameters.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --learning_rate 6e-3 --num_warmup_steps 20 --num_train_epochs 11 --log_interval 10 \
    --per_device_train_batch_size 32 --per_device_eval_batch_size 100 --max_seq_len 128 "$@"
