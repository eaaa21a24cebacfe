#!/usr/bin/env bash
# Step 2 by DPO of step 1's OPT-1.3b, for 1 GPU of 48 GB: as the 350M model, 4 pairs at a time.
exec "$(dirname "$0")/run_350m.sh" --per_device_train_batch_size 4 --gradient_accumulation_steps 16 \
    --gradient_checkpointing "$@"
