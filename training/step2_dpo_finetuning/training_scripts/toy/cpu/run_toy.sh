#!/usr/bin/env bash
# Step 2 by DPO on the embedded task, from the model of step 1.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --learning_rate 5e-4 --beta 0.5 --num_warmup_steps 20 --per_device_train_batch_size 32 \
    --per_device_eval_batch_size 100 --max_seq_len 128 --log_interval 10 "$@"
