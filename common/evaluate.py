"""Score a checkpoint: `python -m common.evaluate --ckpt PATH`.

Draws images from a diffusion checkpoint (or reconstructs test digits with an autoencoder) and compares them with
held-out digits (`common.scores`). Several processes (torchrun, srun) share the drawing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import ckpt, console, emoji, threads
from common.args import Parser, flag_of, named_path, number
from common.autoencoder import build_autoencoder, read_autoencoder
from common.data import HF_MNIST
from common.device import get_device, memory_in_one_line
from common.drawing import choose_threads, draw_with_progress, sampling_options, wanted_labels
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, MODEL_MISMATCH, USAGE, Exit, require, run_main
from common.files import alone_in, write_text
from common.flags import CHECKPOINT, COUNT, add_data_arguments, add_sampling_arguments, check_sampling
from common.images import check_output
from common.modules import guiding_network, module_of
from common.ranks import World, identity, joined
from common.run import require_checkpoint
from common.scores import (
    SPLITS,
    halves,
    holds_scores,
    judges,
    of_digits,
    read_scores,
    score,
    scores_file,
    train_on_synthetic,
)

if TYPE_CHECKING:
    import torch


FEWEST = 200  # images that are worth a score
SAMPLING = ("seed", "sampler", "digit", "guidance", "guidance_interval", "guide", "guide_scale", "steps")
COUNTED = ("fid", "imbalance")  # figures that grow as the images grow fewer
CHUNK = 500  # digits reconstructed at a time
MEANING = {
    "fid": "Fréchet distance in the classifier's feature space (lower is better)",
    "precision": "share of the images that look like real digits (k-NN manifold)",
    "recall": "share of the real digits that the images cover (k-NN manifold)",
    "agreement": "share of the images that the classifier takes for the wanted digit",
    "imbalance": "total variation between the classes seen and wanted (0 is balanced)",
    "confident": "share of the images that the classifier is more than 90 % sure of",
    "tstr": "accuracy on real test digits of a classifier that learned from the images (real: from as many real ones)",
}


def _draw(args: Any, draw: Callable, labels: list[int] | None, world: World) -> tuple[torch.Tensor, float]:
    """(images, seconds) from a diffusion checkpoint's `draw`."""
    options = sampling_options(args) | {"world": world}
    started = time.perf_counter()
    images = draw_with_progress(draw, labels=labels, count=args.n, seed=args.seed, **options)
    return images, time.perf_counter() - started


def _reconstruct(
    read: tuple[Path, dict], real: Any, count: int, device: torch.device
) -> tuple[torch.Tensor, list[int], float]:
    """(images, their labels, seconds): the reconstructions of `count` of the digits that set the floor."""
    import torch

    autoencoder = build_autoencoder(read_autoencoder(read), device)
    images, labels = real[halves(real)[1][:count]]
    started = time.perf_counter()
    with torch.no_grad():
        rebuilt = torch.cat([autoencoder(part.to(device)).cpu() for part in images.split(CHUNK)])
    return rebuilt, labels.tolist(), time.perf_counter() - started


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Score a checkpoint.", "python -m common.evaluate --ckpt RUN_FOLDER --digit 0 1 2 3 4 5 6 7 8 9")
    parser.add_argument(*CHECKPOINT, help="checkpoint file, a folder of a run or of runs (newest), RUN/best, or latest")
    parser.add_argument(
        *COUNT, dest="n", type=number(int, FEWEST), default=5000, help="images, at least 200 (default: 5000)"
    )
    tstr = "also train a classifier on the images and their labels, and test it on real digits"
    parser.add_argument("--tstr", action="store_true", help=tstr)
    parser.add_argument("--json", type=named_path, help="where the scores go (default: beside the checkpoint)")
    add_sampling_arguments(parser)
    add_data_arguments(parser)
    args, typed = parser.parse_args(argv), parser.typed(argv)
    require("torch", "sklearn", "tqdm")
    threads.prepare()
    with joined(vars(args)) as world, memory_in_one_line(f"draw fewer than --n {args.n} images"):
        known: list[Subject] = []

        def prepare() -> tuple[dict[str, Any], str, list[int] | None]:
            known.append(_prepare(args, typed, world.is_over))
            return vars(args), known[0].model, known[0].labels

        flags, model, labels = world.first_at_length(prepare)  # it may have to train the classifier
        if known:
            _evaluate(args, known[0], world)
        elif not model.startswith("ae-"):  # reconstructing is not shared
            vars(args).update(flags)
            device = get_device(args.device, identity())
            draw, _ = module_of(model).load_for_drawing(args.ckpt, device, guide=args.guide)
            choose_threads(args, draw, args.n, labels, device)
            _draw(args, draw, labels, world)


class Subject(NamedTuple):
    """What is to be scored, and by whom.

    labels: of the images that are to be drawn; digits: those that it was trained on, [] for all.
    """

    path: Path
    state: dict[str, Any]
    model: str
    labels: list[int] | None
    digits: list[int]
    real: Any
    classifier: Any
    accuracy: float


def _say(text: str) -> None:
    print(f"{emoji.info} {text}")


def _prepare(args: Any, typed: Collection[str], poll: Callable[[], object]) -> Subject:
    """Check all that can be checked before anything is drawn; poll is called where that lasts. Raises Exit.

    typed: the flags that the user gave.
    """
    require_checkpoint(args.ckpt, ckpt.MODEL_TYPES)
    warn = cache(console.warn)  # two flags may mean one run
    path, state = ckpt.read_model(args.ckpt, ckpt.MODEL_TYPES, warn)
    path = path.resolve()
    model, labels = ckpt.infer_model_from_checkpoint(state), None
    target = check_output(args.json or scores_file(path), ".json")
    if args.json and target.exists() and not holds_scores(target):
        raise Exit(BAD_OUTPUT, f"{target} exists, and holds no scores: give another name, or remove it")
    if not model.startswith("ae-"):
        check_sampling(args, state["args"])
        labels = wanted_labels(args.digit, args.n, args.seed, state["args"])
        args.ckpt = str(path)  # for the other processes
        if args.guide is not None:
            args.guide = ckpt.very_file(ckpt.read_model(args.guide, (model,), warn)[0])
            guiding_network(args.guide, state, module_of(model).build, "cpu")  # does it fit?
    elif useless := [flag_of(name) for name in ("tstr", *SAMPLING) if name in typed]:
        # --tstr: what it reconstructs are the very digits that a classifier would be tested on
        raise Exit(MODEL_MISMATCH, f"{path} holds an autoencoder, which reconstructs: leave out {', '.join(useless)}")
    if args.tstr and labels is None:
        why = "leave out --digit none" if args.digit == [] else "this model's network takes none"
        raise Exit(USAGE, f"--tstr learns from the images' labels; {why}")
    only = state["args"].get("only_digit")
    digits = [] if only is None else [only]
    return Subject(path, state, model, labels, digits, *judges(args, state["args"], args.digit or digits, _say, poll))


def _evaluate(args: Any, subject: Subject, world: World) -> None:
    import torch

    from common.classifier import fingerprint

    path, trained, model, labels, digits, real, classifier, accuracy = subject
    device = get_device(args.device, identity())
    if model.startswith("ae-"):
        threads.settle(args.threads, lambda: threads.recorded(trained["args"]))
        images, labels, seconds = _reconstruct((path, trained), real, args.n, device)
    else:
        draw, _ = module_of(model).load_for_drawing((path, trained), device, guide=args.guide)
        choose_threads(args, draw, args.n, labels, device)
        images, seconds = _draw(args, draw, labels, world)
    if not images.isfinite().all():
        raise Exit(BAD_CHECKPOINT, f"{path} gives images that are not finite; choose an earlier checkpoint")
    wanted = labels or (digits * len(images) if digits else None)
    # reconstructions are of one half's digits, and not to be compared with those very digits
    splits = 1 if model.startswith("ae-") else SPLITS
    asked = None if wanted is None else torch.tensor(wanted)
    figures = score(images, asked, real, classifier, splits=splits, chosen=bool(args.digit))
    if args.tstr:
        learnable = of_digits(HF_MNIST("train", args.cache_dir, source=real.source), args.digit or digits)
        figures["tstr"] = train_on_synthetic(images, torch.tensor(labels), real, learnable, _say)

    # by suffix, one file holds the figures of three ways of drawing, and none hides another's
    if model.startswith("ae-"):
        kind, suffix = "reconstructions", ""
    elif args.digit is None:
        kind, suffix = "labels by class shares", ""
    else:
        kind, suffix = ("labels as asked for", "_labelled") if args.digit else ("without labels", "_unlabelled")
    print(f"{len(images):,} images, {kind}, from {trained['exp_name']}, epoch {trained['epoch']}")
    print(f"judged by a classifier that reads {accuracy:.2%} of the test {real.noun} ({real.source}) correctly")
    spare = len(halves(real)[1])
    print(f"{'':>10} {'value':>9} {'+-':>8} {'real':>9} {'+-':>8}")
    for name, row in figures.items():
        cells = f"{row['value']:>9.4f} {row['error']:>8.4f} {row['floor']:>9.4f} {row['floor_error']:>8.4f}"
        few = f"; real: of only {spare:,}, which scores higher" if name in COUNTED and spare < len(images) else ""
        if name == "tstr" and len(learnable) < len(images):
            few = f"; real: from only {len(learnable):,}"
        print(f"{name:>10} {cells}   {MEANING[name]}{few}")
    if spare < len(images):
        advice = f"draw --n {spare} to compare with them" if spare >= FEWEST else "too few to compare with"
        columns = f"the column 'real' is of {spare:,} {real.noun}, 'value' of {len(images):,} images"
        print(f"{emoji.warning} {columns}: {advice}")
    print(f"{'images/s':>10} {len(images) / seconds:>9.1f}")
    print(f"{emoji.info} not Inception figures: they compare only with figures of this classifier")
    settings = {name: getattr(args, name) for name in ("n", *SAMPLING)}
    # the only digit decides what real digits it is compared with
    settings |= {"kind": kind, "only_digit": trained["args"].get("only_digit"), "splits": splits}
    target = args.json or scores_file(path)
    details = {"figures": figures, "settings": settings, "images_per_second": len(images) / seconds}
    judged = {"classifier": fingerprint(classifier), "classifier_accuracy": accuracy, "data": real.source}
    judged |= {"dataset": real.fingerprint, "held_out": real.held_out}
    found = {f"{name}{suffix}": row["value"] for name, row in figures.items()} | {f"details{suffix}": details | judged}
    with alone_in(target.parent):  # another may have scored another way of drawing meanwhile
        before = read_scores(target, trained)  # of other ways of drawing; of this one nothing stays
        known = {name: value for name, value in before.items() if name not in {f"{it}{suffix}" for it in MEANING}}
        known |= {"timestamp": trained["timestamp"]} | found
        try:
            write_text(target, json.dumps(known, indent=1) + "\n")
        except OSError as error:
            raise Exit(BAD_OUTPUT, f"cannot write {target}: {error.strerror or error}") from None
    print(f"{emoji.ok} {target}")


if __name__ == "__main__":
    sys.exit(run_main(main))
