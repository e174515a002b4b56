"""Pictures: grids of images in one PNG, animations, and whether they can be written where the user wants them."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from common.error_codes import BAD_IMAGE, BAD_OUTPUT, Exit
from common.files import atomic_write, no_file

if TYPE_CHECKING:
    import numpy
    import torch
    from PIL.Image import Image

PADDING = 2
SIDE = 28


def _columns(count: int) -> int:
    """How many images stand in a row of a grid of so many."""
    return math.ceil(math.sqrt(count))


def make_image_grid(images: torch.Tensor, nrow: int | None = None, scale: int = 1) -> torch.Tensor:
    """(N, C, H, W) in [0, 1] -> one (3, H', W') grid with `nrow` images a row (default: ceil(sqrt(N))).

    scale: width and height of a pixel in the grid.
    """
    from torchvision.utils import make_grid

    large = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)  # (N, C, scale * H, scale * W)
    return make_grid(large, nrow=nrow or _columns(len(images)), padding=PADDING * scale)


def save_image_grid(
    images: torch.Tensor, path: str | Path, nrow: int | None = None, scale: int = 1, names: list[str] | None = None
) -> None:
    """Write (N, C, H, W) images in [0, 1] as one PNG, a `make_image_grid`. Raises OSError if it cannot.

    names: of the rows, written to the left of them.
    """
    import torch
    from torchvision.utils import save_image

    grid = make_image_grid(images, nrow, scale)
    if names:
        grid = torch.cat([_margin(names, grid.shape[1], scale).to(grid), grid], dim=2)
    atomic_write(path, lambda file: save_image(grid, file, padding=0, format="PNG"))


def _margin(names: list[str], height: int, scale: int) -> torch.Tensor:
    """(3, height, W) in [0, 1]: the names of a grid's rows."""
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import to_tensor

    row, margin = (SIDE + PADDING) * scale, Image.new("L", (18 * scale, height))
    text, font = ImageDraw.Draw(margin), ImageFont.load_default(16 * scale)
    for number, name in enumerate(names):
        middle = (margin.width / 2, number * row + (row + PADDING * scale) / 2)
        text.text(middle, name, fill=160, font=font, anchor="mm")
    return to_tensor(margin).expand(3, -1, -1)


def picture(images: numpy.ndarray | torch.Tensor, nrow: int | None = None, scale: int = 2) -> Image:
    """Images in [0, 1], or uint8 ones as --save-npz keeps them, as one picture, which a notebook shows.

    images: (N, 1, H, W), (N, H, W), or a single one, (H, W). nrow, scale: see `make_image_grid`.
    Raises ValueError for what is no image.
    """
    from PIL import Image

    from common.sampling import as_floats

    if nrow is not None and not _is_size(nrow):
        raise ValueError(f"nrow must be a whole number of at least 1, not {nrow!r}")
    if not _is_size(scale):
        raise ValueError(f"scale must be a whole number of at least 1, not {scale!r}")
    some = images[0] if isinstance(images, list | tuple) and images else images
    most = 255 if str(getattr(some, "dtype", "")).endswith("uint8") else 1
    try:
        images = as_floats(images).detach() / most
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"images are numbers, or arrays or tensors of them ({error})") from None
    if not images.numel():
        raise ValueError("there are no images to show")
    if not (images.min() > -1e-3 and images.max() < 1 + 1e-3):
        raise ValueError("images must be from 0 (black) to 1, or of type uint8: clamp(0, 1) cuts off the rest")
    if images.ndim not in (2, 3, 4) or (images.ndim == 4 and images.shape[1] != 1):
        raise ValueError(f"images are (N, 1, H, W), (N, H, W) or (H, W), not {tuple(images.shape)}")
    grid = make_image_grid(images.reshape(-1, 1, *images.shape[-2:]), nrow, scale)
    return Image.fromarray(to_bytes(grid[0]).cpu().numpy())


def _is_size(value: object) -> bool:
    return isinstance(value, Integral) and value >= 1


def row_names(labels: list[int]) -> list[str]:
    """What stands in each row of a grid of images with these labels: "" where several digits do."""
    columns = _columns(len(labels)) or 1
    rows = [set(labels[start : start + columns]) for start in range(0, len(labels), columns)]
    return [str(*row) if len(row) == 1 else "" for row in rows]


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


def read_images(path: str | Path, mask: bool = False) -> tuple[torch.Tensor, tuple[int, int]]:
    """(images (K, 1, 28, 28) float32 in [0, 1], their width and height in the file) of a file that the user named.

    A picture in any format that Pillow reads is made grey and shrunk or enlarged to 28 x 28, with black beside it where
    it is no square. One of another size that is light at its edge is taken for ink on paper and inverted, as digits are
    white on black; not a mask. An .npz has (K, 28, 28) or (K, 1, 28, 28), uint8 or from 0 to 1, as `images` or as its
    only array. Raises Exit(BAD_IMAGE).
    """
    from PIL import Image

    path = Path(path)
    try:
        if reason := no_file(path):
            raise ValueError(reason)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a picture's ill-formed notes, for example
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # it would fill the memory
            return _arrays(path) if path.suffix.lower() == ".npz" else _picture(path, mask)
    except FileNotFoundError:
        raise Exit(BAD_IMAGE, f"{path}: no such file") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything; the reason goes to the user
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        raise Exit(BAD_IMAGE, f"{path} cannot be read as a picture, or as an .npz of images: {reason}") from None


def _arrays(path: Path) -> tuple[torch.Tensor, tuple[int, int]]:
    import numpy

    from common.sampling import as_images

    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise ValueError("it is no .npz file")
    with numpy.load(path, allow_pickle=False) as arrays:
        if "images" not in arrays and len(arrays.files) != 1:
            raise ValueError(f"it has no array named images, but {', '.join(arrays.files) or 'none at all'}")
        array = arrays["images" if "images" in arrays else arrays.files[0]]
    if not isinstance(array, numpy.ndarray):
        raise ValueError("what it holds is no array")
    if array.dtype.kind not in "buif":
        raise ValueError(f"its images are of type {array.dtype}")
    values = array.astype(numpy.float32) / 255 if array.dtype == numpy.uint8 else array
    return as_images(values, "its images"), (SIDE, SIDE)


def _picture(path: Path, mask: bool) -> tuple[torch.Tensor, tuple[int, int]]:
    import numpy
    import torch
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode[0] in "IF":  # numbers of 16 bits or more, which Pillow would cut off at 255
            values = numpy.asarray(picture, dtype=numpy.float64)
            if not numpy.isfinite(values).all():
                raise ValueError("not all of its numbers are finite")
            little = 1.01  # by which a picture that was enlarged or smoothed may overshoot
            white = next((most for most in (1, 255) if values.max() <= little * most), 65535)  # the file does not tell
            if values.min() < (1 - little) * white or values.max() > little * white:
                raise ValueError(f"its greys are from {values.min():g} to {values.max():g}; up to 65535 can be read")
            picture = Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(numpy.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            ink = numpy.asarray(picture.convert("L"), dtype=float)
            opacity = numpy.asarray(picture.getchannel("A"), dtype=float)
            light = (ink * opacity).sum() >= 127.5 * opacity.sum()  # what is drawn in white, or nothing, on black paper
            paper = Image.new("RGBA", picture.size, "black" if light else "white")
            picture = Image.alpha_composite(paper, picture)
        grey = picture.convert("L")
    levels = numpy.asarray(grey)
    edge = numpy.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    if not mask and grey.size != (SIDE, SIDE) and edge.mean() > 127.5:
        grey = ImageOps.invert(grey)
    fitted = ImageOps.pad(grey, (SIDE, SIDE), Image.Resampling.BOX)  # black around it
    return torch.from_numpy(numpy.array(fitted)).float().div_(255)[None, None], grey.size


def read_mask(path: str | Path, of: str | Path, size: tuple[int, int]) -> torch.Tensor:
    """(K, 1, 28, 28) in [0, 1], white for what is to be drawn anew, for pictures from `of` of this width and height.

    Raises Exit(BAD_IMAGE) if it cannot be read, is of another size, or has nothing white.
    """
    mask, own = read_images(path, mask=True)
    if own != size:
        here, there = ("{} x {}".format(*pair) for pair in (own, size))
        raise Exit(BAD_IMAGE, f"{path} is {here} pixels, but {of} is {there}: a mask has the size of its picture")
    if mask.max() <= 0.5:
        raise Exit(BAD_IMAGE, f"{path} has nothing white: what is white in a mask is drawn anew")
    return mask


def save_gif(frames: list[torch.Tensor], path: Path) -> None:
    """Write grids (3, H, W) in [0, 1] as an endless animation, 0.1 s each; the last one stays for 1.5 s.

    Raises OSError if it cannot be written.
    """
    from PIL import Image

    pictures = [Image.fromarray(to_bytes(frame[0]).numpy()) for frame in frames]
    durations = [100] * (len(pictures) - 1) + [1500]
    options = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    options["optimize"] = False  # it would shift the greys of a frame that lacks some of the first one's
    atomic_write(path, lambda file: pictures[0].save(file, format="GIF", **options))


def check_output(path: str | Path, suffix: str) -> Path:
    """A file that the user named, before work is spent on it. Raises Exit(BAD_OUTPUT) if it could not be written."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise Exit(BAD_OUTPUT, f"{path}: give a name that ends in {suffix}")
    with one_line(path):
        if path.is_dir():
            raise Exit(BAD_OUTPUT, f"cannot write {path}: it is a folder")
        with suppress(FileNotFoundError):
            path.stat()  # a name that is too long, a link that leads to itself
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path


def save_output(
    images: torch.Tensor, path: str | Path, nrow: int | None = None, scale: int = 1, names: list[str] | None = None
) -> None:
    """`save_image_grid` for a file that the user named. Raises Exit(BAD_OUTPUT) if it cannot be written."""
    with one_line(check_output(path, ".png")):
        save_image_grid(images, path, nrow, scale, names)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """An OSError within becomes Exit(BAD_OUTPUT), in one line."""
    try:
        yield
    except OSError as error:
        raise Exit(BAD_OUTPUT, f"cannot write {path}: {error.strerror or error}") from None
