#!/usr/bin/env bash
# Compress many count matrices on a cluster, one array task per matrix. The scheduler may kill and restart tasks.
#
#   sbatch --array=0-$(($(wc -l < matrices.txt) - 1)) examples/genomics_batch.sh matrices.txt results [narrows fit options]
#
# matrices.txt names one matrix per line (.h5ad, .zarr, 10x .h5 or folder, .mtx, .npz, ...), cells x genes. A task writes
# to results/NAME. Finished results stay. An interrupted task continues from its checkpoint. The script also runs
# without Slurm: SLURM_ARRAY_TASK_ID=0 examples/genomics_batch.sh matrices.txt results
#
#SBATCH --job-name=narrows
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

list=${1:?"a file that names one matrix per line"}
results=${2:?"a folder for the results"}
shift 2

data=$(sed -n "$((${SLURM_ARRAY_TASK_ID:?"is set by sbatch --array"} + 1))p" "$list")
if [ -z "$data" ]; then
  echo "$list has no line $((SLURM_ARRAY_TASK_ID + 1))" >&2
  exit 2
fi
name=$(basename "$data")
out=$results/${name%%.*}

# Stay within the limits of Slurm. narrows reads SLURM_CPUS_PER_TASK. A tenth of the memory is left to the system.
limits=()
if [ -n "${SLURM_MEM_PER_NODE:-}" ]; then
  limits=(--max-memory "$((SLURM_MEM_PER_NODE * 9 / 10))MiB")
fi
launch=()
if [ -n "${SLURM_JOB_ID:-}" ]; then
  launch=(srun)
fi

status=0
"${launch[@]}" narrows fit "$data" --out "$out" "${limits[@]}" "$@" || status=$?

# 128 + USR1: the time limit is near and the checkpoint is written. Requeue the task; the same command continues it.
if [ "$status" -eq 138 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
