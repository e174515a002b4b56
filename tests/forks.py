"""Real processes that begin at once: forked from a Python that has imported the packages, but nothing of this project.

A start of Python and its imports take three seconds of a core, most of them torch's and torchvision's; a fork a
hundredth. A fork is a process like another: it has a number, gets signals, ends with a code, and its script is run from
its file. For what a start itself is to be tested on, there is `helpers.start`.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGES = ("torch._dynamo", "torch.distributed", "torch.utils.tensorboard", "torchvision.utils", "tqdm")
REPO = Path(__file__).resolve().parent.parent

# --- the server -------------------------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    """Fork for everybody who asks, until stdin is closed; returns in the forks."""
    path = Path(listener.getsockname())
    for name in PACKAGES:
        importlib.import_module(name)
    gc.freeze()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return attend(link)
        link.close()
        reap()
    reap()
    path.unlink()
    path.parent.rmdir()
    os._exit(0)


def reap() -> None:
    """Let go of those that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def attend(link: socket.socket) -> None:
    """Fork what is asked for, and say its number and how it ended; returns in the fork when its script has ended."""
    text, streams, _, _ = socket.recv_fds(link, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += link.recv(1 << 16)
    words, folder, env, group = json.loads(text)
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        link.sendall(f"{pid}\n".encode())
        link.sendall(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        os._exit(0)
    link.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - as Python opens them
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    if group:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    become(words)


def become(words: list[str]) -> None:
    """What `python words` does."""
    first, *rest = words = words[words[0] == "-u" :]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if first == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = ModuleType("__main__")
    if first == "-c":
        sys.path[0], sys.argv, file, text = "", ["-c", *rest[1:]], "<string>", rest[0]
    else:
        file = main.__file__ = os.path.abspath(first)
        sys.path[0], sys.argv, text = os.path.dirname(file), words, Path(file).read_bytes()
    exec(compile(text, file, "exec"), main.__dict__)


# --- whoever asks it --------------------------------------------------------------------------------------------------


@cache
def server() -> str:
    """The path of the socket of this process's server, which lives as long as this process."""
    from helpers import environment

    path = tempfile.mkdtemp(prefix="forks-") + "/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        number = listener.fileno()
        command = [sys.executable, __file__, str(number)]
        process = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.PIPE, env=environment())
    atexit.register(process.communicate)  # closes its stdin
    return path


def ask(path: str, streams: list[int], words: list[str], folder: str, env: dict, group: bool) -> socket.socket:
    """Have the server behind a socket's path fork; returns the link on which `said` reads."""
    link = socket.socket(socket.AF_UNIX)
    link.connect(path)
    socket.send_fds(link, [f"{json.dumps([words, folder, env, group])}\n".encode()], streams)
    return link


def as_python(path: str, words: list[str]) -> None:
    """End as `python words` would, in this folder and environment; this process only waits."""
    link = ask(path, [0, 1, 2], words, os.getcwd(), dict(os.environ), False)
    with link.makefile() as said:
        _, code = said.read().split("\n")
    if int(code) < 0:
        os.kill(os.getpid(), -int(code))
    os._exit(int(code))


class Process:
    """As much of `subprocess.Popen` as the tests want of a fork."""

    def __init__(self, words: list[str], folder: Path, env: dict[str, str], group: bool) -> None:
        out, into = os.pipe()
        with open(os.devnull) as nothing:
            self._link = ask(server(), [nothing.fileno(), into, into], words, str(folder), env, group)
        os.close(into)
        self.stdout, self.returncode = os.fdopen(out), None
        self._said = self._link.makefile()
        self.pid = int(self._said.readline())

    def poll(self) -> int | None:
        """Its exit code once it has ended."""
        if self.returncode is None and select.select([self._link], [], [], 0)[0]:
            self.returncode = int(self._said.read())
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end. Raises TimeoutExpired."""
        if self.returncode is None and not select.select([self._link], [], [], max(timeout, 0))[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.poll()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for its end and return all it said. Raises TimeoutExpired."""
        deadline, parts = time.monotonic() + timeout, [b""]
        while not self.stdout.closed:
            if not select.select([self.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            parts.append(os.read(self.stdout.fileno(), 1 << 16))
            if not parts[-1]:
                self.stdout.close()
        self.wait(deadline - time.monotonic())
        return b"".join(parts).decode(), None

    def send_signal(self, number: int) -> None:
        """Send it a signal while it lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send it SIGKILL while it lives."""
        self.send_signal(signal.SIGKILL)


def start(folder: str | Path, script: str, *args: object, env: dict[str, str] | None = None, group: bool = False):
    """`helpers.start`, forked where that is safe, which it is not on macOS."""
    from helpers import environment
    from helpers import start as start_anew

    if sys.platform != "linux":
        return start_anew(folder, script, *args, env=env, group=group)
    words = [*script.split(), *map(str, args)]
    return Process(words, REPO / folder, environment(**(env or {})), group)


def run(folder: str | Path, script: str, *args: object, env: dict[str, str] | None = None, timeout: float = 120):
    """`helpers.run`, forked in the same way."""
    from helpers import finish

    return finish(start(folder, script, *args, env=env), timeout)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
