"""Draw digits from a latent diffusion checkpoint: `python infer.py --ckpt PATH`."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import emoji
from common.args import Parser, add_sampling_arguments, check_sampling, number, wanted_labels
from common.device import get_device, set_threads
from common.error_codes import run_main
from common.images import save_output


def parse_args(argv=None):
    parser = Parser(
        "Draw digits by latent diffusion.", "python infer.py --ckpt RUN_FOLDER --digit 3 --output threes.png"
    )
    add = parser.add_argument
    add("--ckpt", "--checkpoint", required=True, help="checkpoint file, its run's folder (newest) or FOLDER/best")
    add("--ae-ckpt", help="decode with this autoencoder instead of the one inside the checkpoint")
    add("--num-images", "--n", type=number(int, 1), default=64, help="how many (default: 64)")
    add("--output", "--out", default="generated.png", help="the grid's file (default: generated.png)")
    add_sampling_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    set_threads()
    device = get_device(args.device)

    # The model, as its checkpoint describes it
    from model import load_for_drawing

    draw, state = load_for_drawing(args.ckpt, device, args.ae_ckpt)
    check_sampling(args, state["args"])

    # The drawing
    started = time.perf_counter()
    images = draw(
        labels=wanted_labels(args, args.num_images),
        count=args.num_images,
        guidance=args.guidance,
        seed=args.seed,
        sampler=args.sampler,
        steps=args.steps,
    )
    seconds = time.perf_counter() - started
    save_output(images, args.output)
    origin = f"{state['exp_name']}, epoch {state['epoch']}"
    print(f"{emoji.ok} {args.num_images} images from {origin}, in {seconds:.2f} s: {args.output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
