#!/usr/bin/env bash
# Validation loss and perplexity of a checkpoint at every trained width, and at any mix, on one GPU.
#   MODEL=runs/lm_1b4 sbatch slurm/evaluate.sh [--width 1,1/2,... ...] [--sequences N]
# MODEL is a run or a checkpoint folder; DATA (default: the run's) the token shards. slurm/common.sh has the other settings.
#SBATCH --job-name=matmamba-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.out

ROOT=${MATMAMBA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -r $ROOT/slurm/common.sh ]] || {
  echo "error: no slurm/common.sh in $ROOT: call sbatch from the repository, or set MATMAMBA_ROOT" >&2
  exit 2
}
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
[[ -n ${MODEL:-} ]] || die "MODEL is not set: MODEL=runs/lm_1b4 sbatch slurm/evaluate.sh"
settings MODEL
[[ -d $MODEL ]] || die "MODEL=$MODEL: no such folder"
[[ -z ${DATA:-} || -d $DATA || $DATA == *://* ]] || die "DATA=$DATA: no such folder"
only_checked "$@"
alone -m pretrain.evaluate "$MODEL" ${DATA:+--data "$DATA"} "$@"
