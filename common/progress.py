"""How long work shows that it gets on, and how much of it there is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.ranks import identity

PLAIN_LINE_EVERY = 30.0  # seconds between lines where there is no terminal


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 step", "2,000 steps"; many: the plural, where it is not `one` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


@contextmanager
def progress(
    title: str,
    total: int,
    unit: str,
    say: Callable[[str], object],
    *,
    done: int = 0,
    more: Callable[[], str] = lambda: "",
) -> Iterator[Callable[[], object]]:
    """A tqdm bar on a terminal; elsewhere `say` gets one plain line per interval. Yields what to call after each unit.

    done: how many of the `total` units lie behind already. more(): what else a plain line tells.
    """
    first = identity().rank == 0  # of several processes one talks
    if first and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=title, unit=unit, leave=False) as bar:
            yield bar.update
        return
    told = time.monotonic()

    def tick() -> None:
        nonlocal done, told
        done += 1
        if first and time.monotonic() - told >= PLAIN_LINE_EVERY:
            told = time.monotonic()
            say(f"{title}: {unit} {done}/{total}{more()}")

    yield tick
