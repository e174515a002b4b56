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
from functools import cache
from pathlib import Path
from typing import IO, Any

from common import ckpt
from common.args import AUTO, Args, Difference, bash_word, flag_of
from common.device import make_output_directories
from common.error_codes import BAD_OUTPUT, MODEL_MISMATCH, RUN_LOCKED, STOPPED_EARLY, USAGE, Exit
from common.files import alone_in
from common.record import announce, flags_in
from common.slurm import stop_requested

LOCK_PATIENCE = 20.0  # seconds; a requeued job may overlap its predecessor's end
LOCK = ".lock"
_NEWEST = ("latest", ckpt.LATEST)  # what a run's folder calls its newest checkpoint
YOUNG = 60.0  # seconds in which a folder that says nothing may still be about to say whose it is
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

    @property
    def is_held(self) -> bool:
        """Is the lock that this process holds still the one in the run's folder?"""
        return _is_file(self.checkpoints / LOCK, self.lock)

    def hold(self, reached: tuple[int, int], warn: ckpt.Warn) -> bool:
        """Before anything is written: make the folder, or only the lock, again where they were deleted; was that so?

        reached: this process's (epoch, global step). Raises Exit(RUN_LOCKED) if another start holds the run since, or
        has taken it further; OSError if that cannot be found out.
        """
        if self.is_held:
            return False
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            found = ckpt.newest_readable(self.checkpoints, warn, ckpt.peek_checkpoint)
        except ckpt.UnreadableCheckpoint as error:
            raise OSError(str(error)) from None
        if found and (found[1]["epoch"], found[1]["global_step"]) > reached:
            raise Exit(RUN_LOCKED, f"{self.name} was taken further by another start, {found[0]}: leaving it to that")
        return self.lock_again()

    def lock_again(self) -> bool:
        """Take the lock anew if somebody deleted the run's folder, and with it the lock; returns whether that was so.

        Raises Exit(RUN_LOCKED) if another process has taken it since, OSError if the folder is going just now.
        """
        if self.is_held:  # to open it again would give up the lock
            return False
        try:
            lock = _lock(self.checkpoints, 0)
        except Exit as end:
            raise (OSError(str(end)) if end.code == BAD_OUTPUT else end) from None
        self.lock.close()
        self.lock = lock
        return True

    def discard_if_empty(self) -> None:
        """Leave no trace of a run that ended before it saved anything."""
        try:
            names = os.listdir(self.checkpoints)
        except OSError:  # which tells nothing
            return
        resumed = self.source is not None and self.source.parent == self.checkpoints
        if not resumed and not any(".pt" in name for name in names):  # nothing set aside either
            for folder in (self.checkpoints, self.samples, self.tensorboard):
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                self.log_file.unlink()


# --- which run a start means ------------------------------------------------------------------------------------------


def open_run(
    args: Args,
    name: Callable[[Args], str],
    models: tuple[str, ...],
    warn: ckpt.Warn,
    identify: Callable[[Args], None],
    settle: Callable[[Args], None],
) -> Run:
    """The run that the flags mean: resumed where --resume or --auto-resume finds one, else claimed under a new name.

    models: the types that this trainer trains. identify(args) completes what follows from files that flags name.
    settle(args) completes the rest for a run that starts from nothing, or raises Exit; name(args) is then its name up
    to the timestamp. On resume the checkpoint's flags become today's defaults.
    Raises Exit(MODEL_MISMATCH) if --resume names another kind of model.
    """
    warn = cache(warn)  # what is looked at again, once a lock is held, is not told again
    identify(args)
    outdir = Path(args.outdir)
    checkpoints = outdir / ckpt.RUNS
    if args.resume is not None:
        source, state = resume_target(args.resume, args.auto_resume, warn, models)
        if args.auto_resume and source.parent.parent.name != ckpt.RUNS:
            source, state = _begun_from(args, state, checkpoints, models, warn) or (source, state)
        return _resume(args, source, state, warn)
    if args.auto_resume:
        found, passed_over = find_run(args, checkpoints, models, warn)
        if found:
            return _resume(args, *found, warn)
        none = f"nothing to resume in {checkpoints} for these flags: starting a new run"
        if passed_over:
            warn(f"{none}. {_said(args, *passed_over)}")
        else:  # as every first start of a job that says --auto-resume
            logging.getLogger("train").info(none)
    settle(args)
    make_output_directories(outdir)
    prefix, logdir = name(args), _logdir(args, outdir)
    found, claimed = _found_or_claimed(args, checkpoints, prefix, logdir, models)
    return _resume(args, *found, warn) if found else Run(claimed[0], outdir, logdir, claimed[1])


def require_checkpoint(path: str | None, types: tuple[str, ...]) -> None:
    """Raises Exit(USAGE) where no --ckpt was given, naming the run that the newest one of these `types` is."""
    if path is not None:
        return
    folders = ckpt.default_runs()
    for run, state in ckpt.recorded_runs(folders, lambda _: None):
        if state["args"].get("model") in types:
            raise Exit(USAGE, f"no --ckpt given; the newest run here would be --ckpt {bash_word(run)}")
    kinds, where = " or ".join(types), " or ".join(map(str, folders))
    raise Exit(USAGE, f"no --ckpt given, and no run of type {kinds} in {where}: train one, or name one elsewhere")


def find_run(
    args: Args, checkpoints: Path, models: tuple[str, ...], warn: ckpt.Warn, beyond: tuple[int, int] = (0, -1)
) -> tuple[tuple[Path, ckpt.State] | None, tuple[Path, Difference] | None]:
    """(the newest run that today's flags mean, the newest other one of this trainer and in what it differs).

    A run is a checkpoint's (file, state). A run is what it does: see `Args.difference`. beyond: only runs that are
    further than this (epoch, global step).
    """
    passed_over = None
    for folder, state in ckpt.recorded_runs([checkpoints], warn):
        if state["args"].get("model") not in models or (state["epoch"], state["global_step"]) <= beyond:
            continue
        difference = args.difference(state["args"])
        if difference is None and (found := ckpt.newest_readable(folder, warn)):
            difference = args.difference(found[1]["args"])  # of an old file a glance does not tell all
            if difference is None:
                return found, None
        if difference is not None:
            passed_over = passed_over or (folder, difference)
    return None, passed_over


def _said(args: Args, folder: Path, difference: Difference) -> str:
    nothing = "all" if difference.name.endswith("only_digit") else "none"
    recorded, today = (nothing if value is None else value for value in difference[1:])
    name = flag_of(difference.name) if difference.name in args.kinds else difference.name
    return (
        f"Passed over {folder.name}, the newest, which has {name} {recorded}, not {today}; "
        f"go on with it: {args.resume_command(folder, ('place', 'books'))}"
    )


def resume_target(
    path: str, newest: bool, warn: ckpt.Warn, models: tuple[str, ...] = ckpt.MODEL_TYPES
) -> tuple[Path, ckpt.State]:
    """(file, state) that --resume PATH means: a checkpoint, or the newest readable one of a run's folder or latest.pt.

    newest: the newest of PATH's run whatever PATH is, so that a job that is requeued goes on instead of back.
    Raises UnreadableCheckpoint if there is none, Exit(MODEL_MISMATCH) if it holds none of the `models`.
    """
    target = Path(path).absolute()
    if target.name in _NEWEST and ckpt.insist(target, lambda: ckpt.run_checkpoints(target.parent)):
        if not target.with_name(ckpt.LATEST).exists():
            warn(f"passing over {target}: it points to no file")
        target = target.parent
    source, state = ckpt.read_model(target, models, warn)
    if ckpt.EXPORTED in state:
        raise Exit(MODEL_MISMATCH, f"{source} {ckpt.exported_text(state)}: it cannot be trained on, --resume its run")
    source = source.resolve() if source.is_symlink() else source  # best.pt moves on; its target does not
    if source.parent.parent.name != ckpt.RUNS:
        source = source.resolve()  # through a symlink to the run's folder
    if newest and source in [path for _, path in ckpt.insist(source, lambda: ckpt.run_checkpoints(source.parent))]:
        newer = ckpt.newest_readable(source.parent, warn)
        if newer and newer[0] != source:
            warn(f"its run is further, {newer[0].name}: going on with that, not {source.name}, as --auto-resume asks")
        return newer or (source, state)
    return source, state


def _logdir(args: Args, outdir: Path) -> Path:
    return Path(args.logdir or outdir / "logs")


def _begun_from(
    args: Args, state: ckpt.State, checkpoints: Path, models: tuple[str, ...], warn: ckpt.Warn
) -> tuple[Path, ckpt.State] | None:
    """The run that an earlier start with the same --resume COPY began: of its flags, and further than the copy."""
    args.adopt(state["args"])
    found, _ = find_run(args, checkpoints, models, warn, beyond=(state["epoch"], state["global_step"]))
    if found:
        warn(f"{found[0].parent.name} is further than {args.resume}: going on with it")
    return found


def _resume(args: Args, source: Path, state: ckpt.State, warn: ckpt.Warn) -> Run:
    if source.parent.is_symlink():  # to a run's folder, whose name and record are elsewhere
        source = source.resolve()
    folder, outdir = source.parent, Path(args.outdir)
    if folder.parent.name == ckpt.RUNS:  # go on in the file's own run folder, wherever --outdir points
        outdir, run_name = folder.parent.parent, folder.name
        if args.origin["outdir"] == "flag" and outdir.resolve() != Path(args.outdir).resolve():
            warn(f"continuing in {outdir}, where the checkpoint lies; --outdir {args.outdir} is for new runs")
        make_output_directories(outdir, f"to go on elsewhere, copy {source.name} and --resume the copy")
        lock = _lock(folder, LOCK_PATIENCE)
        # the predecessor may have saved once more while we waited for its lock
        newest = args.auto_resume or Path(args.resume).name in _NEWEST or Path(args.resume).is_dir()
        source, state = (newest and ckpt.newest_readable(folder, warn)) or (source, ckpt.read_checkpoint(source))
    else:  # a copy outside any run: its training goes on as a new run
        args.adopt(state["args"])  # which may refuse: before there is a folder
        make_output_directories(outdir)
        place = (outdir / ckpt.RUNS, ckpt.TIMESTAMP.sub("", state["exp_name"]), _logdir(args, outdir))
        models, copied = (ckpt.infer_model_from_checkpoint(state),), (state["epoch"], state["global_step"])
        found, claimed = _found_or_claimed(args, *place, models, copied)
        if found:
            return _resume(args, *found, warn)
        run_name, lock = claimed
    for change in args.adopt(state["args"]):
        warn(f"this resume changes {change}")
    return Run(run_name, outdir, _logdir(args, outdir), lock, state, source)


# --- claiming and locking ---------------------------------------------------------------------------------------------


def _found_or_claimed(
    args: Args,
    checkpoints: Path,
    prefix: str,
    logdir: Path,
    models: tuple[str, ...],
    beyond: tuple[int, int] = (0, -1),
) -> tuple[tuple[Path, ckpt.State] | None, tuple[str, IO[str]] | None]:
    """A run that saved since --auto-resume looked, else, and without that flag, name and lock of a folder of its own.

    Of equal starts at the same moment the first claims one, as the folder of runs is held meanwhile; the others see
    that, wait outside until it ends, and look again. beyond: see `find_run`. Raises Exit(RUN_LOCKED) when their
    patience does.
    """
    if not args.auto_resume:
        return None, _claim(checkpoints, prefix, logdir, args)
    deadline = time.monotonic() + LOCK_PATIENCE

    def saved() -> tuple[Path, ckpt.State] | None:
        return find_run(args, checkpoints, models, lambda _: None, beyond)[0]

    while True:
        try:
            with alone_in(checkpoints):
                if found := saved():
                    return found, None
                begun = _take_over(checkpoints, prefix, args)
                found = ckpt.newest_readable(checkpoints / begun[0], lambda _: None) if begun else saved()
                if not found:  # nor did any save just now
                    return None, begun or _claim(checkpoints, prefix, logdir, args)
            if begun:
                begun[1].close()
            return found, None
        except Exit as end:
            if end.code != RUN_LOCKED or time.monotonic() >= deadline:
                raise
        time.sleep(0.5)


def _claim(checkpoints: Path, prefix: str, logdir: Path, args: Args) -> tuple[str, IO[str]]:
    """A new name, claimed by creating its folder and its log: of two jobs in the same second one waits for the next.

    So it does if a third, looking for an empty folder to take over, is quicker with the lock. Raises Exit(BAD_OUTPUT).
    """
    while True:
        name = f"{prefix}-{datetime.now().strftime(_TIMESTAMP)}"
        folder = checkpoints / name
        try:
            folder.mkdir()
            if not _begins(logdir / f"{name}.log"):
                folder.rmdir()
                raise FileExistsError
            lock = _lock(folder, 0)
            announce(folder, args)
            return name, lock
        except FileExistsError:
            pass
        except OSError as error:
            raise Exit(BAD_OUTPUT, f"cannot write to {checkpoints}: {error.strerror or error}") from None
        except Exit as error:
            if error.code != RUN_LOCKED:
                raise
        time.sleep(0.2)


def _begins(log: Path) -> bool:
    """Create a log; False if it is there, as that of a run with another --outdir and this --logdir."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.open("x").close()
    except FileExistsError:
        return not log.exists()
    except OSError:
        pass  # whoever writes to it says so
    return True


def _take_over(checkpoints: Path, prefix: str, args: Args) -> tuple[str, IO[str]] | None:
    """A folder in which a run of the same flags left no checkpoint. Raises Exit(RUN_LOCKED) if that lives.

    Where there are no locks, nobody can tell the dead from the living, and nothing is taken over.
    """

    def is_ours(folder: Path, flags: dict[str, Any]) -> bool:
        if not flags:  # it was killed even before it wrote them
            with suppress(OSError):
                return time.time() - folder.stat().st_mtime > YOUNG and not any(folder.glob("*.pt"))
            return False
        return not args.difference(flags)

    def is_surely_ours(flags: dict[str, Any]) -> bool:  # what is not known there yet may become another than today's
        told = [
            name for name, value in args.flags().items() if value != AUTO and args.kind(name) in ("shape", "training")
        ]
        return bool(flags) and all(flags.get(name) != AUTO for name in told)

    for folder in sorted(checkpoints.glob("*/"), reverse=True):
        # asked before it is locked too: to hold another run's lock, even briefly, would keep its own start from it
        flags = flags_in(folder)
        if ckpt.TIMESTAMP.sub("", folder.name) != prefix or any(folder.glob("*.pt")) or not is_ours(folder, flags):
            continue
        sure = is_surely_ours(flags)
        try:
            lock = _lock(folder, 0, certainly=True)
        except OSError:
            continue
        except Exit as end:
            if end.code == STOPPED_EARLY or (end.code == RUN_LOCKED and sure and is_ours(folder, flags_in(folder))):
                raise
            continue
        if is_ours(folder, flags_in(folder)):
            return folder.name, lock
        lock.close()
    return None


def _lock(folder: Path, patience: float, certainly: bool = False) -> IO[str]:
    """Hold the run's advisory lock as long as the returned file is open; a dead process holds none.

    certainly: raise OSError where the file system has no locks, instead of a warning. lockf's locks are not inherited
    by forked DataLoader workers. Raises Exit(RUN_LOCKED) when patience runs out, Exit(BAD_OUTPUT) if the folder cannot
    be written to.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            file = open(folder / LOCK, "a+")  # noqa: SIM115 - stays open for as long as the run lives
        except OSError as error:
            raise Exit(BAD_OUTPUT, f"cannot write to {folder}: {error.strerror or error}") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either for "held by another"
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if stop_requested():
                raise Exit(STOPPED_EARLY, f"stopped while waiting for {folder.name}; nothing was changed") from None
            if time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            raise Exit(
                RUN_LOCKED, f"{folder.name} is being trained by {holder}; wait for it, or stop it first"
            ) from None
        except OSError as error:
            if certainly:
                file.close()
                raise
            logging.getLogger("train").warning(f"no locks here ({error.strerror}): do not train {folder.name} twice")
        if not _is_file(folder / LOCK, file):  # deleted, and perhaps made anew, before we had it
            file.close()
            continue
        with suppress(OSError):  # of a full disk; it is a courtesy to whoever waits
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {os.uname().nodename}".encode())
        return file


def _is_file(path: Path, file: IO[str]) -> bool:
    """Is this open file the one at `path`? Yes, where nobody can tell."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
    except OSError:  # a file server that fails
        return True
