#!/usr/bin/env bash
# FineWeb's parquet files to token shards: an array of tasks, each with its share of the files, then one that joins them.
#   INPUT='fineweb/*.parquet' TOKENIZER=tokenizer.json OUTPUT=data/fineweb_100bt sbatch slurm/tokenize_fineweb.sh [option ...]
# Options after the script's name go to data_prep/tokenize_fineweb.py. Run again after a failure, it goes on where it was.
# Another number of tasks: sbatch --array=0-63 ... The last task to finish joins the parts. docs/data.md has the details.
#SBATCH --job-name=tokenize-fineweb
#SBATCH --array=0-15
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=24:00:00
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
for name in INPUT TOKENIZER OUTPUT; do
  [[ -n ${!name:-} ]] || die "$name is not set: INPUT='dir/*.parquet' TOKENIZER=file OUTPUT=dir sbatch slurm/tokenize_fineweb.sh"
done
settings INPUT TOKENIZER OUTPUT
# As data_prep/corpus_files.py finds it: a path, a glob, hf://..., or OWNER/NAME[/FOLDER] of the hub where no such folder is here.
input_is_there() (
  [[ -e $INPUT || $INPUT == hf://* ]] && return
  [[ $INPUT =~ ^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+(/.*)?$ && ! -e ${INPUT%/*} ]] && return
  shopt -s nullglob globstar
  IFS=
  # shellcheck disable=SC2206  # to be expanded
  matches=($INPUT)
  [[ -e ${matches[0]:-} ]]
)
input_is_there || die "INPUT=$INPUT: no such file, no file matches, and not OWNER/NAME of a hub dataset"
[[ -f $TOKENIZER || $TOKENIZER == tiktoken:* ]] || die "TOKENIZER=$TOKENIZER: no such file, and not tiktoken:NAME"
only_checked "$@"
alone -m data_prep.tokenize_fineweb --input "$INPUT" --tokenizer "$TOKENIZER" --output "$OUTPUT" "$@" || exit $?
# Whoever finishes last finds every part finished; until then joining is refused, which is no failure of this task.
exec 9> "$OUTPUT/.merge.lock"
flock 9
if said=$(alone -m data_prep.tokenize_fineweb --output "$OUTPUT" --merge 2>&1); then
  echo "$said"
elif [[ $said == *"not finished"* ]]; then
  echo "this part is done; others are not"
else
  die "joining the parts failed: $said"
fi
