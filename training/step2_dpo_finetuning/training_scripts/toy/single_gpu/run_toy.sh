#!/usr/bin/env bash
# Step 2 by DPO on the embedded task: as on a CPU, on the first GPU.
exec "$(dirname "$0")/../cpu/run_toy.sh" "$@"
