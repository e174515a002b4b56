"""Drawing from a diffusion model: what both infer.py scripts and the previews of both trainers do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common import emoji
from common.args import DEFAULT_GUIDANCE, Args, Parser, add_sampling_arguments, check_sampling, number, wanted_labels
from common.device import get_device, set_threads
from common.images import save_output

if TYPE_CHECKING:
    import torch

EVAL_IMAGES = 1000  # for --eval-every
Draw = Callable[..., "torch.Tensor"]  # draw(labels=None or a list, count=..., seed=..., ...) -> (N, 1, 28, 28)


def drawing_parser(description: str, example: str, *, count: int, output: str) -> Parser:
    """The flags of an infer.py, under the names that either experiment gives them."""
    parser = Parser(description, example)
    add = parser.add_argument
    add("--ckpt", "--checkpoint", required=True, help="checkpoint file, its run's folder (newest) or FOLDER/best")
    add("--num-images", "--n", type=number(int, 1), default=count, help=f"how many (default: {count})")
    add("--output", "--out", default=output, help=f"the grid's file (default: {output})")
    add_sampling_arguments(parser)
    return parser


def draw_to_file(args: Any, load: Callable[[torch.device], tuple[Draw, dict[str, Any]]]) -> None:
    """Draw what the flags ask for and save it as one grid. load(device) is the experiment's `load_for_drawing`."""
    set_threads()
    draw, state = load(get_device(args.device))
    check_sampling(args, state["args"])
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


def digits_in_turn(count: int, only_digit: int | None) -> list[int]:
    """`count` labels: equal runs of all digits, or `only_digit` throughout."""
    return [i * 10 // count if only_digit is None else only_digit for i in range(count)]


def preview_and_scored(args: Args, draw: Draw) -> tuple[Callable, dict[str, Callable]]:
    """(preview(), what `score_epoch` is to score), for a diffusion trainer: draws with and without labels."""
    import torch

    def preview() -> torch.Tensor:
        return draw(labels=digits_in_turn(args.samples_per_epoch, args.only_digit), guidance=DEFAULT_GUIDANCE)

    def with_labels() -> tuple[torch.Tensor, torch.Tensor]:
        labels = digits_in_turn(EVAL_IMAGES, args.only_digit)
        return draw(labels=labels, guidance=DEFAULT_GUIDANCE).cpu(), torch.tensor(labels)

    return preview, {"": lambda: (draw(count=EVAL_IMAGES).cpu(), None), "_labelled": with_labels}
