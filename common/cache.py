"""What both kinds of data share: our own cache of decoded pictures, that of the `datasets` library, and the hub."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.ckpt import UnreadableCheckpoint, read_file
from common.files import atomic_write
from common.flags import MNIST_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy
    import torch

_HUB_PATIENCE = 5.0  # seconds to find out whether the hub can be reached at all


def first_line(error: Exception) -> str:
    """What another library's error says, in one line."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return kind + next(iter(str(error).splitlines()), "no reason given")


# --- our own cache ----------------------------------------------------------------------------------------------------


def decoded_path(cache_dir: Path, name: str) -> Path:
    """Where decoded pictures of this name are kept."""
    return cache_dir / "decoded" / f"{name}.pt"


def kept(path: Path, warn: Callable[[str], None]) -> dict[str, torch.Tensor] | None:
    """The tensors that `keep` wrote there, `images` and `labels` among them.

    None if nothing did, or it is damaged: then it is made anew.
    """
    import torch

    try:
        content = read_file(path)
    except UnreadableCheckpoint as error:
        if not error.gone:
            warn(f"passing over {error}")
        return None
    whole = isinstance(content, dict) and {"images", "labels"} <= content.keys()
    if whole and all(isinstance(value, torch.Tensor) for value in content.values()):
        return content
    warn(f"passing over {path}: it holds no decoded digits")
    return None


def keep(path: Path, arrays: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Write decoded arrays or tensors to a cache; one that cannot be written to only costs time."""
    import torch

    content = {name: torch.as_tensor(array) for name, array in arrays.items()}
    try:
        atomic_write(path, lambda file: torch.save(content, file))
    except OSError as error:
        warn(
            f"cannot keep the decoded digits in {path.parents[1]} ({error.strerror or error}); decoding them each time"
        )


# --- the library's, and the hub ---------------------------------------------------------------------------------------


def finished(cache_dir: Path, pattern: str) -> list[Path]:
    """The files of this pattern that the `datasets` library has finished with, the newest first.

    While it prepares a data set, and for ever if it is killed then, some splits lie in a folder HASH.incomplete.
    """
    found = []
    for path in cache_dir.glob(pattern):
        with suppress(OSError):  # gone since
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True) if path.parent.suffix != ".incomplete"]


def pictures_in(dataset: Any, column: str) -> numpy.ndarray:
    """PNG bytes to one array, once: 60,000 digits take about 3 s, and every later start reads the cached tensor."""
    import io

    import numpy
    from PIL import Image

    pictures = dataset.data.column(column).to_pylist()
    images = [Image.open(io.BytesIO(picture["bytes"])) for picture in pictures]
    # of a palette's pictures the pixels are only its indices
    return numpy.stack([numpy.asarray(image.convert("RGB") if image.mode == "P" else image) for image in images])


def hub_answers() -> bool:
    """Ask the hub once, briefly: the library itself would retry for half a minute before it gave up."""
    if any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    ):
        return False
    import ssl
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers = []

    def ask() -> None:
        try:
            request = Request(f"{endpoint}/api/datasets/{MNIST_NAME}", headers={"User-Agent": "ddpm-mnist"})
            with urlopen(request, timeout=_HUB_PATIENCE) as reply:
                answers.append(reply.status)
        except (OSError, ValueError, HTTPException) as error:  # a proxy may answer anything
            # the library brings certificates of its own
            if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                answers.append(None)

    thread = threading.Thread(target=ask, daemon=True)  # a name server that hangs ignores urlopen's timeout
    thread.start()
    thread.join(_HUB_PATIENCE)
    return bool(answers)
