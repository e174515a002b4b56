"""The digit classifier that judges generated digits: trained on first use, cached with the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from common.ckpt import UnreadableCheckpoint, read_file, weights_digest
from common.data import HF_MNIST
from common.files import alone_in, atomic_write
from common.flags import is_own
from common.rng import generator
from common.slurm import lasting_cache

NUM_FEATURES = 96
VERSION = 2  # raise it with any change to the network or its training: figures of other versions do not compare


class DigitClassifier(nn.Module):
    """(B, 1, 28, 28) images in [0, 1] -> (B, 10) logits; `features` (B, 96) is the layer before.

    Strided convolutions keep it cheap, about 4 MFLOP an image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *self._conv(1, 16, kernel=5, stride=2),  # (B, 16, 14, 14)
            *self._conv(16, 48, kernel=3, stride=2),  # (B, 48, 7, 7)
            *self._conv(48, 64, kernel=3, stride=1),  # (B, 64, 7, 7)
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, NUM_FEATURES, bias=False),
            nn.BatchNorm1d(NUM_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, 10)

    @staticmethod
    def _conv(few: int, many: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
        conv = nn.Conv2d(few, many, kernel, stride=stride, padding=kernel // 2, bias=False)
        return conv, nn.BatchNorm2d(many), nn.ReLU()

    def reset(self, rng: torch.Generator) -> None:
        """Draw the initial weights from `rng`."""
        for module in self.body:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
        nn.init.normal_(self.head.weight, std=NUM_FEATURES**-0.5, generator=rng)
        nn.init.zeros_(self.head.bias)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, 28, 28) -> (B, 96)."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))  # (B, 10)


def random_affine(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Rotate (10 degrees), scale (10 %), shear and shift (1.5 pixels) every image by its own random amounts.

    (B, 1, 28, 28) in [0, 1] -> the same shape and range; outside the image is black.
    """

    def uniform(limit: float) -> torch.Tensor:
        return (2 * torch.rand(len(images), generator=rng) - 1) * limit  # (B,)

    angle, scale, shear = uniform(0.17), 1 + uniform(0.1), uniform(0.1)
    shift_x, shift_y = uniform(1.5 / 14), uniform(1.5 / 14)  # in half widths, as affine_grid counts
    cos, sin = scale * angle.cos(), scale * angle.sin()
    top = torch.stack([cos, shear - sin, shift_x], dim=1)  # (B, 3)
    bottom = torch.stack([sin, cos, shift_y], dim=1)  # (B, 3)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), images.shape, align_corners=False)  # (B, 28, 28, 2)
    return F.grid_sample(images, grid, align_corners=False)  # (B, 1, 28, 28)


def train_classifier(
    digits: Any,
    seed: int = 0,
    *,
    epochs: int = 5,
    min_steps: int = 600,
    batch_size: int = 250,
    peak_lr: float = 5e-3,
    progress: Callable[[str], None] = lambda _: None,
    poll: Callable[[], object] = lambda: None,
) -> DigitClassifier:
    """Train on `digits`; a small data set gets more epochs, to make `min_steps`. A function of (digits, seed).

    digits: any data set that a tensor of rows indexes, giving (images (B, 1, 28, 28) in [0, 1], labels (B,)).
    progress is told how it goes; poll is called between steps, and may raise to stop.
    """
    rng = generator(seed, "classifier")
    with torch.random.fork_rng(devices=[]):
        net = DigitClassifier().to(memory_format=torch.channels_last).train()
    net.reset(rng)
    optimizer = torch.optim.AdamW(net.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.05, fused=True)
    batches = max(len(digits) // batch_size, 1)
    epochs = max(epochs, math.ceil(min_steps / batches))
    total = epochs * batches
    for epoch in range(epochs):
        order = torch.randperm(len(digits), generator=rng)
        for number, rows in enumerate(order[: batches * batch_size].split(batch_size)):
            step = epoch * batches + number
            optimizer.param_groups[0]["lr"] = peak_lr * min((step + 1) / (0.2 * total), (total - step) / (0.8 * total))
            images, labels = digits[rows]
            loss = F.cross_entropy(net(random_affine(images, rng)), labels, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            poll()
            if step % 100 == 99:
                progress(f"classifier: step {step + 1}/{total}, loss {loss.item():.3f}")
    return net.eval().requires_grad_(False)


def load_classifier(
    cache_dir: str | Path,
    source: str,
    progress: Callable[[str], None] = lambda _: None,
    poll: Callable[[], object] = lambda: None,
) -> tuple[DigitClassifier, float]:
    """(the classifier in eval mode, its accuracy on the test digits): from the cache, else trained and cached.

    In a job whose `cache_dir` ends with it, kept where the next job finds it: see `lasting_cache`.
    source: of the digits it is trained on (see `HF_MNIST`), "hub" or "embedded", or other data, for which it is kept
    by what they are. progress, poll: see `train_classifier`.
    """
    path = _path(cache_dir, source)
    if (kept := _kept(path)) is not None:
        return kept
    progress("training the digit classifier that judges the images, once")
    net = train_classifier(HF_MNIST("train", cache_dir, source=source), progress=progress, poll=poll)
    test = HF_MNIST("test", cache_dir, source=source)
    _, probabilities = judge(net, test[torch.arange(len(test))][0])
    accuracy = (probabilities.argmax(1) == test.labels).float().mean().item()
    content = {"model": net.state_dict(), "accuracy": accuracy}
    with alone_in(path.parent):
        if (kept := _kept(path)) is not None:  # of several jobs that train one at once, all use the first
            return kept
        try:
            atomic_write(path, lambda file: torch.save(content, file))
        except OSError as error:
            progress(f"the classifier cannot be kept in {path.parent} ({error.strerror or error})")
    return net, accuracy


def kept_classifier(cache_dir: str | Path, source: str) -> tuple[DigitClassifier, float] | None:
    """What `load_classifier` returns, if it need not be trained; else None."""
    return _kept(_path(cache_dir, source))


def _path(cache_dir: str | Path, source: str) -> Path:
    key = HF_MNIST("test", cache_dir, source=source).fingerprint if is_own(source) else source
    return lasting_cache(cache_dir) / "decoded" / f"classifier-{key}-v{VERSION}.pt"


def _kept(path: Path) -> tuple[DigitClassifier, float] | None:
    """What `load_classifier` returns, from its file; None if that is missing or damaged."""
    net = DigitClassifier()
    try:
        content = read_file(path)
        net.load_state_dict(content["model"])
        return net.eval().requires_grad_(False), content["accuracy"]
    except (UnreadableCheckpoint, KeyError, TypeError, RuntimeError):
        return None


def fingerprint(net: DigitClassifier) -> str:
    """Of all weights: figures of classifiers that differ in it do not compare."""
    return weights_digest(net.state_dict())


@torch.no_grad()
def judge(net: DigitClassifier, images: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """(features (N, 96), class probabilities (N, 10)) of images (N, 1, 28, 28) in [0, 1]."""
    features = torch.cat([net.features(part) for part in images.split(batch_size)])
    return features, net.head(features).softmax(dim=1)
