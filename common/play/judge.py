"""What the digit classifier sees in a sketch and in drawings. It is trained only where somebody asks for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.error_codes import Exit
from common.flags import is_own
from common.play import wishes
from common.play.runs import Opened, Shelf
from common.play.wishes import Refused
from common.play.worker import Wish

if TYPE_CHECKING:
    import torch

    from common.classifier import DigitClassifier


def image_of(pixels: bytes) -> torch.Tensor:
    """784 bytes -> (1, 1, 28, 28) in [0, 1], as infer.py reads a PNG."""
    import torch

    return torch.tensor(list(pixels), dtype=torch.float32).div_(255).view(1, 1, 28, 28)


def _classifier(shelf: Shelf, opened: Opened) -> tuple[DigitClassifier, float] | None:
    """(the classifier of the run's data, its accuracy), if it is kept with the data."""
    from common.classifier import kept_classifier

    cache, source = shelf.data_of(opened)
    known = _named(shelf, opened, source)
    if known not in shelf.classifiers and (kept := kept_classifier(cache, source)) is not None:
        shelf.classifiers[known] = kept
    return shelf.classifiers.get(known)


def _named(shelf: Shelf, opened: Opened, source: str) -> str:
    """What the run's data are called among the classifiers. Raises Refused if a file of them has changed since."""
    if not is_own(source):
        return source
    known = f"{source} {opened.run.flags.get('dataset')}"
    if known not in shelf.classifiers:
        shelf.digits(opened)
    return known


def labels_of(shelf: Shelf, opened: Opened, images: torch.Tensor) -> list[int] | None:
    """What the classifier takes each image (N, 1, 28, 28) for; None without a classifier."""
    from common.classifier import judge

    try:
        found = _classifier(shelf, opened)
    except (Exit, Refused):  # its data are no longer where they were; the drawing is good without
        return None
    return None if found is None else judge(found[0], images)[1].argmax(dim=1).tolist()


def judge(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Any) -> None:
    """The probabilities of the ten digits, as the classifier sees an image; {missing} where it must be trained first.

    "train": train it, and say how far that is.
    """
    from common import classifier

    opened = shelf.open(asked.get("run"))
    image = image_of(wishes.pixels(asked, "image"))
    found = _classifier(shelf, opened)
    if found is None and asked.get("train") is not True:
        send(missing=True, last=True)
        return
    if found is None:
        cache, source = shelf.data_of(opened)
        found = classifier.load_classifier(cache, source, lambda text: send(progress=text), wish.poll)
        shelf.classifiers[_named(shelf, opened, source)] = found
    if not image.any():
        raise Refused("There is nothing on the canvas yet.")
    probabilities = classifier.judge(found[0], image)[1][0]
    send(probabilities=probabilities.tolist(), accuracy=found[1], last=True)
