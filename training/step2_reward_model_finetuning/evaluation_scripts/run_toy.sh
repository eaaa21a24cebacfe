#!/usr/bin/env bash
# The embedded task: the report on its held-out pairs; give --model_name_or_path.
exec python "$(dirname "$0")/../rw_eval.py" \
    --data_path toy --max_seq_len 128 --batch_size 100 --output_dir output/rw_eval "$@"
