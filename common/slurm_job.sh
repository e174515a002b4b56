# Sourced by the job.sh scripts. Slurm runs a copy of those from its spool, so they first go to the submission folder.
#
#     source ../common/slurm_job.sh
#     train_and_requeue --epochs=100 --auto-resume "$@"
#
# Slurm announces the time limit with SIGUSR1 (--signal=B:USR1@...): the trainer saves and stops, and the job puts itself
# back in the queue. On SIGTERM (scancel, preemption) the trainer saves too, but nothing is requeued from here.

source ../mnist_single_digit/setup.sh || exit 1
: "${SCRATCH:?set SCRATCH to a folder that outlives the job}"
if [ -z "${SLURM_TMPDIR:-}" ]; then
    SLURM_TMPDIR="$(mktemp -d)"
    trap 'rm -rf "$SLURM_TMPDIR"' EXIT
fi
export SLURM_TMPDIR
if [ -d "$SCRATCH/hf_cache" ]; then # fetched by: python -m common.data --cache-dir "$SCRATCH/hf_cache"
    cp -r "$SCRATCH/hf_cache/." "$SLURM_TMPDIR/"
fi

train_and_requeue() {
    local child code=0 limit=""
    python train.py "$@" &
    child=$!
    trap 'limit=yes; kill -USR1 "$child" 2>/dev/null' USR1
    trap 'limit=""; kill -TERM "$child" 2>/dev/null' TERM
    while true; do # a trapped signal ends `wait` early
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    trap - USR1 TERM
    # 11 is STOPPED_EARLY; 138 is a death by SIGUSR1, which came before Python could install its handler
    if [ -n "$limit" ] && { [ "$code" -eq 11 ] || [ "$code" -eq 138 ]; }; then
        requeue
        return 0
    fi
    return "$code"
}

requeue() {
    local job="${SLURM_JOB_ID:-}"
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    if command -v scontrol >/dev/null 2>&1; then
        echo "time limit: saved; requeueing job $job"
        scontrol requeue "$job"
    else
        echo "error: TIME LIMIT, AND NO scontrol HERE TO REQUEUE JOB $job: saved; submit the same command again" >&2
        exit 11
    fi
}
