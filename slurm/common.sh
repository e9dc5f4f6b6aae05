# shellcheck shell=bash
# What the scripts beside this share: settings, checks, launch, and when to requeue. Sourced, never submitted.
#
# Every setting is an environment variable with a default (docs/slurm.md lists them; sbatch passes the environment on):
#   DATA                 folder of token shards; default: the config's data.path
#   RUN_DIR              where the run writes and resumes from; default: the config's run_dir; not for the sweep
#   CONFIG               another config file than the script's own; not for the sweep
#   NODES TASKS_PER_NODE fewer nodes or tasks than were allocated; default: all
#   VENV                 virtual environment; default: .venv in the repository
#   MODULES              environment modules to load, separated by spaces
#   CONTAINER            image to run in; default: none
#   CONTAINER_RUNTIME    pyxis (srun --container-image) or apptainer; default: apptainer for a .sif, else pyxis
#   CONTAINER_MOUNTS     more to mount than the repository and what the variables name, HOST:INSIDE separated by commas
#   LAUNCHER             srun (one task a GPU) or torchrun; default: srun
#   MAX_RESTARTS         requeues of one job before it stops; default: 20
#   HANG_SECONDS         least time without a step before the watchdog acts; default: 600
#   LOST_SECONDS         silence after which a rank counts as lost; default: 60
#   ALLREDUCE_GB_S       slowest all-reduce that a job starts with
#   MATMAMBA_ROOT        the repository, where it is not the folder that sbatch was called from
#
# Called by bash, outside a job, a script checks its settings and its config on this machine and submits nothing.
#
# Exit codes of a run: 0 finished, 75 saved and wants to go on, 2 misused (never requeued), anything else broken.

set -uo pipefail

die() {
  echo "error: $*" >&2
  exit 2
}

# settings [VARIABLE ...]: check and set all of it. A container gets the paths in DATA, RUN_DIR and these variables.
settings() {
  cd "$ROOT" || die "cannot enter $ROOT"
  ROOT=$PWD
  LAUNCHER=${LAUNCHER:-srun}
  MAX_RESTARTS=${MAX_RESTARTS:-20}
  [[ $LAUNCHER == srun || $LAUNCHER == torchrun ]] || die "LAUNCHER=$LAUNCHER: must be srun or torchrun"
  [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$MAX_RESTARTS: must be a whole number"
  local name
  for name in NODES TASKS_PER_NODE HANG_SECONDS; do
    [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name}: must be a positive whole number"
  done
  for name in LOST_SECONDS ALLREDUCE_GB_S; do
    [[ -z ${!name:-} || ${!name} =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "$name=${!name}: must be a number"
  done
  if [[ -n ${MODULES:-} ]]; then
    command -v module > /dev/null || type module > /dev/null 2>&1 || die "MODULES=$MODULES: this node has no module command"
    # shellcheck disable=SC2086  # one word a module
    module load $MODULES || die "module load $MODULES failed"
  fi

  container=() # before the program, on one node
  step=()      # after srun
  if [[ -z ${CONTAINER:-} ]]; then
    python=${VENV:-$ROOT/.venv}/bin/python
    [[ -x $python ]] || die "no Python at $python: run make setup in $ROOT, or set VENV or CONTAINER"
  else
    python=python3
    local runtime=${CONTAINER_RUNTIME:-}
    [[ -n $runtime ]] || { [[ $CONTAINER == *.sif ]] && runtime=apptainer || runtime=pyxis; }
    case $CONTAINER in
      /* | ./*) [[ -e $CONTAINER ]] || die "CONTAINER=$CONTAINER: no such image" ;;
    esac
    local mounts=$ROOT:$ROOT
    mounted DATA RUN_DIR "$@"
    if [[ -n ${SLURM_JOB_ID:-} ]]; then # compiled kernels go there
      TMPDIR=${TMPDIR:-/tmp}
      mounted TMPDIR
    fi
    mounts+=${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    case $runtime in
      apptainer)
        command -v apptainer > /dev/null || die "CONTAINER_RUNTIME=apptainer: not installed on $(hostname)"
        container=(apptainer exec --nv --bind "$mounts" --pwd "$ROOT" "$CONTAINER")
        ;;
      pyxis)
        srun --help 2> /dev/null | grep -q -- --container-image || die "CONTAINER=$CONTAINER: this Slurm has no pyxis"
        step=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$ROOT")
        ;;
      *) die "CONTAINER_RUNTIME=$runtime: must be pyxis or apptainer" ;;
    esac
  fi

  export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  # Since Slurm 22.05 srun no longer takes this over from sbatch.
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  [[ -n ${SLURM_JOB_ID:-} ]] || return 0
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
  MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  # A compile cache that two jobs share races.
  TRITON_CACHE_DIR=${TMPDIR:-/tmp}/triton-$SLURM_JOB_ID
  export MASTER_ADDR MASTER_PORT TRITON_CACHE_DIR
  export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} # the flight recorder, for the watchdog
}

# mounted VARIABLE ...: add the path in each to $mounts, and make it absolute in its variable. What is not on this machine
# (s3://..., a hub's name, tiktoken:...) stays as it is, for the program to judge. RUN_DIR and OUTPUT are folders to write
# into: a job makes them first, since a container cannot mount what is not there; a check outside a job writes nothing.
mounted() {
  local name path folder rest
  for name; do
    path=${!name:-} rest=""
    [[ -n $path ]] || continue
    if [[ -n ${SLURM_JOB_ID:-} && ($name == RUN_DIR || $name == OUTPUT) ]]; then
      mkdir -p -- "$path" || die "$name=$path: this folder cannot be made"
    fi
    if [[ ! -e $path && $path == *[*?[]* ]]; then # of a glob, the folder before its first sign
      folder=${path%%[*?[]*}
      folder=${folder%"${folder##*/}"}
      rest=/${path#"$folder"}
      path=${folder:-.}
    fi
    [[ -e $path ]] || continue
    if [[ -d $path ]]; then
      path=$(realpath -m -- "$path")
    else # a file keeps its name: caches hold tokenizer.json as a link to a name without an ending
      path=$(realpath -m -- "$(dirname -- "$path")")/$(basename -- "$path")
    fi
    [[ $path != *[,:]* ]] || die "$name=$path: a path with a comma or a colon cannot be mounted"
    mounts+=,$path:$path
    printf -v "$name" %s "$path$rest"
  done
}

# Outside a job the checks were all there is to do.
only_checked() {
  [[ -z ${SLURM_JOB_ID:-} ]] || return 0
  echo "settings are fine: sbatch $0${*:+ $*}"
  exit 0
}

# One process of ours on this node, in the container if there is one.
alone() {
  if ((${#step[@]})) && [[ -n ${SLURM_JOB_ID:-} ]]; then
    srun --nodes=1 --ntasks=1 --overlap "${step[@]}" "$python" "$@"
  else
    "${container[@]}" "$python" "$@"
  fi
}

# asked_for VARIABLE OPTION: the variable, or what was allocated, or outside a job what the script asks for.
asked_for() {
  local allocated=${SLURM_JOB_NUM_NODES:-}
  [[ $1 == NODES ]] || allocated=${SLURM_NTASKS_PER_NODE:-${SLURM_JOB_ID:+1}}
  local written
  written=$(sed -n "s/^#SBATCH --$2=//p" "$0")
  echo "${!1:-${allocated:-${written:-1}}}"
}

# Start "$@" (a Python module and its arguments) on every task in the background; sets $pid.
launch() {
  local nodes tasks
  nodes=$(asked_for NODES nodes)
  tasks=$(asked_for TASKS_PER_NODE ntasks-per-node)
  local where=(--nodes="$nodes" --kill-on-bad-exit=1 "${step[@]}")
  if [[ $LAUNCHER == srun ]]; then
    srun --ntasks-per-node="$tasks" --ntasks="$((nodes * tasks))" "${where[@]}" "${container[@]}" "$python" -m "$@" &
  else
    # One task starts all ranks of its node: it needs the cores of all of them, where srun would give it those of one.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || local -x SRUN_CPUS_PER_TASK=$((SLURM_CPUS_PER_TASK * tasks))
    srun --ntasks-per-node=1 --ntasks="$nodes" "${where[@]}" "${container[@]}" "$python" -m torch.distributed.run \
      --nnodes="$nodes" --nproc-per-node="$tasks" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
      --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" -m "$@" &
  fi
  pid=$!
}

# Wait for $pid, handing signals on to it; sets $rc, and $told where there was one. A signal cuts `wait` short, so it is asked until the child is gone.
attend() {
  told=0
  trap 'told=1; forward USR1' USR1
  trap 'told=1; forward TERM' TERM
  wait "$pid"
  rc=$?
  while kill -0 "$pid" 2> /dev/null; do
    wait "$pid"
    rc=$?
  done
  trap '' TERM USR1
  # torchrun's agent dies of the signal itself, and has no exit code for "saved".
  if [[ $LAUNCHER == torchrun && $told == 1 && $rc != 0 ]]; then rc=75; fi
}

forward() {
  # torchrun's agent does not know USR1; on TERM it gives its workers 30 seconds to save.
  if [[ $LAUNCHER == torchrun ]]; then kill -TERM "$pid" 2> /dev/null; else kill "-$1" "$pid" 2> /dev/null; fi
}

# This job as scontrol knows it. One task of every array has the array's own number for its SLURM_JOB_ID, and that number
# names all the tasks: it would show, and requeue, every one of them.
job_name() {
  local task=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  echo "${task:-$SLURM_JOB_ID}"
}

# Slurm's state of this job; nothing where the controller answers none of five questions in half a minute.
job_state() {
  local state wait_s
  for wait_s in 2 4 8 16 0; do
    state=$(scontrol show job "$(job_name)" -o | sed -n 's/.* JobState=\([A-Z_]*\) .*/\1/p')
    [[ -z $state ]] || break
    sleep "$wait_s"
  done
  echo "$state"
}

# pretrain CONFIG [section.field=value ...]: train, and requeue this job where it should go on.
pretrain() {
  local config=${CONFIG:-$1}
  shift
  settings config
  local arguments=("$config" ${DATA:+"data.path=$DATA"} ${RUN_DIR:+"run_dir=$RUN_DIR"} "$@")
  local ranks=$(($(asked_for NODES nodes) * $(asked_for TASKS_PER_NODE ntasks-per-node)))
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    # An image of pyxis can be entered in a job alone.
    ((${#step[@]})) || alone -m pretrain.restarts check --world-size "$ranks" "${arguments[@]}" || exit $?
    only_checked "$@"
  fi
  local run_dir
  run_dir=$(alone -m pretrain.restarts begin --world-size "$ranks" "${arguments[@]}") || exit $?
  echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $config in $run_dir on $SLURM_JOB_NODELIST"
  launch pretrain "${arguments[@]}"
  attend
  local end=(--code "$rc" --max-restarts "$MAX_RESTARTS" --job-state "$(job_state)")
  ((told)) && end+=(--told)
  if alone -m pretrain.restarts end "$run_dir" "${end[@]}"; then
    scontrol requeue "$(job_name)" && exit 0
    echo "error: scontrol requeue failed (was the job submitted with --no-requeue?)" >&2
    exit 75
  fi
  exit "$rc"
}
