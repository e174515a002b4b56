#!/bin/bash
#SBATCH --job-name=ae-train
#SBATCH --time=00:30:00
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# Submit from this folder: sbatch job.sh --model conv [more flags of train.py]
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}" && [ "$(basename "$(pwd -P)")" = mnist_ae ] || {
    echo "error: submit job.sh from its own folder: (cd mnist_ae && sbatch job.sh)" >&2
    exit 1
}
source ../common/slurm_job.sh

train_and_requeue --cache-dir="$SLURM_TMPDIR" --outdir="$SCRATCH/ddpm-output" --data=hub \
    --epochs=100 --keep-ckpts=3 --auto-resume --amp "$@"
