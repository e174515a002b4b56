"""Exit codes, and the one exception that carries them to the shell.

Every foreseen way to fail raises `Exit`; `run_main` turns it into one line on stderr and the process's exit code.
CLAUDE.md lists what each code means to a user.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec

from common import emoji
from common.console import ConsoleGone, guarded

OK = 0
USAGE = 2  # argparse's own
MODEL_MISMATCH = 3
NO_MODEL_SPECIFIED = 4
NO_AE_CHECKPOINT = 5
BAD_CHECKPOINT = 6
BAD_OUTPUT = 7
NO_DEVICE = 8
NO_DATA = 9
NON_FINITE_LOSS = 10
STOPPED_EARLY = 11
SAVE_FAILED = 12
RUN_LOCKED = 13
OUT_OF_MEMORY = 14
RANK_FAILED = 15
BAD_IMAGE = 16
NOT_INSTALLED = 17
INTERRUPTED = 130  # what shells use for a second Ctrl-C

# of requirements.txt, as they are imported
PACKAGES = ("torch", "torchvision", "datasets", "tqdm", "tensorboard", "sklearn", "matplotlib", "numpy", "PIL")
PACKAGES += ("mlxtend", "notebook", "tornado")


class Exit(Exception):
    """End the program with `code` after showing `message` as one line (code 0: a note, not a fault).

    everywhere: of several processes that train one run, all raise it at the same point, and one of them shows it.
    """

    def __init__(self, code: int, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.code, self.everywhere = code, everywhere
        self.shown = False  # the session sets this once its log has shown the message

    def __reduce__(self) -> tuple:
        return Exit, (self.code, str(self), self.everywhere)


def require(*packages: str) -> None:
    """Raises Exit(NOT_INSTALLED) where a package is missing, before work is spent that would end without it."""
    for package in packages:
        if find_spec(package) is None:
            raise Exit(NOT_INSTALLED, _not_installed(package))


def _not_installed(package: str) -> str:
    cure = "activate the environment that README.md makes, or pip install -r requirements.txt"
    return f"{package} is not installed in {sys.executable}: {cure}"


def _why_unusable(error: ImportError) -> str | None:
    """What is wrong with a package of requirements.txt; None if the error is a bug here."""
    package = (error.name or "").partition(".")[0]
    if package in PACKAGES and find_spec(package) is None:
        return _not_installed(package)
    if isinstance(error, ModuleNotFoundError) or package not in ("", *PACKAGES):
        return None
    said = next(iter(str(error).splitlines()), "")
    return (
        f"{package or 'a package'} cannot be loaded ({said}): too little memory (ulimit -v), or a broken installation"
    )


def run_main(main: Callable[[], None]) -> int:
    """Run a script's main; return its exit code, having shown an `Exit` that nobody showed yet."""
    from common.ranks import identity

    code = OK
    with guarded():
        try:
            code = _run(main)
            sys.stdout.flush()
        except ConsoleGone as error:
            if code == OK:
                print(f"{emoji.error} cannot write the output: {error.strerror}", file=sys.stderr)
                return BAD_OUTPUT
    if main.__module__ == "__main__":  # Python takes a while to end: a stop that comes now must not look like a kill
        with contextlib.suppress(ValueError):  # in another thread than the main one
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)
    if identity().size > 1:  # gloo's threads sometimes abort a process that ends by way of its destructors
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _run(main: Callable[[], None]) -> int:
    from common.ranks import identity

    try:
        main()
    except Exit as end:
        rank = identity().rank
        if not end.shown and not (rank and end.everywhere):
            symbol = emoji.error if end.code else emoji.ok
            print(f"{symbol} {f'process {rank}: ' if rank else ''}{end}", file=sys.stderr if end.code else sys.stdout)
        return end.code
    except SystemExit as end:  # argparse's, after --help, whose words are still to be written
        return end.code or OK
    except ImportError as error:
        if (why := _why_unusable(error)) is None:
            raise
        print(f"{emoji.error} {why}", file=sys.stderr)
        return NOT_INSTALLED
    except KeyboardInterrupt:
        print(f"{emoji.error} interrupted", file=sys.stderr)
        return INTERRUPTED
    return OK
