"""Pictures: grids of images in one PNG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from common.ckpt import atomic_write
from common.error_codes import BAD_OUTPUT, Exit

if TYPE_CHECKING:
    import torch

PADDING = 2


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def make_image_grid(images: torch.Tensor, nrow: int | None = None) -> torch.Tensor:
    """(N, C, H, W) in [0, 1] -> one (3, H', W') grid with `nrow` images a row (default: ceil(sqrt(N)))."""
    from torchvision.utils import make_grid

    return make_grid(images, nrow=nrow or _columns(len(images)), padding=PADDING)


def save_image_grid(images: torch.Tensor, path: str | Path, nrow: int | None = None) -> None:
    """Write (N, C, H, W) images in [0, 1] as one PNG, pixel for pixel. Raises OSError if it cannot be written."""
    from torchvision.utils import save_image

    nrow = nrow or _columns(len(images))
    atomic_write(path, lambda file: save_image(images, file, nrow=nrow, padding=PADDING, format="PNG"))


def over(originals: torch.Tensor, reconstructions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(images, images a row): rows of originals, each above the row of its reconstructions; all (N, C, H, W)."""
    import torch

    nrow = _columns(2 * len(originals))
    blanks = originals.new_zeros(-len(originals) % nrow, *originals.shape[1:])
    rows = [torch.cat([part, blanks]).unflatten(0, (-1, nrow)) for part in (originals, reconstructions)]
    return torch.stack(rows, dim=1).flatten(0, 2), nrow


def save_output(images: torch.Tensor, path: str | Path, nrow: int | None = None) -> None:
    """`save_image_grid` for a file that the user named. Raises Exit(BAD_OUTPUT) if it cannot be written."""
    if Path(path).suffix.lower() != ".png":
        raise Exit(BAD_OUTPUT, f"{path}: the picture is a PNG; give a name that ends in .png")
    try:
        save_image_grid(images, path, nrow)
    except OSError as error:
        raise Exit(BAD_OUTPUT, f"cannot write {path}: {error.strerror or error}") from None
