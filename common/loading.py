"""Trained networks for notebooks and other programs: `load` a checkpoint, then draw, encode or decode.

Whatever is wrong (a path, a label, a flag) is a ValueError of one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ckpt
from common.device import get_device
from common.error_codes import Exit
from common.flags import (
    DEFAULT_GUIDANCE,
    DEFAULT_GUIDE_SCALE,
    DEFAULT_RESAMPLE,
    DEFAULT_STRENGTH,
    LARGEST_GUIDANCE,
    why_not_drawn,
)

CLASSES = 10

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import nn

    from common.sampling import Watch


class Loaded:
    """What a checkpoint says of itself: run's name, epoch, path, kind of model, and all flags of its training."""

    def __init__(self, path: Path, state: ckpt.State) -> None:
        self.path = path
        self.name: str = state["exp_name"]
        self.epoch: int = state["epoch"]
        self.flags: dict[str, Any] = state["args"]
        self.model = ckpt.infer_model_from_checkpoint(state)  # "ae-mlp", "ae-conv", "lddpm" or "ddpm"

    def __repr__(self) -> str:
        return f"<{self.model}: {self.name}, epoch {self.epoch}>"


class Diffusion(Loaded):
    """A trained diffusion model, of pixels or of latents; `autoencoder` is the one of its latents, else None.

    `guide` is the file of the checkpoint that guides it, or None. `drawer` is what `load_for_drawing` of its experiment
    returns: see `common.sampling.draw`.
    """

    def __init__(
        self,
        path: Path,
        state: ckpt.State,
        draw: Callable[..., torch.Tensor],
        autoencoder: Autoencoder | None = None,
        guide: str | None = None,
    ) -> None:
        super().__init__(path, state)
        self.drawer, self.autoencoder, self.guide = draw, autoencoder, guide

    def draw(
        self,
        labels: int | Sequence[int] | numpy.ndarray | torch.Tensor | None = None,
        *,
        count: int | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide_scale: float | None = None,
        seed: int = 42,
        sampler: str = "ddpm",
        steps: int | None = None,
        callback: Callable[[int, torch.Tensor], None] | None = None,
        watch: Watch | None = None,
        from_image: numpy.ndarray | torch.Tensor | None = None,
        strength: float | None = None,
        inpaint: numpy.ndarray | torch.Tensor | None = None,
        resample: int | None = None,
    ) -> torch.Tensor:
        """Draw digits: (N, 1, 28, 28) float32 in [0, 1], on the CPU.

        labels: the digit of each image, as a list, an array or a tensor (N,) of 0 to 9; one number means `count` images
        (default: 16) of it, None `count` images of digits drawn from the training data's class shares. guidance: as
        --guidance (default: as infer.py's), of the labels that it draws; guidance_interval, and guide_scale of a model
        that was loaded with a guide: as the flags of these names. sampler, steps: see `common.sampling.reverse_steps`;
        callback: see `common.sampling.sample`; watch: see `common.sampling.draw`. The same seed draws the same images.

        from_image: an image (28, 28) to begin with, or several (K, 1, 28, 28), each for an equal run of those drawn;
        without labels the network is then not told any, but for one that learned a single digit. strength: how much of
        it is drawn over, up to 1, all of it (default: as --strength). inpaint: a mask of the same shape; what is 1 or
        True there is drawn anew, the rest is kept exactly (models of pixels only), in `resample` passes (default: as
        --resample).
        Raises ValueError for what cannot be drawn.
        """
        from common.drawing import wanted_labels
        from common.sampling import as_labels

        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise ValueError(f"count must be a whole number of at least 1, not {count}")
        asked, count = count, 16 if count is None else int(count)
        if not isinstance(seed, Integral):
            raise ValueError(f"seed must be a whole number, not {seed!r}")
        labelled = self.flags.get("labelled", True)
        if guidance is None:
            guidance = DEFAULT_GUIDANCE if labels is not None and labelled else 1.0
        only = self.flags["only_digit"]
        if labels is None:
            labels = wanted_labels(None if from_image is None or only is not None else [], count, seed, self.flags)
        else:
            if getattr(labels, "ndim", None) == 0:  # a number in a tensor or an array
                labels = labels.item()
            labels = as_labels([labels] * count if isinstance(labels, Integral) else labels, CLASSES - 1)
            if asked not in (None, len(labels)):
                raise ValueError(f"these are {len(labels)} labels, one for each image: count cannot be {asked}")
            if complaint := why_not_drawn(labels, self.flags, "labels"):
                raise ValueError(complaint)
        guided_by = DEFAULT_GUIDE_SCALE if guide_scale is None else guide_scale
        for name, scale in (("guidance", guidance), ("guide_scale", guided_by)):
            if not isinstance(scale, Real) or not 0 <= scale <= LARGEST_GUIDANCE:
                raise ValueError(f"{name} must be a number from 0 to {LARGEST_GUIDANCE:g}, not {scale}")
        if guide_scale is not None and self.guide is None:
            raise ValueError("guide_scale says how far to move away from a guide: load the run with one")
        if guidance != 1 and (labels is None or not labelled):
            raise ValueError(f"guidance {guidance} has an effect only on labels, and none are drawn")
        if guidance == 1 and guidance_interval is not None:
            raise ValueError("guidance_interval says where guidance acts: give a guidance other than 1 too")
        how = {"guidance": guidance, "guidance_interval": guidance_interval, "guide_scale": guided_by}
        how |= {"seed": seed, "sampler": sampler, "steps": steps}
        how |= {"callback": callback, "watch": watch}
        if from_image is not None and strength is None:
            strength = DEFAULT_STRENGTH[self.model] if inpaint is None else 1.0
        how |= {"from_image": from_image, "strength": 1.0 if strength is None else strength, "inpaint": inpaint}
        how["resample"] = (1 if inpaint is None else DEFAULT_RESAMPLE) if resample is None else resample
        images = self.drawer(labels=labels, count=count, **how).cpu()
        if not images.isfinite().all():
            smaller = "a smaller guidance or guide_scale, or " if guidance > 1 or self.guide else ""
            raise ValueError(f"the images are not finite numbers: choose {smaller}an earlier checkpoint")
        return images


class Autoencoder(Loaded):
    """A trained autoencoder; `net` is the module, frozen."""

    def __init__(self, path: Path, state: ckpt.State, net: nn.Module, device: torch.device) -> None:
        super().__init__(path, state)
        self.net, self.device = net, device

    def encode(self, images: numpy.ndarray | torch.Tensor) -> torch.Tensor:
        """Images in [0, 1], (N, 1, 28, 28), (N, 28, 28) or one (28, 28) -> (N, D) latents, on the CPU.

        Raises ValueError for anything else.
        """
        from common.sampling import as_images

        return self.net.encode(as_images(images, "images").to(self.device)).cpu()

    def decode(self, latents: numpy.ndarray | torch.Tensor) -> torch.Tensor:
        """(N, D) latents -> (N, 1, 28, 28) images in [0, 1], on the CPU. Raises ValueError for another shape."""
        from common.sampling import as_floats

        rows = as_floats(latents)
        if rows.shape[1:] != (self.flags["latent_dim"],):
            raise ValueError(f"latents must be of shape (N, {self.flags['latent_dim']}), not {tuple(rows.shape)}")
        return self.net.decode(rows.to(self.device)).cpu()


@contextmanager
def _one_line():
    """An Exit, which ends a script, becomes a ValueError, which a program can handle."""
    try:
        yield
    except Exit as end:
        raise ValueError(str(end)) from None


def _path(given: str | Path) -> Path:
    if given == "":  # which pathlib takes for the current folder
        raise ValueError("'' names no checkpoint")
    try:
        return Path(given).expanduser()
    except (TypeError, RuntimeError):  # no path at all, or of a user that there is not
        raise ValueError(f"{given!r} names no checkpoint") from None


def load(
    path: str | Path, device: str | torch.device | None = None, *, guide: str | Path | None = None
) -> Diffusion | Autoencoder:
    """The trained network of a checkpoint file, a run's folder (its newest), RUN/best, or a folder of runs (newest).

    device: "cpu", "cuda", "cuda:1" or "mps" (default: the best there is). guide: as --guide, for a diffusion model.
    Raises ValueError if there is no such file or device, or a file cannot be read, or the guide does not fit.
    """
    from common.modules import module_of

    with _one_line():
        where = get_device(device)
        say = partial(warnings.warn, stacklevel=5)  # of damaged files that are passed over
        read = ckpt.read_model(_path(path), ckpt.MODEL_TYPES, say)
        model = ckpt.infer_model_from_checkpoint(read[1])
        if model.startswith("ae-"):
            if guide is not None:
                raise ValueError(f"{read[0]} holds an autoencoder: it draws nothing that could be guided")
            return _autoencoder(*read, where)
        guide = None if guide is None else ckpt.very_file(ckpt.read_model(_path(guide), (model,), say)[0])
        inner = _autoencoder(read[0], read[1]["ae_ckpt_data"], where) if model == "lddpm" else None
        return Diffusion(*read, module_of(model).load_for_drawing(read, where, guide=guide)[0], inner, guide)


def _autoencoder(path: Path, state: ckpt.State, where: torch.device) -> Autoencoder:
    from common.autoencoder import build_autoencoder

    return Autoencoder(path, state, build_autoencoder(state, where), where)
