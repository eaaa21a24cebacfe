#!/usr/bin/env bash
# Step 3 on the embedded task, from the models of steps 1 and 2.
exec ${DSCHAT_LAUNCH:-python} "$(dirname "$0")/../../../main.py" \
    --actor_learning_rate 5e-4 --critic_learning_rate 1e-3 --num_warmup_steps 20 --kl_coef 0.15 \
    --ppo_epochs 2 --num_train_epochs 5 --per_device_generation_batch_size 100 --per_device_training_batch_size 25 \
    --max_prompt_seq_len 48 --max_answer_seq_len 40 --best_of_n 8 --eval_interval 15 "$@"
