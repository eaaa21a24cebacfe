#!/usr/bin/env bash
# What models answer: greedily, and one sample each; give --model_name_or_path and --data_path.
exec python "$(dirname "$0")/../prompt_eval.py" --decoding greedy sample "$@"
