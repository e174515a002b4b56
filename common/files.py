"""Files that are there whole or not at all, whatever interrupts their writing; and what interrupted writing leaves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

A_DAY = 24 * 3600  # seconds
LONGEST_NAME = 255  # bytes
ALONE_PATIENCE = 10.0  # seconds


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it over `path`.

    Whatever interrupts this leaves the old file whole. Raises OSError if the disk is full, read-only or gone, or if
    something at `path` is no file, such as a pipe or a device, whose place a file would take.
    What killed writes of any file left in the folder goes first.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(errno.EEXIST, "it is no file, but a pipe or device", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(path.parent)
    temporary = _temporary(path.parent, path.name)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            _flush(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except RuntimeError as error:  # how torch reports a failing write, and Ctrl-C during it
        if isinstance(error.__context__, KeyboardInterrupt | OSError):  # what the disk said
            raise error.__context__ from None
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _temporary(folder: Path, name: str) -> Path:
    """A new file's name that no reader's pattern matches, and that says which process writes it."""
    rest = f".{os.getpid()}@{_host()}.{uuid.uuid4().hex[:8]}.tmp"
    room, whole = LONGEST_NAME - 1 - len(rest), os.fsencode(name)
    return folder / f".{name if len(whole) <= room else whole[:room].decode(errors='ignore')}{rest}"


_TEMPORARY = re.compile(r"\..+\.(\d+)@(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)


@cache
def _host() -> str:
    """Where process numbers mean the same processes: a machine, or a container on it."""
    place = os.uname().nodename
    with contextlib.suppress(OSError):  # only Linux has it
        place += os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:12]


def _clear_abandoned(folder: Path) -> None:
    """Remove temporary files whose process, on this host, is gone, and those that are a day old."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if match := _TEMPORARY.fullmatch(entry.name):
                old = time.time() - entry.stat(follow_symlinks=False).st_mtime > A_DAY
                if old or (match[2] == _host() and not _lives(int(match[1]))):
                    os.unlink(entry.path)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _flush(descriptor: int) -> None:
    """Down to the disk: macOS's fsync leaves it in the drive's own cache, if that can do more."""
    os.fsync(descriptor)
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def _sync_folder(folder: Path) -> None:
    """Flush the folder's own entries, so that a rename survives a power cut (a no-op where that is not possible)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _flush(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder, where the file system has locks for folders.

    One that stays there for longer than a few seconds hangs, and is not waited for.
    """
    descriptor, deadline = None, time.monotonic() + ALONE_PATIENCE
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def no_file(path: str | Path) -> str:
    """Why what is at `path` is no file to be read, as a folder or a pipe, which would be waited for; else "".

    In one look, for between two it may go, and then it was not that. What is not there, whoever opens it says.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    if stat.S_ISREG(mode):
        return ""
    return "is a folder, not a file" if stat.S_ISDIR(mode) else "not a file"


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    atomic_write(path, lambda file: file.write(text.encode()))


def link(target: Path, name: str) -> None:
    """Make `name`, beside `target`, a relative symlink to it (a copy where symlinks are not allowed)."""
    temporary = _temporary(target.parent, name)
    try:
        try:
            os.symlink(target.name, temporary)
        except OSError:
            shutil.copyfile(target, temporary)
        os.replace(temporary, target.parent / name)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
