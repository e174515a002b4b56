"""Devices, seeds and the output tree."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.error_codes import BAD_OUTPUT, NO_DEVICE, OUT_OF_MEMORY, Exit
from common.ranks import ALONE, Identity
from common.slurm import STOP_SIGNALS

if TYPE_CHECKING:
    import torch

SHARED_MEMORY = "/dev/shm"
OUTPUT_FOLDERS = ("checkpoints", "samples", "runs", "logs")


def get_device(name: str | torch.device | None = None, me: Identity = ALONE) -> torch.device:
    """The device called `name` ("cuda", "cuda:1", "mps", "cpu"), or (None, "none") the best: CUDA, then MPS, then CPU.

    Of several processes on one machine (`me` is one of them) each gets a CUDA device of its own.
    Raises Exit(NO_DEVICE) if a named device does not exist; a wish is never quietly replaced by the CPU.
    """
    import torch

    name = None if name is None else str(name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name is None or name.lower() == "none":
        name = "cuda" if gpus else "mps" if mps else "cpu"
    if name == "cuda" and me.size > 1 and gpus:
        if gpus < me.local_size and not (gpus == 1 and "SLURM_PROCID" in os.environ):  # Slurm may show each its own
            raise Exit(
                NO_DEVICE, f"{me.local_size} processes on a machine with {gpus} CUDA devices: start one for each"
            )
        return torch.device("cuda", me.local % gpus)  # that no other has it too is seen to by `ranks.joined`
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Exit(NO_DEVICE, f"--device {name}: no such kind of device; use cuda, cuda:N, mps or cpu") from None
    if device.type not in ("cuda", "mps", "cpu"):
        raise Exit(NO_DEVICE, f"--device {name}: only cuda, mps and cpu are supported")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise Exit(NO_DEVICE, f"--device {name}: this machine offers {gpus} CUDA device(s); use --device cpu")
    if device.type == "cuda" and device.index is not None and me.local_size > 1:
        raise Exit(NO_DEVICE, f"--device {name}: several processes need a device each; use --device cuda, or cpu")
    if device.type == "mps" and not mps:
        raise Exit(NO_DEVICE, f"--device {name}: MPS is not available here; use --device cpu")
    return device


def no_room(why: str) -> Exit:
    """What ends a run whose DataLoader workers cannot go on."""
    advice = "drop the flag, or make more room there"
    place = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else "shared memory"  # macOS has no folder for it
    return Exit(OUT_OF_MEMORY, f"--num-workers: workers pass batches through {place}, and {why}; {advice}")


def check_shared_memory(workers: int) -> None:
    """Raises Exit(OUT_OF_MEMORY) where there is no room even for the queues of so many DataLoader workers.

    Too little room for batches is found out by the first worker that has one to pass: see `memory_in_one_line`.
    """
    try:
        disk = shutil.disk_usage(SHARED_MEMORY)
    except OSError:  # macOS has no such folder
        return
    if workers and disk.total and disk.free < 2**15 * (workers + 2):  # a total of 0: no limit
        raise no_room(f"only {disk.free // 1024} kB are free")


WORKER_DIED = "DataLoader worker (pid"


@contextmanager
def _quiet_about_workers() -> Iterator[None]:
    """torch's signal handler raises wherever it interrupts; in a destructor Python prints that, and goes on.

    Nothing is lost: the DataLoader finds its dead worker again.
    """
    show = sys.unraisablehook
    sys.unraisablehook = lambda fault: None if WORKER_DIED in str(fault.exc_value) else show(fault)
    try:
        yield
    finally:
        sys.unraisablehook = show


@contextmanager
def memory_in_one_line(advice: str) -> Iterator[None]:
    """Running out of memory within becomes Exit(OUT_OF_MEMORY): the device's and the computer's with `advice`.

    So does a DataLoader's worker that finds no room in shared memory for its batch, or that dies of it.
    """
    try:
        with _quiet_about_workers():
            yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if "shared memory" in text or WORKER_DIED in text:
            raise no_room("too little of it is left, or a worker was killed") from None
        if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text.lower():
            raise Exit(OUT_OF_MEMORY, f"out of memory: {advice}") from None
        raise


def move(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """`tensor` on the device `where`: to CUDA by way of pinned memory, so that nobody waits for the copy.

    Only there: MPS may read the memory after it was freed.
    """
    if where.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(where, non_blocking=True)
    return tensor.to(where)


def seed_everything(seed: int = 42) -> None:
    """Seed torch (all devices), numpy and random, in [0, 2**32), and keep cuDNN to kernels that repeat exactly."""
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


def make_output_directories(outdir: str | Path, advice: str = "choose another --outdir") -> dict[str, Path]:
    """Create `outdir`/{checkpoints,samples,runs,logs}; returns them by name.

    Raises Exit(BAD_OUTPUT), with `advice`, if a folder cannot be made or written to.
    """
    folders = {name: Path(outdir) / name for name in OUTPUT_FOLDERS}
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:  # os.access says yes to root, even on a read-only disk
                probe.write(b"x")
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or outdir})"
        raise Exit(BAD_OUTPUT, f"cannot write to output folder {outdir}: {reason}; {advice}") from None
    return folders
