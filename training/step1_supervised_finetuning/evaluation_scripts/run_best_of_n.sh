#!/usr/bin/env bash
# What a reward model is worth: one sample beside the best of eight; give --model_name_or_path, --data_path, --reward.
exec python "$(dirname "$0")/../prompt_eval.py" --decoding sample best_of_n "$@"
