"""Graceful stops: signals set a flag, and the training session polls it between two steps.

Slurm announces a time limit with SIGUSR1 or SIGUSR2 (`--signal`), preemption and `scancel` with SIGTERM; a person
presses Ctrl-C, or closes the terminal (SIGHUP). SIGUSR2 is taken too because NCCL may keep SIGUSR1 for itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.ranks import identity

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_received: int | None = None
_parent = os.getppid()


def _on_signal(number: int, _frame: object) -> None:
    global _received
    # Only a second Ctrl-C means "leave at once": scancel may well deliver SIGTERM twice.
    if number == signal.SIGINT and _received == signal.SIGINT:
        raise KeyboardInterrupt
    if _received != signal.SIGINT:
        _received = number


def install_signal_handlers() -> dict[int, object]:
    """Handle SIGUSR1, SIGUSR2, SIGTERM, SIGHUP and Ctrl-C from now on; returns the handlers that stood before.

    Call it before anything slow is imported: a signal that finds no handler kills the process. Outside the main
    thread Python forbids handlers, and nothing is installed.
    """
    global _received
    _received = None
    if threading.current_thread() is not threading.main_thread():
        return {}
    wanted = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not _under_nohup()]
    return {number: signal.signal(number, _on_signal) for number in wanted}


def _under_nohup() -> bool:
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def restore_signal_handlers(previous: dict[int, object]) -> None:
    """Put back what `install_signal_handlers` returned."""
    for number, handler in previous.items():
        signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let stop signals wait while processes are started, which inherit that: none dies of one in its first moments."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_requested() -> int:
    """The number of the stop signal that has arrived since the handlers were installed; 0 if none has.

    One of several processes whose launcher was killed is as if its terminal had been closed: it would stay for ever.
    """
    if _received is None and identity().size > 1 and os.getppid() != _parent:
        _on_signal(signal.SIGHUP, None)
    return _received or 0


def lasting_cache(cache_dir: str | Path) -> Path:
    """Where what is costly to get again belongs: `cache_dir`, but $SCRATCH/hf_cache for one that ends with its job."""
    temporary, scratch = os.environ.get("SLURM_TMPDIR"), os.environ.get("SCRATCH")
    if temporary and scratch and Path(cache_dir).resolve().is_relative_to(Path(temporary).resolve()):
        return Path(scratch) / "hf_cache"  # which job.sh copies to $SLURM_TMPDIR
    return Path(cache_dir)


def report(what: str) -> None:
    """Tell job.sh that this start has "trained" and saved at least a step, or that it "stopped" and saved.

    Without the one it would requeue itself for ever; the other it cannot learn from the exit codes of launchers.
    """
    if path := os.environ.get("DDPM_PROGRESS_FILE"):
        with suppress(OSError):
            open(f"{path}.{what}", "a").close()  # nothing is in it: a full disk has room for that
