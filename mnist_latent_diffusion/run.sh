#!/usr/bin/env bash
# The main job: sets up whatever is missing, trains an autoencoder, trains latent diffusion on its latents, and draws
# generated.png. Interrupted, it goes on where it was when started again; finished, it only draws.
set -euo pipefail
[ $# -eq 0 ] || { echo "error: run.sh takes no arguments" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")"
source ../common/setup_env.sh requirements.txt

cache="${SLURM_TMPDIR:-$PWD/hf_cache}"
fetch() { (cd .. && env -u PYTHONSAFEPATH python -m common.data --cache-dir "$cache" "$@"); }

code=0
fetch || code=$?
case $code in
0) flags=(--data hub) ae_length=(--epochs 20) length=(--epochs 36) ;; # with the flags below the recommended recipe
9) # NO_DATA
    echo "going on with the 5,000 embedded digits"
    fetch --data embedded
    flags=(--data embedded) # 4,050 digits instead of 54,000: short epochs, and an end to what they can teach
    ae_length=(--epochs 60 --early-stopping-patience 20) length=(--epochs 200 --early-stopping-patience 50)
    ;;
*) exit "$code" ;;
esac
flags+=(--cache-dir "$cache" --generate-images --auto-resume --ckpt-save-every 10 --keep-ckpts 3)

# Trains, and prints the folder that the trainer names in its last line, "checkpoints: FOLDER". Its lines are shown, on
# stderr, by a loop that Ctrl-C does not reach: the trainer then saves, and says how it ended.
train() { python train.py "${flags[@]}" "$@" | _show; }
_show() (
    trap '' INT HUP PIPE
    while IFS= read -r line; do
        printf '%s\n' "$line" >&2 || true
        [[ "$line" != "checkpoints: "* ]] || printf '%s\n' "${line#checkpoints: }"
    done
)
trap : INT # else bash would die of it before it could end with the trainer's code
trap '[ $? -ne 11 ] || echo "stopped and saved: start run.sh again, and it goes on" >&2' EXIT # STOPPED_EARLY

autoencoder="$(cd ../mnist_ae && train --model mlp "${ae_length[@]}")"
run="$(train --ae-ckpt "$autoencoder" --batch-size 256 --lr 4e-4 "${length[@]}")"
python infer.py --ckpt "$run" --digit 0 1 2 3 4 5 6 7 8 9 --num-images 100 --output generated.png

root="${run%/checkpoints/*}"
echo
echo "picture:      $PWD/generated.png"
echo "autoencoder:  $autoencoder"
echo "diffusion:    $run"
echo "TensorBoard:  tensorboard --logdir '$root/runs'"
