"""Drawing from a diffusion model: what both infer.py scripts and the previews of both trainers do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ckpt, console, emoji, threads
from common.args import Args, Parser, flag_of, number
from common.autoencoder import AUTOENCODERS
from common.device import get_device, memory_in_one_line
from common.error_codes import BAD_CHECKPOINT, BAD_IMAGE, BAD_OUTPUT, USAGE, Exit, require
from common.files import atomic_write
from common.flags import (
    CHECKPOINT,
    COUNT,
    DEFAULT_GUIDANCE,
    DEFAULT_RESAMPLE,
    DEFAULT_STRENGTH,
    MOST_PASSES,
    OUTPUT,
    add_sampling_arguments,
    add_scale_argument,
    check_sampling,
    is_own,
)
from common.images import (
    check_output,
    make_image_grid,
    one_line,
    read_images,
    read_mask,
    row_names,
    save_gif,
    save_output,
    to_bytes,
)
from common.progress import counted, progress
from common.ranks import World, identity, joined
from common.rng import generator
from common.run import require_checkpoint

if TYPE_CHECKING:
    import torch

EVAL_IMAGES = 1000  # for --eval-every
ROWS, FRAMES = 8, 20  # of a filmstrip
FEW = 64  # images that are drawn to find the fastest number of threads
Draw = Callable[..., "torch.Tensor"]  # draw(labels=None or a list, count=..., seed=..., ...) -> (N, 1, 28, 28)


def drawing_parser(description: str, example: str, *, count: int, output: str) -> Parser:
    """The flags of an infer.py, under the names that either experiment gives them."""
    parser = Parser(description, example)
    add = parser.add_argument
    add(*CHECKPOINT, help="checkpoint file, a folder of a run or of runs (newest), RUN/best, or latest")
    add(*COUNT, type=number(int, 1), default=count, help=f"how many (default: {count})")
    add(*OUTPUT, default=output, help=f"the grid's file (default: {output})")
    add(
        "--show-process", action="store_true", help=f"also write a filmstrip of the first {ROWS}, and a GIF of the grid"
    )
    add_scale_argument(parser)
    add("--row-labels", action="store_true", help="write each row's digit beside it")
    frames = f"pictures in the filmstrip, from noise to digit (default: {FRAMES}, or all if there are fewer)"
    add("--process-steps", type=number(int, 2), metavar="N", help=frames)
    add("--save-npz", metavar="FILE", help="also save the images, labels, seed and settings as numpy arrays")
    add(
        "--save-dir",
        metavar="DIR",
        help="also save single PNGs there, named by number and label (a new or empty folder)",
    )
    add(
        "--from-image",
        metavar="FILE",
        help="begin with this picture (or the images of an .npz), not with noise; then --digit is none unless given",
    )
    latents, pixels = DEFAULT_STRENGTH.values()
    strength = f"how much of it is drawn over, up to 1 (all; default: latents {latents}, pixels {pixels}; --inpaint 1)"
    add("--strength", type=number(float, above=0, high=1), metavar="S", help=strength)
    mask = "keep the picture as it is but where this one, of the same size, is white (pixel diffusion only)"
    add("--inpaint", metavar="MASK", help=mask)
    times = f"with --inpaint, go every stretch of steps N times (RePaint's resampling; default: {DEFAULT_RESAMPLE})"
    add("--resample", type=number(int, 1, MOST_PASSES), metavar="N", help=times)
    add("--export", metavar="FILE", help="draw nothing, but write what drawing needs of the run to this file (.pt)")
    add_sampling_arguments(parser)
    return parser


def what_to_draw_with(args: Any, model: str) -> tuple[Path, dict[str, Any]]:
    """(file, state) that --ckpt means: a `model` of this type. Raises Exit.

    From now on the flags name the very files, so that several processes draw with the same: of a folder that they name
    the newest may be another by the time that the others look.
    """
    require_checkpoint(args.ckpt, (model,))
    warn = cache(console.warn)  # two flags may mean one run
    path, state = ckpt.read_model(args.ckpt, (model,), warn)
    args.ckpt = ckpt.very_file(path)
    for name, types in (("guide", (model,)), ("ae_ckpt", AUTOENCODERS)):
        if getattr(args, name, None) is not None:
            setattr(args, name, ckpt.very_file(ckpt.read_model(getattr(args, name), types, warn)[0]))
    return path, state


def draw_to_file(args: Any, load: Callable[[torch.device], tuple[Draw, dict[str, Any]]]) -> None:
    """Draw what the flags ask for and save it in the forms they ask for.

    load(device) is the experiment's `load_for_drawing` of `what_to_draw_with`. Raises Exit, for a bad output before
    anything is drawn. Several processes share the drawing, and the first writes.
    """
    require("torch", "torchvision", "tqdm", "PIL")
    with memory_in_one_line(f"draw fewer than --num-images {args.num_images} at a time"), joined(vars(args)) as world:
        _draw_to_file(args, load, world)


def _check_outputs(args: Any) -> None:
    for path in _written(args):
        if args.save_dir and path.resolve().is_relative_to(Path(args.save_dir).resolve()):
            raise Exit(BAD_OUTPUT, f"{path} lies among the single images of --save-dir: choose another folder")
    output = check_output(args.output, ".png")
    if args.show_process:
        for path in _process_files(output):
            check_output(path, path.suffix)
    elif args.process_steps:
        raise Exit(USAGE, "--process-steps says how --show-process is to look: give both")
    if args.save_npz:
        check_output(args.save_npz, ".npz")
    if args.save_dir:
        _check_folder(Path(args.save_dir))


def _written(args: Any) -> list[Path]:
    """The files that the flags name, or imply, for what is drawn; single ones in --save-dir apart."""
    output = Path(args.output)
    process = _process_files(output) if args.show_process else ()
    return [output, *process, *([Path(args.save_npz)] if args.save_npz else [])]


def _spare(args: Any, *read: str | None) -> None:
    """Raises Exit(BAD_OUTPUT) if one of the files `read` would be overwritten."""
    if lost := [path for path in _written(args) if any(_same_file(path, other) for other in read if other is not None)]:
        raise Exit(BAD_OUTPUT, f"{lost[0]} is read here, and would be overwritten: choose another name")


def _same_file(one: Path, other: str) -> bool:
    try:
        return os.path.samefile(one, other)  # also by other names, and in other case where the disk knows none
    except OSError:
        return False


def _draw_to_file(args: Any, load: Callable[[torch.device], tuple[Draw, dict[str, Any]]], world: World) -> None:
    threads.prepare()
    device = get_device(args.device, identity())
    known: list[tuple[Draw, dict[str, Any]]] = []

    def check() -> tuple[dict[str, Any], dict[str, Any]]:  # by the first process, so that what is wrong is said once
        _check_outputs(args)
        _spare(args, args.from_image, args.inpaint, args.ckpt, args.guide, getattr(args, "ae_ckpt", None))
        known.append(load(device))
        if is_own(learned := known[0][1]["args"].get("data", "")):
            _spare(args, learned)
        edit = _edit(args, ckpt.infer_model_from_checkpoint(known[0][1]))
        trained = known[0][1]["args"]
        if edit and args.digit is None and trained["only_digit"] is None:
            args.digit = []  # nobody knows what is in the picture
        check_sampling(args, trained, edit.get("strength", 1.0))
        if len(args.digit or []) > args.num_images:
            raise Exit(
                USAGE, f"--num-images {args.num_images} is less than one of each of the {len(args.digit)} digits"
            )
        if args.row_labels and not any(_row_names(args, trained)):
            raise Exit(USAGE, "--row-labels: no row has a single digit: name some by --digit, a row's number of each")
        return vars(args), edit

    flags, edit = world.first(check)
    vars(args).update(flags)
    draw, state = known[0] if known else load(device)
    labels = wanted_labels(args.digit, args.num_images, args.seed, state["args"])
    choose_threads(args, draw, args.num_images, labels, device)
    passes = edit.get("resample", 1)
    moments = _moments(args, args.steps * passes) if args.show_process else []
    frames: dict[int, Any] = dict.fromkeys(moments)
    started = time.perf_counter()
    images = draw_with_progress(
        draw,
        labels=labels,
        count=args.num_images,
        seed=args.seed,
        passes=passes,
        frames=frames,
        world=world,
        **sampling_options(args),
        **edit,
    )
    if world.rank:
        return
    if not images.isfinite().all():
        smaller = "a smaller --guidance or --guide-scale, or " if args.guidance > 1 or args.guide is not None else ""
        raise Exit(BAD_CHECKPOINT, f"the images are not finite numbers: choose {smaller}an earlier checkpoint")
    seconds = time.perf_counter() - started
    origin, output = f"{state['exp_name']}, epoch {state['epoch']}", Path(args.output)
    names = _row_names(args, state["args"]) if args.row_labels else None
    if args.save_npz:  # before the pictures, which may want far more memory
        _save_npz(images, labels, args, state, Path(args.save_npz))
    if args.save_dir:
        _save_singly(images, labels, Path(args.save_dir))
    with memory_in_one_line(f"give a smaller --scale than {args.scale}, or fewer --num-images"):
        save_output(images, output, scale=args.scale, names=names)
        print(f"{emoji.ok} {counted(args.num_images, 'image')} from {origin}, in {seconds:.2f} s: {output}")
        if args.show_process:
            _save_process([frames[moment].cpu() for moment in moments], output, args.scale)


def sampling_options(args: Any) -> dict[str, Any]:
    """What the flags of `add_sampling_arguments` say to `sampling.draw`; labels, seed and guide apart."""
    return {name: getattr(args, name) for name in ("guidance", "guidance_interval", "guide_scale", "sampler", "steps")}


def _row_names(args: Any, trained: dict[str, Any]) -> list[str]:
    """By --digit; "" for a row of several."""
    return row_names(wanted_labels(args.digit, args.num_images, args.seed, trained) or [])


def _edit(args: Any, model: str) -> dict[str, Any]:
    """What the flags want of a picture, as `sampling.draw` takes it; {} without --from-image. Raises Exit."""
    if args.from_image is None:
        for name in ("strength", "inpaint", "resample"):
            if getattr(args, name) is not None:
                raise Exit(USAGE, f"{flag_of(name)} says what becomes of a picture: give --from-image FILE too")
        return {}
    if args.inpaint is None and args.resample is not None:
        raise Exit(USAGE, "--resample fits what is drawn anew to what is kept: give --inpaint MASK too")
    images, size = read_images(args.from_image)
    if len(images) > args.num_images:
        few = f"--num-images {args.num_images} is less than one of each of the {len(images)} images"
        raise Exit(USAGE, f"{few} in {args.from_image}")
    if args.inpaint is None:
        args.strength = args.strength or DEFAULT_STRENGTH[model]
        return {"from_image": images, "strength": args.strength}
    mask = read_mask(args.inpaint, args.from_image, size)
    if len(mask) not in (1, len(images)):
        raise Exit(BAD_IMAGE, f"{len(mask)} masks in {args.inpaint} for {len(images)} images in {args.from_image}")
    args.strength, args.resample = args.strength or 1.0, args.resample or DEFAULT_RESAMPLE
    return {"from_image": images, "strength": args.strength, "inpaint": mask, "resample": args.resample}


def wanted_labels(digits: list[int] | None, count: int, seed: int, trained: dict[str, Any]) -> list[int] | None:
    """The label of each of `count` images: equal runs of `digits`; None, for the null label, where that is empty.

    Where nobody asked (`digits` is None), each is drawn by the seed from the training data's class shares, which the
    run's flags `trained` hold. As p(x) is the sum over labels of p(label) p(x | label), the images then follow the
    data, and networks draw them better than with the null label. A run older than `class_counts` is taken to have
    seen all classes equally often. A network that takes no labels draws without, unless it has seen but one class.
    """
    if digits is not None:
        return [digits[i * len(digits) // count] for i in range(count)] if digits else None
    only = trained["only_digit"]
    if only is None and not trained.get("labelled", True):
        return None
    import torch

    counts = trained.get("class_counts") or [only in (None, digit) for digit in range(10)]
    shares = torch.tensor(counts, dtype=torch.float64)
    return shares.multinomial(count, replacement=True, generator=generator(seed, "labels")).tolist()


def choose_threads(args: Any, draw: Draw, count: int, labels: list[int] | None, device: torch.device) -> None:
    """Compute with --threads, or with as many threads as draw a few of these images fastest."""
    few = min(count, FEW)
    how = {"labels": labels and labels[:few], "count": few, "steps": 1, "guidance": args.guidance}
    threads.settle(
        args.threads, lambda: threads.fastest(lambda: draw(**how))[0] if device.type == "cpu" else threads.available()
    )


def draw_with_progress(draw: Draw, *, steps: int, passes: int = 1, **how: Any) -> torch.Tensor:
    """draw(...)'s images on the CPU, showing how far it is. how: see `sampling.draw`. passes: through each step."""
    total = steps * passes
    with progress("drawing", total, "step", lambda text: print(f"{emoji.info} {text}", flush=True)) as tick:
        return draw(steps=steps, callback=lambda left, _x: left == total or tick(), **how).cpu()


def _check_folder(folder: Path) -> None:
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise Exit(BAD_OUTPUT, f"{folder} is not empty; choose another --save-dir, so that no images mix")
    check_output(folder / "00000.png", ".png")


def _moments(args: Any, steps: int) -> list[int]:
    """How many steps are left when a picture is taken: evenly spaced from the first noise to the result."""
    wanted = args.process_steps or min(FRAMES, steps + 1)
    if wanted > steps + 1:
        raise Exit(USAGE, f"--process-steps {wanted} is more than the {steps + 1} pictures of {counted(steps, 'step')}")
    count = wanted - 1
    return [round(steps * (count - i) / count) for i in range(count + 1)]


def _process_files(output: Path) -> tuple[Path, Path]:
    return output.with_name(f"{output.stem}_process.png"), output.with_name(f"{output.stem}_process.gif")


def _save_process(frames: list[torch.Tensor], output: Path, scale: int) -> None:
    """A filmstrip (a row an image, noise on the left) and an animation of the grid, beside the grid."""
    import torch

    strip, animation = _process_files(output)
    rows = torch.stack([frame[:ROWS] for frame in frames], dim=1)  # (rows, frames, 1, 28, 28)
    save_output(rows.flatten(0, 1), strip, nrow=len(frames), scale=scale)
    with one_line(animation):
        save_gif([make_image_grid(frame, scale=2) for frame in frames], animation)
    print(f"{emoji.ok} the process: {strip}, {animation}")


def _save_npz(images: torch.Tensor, labels: list[int] | None, args: Any, state: dict[str, Any], path: Path) -> None:
    """images (N, 28, 28) uint8, labels (N,) int64 (-1: drawn without), seed, settings (a JSON text)."""
    import numpy

    names = ("ckpt", "ae_ckpt", "digit", "guidance", "sampler", "steps", "seed")
    names += ("guidance_interval",) if args.guidance_interval else ()
    names += ("guide", "guide_scale") if args.guide is not None else ()
    names += ("from_image", "strength", "inpaint", "resample") if args.from_image else ()
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings |= {"exp_name": state["exp_name"], "epoch": state["epoch"], "T": state["args"]["T"]}
    arrays = {
        "images": to_bytes(images).squeeze(1).numpy(),
        "labels": numpy.array(labels or [-1] * len(images), dtype=numpy.int64),
        "seed": numpy.array(args.seed),
        "settings": numpy.array(json.dumps(settings)),
    }
    with one_line(path):
        atomic_write(path, lambda file: numpy.savez_compressed(file, **arrays))
    print(f"{emoji.ok} as arrays: {path}")


def _save_singly(images: torch.Tensor, labels: list[int] | None, folder: Path) -> None:
    """NNNNN_LABEL.png (NNNNN.png without labels), counted from 0."""
    from PIL import Image

    with one_line(folder):
        for index, image in enumerate(to_bytes(images).squeeze(1).numpy()):
            name = f"{index:05d}_{labels[index]}.png" if labels else f"{index:05d}.png"
            Image.fromarray(image).save(folder / name)
    print(f"{emoji.ok} singly: {counted(len(images), 'file')} in {folder}")


def preview_and_scored(args: Args, draw: Draw) -> tuple[Callable, dict[str, Callable]]:
    """(preview(), what `epoch_scorer` is to score), for a diffusion trainer: drawn as infer.py does by default.

    Scored are also equal runs of digits, as infer.py draws them with --digit, where the network takes labels.
    """
    import torch

    digits = [digit for digit, count in enumerate(args.class_counts) if count]

    def scored(asked: list[int] | None, guidance: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        labels = wanted_labels(asked, EVAL_IMAGES, args.seed, args.flags())
        images = draw(labels=labels, count=EVAL_IMAGES, guidance=guidance)
        return images.cpu(), labels and torch.tensor(labels)

    def preview() -> torch.Tensor:
        count = args.samples_per_epoch
        return draw(labels=wanted_labels(None, count, args.seed, args.flags()), count=count)

    asked = {"_labelled": lambda: scored(digits, DEFAULT_GUIDANCE)} if args.labelled else {}
    return preview, {"": lambda: scored(None, 1.0), **asked}
