"""Look at an autoencoder: originals over their reconstructions, or walks between digits through the latent space."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import emoji, threads
from common.args import Parser, number
from common.autoencoder import AUTOENCODERS, build_autoencoder, read_autoencoder
from common.data import held_out, make_mnist_loader
from common.device import get_device, memory_in_one_line
from common.error_codes import BAD_CHECKPOINT, NO_DATA, USAGE, Exit, require, run_main
from common.export import export
from common.flags import (
    CHECKPOINT,
    COUNT,
    OUTPUT,
    add_data_arguments,
    add_device_argument,
    add_scale_argument,
    add_threads_argument,
)
from common.images import check_output, over, save_output
from common.latents import walks_between
from common.rng import generator
from common.run import require_checkpoint

WALK_STEPS = 10


def parse_args(argv=None):
    parser = Parser("Reconstruct test digits, or walk between them.", "python infer.py --ckpt RUN_FOLDER --interpolate")
    add = parser.add_argument
    add(*CHECKPOINT, help="checkpoint file, a folder of a run or of runs (newest), RUN/best, or latest")
    add(*OUTPUT, help="PNG file (default: reconstructions.png or interpolation.png)")
    add(*COUNT, type=number(int, 1), default=16, help="digits or walks (default: 16)")
    add("--interpolate", action="store_true", help="one row per walk from a digit to another")
    steps = f"images in a walk (default: {WALK_STEPS})"
    add("--walk-steps", type=number(int, 2, 1000), metavar="N", help=steps)
    add("--seed", type=number(int, 0, 2**32 - 1), default=42, help="which test digits (default: 42)")
    what = "show nothing, but write what drawing needs of the run to this file (.pt)"
    add("--export", metavar="FILE", help=what)
    add_scale_argument(parser)
    add_device_argument(parser)
    add_threads_argument(parser)
    add_data_arguments(parser)
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    if args.export:
        return export(args.ckpt, args.export, parser.typed(argv), AUTOENCODERS)
    require_checkpoint(args.ckpt, AUTOENCODERS)
    if args.walk_steps and not args.interpolate:
        raise Exit(USAGE, "--walk-steps says how --interpolate is to look: give both")
    output = check_output(args.output or ("interpolation.png" if args.interpolate else "reconstructions.png"), ".png")

    require("torch", "torchvision", "PIL")
    threads.prepare()
    import torch

    device = get_device(args.device)
    data = read_autoencoder(args.ckpt)
    threads.settle(args.threads, lambda: threads.recorded(data["args"]))
    autoencoder = build_autoencoder(data, device)
    digits = held_out(args.data, args.cache_dir, data["args"], data["args"]["only_digit"])
    if len(digits) < (2 if args.interpolate else 1):
        raise Exit(NO_DATA, f"{digits.source} holds {len(digits)} test {digits.noun} of this class: too few to show")
    if (wanted := args.num_images * (2 if args.interpolate else 1)) > len(digits):
        print(f"{emoji.warning} of {wanted} test {digits.noun} there are only {len(digits)} ({digits.source})")
    order = torch.randperm(len(digits), generator=generator(args.seed, "test digits"))

    with torch.no_grad(), memory_in_one_line(f"ask for fewer than --num-images {args.num_images}"):
        if args.interpolate:
            walk_steps = args.walk_steps or WALK_STEPS
            ends = order[: 2 * args.num_images]
            ends = ends[: len(ends) // 2 * 2]
            images, nrow = walks_between(autoencoder, digits[ends][0].to(device), walk_steps), walk_steps
        else:
            originals = digits[order[: args.num_images]][0].to(device)
            images, nrow = over(originals, autoencoder(originals))
            error = sum(
                ((autoencoder(part) - part) ** 2).mean((1, 2, 3)).sum().item()
                for part in (batch.to(device) for batch, _ in make_mnist_loader(digits, 1000, shuffle=False))
            ) / len(digits)
            which = f"{len(digits):,} test {digits.noun} ({digits.source})"
            print(f"{emoji.info} mean squared error over {which}: {error:.5f}")
    if not images.isfinite().all():
        raise Exit(BAD_CHECKPOINT, f"{data['path']} draws what are no numbers (NaN)")
    save_output(images, output, nrow, args.scale)
    print(f"{emoji.ok} {data['exp_name']}, epoch {data['epoch']}: {output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
