"""A server of the page as a process, and talking to it as a browser does."""

import asyncio
import json
import re
import signal
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from forks import start
from helpers import finish
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from common import ckpt

PLAY = "-m common.play"


class Server:
    """`python -m common.play` on a free port; `address` ends with a slash."""

    def __init__(self, *words: object, port: int = 0, env: dict | None = None) -> None:
        self.process = start(".", PLAY, *words, "--port", port, "--device", "cpu", env=env)
        self.said = []
        while True:
            line = self.process.stdout.readline()
            assert line, "".join(self.said)
            self.said.append(line)
            if found := re.search(r"(http://\S+/) ", line):
                self.address = found[1]
                return

    @property
    def port(self) -> int:
        return int(self.address.rstrip("/").rsplit(":")[-1])

    def interrupt(self) -> tuple[int, float]:
        """Ctrl-C; (exit code, seconds until the end)."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        code = finish(self.process).code
        return code, time.monotonic() - began

    def memory(self) -> int:
        """Megabytes; 0 where the system does not tell."""
        status = Path(f"/proc/{self.process.pid}/status")
        return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) // 1024 if status.is_file() else 0


@contextmanager
def one_epoch_more(folder: Path) -> Iterator[None]:
    """A run of two epochs has a third, of other weights, as if it were in training."""
    state = ckpt.read_checkpoint(folder / ckpt.NAME.format(epoch=2))
    state["epoch"] = state["args"]["epochs"] = 3
    for value in state["ema"].values():
        if value.is_floating_point():
            value.mul_(1.5)
    later = folder / ckpt.NAME.format(epoch=3)
    ckpt.save_checkpoint(later, state)
    try:
        yield
    finally:
        later.unlink()


def settings(**changed) -> dict:
    """A drawing that takes no time."""
    usual = {"side": 0, "digits": [3], "count": 4, "guidance": 2.0, "sampler": "ddim", "steps": 5, "seed": 7}
    return usual | changed


def talk(
    server: Server, *asked: dict | str | bytes, until: int = 1, host: str | None = None, origin: str | None = None
):
    """Ask over one connection; (hello, [(header, pixels)] until so many answers have ended)."""

    async def conversation() -> tuple[dict, list]:
        own = server.address.rstrip("/")
        headers = {"Origin": origin or own, "Host": host or own.removeprefix("http://")}
        url = f"ws://127.0.0.1:{server.port}/socket"
        socket = await websocket_connect(HTTPRequest(url, headers=headers))
        hello, _ = parts_of(await socket.read_message())
        answers, ended = [], 0
        for number, wish in enumerate(asked):
            text = json.dumps({"id": number, **wish}) if isinstance(wish, dict) else wish
            await socket.write_message(text)
        while ended < until:
            message = await asyncio.wait_for(socket.read_message(), 60)
            if message is None:
                answers.append(({"closed": True}, b""))
                break
            answers.append(parts_of(message))
            ended += "last" in answers[-1][0]
        socket.close()
        return hello, answers

    return waited(conversation())


def waited(conversation):
    """The result of a coroutine, in a thread of its own: Playwright keeps a loop in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, conversation).result()


def parts_of(message: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<I", message[:4])[0]
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def last_pictures(answers: list) -> bytes:
    """The finished drawing: the predicted x_0 with no steps left."""
    pixels = next(pixels for header, pixels in reversed(answers) if header.get("left") == 0)
    return pixels[len(pixels) // 2 :]


def moments(answers: list) -> dict[int, tuple[dict, bytes]]:
    """{steps left: (header, pixels)}, each of them once."""
    shown = [part for part in answers if "left" in part[0]]
    found = {part[0]["left"]: part for part in shown}
    assert len(found) == len(shown)
    return found
