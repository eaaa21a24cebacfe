#!/usr/bin/env bash
#SBATCH --job-name=dschat --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 --time=24:00:00
# A recipe on all nodes of a SLURM job: sbatch training/examples/slurm.sh RECIPE [flags]
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ranks="--nnodes $SLURM_JOB_NUM_NODES --nproc_per_node ${SLURM_GPUS_PER_NODE:-8}"
place="--rdzv_backend c10d --rdzv_endpoint $first:29500 --rdzv_id $SLURM_JOB_ID"
DSCHAT_LAUNCH="torchrun $ranks $place" exec srun --kill-on-bad-exit=1 "$@"
