#!/bin/bash
# Eight nodes of 8 GPUs under Slurm; going on after the time limit, with the same command:
#   sbatch examples/launch/slurm.sh examples/qwen2_5_vl_72b_8nodes.yaml [name=value ...]
# Fewer nodes: sbatch --nodes 2 ... The environment of the shell that submits it has appo installed.
#SBATCH --job-name=appo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER=${hosts%%$'\n'*}
# TERM, five minutes before the end, makes the run save a checkpoint and stop.
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node 8 --master_addr "$MASTER" --master_port 29500 -m appo train "$@"' appo "$@"
