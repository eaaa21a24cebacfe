#!/usr/bin/env bash
# A recipe of steps 1 and 2 at ZeRO 2 and 3, whole and with LoRA: sweep.sh RECIPE OUTPUT [flags]
# What does not fit is left out, as planned for $PLAN_FOR, such as 8x80 (default: this machine, one rank).
recipe=$1 output=$2
shift 2
for stage in 2 3; do
    for dim in 0 128; do
        run=("$@" --zero_stage $stage --lora_dim $dim --output_dir "$output/zero$stage-lora$dim")
        DSCHAT_LAUNCH=python "$recipe" "${run[@]}" --dry_run --plan_for "${PLAN_FOR:-}" || continue
        "$recipe" "${run[@]}"
    done
done
