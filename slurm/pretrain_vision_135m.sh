#!/usr/bin/env bash
# MatMamba-Vision 135M on ImageNet: one node of 8 GPUs.
#   sbatch slurm/pretrain_vision_135m.sh [section.field=value ...]
# It resumes by itself; slurm/common.sh and docs/slurm.md list the settings (DATA, RUN_DIR, CONTAINER, ...).
#SBATCH --job-name=matmamba-vision-135m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

ROOT=${MATMAMBA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -r $ROOT/slurm/common.sh ]] || {
  echo "error: no slurm/common.sh in $ROOT: call sbatch from the repository, or set MATMAMBA_ROOT" >&2
  exit 2
}
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
pretrain configs/vision_135m.yaml "$@"
