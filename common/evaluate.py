"""Score a checkpoint: `python -m common.evaluate --ckpt PATH`.

Draws images from a diffusion checkpoint (or reconstructs test digits with an autoencoder) and compares them with
held-out digits in the feature space of a digit classifier. The distances are not Inception figures: they compare only
with figures of the same classifier. Several processes (torchrun, srun) share the drawing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import ckpt, emoji, threads
from common.args import Parser, flag_of, number
from common.data import held_out
from common.device import get_device, memory_in_one_line
from common.drawing import choose_threads, draw_with_progress, sampling_options, wanted_labels
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, MODEL_MISMATCH, NO_DATA, USAGE, Exit, run_main
from common.files import alone_in, write_text
from common.flags import CHECKPOINT, COUNT, add_data_arguments, add_sampling_arguments, check_sampling
from common.images import check_output
from common.modules import guiding_network, module_of
from common.ranks import World, identity, joined
from common.run import require_checkpoint

if TYPE_CHECKING:
    import torch

    from common.session import Session

FEWEST = 200  # images that are worth a score
FEWEST_REAL = 10  # held-out digits: of each half some neighbours are looked for
SAMPLING = ("seed", "sampler", "digit", "guidance", "guidance_interval", "guide", "guide_scale", "steps")
COUNTED = ("fid", "imbalance")  # figures that grow as the images grow fewer
SPLITS = 10  # of the held-out digits, over which the Fréchet distance is averaged
CHUNK = 500  # digits reconstructed at a time
ORDER = ("fid", "precision", "recall", "agreement", "imbalance", "confident")
MEANING = {
    "fid": "Fréchet distance in the classifier's feature space (lower is better)",
    "precision": "share of the images that look like real digits (k-NN manifold)",
    "recall": "share of the real digits that the images cover (k-NN manifold)",
    "agreement": "share of the images that the classifier takes for the wanted digit",
    "imbalance": "total variation between the classes seen and wanted (0 is balanced)",
    "confident": "share of the images that the classifier is more than 90 % sure of",
    "tstr": "accuracy on real test digits of a classifier that learned from the images (real: from as many real ones)",
}


def _halves(real: Any, split: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of the reference digits, of the spare ones): one of a fixed row of random splits.

    In MNIST's own order the first half of the test digits is the cleaner one.
    """
    import torch

    from common.rng import generator

    return torch.randperm(len(real), generator=generator(split, "evaluation halves")).tensor_split(2)


def score(
    images: torch.Tensor,
    wanted: torch.Tensor | None,
    real: Any,
    classifier: Any,
    *,
    errors: bool = True,
    splits: int = SPLITS,
) -> dict[str, dict[str, float]]:
    """{figure: {"value", "error", "floor" (what real digits score), "floor_error"}}; errors by bootstrap.

    images (N, 1, 28, 28) in [0, 1]; wanted (N,) labels, None if none were asked for. real: held-out digits (HF_MNIST);
    one half is the reference, the other sets the floor, cut to N digits if it has more. The Fréchet distance depends
    on which half it is: it is the mean over so many `splits`, and its "floor_error" their standard deviation.
    """
    import numpy
    import torch

    from common.classifier import judge
    from common.metrics import bootstrap, covered, frechet_distance, imbalance

    rng = numpy.random.default_rng(0)
    real_images, real_labels = real[torch.arange(len(real))]
    real_features, real_probabilities = (part.numpy() for part in judge(classifier, real_images))
    halves = [_halves(real, split) for split in range(splits)]
    first, second = halves[0][0], halves[0][1][: len(images)]
    reference = real_features[first]
    half = len(reference)
    spare = (real_features[second], real_probabilities[second], real_labels[second])
    drawn = (*(part.numpy() for part in judge(classifier, images)), wanted)
    found: dict[str, dict[str, float]] = {}
    for column, (features, probabilities, asked) in {"floor": spare, "value": drawn}.items():
        predicted = probabilities.argmax(1)
        balance = (real_labels[first] if wanted is None else asked).numpy()
        size = min(len(features), half)  # precision and recall want sets of equal size
        some = features[rng.permutation(len(features))[:size]]  # not the first ones: drawings come digit by digit
        samples: dict[str, tuple[Callable[..., float], Any]] = {
            "fid": (lambda rows: frechet_distance(rows, reference), features),
            "precision": (lambda rows: rows.mean(), covered(reference[:size], some)),
            "recall": (lambda rows: rows.mean(), covered(some, reference[:size])),
            "imbalance": (lambda rows, balance=balance: imbalance(rows, balance), predicted),
            "confident": (lambda rows: rows.mean(), probabilities.max(1) > 0.9),
        }
        if wanted is not None:
            samples["agreement"] = (lambda rows: rows.mean(), predicted == asked.numpy())
        for name, (statistic, rows) in samples.items():
            entry = found.setdefault(name, {})
            entry[column] = float(statistic(rows))
            if errors:
                entry["error" if column == "value" else "floor_error"] = bootstrap(statistic, rows)
    if splits > 1:
        fid, count = found["fid"], len(images)
        values = [frechet_distance(drawn[0], real_features[some]) for some, _ in halves]
        floors = [frechet_distance(real_features[rest[:count]], real_features[some]) for some, rest in halves]
        fid |= {"value": float(numpy.mean(values)), "floor": float(numpy.mean(floors))}
        if errors:
            fid["floor_error"] = float(numpy.std(floors, ddof=1))
    return {name: found[name] for name in ORDER if name in found}


def train_on_synthetic(
    images: torch.Tensor, labels: torch.Tensor, real: Any, learnable: Any, say: Callable[[str], None]
) -> dict[str, float]:
    """The figure "tstr" of `score`: train on synthetic, test on real (Esteban et al. 2017).

    images (N, 1, 28, 28), labels (N,): the drawings. real: the test digits; learnable: real training digits, N of which
    set the floor (all, if there are fewer). Both classifiers are the project's own, trained alike.
    """
    import torch
    from torch.utils.data import TensorDataset

    from common.classifier import judge, train_classifier
    from common.metrics import bootstrap
    from common.rng import generator

    some = torch.randperm(len(learnable), generator=generator(0, "evaluation training digits"))[: len(images)]
    found: dict[str, float] = {}
    for column, error, learned in (
        ("value", "error", TensorDataset(images, labels)),
        ("floor", "floor_error", learnable.subset(some)),
    ):
        net = train_classifier(learned, progress=say)
        predicted = judge(net, real[torch.arange(len(real))][0])[1].argmax(1)
        hits = (predicted == real.labels).numpy()
        found |= {column: float(hits.mean()), error: bootstrap(lambda rows: rows.mean(), hits)}
    return found


def epoch_scorer(
    session: Session, shown: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor | None]]]
) -> Callable[[], dict[str, Any]]:
    """For a trainer's --eval-every: a function that scores an epoch, {figure + suffix: value, "classifier": which}.

    It gives {} in the epochs between, and without --eval-every. shown: by suffix, what to score: a function that
    returns (images, wanted labels), as `score` takes them.

    The digits and the classifier are fetched here, before training begins: Exit(NO_DATA) if they cannot be had.
    """
    args = session.args
    if not args.eval_every:
        return dict
    from common.classifier import fingerprint

    only = [] if args.only_digit is None else [args.only_digit]
    real = classifier = None  # of several processes only the first needs them

    def fetch() -> None:
        nonlocal real, classifier
        real, classifier, _ = _judges(args, args.flags(), only, session.log.info, session.poll)

    session.on_first(fetch)

    def scored() -> dict[str, Any]:
        return {} if session.epoch % args.eval_every else session.on_first(measured)

    def measured() -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for suffix, show in shown.items():
            images, wanted = show()
            if not images.isfinite().all():
                session.log.warning(f"epoch {session.epoch} gives images that are not finite: not scored")
                continue
            rows = score(images, wanted, real, classifier, errors=False)
            figures |= {f"{name}{suffix}": row["value"] for name, row in rows.items()}
        return figures and figures | {"classifier": fingerprint(classifier)}

    return scored


def _judges(
    args: Any,
    trained: dict[str, Any],
    digits: list[int],
    say: Callable[[str], None],
    poll: Callable[[], object] = lambda: None,
) -> tuple[Any, Any, float]:
    """(held-out real digits, only `digits` if any are given; the classifier; its accuracy), for a run's flags.

    Raises Exit(MODEL_MISMATCH) if it learned from other data, Exit(NO_DATA) if too few are held out.
    """
    from common.classifier import load_classifier

    real = held_out(args.data, args.cache_dir, trained)
    some = _only(real, digits)
    if len(some) < FEWEST_REAL:
        raise Exit(NO_DATA, f"{real.source} has too few {real.noun} for tests, {len(some)}, to compare with")
    classifier, accuracy = load_classifier(args.cache_dir, real.source, say, poll)
    return some, classifier, accuracy


def _only(real: Any, digits: list[int]) -> Any:
    """The data set `real`, or its part of these digits if any are named."""
    import torch

    return real.subset(torch.isin(real.labels, torch.tensor(digits)).nonzero().flatten()) if digits else real


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

    from common.autoencoder import build_autoencoder, read_autoencoder

    autoencoder = build_autoencoder(read_autoencoder(read), device)
    images, labels = real[_halves(real)[1][:count]]
    started = time.perf_counter()
    with torch.no_grad():
        rebuilt = torch.cat([autoencoder(part.to(device)).cpu() for part in images.split(CHUNK)])
    return rebuilt, labels.tolist(), time.perf_counter() - started


def scores_file(path: Path) -> Path:
    """Where the scores of the checkpoint file `path` are written."""
    return path.with_name(f"{path.stem}.scores.json")


def read_scores(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What was written there about the checkpoint with this `state`; {} if it was about another of that name."""
    try:
        scores = json.loads(path.read_text())
        return scores if scores["timestamp"] == state["timestamp"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Score a checkpoint.", "python -m common.evaluate --ckpt RUN_FOLDER --digit 0 1 2 3 4 5 6 7 8 9")
    parser.add_argument(*CHECKPOINT, help="checkpoint file, a folder of a run or of runs (newest), RUN/best, or latest")
    parser.add_argument(
        *COUNT, dest="n", type=number(int, FEWEST), default=5000, help="images, at least 200 (default: 5000)"
    )
    tstr = "also train a classifier on the images and their labels, and test it on real digits"
    parser.add_argument("--tstr", action="store_true", help=tstr)
    parser.add_argument("--json", type=Path, help="where the scores go (default: beside the checkpoint)")
    add_sampling_arguments(parser)
    add_data_arguments(parser)
    args, typed = parser.parse_args(argv), parser.typed(argv)
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
            draw, _ = module_of(model).load_for_drawing(
                args.ckpt, get_device(args.device, identity()), guide=args.guide
            )
            _draw(args, draw, labels, world)


class Subject(NamedTuple):
    """What is to be scored, and by whom; labels: of the images that are to be drawn."""

    path: Path
    state: dict[str, Any]
    model: str
    labels: list[int] | None
    real: Any
    classifier: Any
    accuracy: float

    @property
    def digits(self) -> list[int]:
        """Those that it was trained on, [] for all."""
        only = self.state["args"].get("only_digit")
        return [] if only is None else [only]


def _say(text: str) -> None:
    print(f"{emoji.info} {text}")


def _prepare(args: Any, typed: Collection[str], poll: Callable[[], object]) -> Subject:
    """Check all that can be checked before anything is drawn; poll is called where that lasts. Raises Exit.

    typed: the flags that the user gave.
    """
    require_checkpoint(args.ckpt, ckpt.MODEL_TYPES)
    path, state = ckpt.read_model(args.ckpt, ckpt.MODEL_TYPES)
    path = path.resolve()
    model, labels = ckpt.infer_model_from_checkpoint(state), None
    check_output(args.json or scores_file(path), ".json")
    if not model.startswith("ae-"):
        check_sampling(args, state["args"])
        labels = wanted_labels(args.digit, args.n, args.seed, state["args"])
        args.ckpt = ckpt.very_file(path)  # for the other processes
        if args.guide is not None:
            args.guide = ckpt.very_file(ckpt.read_model(args.guide, (model,))[0])
            guiding_network(args.guide, state, module_of(model).build, "cpu")  # does it fit?
    elif useless := [flag_of(name) for name in ("tstr", *SAMPLING) if name in typed]:
        # --tstr: what it reconstructs are the very digits that a classifier would be tested on
        raise Exit(MODEL_MISMATCH, f"{path} holds an autoencoder, which reconstructs: leave out {', '.join(useless)}")
    if args.tstr and labels is None:
        why = "leave out --digit none" if args.digit == [] else "this model's network takes none"
        raise Exit(USAGE, f"--tstr learns from the images' labels; {why}")
    subject = Subject(path, state, model, labels, None, None, 0.0)
    real, classifier, accuracy = _judges(args, state["args"], args.digit or subject.digits, _say, poll)
    return subject._replace(real=real, classifier=classifier, accuracy=accuracy)


def _evaluate(args: Any, subject: Subject, world: World) -> None:
    import torch

    from common.classifier import fingerprint
    from common.data import HF_MNIST

    path, trained, model, labels, real, classifier, accuracy = subject
    device, digits = get_device(args.device, identity()), subject.digits
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
    figures = score(images, None if wanted is None else torch.tensor(wanted), real, classifier, splits=splits)
    if args.tstr:
        learnable = _only(HF_MNIST("train", args.cache_dir, source=real.source), args.digit or digits)
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
    spare = len(_halves(real)[1])
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
        known = read_scores(target, trained) | {"timestamp": trained["timestamp"]} | found
        try:
            write_text(target, json.dumps(known, indent=1) + "\n")
        except OSError as error:
            raise Exit(BAD_OUTPUT, f"cannot write {target}: {error.strerror or error}") from None
    print(f"{emoji.ok} {target}")


if __name__ == "__main__":
    sys.exit(run_main(main))
