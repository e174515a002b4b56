"""A run: its name, its folders, its lock, and which run a resume means."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from common import ckpt
from common.args import Args
from common.device import make_output_directories
from common.error_codes import BAD_OUTPUT, RUN_LOCKED, STOPPED_EARLY, Exit
from common.slurm import stop_requested

LOCK_PATIENCE = 20.0  # seconds; a requeued job may overlap its predecessor's end
LOCK = ".lock"
_TIMESTAMP = "%Y%m%d-%H%M%S"  # see ckpt.TIMESTAMP


@dataclass
class Run:
    """Where one run lives. `state` is the checkpoint it resumes from (read from `source`), None for a fresh run."""

    name: str
    outdir: Path
    logdir: Path
    lock: IO[str]
    state: dict[str, Any] | None = None
    source: Path | None = None

    @property
    def checkpoints(self) -> Path:
        return self.outdir / ckpt.RUNS / self.name

    @property
    def samples(self) -> Path:
        return self.outdir / "samples" / self.name

    @property
    def tensorboard(self) -> Path:
        return self.outdir / "runs" / self.name

    @property
    def log_file(self) -> Path:
        return self.logdir / f"{self.name}.log"

    def lock_again(self) -> bool:
        """Take the lock anew if somebody deleted the run's folder, and with it the lock; returns whether that was so.

        Raises Exit(RUN_LOCKED) if another process has taken it since.
        """
        with suppress(OSError):
            if os.path.samestat(os.stat(self.checkpoints / LOCK), os.fstat(self.lock.fileno())):
                return False
        before, self.lock = self.lock, _lock(self.checkpoints, 0)
        before.close()
        return True

    def discard_if_empty(self) -> None:
        """Leave no trace of a run that failed before it saved anything."""
        if self.state is None and not any(self.checkpoints.glob("*.pt*")):  # nothing set aside either
            for folder in (self.checkpoints, self.samples, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)
            self.log_file.unlink(missing_ok=True)


def open_run(
    args: Args,
    name: Callable[[Args], str],
    settle: Callable[[Args, bool], None],
    models: tuple[str, ...],
    warn: Callable[[str], None],
) -> Run:
    """The run that the flags mean: resumed where --resume or --auto-resume finds one, else claimed under a new name.

    name(args) is the run's name up to its timestamp, with `*` for parts that nothing has fixed yet.
    settle(args, fresh) completes the flags: before the search (fresh=False: as far as they allow), and again for a
    run that starts from nothing (fresh=True: or raise Exit). On resume the checkpoint's flags become today's defaults;
    Exit(MODEL_MISMATCH) if its model is none of `models`, the types that this trainer trains.
    """
    settle(args, False)
    outdir = Path(args.outdir)
    checkpoints = outdir / ckpt.RUNS
    source = ckpt.resolve_resume_path(args.resume, args.auto_resume, checkpoints, f"{name(args)}-", warn)
    if source is not None:
        return _resume(args, source, models, warn)
    if args.auto_resume:
        warn(f"nothing to resume in {checkpoints} for {name(args)}-*: starting a new run")
    settle(args, True)
    make_output_directories(outdir)
    run_name, lock = (_take_over(checkpoints, name(args)) if args.auto_resume else None) or _claim(
        checkpoints, name(args)
    )
    return Run(run_name, outdir, Path(args.logdir or outdir / "logs"), lock)


def _resume(args: Args, source: Path, models: tuple[str, ...], warn: Callable[[str], None]) -> Run:
    folder = source.parent
    state = ckpt.read_model(source, models)
    if folder.parent.name == ckpt.RUNS:  # go on in the file's own run folder, wherever --outdir points
        outdir, run_name = folder.parent.parent, folder.name
        if args.origin["outdir"] == "flag" and outdir.resolve() != Path(args.outdir).resolve():
            warn(f"continuing in {outdir}, where the checkpoint lies; --outdir {args.outdir} is for new runs")
        make_output_directories(outdir)
        lock = _lock(folder, LOCK_PATIENCE)
        # the predecessor may have saved once more while we waited for its lock
        newest = args.auto_resume or Path(args.resume).name in ("latest", ckpt.LATEST) or Path(args.resume).is_dir()
        source, state = (newest and ckpt.newest_readable(folder, warn)) or (source, ckpt.read_model(source, models))
    else:  # a copy outside any run: its training goes on as a new run
        outdir = Path(args.outdir)
        make_output_directories(outdir)
        run_name, lock = _claim(outdir / ckpt.RUNS, ckpt.TIMESTAMP.sub("", state["exp_name"]))
    for change in args.adopt(state["args"]):
        warn(f"this resume changes {change}")
    return Run(run_name, outdir, Path(args.logdir or outdir / "logs"), lock, state, source)


def _claim(checkpoints: Path, prefix: str) -> tuple[str, IO[str]]:
    """A new name, claimed by creating its folder: of two jobs started in the same second one waits for the next.

    So it does if a third, looking for an empty folder to take over, is quicker with the lock.
    """
    while True:
        name = f"{prefix}-{datetime.now().strftime(_TIMESTAMP)}"
        try:
            (checkpoints / name).mkdir()
            return name, _lock(checkpoints / name, 0)
        except FileExistsError:
            pass
        except Exit as error:
            if error.code != RUN_LOCKED:
                raise
        time.sleep(0.2)


def _take_over(checkpoints: Path, prefix: str) -> tuple[str, IO[str]] | None:
    """A matching folder in which a killed run left no checkpoint, unless a living process holds it."""
    for folder in sorted(checkpoints.glob("*/"), reverse=True):
        if fnmatchcase(folder.name, f"{prefix}-*") and not any(folder.glob("*.pt")):
            try:
                return folder.name, _lock(folder, 0)
            except Exit:
                continue
    return None


def _lock(folder: Path, patience: float) -> IO[str]:
    """Hold the run's advisory lock as long as the returned file is open; a dead process holds none.

    lockf's locks are not inherited by forked DataLoader workers. Raises Exit(RUN_LOCKED) when patience runs out,
    Exit(BAD_OUTPUT) if the folder cannot be written to.
    """
    try:
        file = open(folder / LOCK, "a+")  # noqa: SIM115 - stays open for as long as the run lives
    except OSError as error:
        raise Exit(BAD_OUTPUT, f"cannot write to {folder}: {error.strerror or error}") from None
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either for "held by another"
            if stop_requested():
                file.close()
                raise Exit(STOPPED_EARLY, f"stopped while waiting for {folder.name}; nothing was changed") from None
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise Exit(
                RUN_LOCKED, f"{folder.name} is being trained by {holder}; wait for it, or stop it first"
            ) from None
        except OSError as error:
            logging.getLogger("train").warning(f"no locks here ({error.strerror}): do not train {folder.name} twice")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        return file
