"""How many threads to compute with: measured where and when the work is done.

Threads share each operation and wait for one another at its end. On an idle machine that is a gain; where something
else has one of the cores, all wait for the thread that is not running, and work can take fifty times as long.

The number is part of what makes bits repeat: the gradients of a convolution's weights and of LayerNorm's gain and
offset, means over more than 32,768 numbers, and on some processors matrix products, are summed in as many parts as
there are threads, and rounded accordingly. oneDNN has no mode that would cure the first. So a run keeps the number of
its first steps, and what comes before them (encoding digits, say) uses one thread at every start.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from common.args import AUTO
from common.console import warn
from common.ranks import identity

TRIAL_SECONDS = 0.12  # for each number of threads
WORTH = 1.05  # how much faster more threads must be
LOOK_SECONDS = 20.0  # for how long steps must have been slow
SLOW = 2.5  # times as long as they took before


@cache
def available() -> int:
    """The number of cores that this process may use: Slurm's share, or its part of the affinity mask, or of the limit.

    Asked before torch is imported: where OMP_PROC_BIND is set, its OpenMP then ties this thread to a single core.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, _limit(Path("/sys/fs/cgroup")))
    share = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if share.isdecimal() and int(share):
        return min(cores, int(share))
    return max(1, cores // identity().local_size)


def _limit(groups: Path) -> float:
    """As many cores' time a container may take (docker --cpus, Kubernetes' limits), rounded up; inf without a limit.

    More threads than that, each stopped for most of the time, would wait for one another.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # control groups of version 2, 1
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = " ".join((groups / name).read_text() for name in names).split()
            return max(1, math.ceil(int(quota) / int(period))) if quota not in ("max", "-1") else math.inf
    return math.inf


def prepare() -> int | None:
    """Begin with one thread; returns the number that OMP_NUM_THREADS asks for, None if it asks for none."""
    available()
    import torch

    _keep_freed_memory()
    torch.set_num_threads(1)
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(first), available()) if first.isdecimal() and int(first) else None


def use(count: int) -> None:
    """Compute with `count` threads, or with as many as there are cores."""
    import torch

    torch.set_num_threads(min(count, available()))


def fastest(work: Callable[[], object]) -> tuple[int, dict[int, float]]:
    """(the number of threads that is fastest now, {number: seconds that work() took}); it is in use then.

    1, 2, 4, ... are tried, as long as more are better.
    """
    import torch

    best, seconds = 1, {1: trial(work, 1)}
    while best < available():
        more = min(2 * best, available())
        seconds[more] = trial(work, more, give_up=seconds[best])
        if seconds[more] * WORTH > seconds[best]:
            break
        best = more
    torch.set_num_threads(best)
    return best, seconds


def trial(work: Callable[[], object], count: int, give_up: float = float("inf")) -> float:
    """Mean seconds of work() with `count` threads; of a single one if that takes more than twice `give_up`."""
    import torch

    torch.set_num_threads(count)
    work()  # the first one makes threads and buffers
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < TRIAL_SECONDS:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
        if taken[0] > 2 * give_up:
            break
    return sum(taken) / len(taken)


def settle(asked: int | str, otherwise: Callable[[], int]) -> None:
    """The threads of a tool: `asked` (--threads) if it is a number, else OMP_NUM_THREADS, else otherwise()."""
    import torch

    wanted = prepare() if asked == AUTO else int(asked)
    if asked != AUTO and wanted > available() and not identity().rank:
        _warn_once(f"--threads {asked} is more than there are cores to use: {available()} compute")
    torch.set_num_threads(min(wanted or otherwise(), available()))


_warn_once = cache(warn)


def recorded(flags: dict[str, Any]) -> int:
    """As many threads as the run with these recorded `flags` took, if there are so many cores."""
    known = flags.get("threads", AUTO)
    return available() if known == AUTO else min(known, available())


class Pace:
    """Notices, once, that the steps of a run take much longer than they did. usual: seconds of a step, if known."""

    def __init__(self, usual: float = float("inf")) -> None:
        self.usual, self._told = usual, False
        self._steps, self._seconds = 0, 0.0

    def slowed(self, seconds: float) -> bool:
        """Is this step, which took `seconds`, the last of many that were slow?"""
        self._steps += 1
        self._seconds += seconds
        if self._told or self._seconds < LOOK_SECONDS:
            return False
        mean, self._steps, self._seconds = self._seconds / self._steps, 0, 0.0
        self._told = mean > SLOW * self.usual
        self.usual = min(self.usual, mean)
        return self._told


def _keep_freed_memory() -> None:
    """Let glibc keep the buffers that a step frees, instead of returning them to the kernel and faulting them in again.

    Forward and backward of the MLP autoencoder take a quarter less time for it. A no-op with other C libraries.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 28)
        libc.mallopt(trim_threshold, 1 << 29)
