# Sourced by the job.sh scripts. Slurm runs a copy of those from its spool, so they first go to the submission folder.
#
#     source ../common/slurm_job.sh
#     train_and_requeue --epochs=100 --keep-ckpts=3 --auto-resume "$@"
#
# Slurm announces the time limit with SIGUSR1 (--signal=B:USR1@...; SIGUSR2 does too): the trainer saves and stops, and
# the job puts itself back in the queue. On SIGTERM (scancel, preemption), SIGINT and SIGHUP the trainer saves too, but
# nothing is requeued from here: a preempted job is requeued by Slurm, a cancelled one by nobody.
# In a job array the task's number is the digit: sbatch --array=0-9 job.sh.
# A job of several tasks, nodes or GPUs a node (sbatch --ntasks=2, --nodes=2, --gres=gpu:4) trains one run with that many
# processes.
# A job whose limit comes three times in a row before it could train a single step gives up (see requeue).

limit="" child="" made="" gently=TERM
_clean() { [ -z "$made" ] || rm -rf "$made"; }
_on_limit() { limit=yes; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null; }
_on_term() { limit=""; [ -z "$child" ] && exit 143; kill -"$gently" "$child" 2>/dev/null; }
trap _on_limit USR1 USR2 # before anything slow: an untrapped signal would kill this shell
trap _on_term TERM INT HUP

: "${SCRATCH:?error: set SCRATCH to a folder that outlives the job}"
source ../mnist_single_digit/setup.sh || exit 1
if ! { [ -d "${SLURM_TMPDIR:-}" ] && [ -w "$SLURM_TMPDIR" ]; }; then
    SLURM_TMPDIR="$(mktemp -d || mktemp -d -p /tmp)" || {
        echo "error: no folder for temporary files: set TMPDIR to one" >&2
        exit 7
    }
    made="$SLURM_TMPDIR"
    trap _clean EXIT
fi
export SLURM_TMPDIR
if [ -d "$SCRATCH/hf_cache" ]; then # fetched by: python -m common.data --cache-dir "$SCRATCH/hf_cache"
    # what another job is writing there is gone before it is copied; the trainer says it if digits are missing
    cp -r "$SCRATCH/hf_cache/." "$SLURM_TMPDIR/" || echo "warning: not all of $SCRATCH/hf_cache was copied" >&2
fi

# What this job is: one that was submitted from within another job has inherited that one's variables, so Slurm itself is
# asked, and they are believed only where it does not answer.
_shown() { # what scontrol says of a job, from behind its name, which may be anything, if it is this one
    local line
    line="$(scontrol show job --oneliner "$1" 2>/dev/null)" || return 1
    [[ "$line" == "JobId=$SLURM_JOB_ID "* ]] && shown=" ${line#* UserId=} "
}
job="${SLURM_JOB_ID:-}" shown="" tasks="${SLURM_NTASKS:-1}" gpus="${SLURM_GPUS_ON_NODE:-1}"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && ! _shown "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && _shown "$job"; then
    unset SLURM_ARRAY_TASK_ID SLURM_ARRAY_JOB_ID
fi
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
if [ -n "$shown" ] || { [ -n "$job" ] && _shown "$job"; }; then
    [[ ! "$shown" =~ \ NumTasks=([0-9]+)\  ]] || tasks="${BASH_REMATCH[1]}"
    [[ "$shown" =~ \ T[Rr][Ee][Ss][A-Za-z]*=[^\ ]*gpu ]] || gpus=1
    [[ "$shown" =~ gpu:${SLURM_GPUS_PER_NODE:-0}[\ ,] ]] || unset SLURM_GPUS_PER_NODE
    [ -z "${SLURM_MEM_PER_NODE:-}" ] || unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU # of which srun wants one
fi
idle="$SCRATCH/ddpm-output/.no-progress-$job"                 # a line for each start in a row that trained nothing
export DDPM_PROGRESS_FILE="$SLURM_TMPDIR/.ddpm-progress-$job" # with .trained or .stopped: the trainer did, and saved
rm -f "$DDPM_PROGRESS_FILE".*

# Sets `launcher`, what starts the trainer: nothing, or srun for a process per task, or per GPU where no tasks were given.
launcher=()
nodes="${SLURM_JOB_NUM_NODES:-1}"
if [ "${SLURM_GPUS_PER_NODE:-0}" -gt "$gpus" ] 2>/dev/null; then
    echo "error: job.sh's own --gres stands beside --gpus-per-node: say sbatch --gres=gpu:$SLURM_GPUS_PER_NODE" >&2
    exit 2
fi
if [ "$tasks" -le "$nodes" ] && [ "$gpus" -gt 1 ]; then
    tasks=$((nodes * gpus))
    export SLURM_CPUS_PER_TASK=$(((${SLURM_CPUS_ON_NODE:-1} + gpus - 1) / gpus))
    unset SLURM_TRES_PER_TASK # of the batch shell, from which newer sruns would not have it differ
    launcher=(--overcommit) # a node may have fewer cores for the job than GPUs
elif [ "$tasks" -lt "$nodes" ]; then
    tasks="$nodes"
fi
if [ "$tasks" -gt 1 ]; then
    launcher=(srun --export=ALL --kill-on-bad-exit=1 "${launcher[@]}" --nodes="$nodes" --ntasks="$tasks")
    gently=USR1 # which srun passes on; at SIGTERM it kills
fi

preempted() { # has Slurm begun to end this job, so as to requeue it? If it does not answer, it is asked again
    local try
    [ -n "$job" ] && command -v scontrol >/dev/null 2>&1 || return 1
    for try in 1 2 3 4 5; do
        ! _shown "$job" || break
        sleep "$try"
    done
    [[ "$shown" =~ \ Requeue=1\  && "$shown" =~ \ StartTime=([0-9][^\ ]*)\  ]] || return 1
    local started="${BASH_REMATCH[1]}"
    [[ "$shown" =~ \ PreemptTime=([0-9][^\ ]*)\  ]] && [[ ! "${BASH_REMATCH[1]}" < "$started" ]]
}

train_and_requeue() {
    local code=11 # as if stopped at once, if the limit came before the start
    case " $* " in *" --no-auto"*)
        echo "error: a job that requeues itself has to resume: for a second run of these flags say --seed N" >&2
        exit 2
        ;;
    esac
    if [ -z "$limit" ]; then
        "${launcher[@]}" python train.py ${SLURM_ARRAY_TASK_ID:+--only-digit="$SLURM_ARRAY_TASK_ID"} "$@" &
        child=$!
        [ -z "$limit" ] || kill -USR1 "$child" # the limit came before there was a child to tell
        while true; do # a trapped signal ends `wait` early
            wait "$child"
            code=$?
            kill -0 "$child" 2>/dev/null || break
        done
    fi
    [ ! -e "$DDPM_PROGRESS_FILE.stopped" ] || code=11 # launchers have exit codes of their own
    # 11 is STOPPED_EARLY; 138 and 140 are deaths by SIGUSR1 and SIGUSR2, before Python could install its handlers
    case "$limit$code" in
    yes11 | yes138 | yes140) requeue ;;
    *)
        rm -f "$idle"
        while [ "$code" = 11 ] && preempted; do sleep 3; done # Slurm requeues only what is still there when it ends it
        [ "$code" != 11 ] || echo "stopped, and not requeued from here: submit the same command again to go on"
        return "$code"
        ;;
    esac
}

requeue() {
    local starts=0 note="time limit: saved; requeueing job $job"
    if [ -e "$DDPM_PROGRESS_FILE.trained" ]; then
        rm -f "$idle"
    elif ! { mkdir -p "${idle%/*}" && date >>"$idle"; }; then
        echo "error: TIME LIMIT BEFORE A STEP COULD BE TRAINED, AND $SCRATCH CANNOT BE WRITTEN TO: not requeueing job $job" >&2
        exit 11
    else
        starts=$(($(wc -l <"$idle")))
        note="warning: TIME LIMIT BEFORE A STEP COULD BE TRAINED, $starts in a row; requeueing job $job"
    fi
    _clean # requeueing ends this shell without its EXIT trap
    if [ "$starts" -ge 3 ]; then
        rm -f "$idle"
        echo "error: GIVING UP JOB $job: $starts TIMES IN A ROW ITS TIME LIMIT CAME BEFORE A STEP COULD BE TRAINED." \
            "The signal comes as long before the limit as --signal says, or up to a minute earlier still:" \
            "submit with a longer --time" >&2
        exit 11
    fi
    if command -v scontrol >/dev/null 2>&1; then
        echo "$note"
        scontrol requeue "$job" && return
    fi
    echo "error: TIME LIMIT, AND JOB $job COULD NOT BE REQUEUED (no scontrol, or it refuses): submit the same command again" >&2
    exit 11
}
