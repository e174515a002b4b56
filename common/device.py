"""Devices, seeds and the output tree."""

from __future__ import annotations

import random
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from common.error_codes import BAD_OUTPUT, NO_DEVICE, Exit
from common.slurm import STOP_SIGNALS

if TYPE_CHECKING:
    import torch

OUTPUT_FOLDERS = ("checkpoints", "samples", "runs", "logs")


def get_device(name: str | None = None) -> torch.device:
    """The device called `name` ("cuda", "cuda:1", "mps", "cpu"), or the best there is: CUDA, then MPS, then CPU.

    Raises Exit(NO_DEVICE) if a named device does not exist; a wish is never quietly replaced by the CPU.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name is None:
        return torch.device("cuda" if gpus else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Exit(NO_DEVICE, f"--device {name}: no such kind of device; use cuda, cuda:N, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise Exit(NO_DEVICE, f"--device {name}: only cuda, mps and cpu are supported")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise Exit(NO_DEVICE, f"--device {name}: this machine offers {gpus} CUDA device(s); use --device cpu")
    if device.type == "mps" and not mps:
        raise Exit(NO_DEVICE, f"--device {name}: MPS is not available here; use --device cpu")
    return device


def move(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """`tensor` on the device `where`: to CUDA by way of pinned memory, so that nobody waits for the copy.

    Only there: MPS may read the memory after it was freed.
    """
    if where.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(where, non_blocking=True)
    return tensor.to(where)


def seed_everything(seed: int = 42) -> None:
    """Seed torch (all devices), numpy and random, and keep cuDNN to kernels that repeat exactly. seed: in [0, 2**32)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


set_seed = seed_everything


def seed_worker(_worker_id: int) -> None:
    """DataLoader `worker_init_fn`: seed numpy and random as torch seeded this worker, and leave signals to the parent.

    A stop signal often goes to the whole process group; workers that died of it would take the batch being made with
    them before the parent could save.
    """
    import numpy
    import torch

    seed = torch.initial_seed() % 2**32
    random.seed(seed)
    numpy.random.seed(seed)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_output_directories(outdir: str | Path) -> dict[str, Path]:
    """Create `outdir`/{checkpoints,samples,runs,logs}; returns them by name.

    Raises Exit(BAD_OUTPUT) if a folder cannot be made or written to.
    """
    folders = {name: Path(outdir) / name for name in OUTPUT_FOLDERS}
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:  # os.access says yes to root, even on a read-only disk
                probe.write(b"x")
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or outdir})"
        raise Exit(BAD_OUTPUT, f"cannot write to output folder {outdir}: {reason}; choose another --outdir") from None
    return folders
