#!/usr/bin/env bash
# The quality report of a reward model, with pictures; give --model_name_or_path and --data_path.
exec python "$(dirname "$0")/../rw_eval.py" --output_dir output/rw_eval "$@"
