"""Pictures: grids of images in one PNG, animations, and whether they can be written where the user wants them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.ckpt import atomic_write
from common.error_codes import BAD_OUTPUT, Exit

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

PADDING = 2


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def make_image_grid(images: torch.Tensor, nrow: int | None = None, scale: int = 1) -> torch.Tensor:
    """(N, C, H, W) in [0, 1] -> one (3, H', W') grid with `nrow` images a row (default: ceil(sqrt(N))).

    scale: width and height of a pixel in the grid.
    """
    from torchvision.utils import make_grid

    large = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)  # (N, C, scale * H, scale * W)
    return make_grid(large, nrow=nrow or _columns(len(images)), padding=PADDING * scale)


def save_image_grid(images: torch.Tensor, path: str | Path, nrow: int | None = None, scale: int = 1) -> None:
    """Write (N, C, H, W) images in [0, 1] as one PNG, a `make_image_grid`. Raises OSError if it cannot."""
    from torchvision.utils import save_image

    grid = make_image_grid(images, nrow, scale)
    atomic_write(path, lambda file: save_image(grid, file, padding=0, format="PNG"))


def picture(images: torch.Tensor, nrow: int | None = None, scale: int = 2) -> Image:
    """(N, 1, H, W) or (1, H, W) images in [0, 1] as one picture, which a notebook shows: see `make_image_grid`."""
    from PIL import Image

    grid = make_image_grid(images if images.ndim == 4 else images[None], nrow, scale)
    return Image.fromarray(to_bytes(grid[0]).cpu().numpy())


def over(originals: torch.Tensor, reconstructions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(images, images a row): rows of originals, each above the row of its reconstructions; all (N, C, H, W)."""
    import torch

    nrow = _columns(2 * len(originals))
    blanks = originals.new_zeros(-len(originals) % nrow, *originals.shape[1:])
    rows = [torch.cat([part, blanks]).unflatten(0, (-1, nrow)) for part in (originals, reconstructions)]
    return torch.stack(rows, dim=1).flatten(0, 2), nrow


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """(..., H, W) in [0, 1] -> uint8, rounded as torchvision's save_image does."""
    import torch

    return images.mul(255).add(0.5).clamp(0, 255).to(torch.uint8)


def save_gif(frames: list[torch.Tensor], path: Path, *, seconds: float = 0.1, last: float = 1.5) -> None:
    """Write grids (3, H, W) in [0, 1] as an endless animation, twice their size; the last one stays longer.

    Raises OSError if it cannot be written.
    """
    from PIL import Image

    pictures = [Image.fromarray(to_bytes(frame[0]).numpy()) for frame in frames]
    pictures = [
        picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST) for picture in pictures
    ]
    durations = [1000 * seconds] * (len(pictures) - 1) + [1000 * last]
    options = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    options["optimize"] = False  # it would shift the greys of a frame that lacks some of the first one's
    atomic_write(path, lambda file: pictures[0].save(file, format="GIF", **options))


def check_output(path: str | Path, suffix: str) -> Path:
    """A file that the user named, before work is spent on it. Raises Exit(BAD_OUTPUT) if it could not be written."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise Exit(BAD_OUTPUT, f"{path}: give a name that ends in {suffix}")
    if path.is_dir():
        raise Exit(BAD_OUTPUT, f"cannot write {path}: it is a folder")
    with one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


def save_output(images: torch.Tensor, path: str | Path, nrow: int | None = None, scale: int = 1) -> None:
    """`save_image_grid` for a file that the user named. Raises Exit(BAD_OUTPUT) if it cannot be written."""
    with one_line(check_output(path, ".png")):
        save_image_grid(images, path, nrow, scale)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """An OSError within becomes Exit(BAD_OUTPUT), in one line."""
    try:
        yield
    except OSError as error:
        raise Exit(BAD_OUTPUT, f"cannot write {path}: {error.strerror or error}") from None
