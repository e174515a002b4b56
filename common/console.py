"""The console: what happens when stdout or stderr cannot be written to.

A terminal that was closed, a full disk or a used-up quota behind a redirection: a tool ends (`guarded`), a training
session goes on without its console (`patient`), as both do where a pipe's reader has left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from common import emoji


def warn(text: str) -> None:
    """A line on stderr, where there is no log."""
    print(f"{emoji.warning} {text}", file=sys.stderr)


class ConsoleGone(OSError):
    """stdout cannot be written to; of BrokenPipeErrors from elsewhere, nobody may think that."""


class _Stream:
    """A stream that tells `failed` of every OSError that writing meets, and goes on if that returns."""

    def __init__(self, raw: TextIO, failed: Callable[[OSError], object]) -> None:
        self._raw = raw._raw if isinstance(raw, _Stream) else raw  # a session within a script hears of failures first
        self._failed = failed

    def write(self, text: str | bytes) -> int:
        try:
            return self._raw.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._raw.flush()
        except OSError as error:
            self._failed(error)

    @property
    def buffer(self) -> _Stream:
        """The stream of bytes beneath, guarded likewise."""
        return _Stream(self._raw.buffer, self._failed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


@contextmanager
def _streams(out_failed: Callable[[OSError], object], err_failed: Callable[[OSError], object]) -> Iterator[None]:
    """sys.stdout and sys.stderr as such streams for a while; what they hold at its end and cannot write is dropped."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream(sys.stdout, out_failed), _Stream(sys.stderr, err_failed)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:  # else Python would complain at shutdown, and end with a code of its own
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def guarded() -> Iterator[None]:
    """For a script: there is a stdout and a stderr that take any text, and ConsoleGone if stdout cannot be written to.

    A reader that left (`… | head`) has seen enough of the words: the script goes on, as its files are still wanted.
    Nobody can be told of a stderr that cannot.
    """
    _open_closed()

    def gone(error: OSError) -> None:
        if error.errno != errno.EPIPE:
            raise ConsoleGone(*error.args) from None

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    with _streams(gone, lambda _: None):
        yield


def _open_closed() -> None:
    """Give a process that was started without stdin, stdout or stderr (`>&-`) /dev/null instead.

    Otherwise the next file that it opens gets the free number, and whatever writes to that number writes into the file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - stays open for as long as the process lives


class Trouble:
    """What a session's console met: `out` says whether stdout ever failed."""

    def __init__(self) -> None:
        self.out = False
        self._reason, self._tell = "", None

    def tell(self, tell: Callable[[str], object]) -> None:
        """Give `tell` one line about the first failure, now or when it comes."""
        self._tell = tell
        if self._reason:
            tell(self._reason)

    def met(self, error: OSError) -> None:
        """Note a failed write."""
        if not self._reason:
            self._reason = f"the console cannot be written to ({error.strerror or error}); training goes on"
            if self._tell is not None:
                self._tell(self._reason)


@contextmanager
def patient() -> Iterator[Trouble]:
    """For a session: nothing that happens to the console raises."""
    trouble = Trouble()

    def out_failed(error: OSError) -> None:
        trouble.out = True
        trouble.met(error)

    with _streams(out_failed, trouble.met):
        yield trouble
