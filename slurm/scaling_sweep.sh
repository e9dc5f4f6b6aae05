#!/usr/bin/env bash
# The scaling sweep: each line of GRID (default slurm/scaling_grid.txt) is one run of the array, four at a time.
#   sbatch slurm/scaling_sweep.sh [section.field=value ...]        then, at any time: python -m pretrain.sweep runs/sweep
# Another grid: GRID=my.txt sbatch --array=0-5%2 slurm/scaling_sweep.sh. SWEEP_DIR (default runs/sweep) holds the runs.
# Each run resumes by itself; slurm/common.sh and docs/slurm.md list the other settings.
#SBATCH --job-name=matmamba-sweep
#SBATCH --array=0-19%4
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

ROOT=${MATMAMBA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -r $ROOT/slurm/common.sh ]] || {
  echo "error: no slurm/common.sh in $ROOT: call sbatch from the repository, or set MATMAMBA_ROOT" >&2
  exit 2
}
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
GRID=${GRID:-$ROOT/slurm/scaling_grid.txt}
[[ -r $GRID ]] || die "GRID=$GRID cannot be read"
[[ -z ${CONFIG:-} ]] || die "CONFIG=$CONFIG would replace the config of every run of GRID=$GRID: unset it"
[[ -z ${RUN_DIR:-} ]] || die "RUN_DIR=$RUN_DIR: every run of the sweep has its own, in SWEEP_DIR: unset it, and set that one"
run_of_grid() {
  local line name config overrides
  line=$(grep -v -e '^ *#' -e '^ *$' "$GRID" | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p")
  [[ -n $line ]] || die "GRID=$GRID has no run number $SLURM_ARRAY_TASK_ID (the first is 0)"
  read -r name config overrides <<< "$line"
  RUN_DIR=${SWEEP_DIR:-$ROOT/runs/sweep}/$name
  # shellcheck disable=SC2086  # one word an override
  pretrain "$config" $overrides "$@"
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  # Every run of the grid is checked, each in a shell of its own.
  n_runs=$(grep -vc -e '^ *#' -e '^ *$' "$GRID")
  for ((SLURM_ARRAY_TASK_ID = 0; SLURM_ARRAY_TASK_ID < n_runs; SLURM_ARRAY_TASK_ID++)); do
    (run_of_grid "$@" > /dev/null) || exit $?
  done
  unset SLURM_ARRAY_TASK_ID
  only_checked "$@"
fi
[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || die "not an array job: sbatch --array=0-19%4 slurm/scaling_sweep.sh"
run_of_grid "$@"
