"""The latent space: its map of test digits, kept with the run; digits and walks in it; any point decoded."""

from __future__ import annotations

import contextlib
import threading
import time
import zipfile
from typing import TYPE_CHECKING, Any

from common import ckpt
from common.files import atomic_write
from common.latents import PERPLEXITY, encode_digits, tsne_map, walks_between
from common.play import wishes
from common.play.drawings import TELL_EVERY, Send, bytes_of, threads_of
from common.play.runs import Opened, Shelf
from common.play.wishes import Refused
from common.play.worker import Wish

if TYPE_CHECKING:
    import numpy

COUNT, SEED = 2000, 42  # which test digits are on the map
KEPT = "latent_map.npz"  # with the run
WALK = 11  # images of a walk
FARTHEST = 1e4  # in the latent space
LOOK_EVERY = 0.01  # seconds


class Space:
    """Test digits in a run's latent space: images (N, 1, 28, 28), labels (N,), latents (N, D), points (N, 2) | None."""

    def __init__(self, shelf: Shelf, opened: Opened) -> None:
        import torch

        self.opened, self.digits = opened, shelf.digits(opened)
        self.digest = ckpt.weights_digest(opened.autoencoder.net.state_dict())
        latents, self.labels, self.images = encode_digits(
            opened.autoencoder.net, self.digits, COUNT, SEED, opened.autoencoder.device
        )
        self.latents = torch.as_tensor(latents)
        self.points = self._read()
        self.fault: Exception | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Compute the points in a thread of its own, which a second call does not start again."""
        if self._thread is None or not self._thread.is_alive():
            self.fault = None
            self._thread = threading.Thread(target=self._compute, name="play: map", daemon=True)
            self._thread.start()

    def _compute(self) -> None:
        try:
            points = tsne_map(self.latents.numpy(), min(PERPLEXITY, (len(self.latents) - 1) / 3))
            low, high = points.min(axis=0), points.max(axis=0)
            points = (points - low) / (high - low).clip(1e-9)  # in [0, 1]
            self._keep(points)
            self.points = points  # for the worker's thread, which waits for it
        except Exception as error:  # goes to the worker's thread, which waits for the points
            self.fault = error

    def _read(self) -> numpy.ndarray | None:
        """The points that were kept, if they are of these weights and digits."""
        import numpy

        try:
            with numpy.load(self.opened.entry.kept(KEPT), allow_pickle=False) as kept:
                same = str(kept["digest"]) == self.digest and numpy.array_equal(kept["labels"], self.labels)
                return kept["points"] if same and kept["points"].shape == (len(self.labels), 2) else None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None

    def _keep(self, points: numpy.ndarray) -> None:
        """Where the folder cannot be written to, the map is computed again by the next server."""
        import numpy

        arrays = {"points": points, "labels": self.labels, "digest": numpy.array(self.digest)}
        with contextlib.suppress(OSError):
            atomic_write(self.opened.entry.kept(KEPT), lambda file: numpy.savez(file, **arrays))


def _space(shelf: Shelf, asked: dict[str, Any]) -> Space:
    opened = shelf.open(asked.get("run"))
    if "space" not in opened.kept:
        with threads_of(opened):
            opened.kept["space"] = Space(shelf, opened)
    return opened.kept["space"]


def map_digits(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Send) -> None:
    """The map, and the mean and deviation of every latent dimension; computed first where it was not kept."""
    space = _space(shelf, asked)
    started = told = time.monotonic()
    if space.points is None:
        space.begin()
    while space.points is None:
        if space.fault is not None:
            raise Refused(f"The map could not be computed: {space.fault}")
        wish.poll()
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            send(seconds=told - started, digits=len(space.labels))
        time.sleep(LOOK_EVERY)
    deviation = space.latents.std(dim=0, correction=0) if len(space.latents) > 1 else space.latents[0].abs() + 1
    points = [[round(float(value), 4) for value in point] for point in space.points]
    answer = {"points": points, "labels": space.labels.tolist(), "source": space.digits.source}
    send(last=True, **answer, mean=space.latents.mean(dim=0).tolist(), deviation=deviation.tolist())


def digit(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Send) -> None:
    """A digit of the map: the image, its reconstruction, its latent."""
    space = _space(shelf, asked)
    index = wishes.whole(asked, "index", 0, len(space.labels) - 1)
    rows = slice(index, index + 1)
    with threads_of(space.opened):
        pixels = bytes_of(space.images[rows]) + bytes_of(space.opened.autoencoder.decode(space.latents[rows]))
    send(pixels, last=True, latent=space.latents[index].tolist(), label=int(space.labels[index]), index=index)


def walk(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Send) -> None:
    """WALK images on the straight way between two digits of the map, and the latents at its ends."""
    space = _space(shelf, asked)
    ends = [wishes.whole(asked, name, 0, len(space.labels) - 1) for name in ("from", "to")]
    autoencoder = space.opened.autoencoder
    with threads_of(space.opened):
        images = walks_between(autoencoder.net, space.images[ends].to(autoencoder.device), WALK)
    send(bytes_of(images), last=True, latents=space.latents[ends].tolist(), ends=ends)


def decode(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Send) -> None:
    """The image of any latent."""
    import torch

    opened = shelf.open(asked.get("run"))
    count = opened.autoencoder.flags["latent_dim"]
    latent = torch.tensor([wishes.reals(asked, "latent", count, -FARTHEST, FARTHEST)])  # (1, D)
    with threads_of(opened):
        send(bytes_of(opened.autoencoder.decode(latent)), last=True)
