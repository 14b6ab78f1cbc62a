#!/bin/bash
# Train on several nodes: sbatch examples/slurm.sh configs/paper/vila-u-7b-256.yaml [key=value ...]
#
# One torchrun per node; it starts one process per GPU. Set account and partition for your cluster. Slurm sends SIGTERM
# five minutes before the time is over: the run then saves, leaves with 143, and the same command goes on from there.
#SBATCH --job-name=vilau
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log

set -euo pipefail
export OMP_NUM_THREADS=8
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 --shutdown-timeout 270 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head_node:29500" \
    -m vilau train "$@"
