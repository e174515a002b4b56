#!/usr/bin/env bash
# The main job: sets up whatever is missing, trains an autoencoder, trains latent diffusion on its latents, and draws
# generated.png. Interrupted, it goes on where it was when started again; finished, it only draws.
set -euo pipefail
[ $# -eq 0 ] || { echo "error: run.sh takes no arguments" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")"
source ../common/setup_env.sh requirements.txt

cache="${SLURM_TMPDIR:-$PWD/hf_cache}"
found="$(cd .. && python -m common.data --cache-dir "$cache")"
echo "$found"
if [[ "$found" == *"(hub)"* ]]; then
    flags=(--data hub --lr 4e-4 --generate-images) ae_epochs=10 epochs=12
else
    flags=(--data embedded) ae_epochs=60 epochs=200 # 4,050 digits instead of 54,000: epochs are short
fi
flags+=(--cache-dir "$cache" --auto-resume --ckpt-save-every 10)

# Each trainer ends with the line "checkpoints: FOLDER"
train() { python train.py "${flags[@]}" "$@" | tee >(cat >&2) | sed -n 's/^checkpoints: //p'; }

autoencoder="$(cd ../mnist_ae && train --model mlp --epochs "$ae_epochs")"
run="$(train --ae-ckpt "$autoencoder" --epochs "$epochs")"
python infer.py --ckpt "$run" --digit 0 1 2 3 4 5 6 7 8 9 --num-images 100 --output generated.png

root="${run%/checkpoints/*}"
echo
echo "picture:      $PWD/generated.png"
echo "autoencoder:  $autoencoder"
echo "diffusion:    $run"
echo "TensorBoard:  tensorboard --logdir '$root/runs'"
