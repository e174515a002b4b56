"""Logging to the console and to a file."""

from __future__ import annotations

import contextlib
import logging
import sys
from argparse import Namespace
from collections import deque
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

from common import emoji
from common.error_codes import BAD_OUTPUT, Exit
from common.ranks import identity

if TYPE_CHECKING:
    from common.args import Args


class _Console(logging.StreamHandler):
    """One line per record on stdout, written through tqdm so that a progress bar is not torn apart.

    Of several processes only the first one talks.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or identity().rank:  # Python itself shows the traceback, as it ends the process
            return
        from tqdm import tqdm

        symbol = {logging.WARNING: emoji.warning, logging.ERROR: emoji.error}.get(record.levelno, "")
        tqdm.write(f"{symbol} {self.format(record)}".strip(), file=sys.stdout)
        sys.stdout.flush()


class _Early(logging.Handler):
    """Keeps what is said before there is a log file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _File(WatchedFileHandler):
    """Goes on in a new file if somebody deletes the log; a disk that is full or gone never stops the run."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written is tried once more
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Do not bury the console under tracebacks of the logging module."""


def setup_component_logger(name: str, log_file: str | Path | None = None, debug: bool = False) -> logging.Logger:
    """Logger `name` with a console handler and, if `log_file` is given, a file handler that appends to it.

    Raises Exit(BAD_OUTPUT) if the file cannot be opened.
    Calling it again replaces the handlers, so a logger can start on the console and gain its file later, which then
    gets what was said before.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    early = [record for handler in logger.handlers if isinstance(handler, _Early) for record in handler.records]
    close_handlers(logger)
    logger.addHandler(_Console())
    if log_file is None:
        logger.addHandler(_Early())
    else:
        try:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            handler = _File(log_file, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise Exit(BAD_OUTPUT, f"cannot write the log {log_file}: {error.strerror or error}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        for record in early:
            handler.handle(record)
    return logger


def close_handlers(logger: logging.Logger) -> None:
    """Flush, close and remove the logger's handlers."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def log_args_rich(logger: logging.Logger, args: Args | Namespace) -> None:
    """Log every flag with its value and where it came from; plain defaults only at debug level.

    Of argparse's own Namespace, which does not know where values came from, all are logged.
    """
    known = hasattr(args, "origin")
    flags = args.flags() if known else vars(args)
    width = max(map(len, flags), default=0)
    for name, value in sorted(flags.items()):
        origin = args.origin.get(name, "default") if known else ""
        level = logging.DEBUG if origin == "default" else logging.INFO
        logger.log(level, f"  {name:<{width}}  {value}" + (f"  ({origin})" if origin else ""))
