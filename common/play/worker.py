"""The one thread that computes, and the wishes that wait for it: of each tab and kind the newest only.

A tab's newer wish cancels the one that it has running, between two steps. Between the steps of long work, short work
of other tabs gets its turn, so that nobody's slider waits for somebody's thousand steps.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from common.error_codes import Exit
from common.play.wishes import Refused


class Cancelled(Exception):
    """Nobody wants this any more."""


class Wish:
    """Work for a tab. run(self) does it, and calls `poll` between its steps; `fail` is told a sentence."""

    def __init__(
        self, key: tuple[Any, str], run: Callable[[Wish], None], fail: Callable[[str], None], short: bool
    ) -> None:
        self.key = key  # (tab, kind)
        self.run, self.fail, self.short = run, fail, short
        self.cancelled = False
        self.poll: Callable[[], None] = lambda: None  # the worker's, once it runs


class Worker(threading.Thread):
    """Runs wishes, in the order in which their tabs first had to wait. begin() is the thread's first work."""

    def __init__(self, begin: Callable[[], None], ready: Callable[[tuple], bool] = lambda _key: True) -> None:
        super().__init__(name="play", daemon=True)
        self._begin, self._ready = begin, ready
        self._change = threading.Condition()
        self._waiting: dict[tuple, Wish] = {}
        self._running: list[Wish] = []  # the second is short work between two steps of the first

    def ask(self, wish: Wish) -> None:
        """Let `wish` take the place of an earlier one of its tab and kind."""
        with self._change:
            self._cancel(lambda key: key == wish.key)
            self._waiting[wish.key] = wish  # at the earlier one's place, if that still waited
            self._change.notify()

    def drop(self, tab: Any) -> None:
        """A tab was closed: nothing of it is wanted any more."""
        with self._change:
            self._cancel(lambda key: key[0] is tab)
            for key in [key for key in self._waiting if key[0] is tab]:
                del self._waiting[key]

    def wake(self) -> None:
        """Look again which tabs are ready."""
        with self._change:
            self._change.notify()

    def _cancel(self, which: Callable[[tuple], bool]) -> None:
        for wish in self._running:
            wish.cancelled = wish.cancelled or which(wish.key)

    def _next(self, short: bool) -> Wish | None:
        """Take the first wish whose tab can take an answer; short: of the short ones, if there is any."""
        for key, wish in self._waiting.items():
            if (wish.short or not short) and self._ready(key):
                return self._waiting.pop(key)
        return None

    def run(self) -> None:
        self._begin()
        while True:
            with self._change:
                while (wish := self._next(short=False)) is None:
                    self._change.wait()
                self._running.append(wish)
            self._do(wish)

    def _do(self, wish: Wish) -> None:
        """Run a wish that is in `_running`, whatever comes of it."""

        def poll() -> None:
            if wish.cancelled:
                raise Cancelled
            if wish.short:
                return
            while True:
                with self._change:
                    if (other := self._next(short=True)) is None:
                        break
                    self._running.append(other)
                self._do(other)
            if wish.cancelled:
                raise Cancelled

        wish.poll = poll
        try:
            wish.run(wish)
        except Cancelled:
            pass
        except (Refused, Exit, ValueError) as error:
            wish.fail(str(error))
        except Exception as error:
            logging.getLogger("play").exception("a bug in common.play")
            wish.fail(f"The server met a fault of its own ({type(error).__name__}); its terminal shows more.")
        finally:
            with self._change:
                self._running.remove(wish)
