# Sourced by the job.sh scripts. Slurm runs a copy of those from its spool, so they first go to the submission folder.
#
#     source ../common/slurm_job.sh
#     train_and_requeue --epochs=100 --auto-resume "$@"
#
# Slurm announces the time limit with SIGUSR1 (--signal=B:USR1@...; SIGUSR2 does too): the trainer saves and stops, and
# the job puts itself back in the queue. On SIGTERM (scancel, preemption) the trainer saves too, but nothing is requeued
# from here: a preempted job is requeued by Slurm, a cancelled one by nobody.
# In a job array the task's number is the digit: sbatch --array=0-9 job.sh.

limit="" child="" made=""
_clean() { [ -z "$made" ] || rm -rf "$made"; }
_on_limit() { limit=yes; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null; }
_on_term() { limit=""; [ -z "$child" ] && exit 143; kill -TERM "$child" 2>/dev/null; }
trap _on_limit USR1 USR2 # before anything slow: an untrapped signal would kill this shell
trap _on_term TERM

: "${SCRATCH:?error: set SCRATCH to a folder that outlives the job}"
source ../mnist_single_digit/setup.sh || exit 1
if [ -z "${SLURM_TMPDIR:-}" ]; then
    SLURM_TMPDIR="$(mktemp -d)" made="$SLURM_TMPDIR"
    trap _clean EXIT
fi
export SLURM_TMPDIR
if [ -d "$SCRATCH/hf_cache" ]; then # fetched by: python -m common.data --cache-dir "$SCRATCH/hf_cache"
    cp -r "$SCRATCH/hf_cache/." "$SLURM_TMPDIR/" || exit 1
fi

train_and_requeue() {
    local code=11 # as if stopped at once, if the limit came before the start
    if [ -z "$limit" ]; then
        python train.py ${SLURM_ARRAY_TASK_ID:+--only-digit="$SLURM_ARRAY_TASK_ID"} "$@" &
        child=$!
        [ -z "$limit" ] || kill -USR1 "$child" # the limit came before there was a child to tell
        while true; do # a trapped signal ends `wait` early
            wait "$child"
            code=$?
            kill -0 "$child" 2>/dev/null || break
        done
    fi
    # 11 is STOPPED_EARLY; 138 and 140 are deaths by SIGUSR1 and SIGUSR2, before Python could install its handlers
    case "$limit$code" in yes11 | yes138 | yes140) requeue ;; *) return "$code" ;; esac
}

requeue() {
    local job="${SLURM_JOB_ID:-}"
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    _clean # requeueing ends this shell without its EXIT trap
    if command -v scontrol >/dev/null 2>&1; then
        echo "time limit: saved; requeueing job $job"
        scontrol requeue "$job" && return
    fi
    echo "error: TIME LIMIT, AND NO WORKING scontrol HERE TO REQUEUE JOB $job: saved; submit the same command again" >&2
    exit 11
}
