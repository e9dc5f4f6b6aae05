#!/usr/bin/env bash
# A width, or a mix of widths per layer, out of a run, in a format that other tools load.
#   MODEL=runs/lm_1b4 sbatch slurm/export.sh --width 1/4 --format hf -o exports/1b4-quarter
# MODEL is a run or a checkpoint folder; options go to python -m modeling.export. slurm/common.sh has the other settings.
#SBATCH --job-name=matmamba-export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out

ROOT=${MATMAMBA_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -r $ROOT/slurm/common.sh ]] || {
  echo "error: no slurm/common.sh in $ROOT: call sbatch from the repository, or set MATMAMBA_ROOT" >&2
  exit 2
}
# shellcheck source=slurm/common.sh
source "$ROOT/slurm/common.sh"
[[ -n ${MODEL:-} ]] || die "MODEL is not set: MODEL=runs/lm_1b4 sbatch slurm/export.sh --width 1/4 --format hf -o DIR"
given=("$@") arguments=() output=""
while (($#)); do
  case $1 in
    -o | --output) output=${2:-} && shift ;;
    -o?*) output=${1#-o} ;;
    --output=*) output=${1#*=} ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ -n $output ]] || die "-o DIR is not given: MODEL=runs/lm_1b4 sbatch slurm/export.sh --width 1/4 --format hf -o DIR"
OUTPUT=$(dirname -- "$output") # the export is made beside its place, and moved there when whole
settings MODEL OUTPUT
[[ -d $MODEL ]] || die "MODEL=$MODEL: no such folder"
only_checked "${given[@]}"
alone -m modeling.export "$MODEL" "${arguments[@]}" -o "$OUTPUT/$(basename -- "$output")"
