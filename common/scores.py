"""What drawings are worth beside held-out digits, in the feature space of a digit classifier; and their scores' file.

The distances are not Inception figures: they compare only with figures of the same classifier.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data import held_out
from common.error_codes import NO_DATA, Exit
from common.rng import generator

if TYPE_CHECKING:
    import torch

    from common.session import Session

FEWEST_REAL = 10  # held-out digits: of each half some neighbours are looked for
SPLITS = 10  # of the held-out digits, over which the Fréchet distance is averaged
ORDER = ("fid", "precision", "recall", "agreement", "imbalance", "confident")


def halves(real: Any, split: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of the reference digits, of the spare ones): one of a fixed row of random splits.

    In MNIST's own order the first half of the test digits is the cleaner one.
    """
    import torch

    return torch.randperm(len(real), generator=generator(split, "evaluation halves")).tensor_split(2)


def score(
    images: torch.Tensor,
    wanted: torch.Tensor | None,
    real: Any,
    classifier: Any,
    *,
    errors: bool = True,
    splits: int = SPLITS,
    chosen: bool = False,
) -> dict[str, dict[str, float]]:
    """{figure: {"value", "error", "floor" (what real digits score), "floor_error"}}; errors by bootstrap.

    images (N, 1, 28, 28) in [0, 1]; wanted (N,) labels, None if none were asked for. real: held-out digits (HF_MNIST);
    one half is the reference, the other sets the floor, cut to N digits if it has more. The Fréchet distance depends
    on which half it is: it is the mean over so many `splits`, its floor over all groups of N in their other halves too
    (one odd digit can double that of a group), and its "floor_error" the standard deviation over the splits. A group's
    classes count as much as among `wanted`: equal runs of each digit score otherwise than digits at random. chosen: how
    many there are of each label was not chance, and is no part of the distance's error.
    """
    import numpy
    import torch

    from common.classifier import judge
    from common.metrics import bootstrap, covered, frechet_distance, imbalance

    rng = numpy.random.default_rng(0)
    real_images, real_labels = real[torch.arange(len(real))]
    real_features, real_probabilities = (part.numpy() for part in judge(classifier, real_images))
    parts = [halves(real, split) for split in range(splits)]
    first, second = parts[0][0], parts[0][1][: len(images)]
    reference = real_features[first]
    half = len(reference)
    spare = (real_features[second], real_probabilities[second], real_labels[second])
    drawn = (*(part.numpy() for part in judge(classifier, images)), wanted)
    found: dict[str, dict[str, float]] = {}
    for column, (features, probabilities, asked) in {"floor": spare, "value": drawn}.items():
        predicted = probabilities.argmax(1)
        size = min(len(features), half)  # precision and recall want sets of equal size
        some = features[rng.permutation(len(features))[:size]]  # not the first ones: drawings come digit by digit
        samples: dict[str, tuple[Callable[..., float], Any]] = {
            "fid": (lambda rows: frechet_distance(rows, reference), features),
            "precision": (lambda rows: rows.mean(), covered(reference[:size], some)),
            "recall": (lambda rows: rows.mean(), covered(some, reference[:size])),
            "imbalance": (lambda rows: imbalance(rows, real_labels[first].numpy()), predicted),
            "confident": (lambda rows: rows.mean(), probabilities.max(1) > 0.9),
        }
        if wanted is not None:
            pairs = numpy.stack([predicted, asked.numpy()], axis=1)
            samples["imbalance"] = (lambda rows: imbalance(*rows.T), pairs)
            samples["agreement"] = (lambda rows: (rows[:, 0] == rows[:, 1]).mean(), pairs)
        for name, (statistic, rows) in samples.items():
            entry = found.setdefault(name, {})
            entry[column] = float(statistic(rows))
            if errors:
                strata = asked.numpy() if chosen and (name, column) == ("fid", "value") else None
                error = bootstrap(statistic, rows, strata=strata)
                entry["error" if column == "value" else "floor_error"] = error
    if splits > 1:
        fid, count = found["fid"], len(images)
        values = [frechet_distance(drawn[0], real_features[some]) for some, _ in parts]
        floors = []
        for some, rest in parts:
            groups = [(real_features[rows], _balanced(real_labels[rows], wanted)) for rows in _groups(rest, count)]
            floors.append(numpy.mean([frechet_distance(rows, real_features[some], counts) for rows, counts in groups]))
        fid |= {"value": float(numpy.mean(values)), "floor": float(numpy.mean(floors))}
        if errors:
            fid["floor_error"] = float(numpy.std(floors, ddof=1))
    return {name: found[name] for name in ORDER if name in found}


def _groups(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """`rows` in groups of `count`, the rest left out; all of them in one if there are not so many."""
    return rows[: len(rows) // count * count or None].split(count)


def _balanced(labels: torch.Tensor, wanted: torch.Tensor | None) -> Any:
    """(N,), or None: how much each row of `labels` must count for their classes to have the shares of `wanted`.

    Digits that count so score as digits picked in these shares do, of which there may be too few.
    """
    if wanted is None:
        return None
    classes = int(max(labels.max(), wanted.max())) + 1
    here, there = (rows.bincount(minlength=classes).double() for rows in (labels, wanted))
    weights = (there / here)[labels].numpy()
    return weights if (weights > 0).sum() > 1 else None


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


def of_digits(real: Any, digits: list[int]) -> Any:
    """The data set `real`, or its part of these digits if any are named."""
    import torch

    return real.subset(torch.isin(real.labels, torch.tensor(digits)).nonzero().flatten()) if digits else real


def judges(
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
    some = of_digits(real, digits)
    if len(some) < FEWEST_REAL:
        raise Exit(NO_DATA, f"{real.source} has too few {real.noun} for tests, {len(some)}, to compare with")
    classifier, accuracy = load_classifier(args.cache_dir, real.source, say, poll)
    return some, classifier, accuracy


def epoch_scorer(
    session: Session, shown: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor | None]]]
) -> Callable[[], dict[str, Any]]:
    """For a trainer's --eval-every: a function that scores an epoch, {figure + suffix: value, "classifier": which}.

    It gives {} in the epochs between, and where --eval-every is not given or too large. shown: by suffix, what to
    score: a function that returns (images, wanted labels), as `score` takes them.

    The digits and the classifier are fetched here, before training begins: Exit(NO_DATA) if they cannot be had.
    """
    args = session.args
    if not args.eval_every:
        return dict
    if args.eval_every > args.epochs:
        session.log.warning(f"--eval-every {args.eval_every} is more than --epochs {args.epochs}: nothing is scored")
        return dict
    from common.classifier import fingerprint

    only = [] if args.only_digit is None else [args.only_digit]
    real = classifier = None  # of several processes only the first needs them

    def fetch() -> None:
        nonlocal real, classifier
        real, classifier, _ = judges(args, args.flags(), only, session.log.info, session.poll)

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


def scores_file(path: Path) -> Path:
    """Where the scores of the checkpoint file `path` are written."""
    return path.with_name(f"{path.stem}.scores.json")


def holds_scores(path: Path) -> bool:
    """Is this a file of scores, of whatever checkpoint, and nothing else that would be lost under them?"""
    try:
        return any(name.startswith("details") for name in json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def read_scores(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What was written there about the checkpoint with this `state`; {} if it was about another of that name."""
    try:
        scores = json.loads(path.read_text())
        return scores if scores["timestamp"] == state["timestamp"] else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
