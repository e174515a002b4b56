"""Data other than MNIST: --data FILE.npz and --data hub:OWNER/NAME. 28 x 28 grey pixels, at most ten classes.

A file holds `images` (N, 28, 28) uint8 and `labels` (N,), whole numbers from 0 to 9; perhaps also `test_images` and
`test_labels`. Without these a tenth of the images, the same at every start, is held back for tests. What the data are
is their content: its fingerprint tells runs apart, wherever the file lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import cache
from common.device import memory_in_one_line
from common.error_codes import NO_DATA, Exit
from common.files import no_file
from common.flags import HUB
from common.rng import generator
from common.slurm import lasting_cache

if TYPE_CHECKING:
    import numpy
    import torch

NAMES = ("images", "labels", "test_images", "test_labels")
FEWEST = {"": 90, "test_": 10}  # images, so of one set 100
TENTH = "a tenth of the images, always the same"


class OwnData(NamedTuple):
    """Tensors (N, 28, 28) uint8 and (N,) int64; `held_out` says which images are those for tests."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    fingerprint: str
    held_out: str


@memory_in_one_line("there are more images in --data than fit")
def read_own(source: str, cache_dir: Path, warn: Callable[[str], None]) -> OwnData:
    """The data that `source`, FILE.npz or hub:OWNER/NAME, means. Raises Exit(NO_DATA) if they are not as wanted."""
    import torch

    arrays = _of_hub(source.removeprefix(HUB), cache_dir, warn) if source.startswith(HUB) else _of_file(Path(source))
    _check(arrays, source)
    kinds = {"images": "uint8", "labels": "int64"}
    tensors = {
        name: torch.as_tensor(array.astype(kinds[name.split("_")[-1]], copy=False)) for name, array in arrays.items()
    }
    digest = hashlib.sha256()
    for name in NAMES:
        if name in tensors:
            digest.update(f"{name} {len(tensors[name])} ".encode() + tensors[name].contiguous().numpy().tobytes())
    held_out = "its own" if "test_images" in tensors else TENTH
    if held_out == TENTH:
        images, labels = tensors["images"], tensors["labels"]
        order = torch.randperm(len(images), generator=generator(0, "test images"))
        for prefix, rows in (("test_", order[: len(order) // 10]), ("", order[len(order) // 10 :])):
            rows = rows.sort().values
            tensors |= {f"{prefix}images": images[rows], f"{prefix}labels": labels[rows]}
    for prefix, least in FEWEST.items():
        if (count := len(tensors[f"{prefix}images"])) < least:
            whose = "for tests" if prefix else "to learn from"
            raise Exit(NO_DATA, f"{source} has too few images {whose}: {count}; at least {least} are needed")
    return OwnData(*(tensors[name] for name in NAMES), digest.hexdigest()[:12], held_out)


def _check(arrays: dict[str, numpy.ndarray], source: str) -> None:
    """Raises Exit(NO_DATA) with what is wrong with the arrays, in one line."""
    wanted = NAMES if arrays.keys() & set(NAMES[2:]) else NAMES[:2]
    if lacking := [name for name in wanted if name not in arrays]:
        raise Exit(NO_DATA, f"{source} holds no {lacking[0]}")
    for prefix in ("", "test_")[: len(wanted) // 2]:
        images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
        if images.dtype != "uint8" or images.ndim != 3 or images.shape[1:] != (28, 28):
            found = f"{images.dtype} of shape {images.shape}"
            raise Exit(NO_DATA, f"{source}: its {prefix}images are {found}; they must be uint8 of shape (N, 28, 28)")
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            found, count = f"{labels.dtype} of shape {labels.shape}", len(images)
            raise Exit(NO_DATA, f"{source}: its {prefix}labels are {found}; they must be whole numbers, ({count},)")
        classes = sorted(set(labels.tolist()))
        if len(classes) > 10:
            raise Exit(NO_DATA, f"{source}: its {prefix}labels name {len(classes)} classes; at most 10 are possible")
        if classes and not 0 <= classes[0] <= classes[-1] <= 9:
            found = f"{classes[0]} to {classes[-1]}"
            raise Exit(NO_DATA, f"{source}: its {prefix}labels go from {found}; classes are numbered from 0 to 9")


def _of_file(path: Path) -> dict[str, numpy.ndarray]:
    import numpy

    try:
        if reason := no_file(path):
            raise Exit(NO_DATA, f"{path}: {reason}")
        with numpy.load(path, allow_pickle=False) as file:
            return {name: numpy.asarray(file[name]) for name in NAMES if name in file}
    except FileNotFoundError:
        raise Exit(NO_DATA, f"{path}: no such file; give --data with the path where it lies now") from None
    except OSError as error:
        raise Exit(NO_DATA, f"{path} cannot be read: {error.strerror or error}") from None
    except (Exit, MemoryError):
        raise
    except Exception as error:  # a damaged archive can raise anything
        why = cache.first_line(error)
        if "pickle" in why:  # numpy's advice to load them nevertheless is none
            why = "its arrays, if it has any, hold Python objects, and not only numbers"
        raise Exit(NO_DATA, f"{path} is damaged, or no .npz file: {why}") from None


def hub_file(name: str, cache_dir: Path) -> Path:
    """Where a data set of the hub is kept, decoded."""
    return cache.decoded_path(cache_dir, "hub-" + name.replace("/", "--"))


def _of_hub(name: str, cache_dir: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """The arrays of a data set of the hub: from our decoded cache, the `datasets` cache, or a download."""
    path = hub_file(name, cache_dir)
    if (content := cache.kept(path, warn)) is not None:
        return {part: content[part].numpy() for part in NAMES if part in content}
    passed_over: list[str] = []
    if (found := _splits_in_cache(name, cache_dir, passed_over.append)) is None:
        for text in passed_over:
            warn(text)
        found = _downloaded(name, cache_dir, again=bool(passed_over))
    arrays = {}
    test = next((split for split in ("test", "validation") if split in found), None)
    for prefix, split in (("", "train"), ("test_", test)):
        if split is None:
            continue
        if split not in found:
            raise Exit(NO_DATA, f"{HUB}{name} has no split of the name train, but {', '.join(found)}")
        arrays |= {f"{prefix}{part}": array for part, array in _decoded(found[split], name).items()}
    _check(arrays, f"{HUB}{name}")
    cache.keep(path, arrays, warn)
    return arrays


def _splits_in_cache(name: str, cache_dir: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """{split: data set} as the `datasets` library left them, without asking the network; None if it did not."""
    from datasets.naming import camelcase_to_snakecase

    owner, title = name.split("/")
    short = camelcase_to_snakecase(title)
    trains = cache.finished(cache_dir, f"{owner}___{short}/*/*/*/{short}-train.arrow")
    if not trains:
        return None
    if len({path.parents[2] for path in trains}) > 1:
        raise Exit(
            NO_DATA, f"{cache_dir} holds several configurations of {name}: save the one you mean as an .npz file"
        )
    from datasets import Dataset

    folder = trains[0].parent
    try:
        files = sorted(folder.glob(f"{short}-*.arrow"))
        return {file.stem.removeprefix(f"{short}-"): Dataset.from_file(str(file)) for file in files}
    except Exception as error:  # a damaged file: whatever arrow and the library raise
        warn(f"passing over {folder}: {cache.first_line(error)}")
        return None


def _downloaded(name: str, cache_dir: Path, again: bool) -> Any:
    """again: what is in the cache is no good."""
    if not cache.hub_answers():
        fetch = f"python -m common.data --data {HUB}{name} --cache-dir {lasting_cache(cache_dir).resolve()}"
        raise Exit(
            NO_DATA,
            f"{name} is not in {cache_dir} and the Hugging Face hub cannot be reached; "
            f"run `{fetch}` in the repository where there is internet",
        )
    from datasets import load_dataset

    try:
        return load_dataset(name, cache_dir=str(cache_dir), download_mode="force_redownload" if again else None)
    except Exception as error:  # the library raises whatever its many layers raise
        raise Exit(NO_DATA, f"downloading {name} failed: {cache.first_line(error)}") from None


def _decoded(dataset: Any, name: str) -> dict[str, numpy.ndarray]:
    """{"images", "labels"} of a split. Raises Exit(NO_DATA) if it has no such columns, or pictures of several sizes."""
    from datasets import ClassLabel, Image

    features = dataset.features
    pictures = [column for column, kind in features.items() if isinstance(kind, Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    labels = labels or [column for column in ("label", "labels") if column in features]
    for what, columns in (("images", pictures), ("labels", labels)):
        if len(columns) != 1:
            found = ", ".join(features)
            raise Exit(NO_DATA, f"{HUB}{name} has {len(columns) or 'no'} columns of {what}; its columns are {found}")
    try:
        return {
            "images": cache.pictures_in(dataset, pictures[0]),
            "labels": dataset.data.column(labels[0]).to_numpy().copy(),
        }
    except Exception as error:  # pictures of several sizes, or damaged ones
        raise Exit(NO_DATA, f"{HUB}{name} cannot be decoded: {cache.first_line(error)}") from None
