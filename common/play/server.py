"""The server: one page with its files, the pictures of epochs, and a WebSocket for everything that is computed.

Whoever can open the page can use it, so it listens on loopback only unless told otherwise, and answers only to its own
names and to pages that it served itself: a foreign page whose name is made to lead here (DNS rebinding) carries its
own name in Host, and a foreign page that connects from the same browser carries it in Origin.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from common.error_codes import USAGE, Exit
from common.play import wishes
from common.play.answers import ANSWERS, pictures
from common.play.runs import Shelf
from common.play.wishes import Refused
from common.play.worker import Wish, Worker

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MOST_TABS = 64
MOST_UNSENT = 8 * 2**20  # bytes for a tab that takes its answers slowly, before it gets no more work done
PING_EVERY = 20  # seconds
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def is_own_name(host: str, names: set[str]) -> bool:
    """Is this Host header one of the server's? An address needs no name server, so it cannot be made to lead here.

    The port may be another: `ssh -L` forwards from any.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in names:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback or "*" in names
    except ValueError:
        return False


def names_of(host: str) -> set[str]:
    """The names under which a server that listens on `host` may be asked; "*": and any address."""
    names = {"localhost", host.lower()}
    if host in ("0.0.0.0", "::", ""):
        names |= {"*", socket.gethostname().lower(), socket.getfqdn().lower()}
    return names


FILES = {path.name: path for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}


class Guarded(RequestHandler):
    """Answers GET to a Host of this server's own, with headers that let the page do nothing but what it needs."""

    def initialize(self, names: set[str]) -> None:
        self.names = names

    def set_default_headers(self) -> None:
        self.clear_header("Server")
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        if not is_own_name(self.request.headers.get("Host", ""), self.names):
            raise HTTPError(403)

    def write_error(self, status_code: int, **_kwargs: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code} {self._reason}\n")


class Page(Guarded):
    """The files in `static`, by their names there; 404 for everything else."""

    def get(self) -> None:
        path = FILES.get(self.request.path.removeprefix("/") or "index.html")
        if path is None:
            raise HTTPError(404)
        self.set_header("Content-Type", f"{TYPES[path.suffix]}; charset=utf-8")
        self.finish(path.read_bytes())


class Picture(Guarded):
    """The grid that a run's training drew after an epoch: ?run=ID&epoch=N."""

    def initialize(self, names: set[str], shelf: Shelf) -> None:
        super().initialize(names)
        self.shelf = shelf

    def get(self) -> None:
        try:
            entry, epoch = self.shelf.entry(self.get_query_argument("run", "")), self.get_query_argument("epoch", "")
            content = pictures(entry)[int(epoch)].read_bytes()
        except (Refused, ValueError, KeyError, OSError):
            raise HTTPError(404) from None
        self.set_header("Content-Type", "image/png")
        self.finish(content)


class Tab(WebSocketHandler):
    """A browser's tab: its wishes go to the worker, whose answers come back as they are made.

    A message to the tab is a header's length (4 bytes, little-endian), the header (JSON), and pixels.
    """

    open_tabs = 0

    def initialize(self, names: set[str], shelf: Shelf, worker: Worker) -> None:
        self.names, self.shelf, self.worker = names, shelf, worker
        self.counted, self.loop = False, asyncio.get_running_loop()
        self.posted, self.sent = 0, 0  # bytes; only the worker's thread changes the one, only the server's the other

    def prepare(self) -> None:
        if not is_own_name(self.request.headers.get("Host", ""), self.names):
            raise HTTPError(403)
        try:
            urlsplit(self.request.headers["Origin"])
        except (KeyError, ValueError):
            raise HTTPError(403) from None

    def check_origin(self, origin: str) -> bool:
        return urlsplit(origin).netloc.lower() == self.request.headers.get("Host", "").lower()

    def open(self) -> None:
        if Tab.open_tabs >= MOST_TABS:
            self.close(1013, "too many tabs are open")
            return
        Tab.open_tabs += 1
        self.counted = True
        self._write(packed({"do": "hello", "runs": self.shelf.described()}))

    def on_message(self, message: str | bytes) -> None:
        number, asked = None, {}
        try:
            asked = wishes.parsed(message)
            number = wishes.whole(asked, "id", 0, 2**53)
            if asked["do"] not in ANSWERS:
                raise Refused("There is nothing of this name to ask for.")
            answer, is_short = ANSWERS[asked["do"]]

            def send(pixels: bytes = b"", **header: Any) -> None:  # in the worker's thread
                self._post(packed({"id": number, "do": asked["do"], **header}) + pixels)

            wish = Wish(
                key=(self, asked["do"]),
                run=lambda wish: answer(self.shelf, wish, asked, send),
                fail=lambda sentence: send(error=sentence, last=True),
                short=is_short(self.shelf, asked),
            )
        except Refused as refusal:
            self._write(packed({"id": number, "do": asked.get("do"), "error": str(refusal), "last": True}))
            return
        self.worker.ask(wish)

    def on_close(self) -> None:
        if self.counted:
            Tab.open_tabs -= 1
        self.worker.drop(self)

    @property
    def takes_more(self) -> bool:
        """Has it read most of what it was sent?"""
        return self.posted - self.sent < MOST_UNSENT

    def _post(self, message: bytes) -> None:
        self.posted += len(message)
        self.loop.call_soon_threadsafe(self._write, message, True)

    def _write(self, message: bytes, posted: bool = False) -> None:
        def sent(future: asyncio.Future) -> None:
            if not future.cancelled():
                future.exception()  # of a tab that was closed meanwhile
            if posted:
                self.sent += len(message)
                self.worker.wake()

        with suppress(WebSocketClosedError):
            asyncio.ensure_future(self.write_message(message, binary=True)).add_done_callback(sent)


def packed(header: dict[str, Any]) -> bytes:
    """The beginning of a message. Raises ValueError for numbers that JSON has not: of a network that went wrong."""
    text = json.dumps(header, allow_nan=False).encode()
    return struct.pack("<I", len(text)) + text


def application(shelf: Shelf, worker: Worker, host: str) -> Application:
    """What the server answers."""
    names = names_of(host)
    return Application(
        [
            (r"/socket", Tab, {"names": names, "shelf": shelf, "worker": worker}),
            (r"/picture", Picture, {"names": names, "shelf": shelf}),
            (r".*", Page, {"names": names}),
        ],
        websocket_max_message_size=wishes.MOST_BYTES,
        websocket_ping_interval=PING_EVERY,
        log_function=lambda _handler: None,
    )


async def serve(shelf: Shelf, host: str, port: int, begin: Callable[[], None], say: Callable[[str], None]) -> None:
    """Serve until it is cancelled, which Ctrl-C does. begin() is the worker's first work; say(address) follows it.

    Raises Exit(USAGE) if the address cannot be listened on.
    """
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "another program listens there; --port 0 takes a free one" if taken else error.strerror or error
        raise Exit(USAGE, f"--port {port}: {reason}" if taken else f"--host {host}: {reason}") from None
    loop, faults = asyncio.get_running_loop(), []
    ready = asyncio.Event()

    def begun() -> None:
        try:
            begin()
        except Exception as fault:  # which ends the program, in its main thread
            faults.append(fault)
        loop.call_soon_threadsafe(ready.set)

    worker = Worker(begun, ready=lambda key: key[0].takes_more)
    worker.start()
    await ready.wait()
    if faults:
        raise faults[0]
    server = HTTPServer(
        application(shelf, worker, host), max_body_size=wishes.MOST_BYTES, max_header_size=wishes.MOST_BYTES
    )
    server.add_sockets(sockets)
    name = f"[{host}]" if ":" in host else host
    say(f"http://{'localhost' if name in ('0.0.0.0', '[::]') else name}:{sockets[0].getsockname()[1]}/")
    await asyncio.Event().wait()
