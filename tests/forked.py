"""A `python` for tests that type many commands: scripts are forked from a process that has imported torch already.

`python forked.py SOCKET` is that process. `ask(SOCKET, ARGUMENTS)` stands for `python ARGUMENTS`: the script sees its
own arguments, environment, folder, stdin, stdout and stderr, and its exit code comes back.
"""

import json
import os
import runpy
import socket
import sys

MOST = 1 << 17  # bytes of a request


def serve(path: str) -> None:
    """Answer requests, one child each, until killed."""
    import matplotlib.figure  # noqa: F401
    import sklearn.manifold  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import torchvision.utils  # noqa: F401

    del sys.path[0]  # the tests' folder
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            request, streams, *_ = socket.recv_fds(connection, MOST, 3)
            if not os.fork():
                _answer(connection, streams, **json.loads(request))
            for stream in (connection, *map(os.fdopen, streams)):
                stream.close()
            os.waitpid(-1, os.WNOHANG)


def _answer(connection: socket.socket, streams: list[int], arguments: list[str], folder: str, env: dict) -> None:
    if child := os.fork():
        connection.send(bytes([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) % 256]))
        os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    own = {"closefd": False, "encoding": "utf-8"}  # anew: the objects that are there remember the server's streams
    sys.stdin, sys.stdout = os.fdopen(0, **own), os.fdopen(1, "w", **own)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", **own)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, folder)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(os.path.abspath(arguments[0]), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    os._exit(code)


def ask(path: str, arguments: list[str]) -> int:
    """Have the server run `python ARGUMENTS` here; returns the exit code."""
    request = {"arguments": arguments, "folder": os.getcwd(), "env": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        return (connection.recv(1) or b"\x01")[0]


if __name__ == "__main__":
    serve(sys.argv[1])
