#!/usr/bin/env bash
# Step 2 by DPO on the embedded task: as on a CPU, a rank for each GPU of this machine; batch sizes are per rank.
DSCHAT_LAUNCH=${DSCHAT_LAUNCH:-deepspeed} exec "$(dirname "$0")/../cpu/run_toy.sh" "$@"
