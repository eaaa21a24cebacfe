#!/usr/bin/env bash
# The embedded task: one sample for each of its held-out prompts, by its own judge; give --model_name_or_path.
exec python "$(dirname "$0")/../prompt_eval.py" \
    --data_path toy --decoding sample --num_prompts 0 --num_shown 5 --batch_size 100 "$@"
