"""A page to play with checkpoints, in a browser: `python -m common.play`."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress

from common import emoji, threads
from common.args import Parser, number
from common.console import warn
from common.device import get_device
from common.error_codes import run_main
from common.flags import add_device_argument, add_threads_argument
from common.play import wishes
from common.progress import counted

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("A page to play with checkpoints, in a browser.", "python -m common.play --port 8000")
    parser.prog = "common.play"
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="checkpoint file, run folder or folder of runs (default: all it finds)"
    )
    parser.flag("place", "--port", type=number(int, 0, 65535), default=8000, help="0: any free one (default: 8000)")
    parser.flag("place", "--host", default=LOOPBACK[0], help="address to listen on (default: 127.0.0.1, loopback)")
    parser.flag("place", "--cache-dir", help="where MNIST is, for the latent map (default: where the run had it)")
    add_device_argument(parser)
    add_threads_argument(parser)
    args = parser.parse(argv)

    from common.play.runs import Shelf, find
    from common.play.server import serve

    shelf = Shelf(find(args.runs, warn), args.device, args.threads, args.cache_dir)
    if args.cache_dir and not os.path.isdir(args.cache_dir):
        warn(f"--cache-dir {args.cache_dir}: there is no such folder; digits are looked for where the runs had them")
    if args.host not in LOOPBACK:
        warn(f"--host {args.host}: whoever can reach this address can use the page; nothing asks for a password")

    def begin() -> None:
        """The slow part of the first answer, before the address is told: torch, and the newest run's networks."""
        threads.prepare()
        get_device(args.device)
        with suppress(wishes.Refused):  # which is told to whoever asks for that run
            shelf.open(next(iter(shelf.entries)))

    def say(address: str) -> None:
        print(f"{emoji.ok} {counted(len(shelf.entries), 'run')}: {address} (Ctrl-C ends it)", flush=True)

    asyncio.run(serve(shelf, args.host, args.port, begin, say))


if __name__ == "__main__":
    code = run_main(main)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # at once: the worker's thread may be in the middle of a step
