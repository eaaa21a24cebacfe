#!/usr/bin/env bash
# Step 2 from the 1.3B model of step 1, for 1 GPU of 48 GB: DeepSpeed-Chat's batch and weight decay, step 1's lr.
exec "$(dirname "$0")/run_350m.sh" --learning_rate 9.65e-6 --gradient_checkpointing "$@"
