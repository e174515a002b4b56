#!/bin/bash
#SBATCH --job-name=lddpm-train
#SBATCH --time=00:30:00
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# Submit from this folder: sbatch job.sh [more flags of train.py]; it takes an autoencoder in $SCRATCH/ddpm-output
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}" && [ "$(basename "$(pwd -P)")" = mnist_latent_diffusion ] || {
    echo "error: submit job.sh from its own folder: (cd mnist_latent_diffusion && sbatch job.sh)" >&2
    exit 1
}
source ../common/slurm_job.sh

train_and_requeue --cache-dir="$SLURM_TMPDIR" --outdir="$SCRATCH/ddpm-output" --data=hub \
    --epochs=100 --keep-ckpts=3 --auto-resume --amp "$@"
