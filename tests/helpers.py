"""What the tests share: running the scripts (as processes or in this one), and reading what a run leaves behind."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from common import ckpt
from common.error_codes import run_main

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbformat import NotebookNode

REPO = Path(__file__).resolve().parent.parent
FULL_MNIST = REPO.parent / "shared" / "mnist" / "hf_cache"
AE, LATENT, PIXEL = "mnist_ae", "mnist_latent_diffusion", "mnist_single_digit"
SMALL = ("--base-ch", 8, "--dense-dim", 16)  # a pixel network that trains and saves quickly
TIMES = ("seconds", "images_per_second", "timestamp")
CLOSED_PORT = "http://127.0.0.1:9"  # a hub that nobody can reach


class Result(NamedTuple):
    """How a script ended, and what it said (stdout and stderr together)."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        """The lines that report an error."""
        return [line for line in self.text.splitlines() if line.startswith("error:")]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a test's process: one thread, no cluster's variables, no hub.

    Where a test wants more threads, they sleep while they wait: on a busy machine spinning costs minutes.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "HF_")) and k != "SCRATCH"}
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return {**kept, **threads, "HF_ENDPOINT": CLOSED_PORT, "PYTHONDONTWRITEBYTECODE": "1", **extra}


def start(
    folder: str,
    script: str,
    *args: object,
    env: dict[str, str] | None = None,
    group: bool = False,
    under: Sequence[str] = (),
) -> subprocess.Popen:
    """Start `python script args` from inside `folder`, as a user does; `-m common.x` as script starts a tool.

    group: as the leader of a process group of its own. under: a command that runs commands.
    """
    command = [*under, sys.executable, *script.split(), *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=REPO / folder,
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=group,
    )


def finish(process: subprocess.Popen, timeout: float = 120) -> Result:
    """Wait for a started script."""
    try:
        text, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Result(process.returncode, text)


def run(folder: str, script: str, *args: object, env: dict[str, str] | None = None, timeout: float = 120) -> Result:
    """Run a script to its end in a process of its own."""
    return finish(start(folder, script, *args, env=env), timeout)


def children(pid: int) -> list[int]:
    """The processes that process `pid` started. Skips the test where /proc does not tell."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs Linux's /proc")
    found = []
    for stat in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            text = Path(f"/proc/{int(stat)}/stat").read_text()
            if int(text.rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat))
    return sorted(found)


def recipe(folder: str, script: str) -> ModuleType:
    """The module of a script, loaded by file (three folders have a train.py)."""
    path = REPO / folder / script
    spec = importlib.util.spec_from_file_location(f"{folder}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def inside(folder: str):
    """As if Python had been started in `folder`: working directory and `import model`."""
    before, path = Path.cwd(), list(sys.path)
    os.chdir(REPO / folder)
    sys.path.insert(0, str(REPO / folder))
    sys.modules.pop("model", None)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        sys.modules.pop("model", None)


def call(folder: str, script: str, *args: object) -> Result:
    """Like `run`, but in this process: quick, and open to monkeypatching."""
    said = io.StringIO()
    with inside(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = run_main(lambda: recipe(folder, script).main([str(arg) for arg in args]))
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
    return Result(code, said.getvalue())


def stored(notebook: Path) -> list[NotebookNode]:
    """The code cells of a notebook as it is in the repository."""
    import nbformat

    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def executed(notebook: Path, **settings: object) -> list[NotebookNode]:
    """The same when all cells have run, in a kernel of their own, with other `settings` after those of its first cell.

    Raises CellExecutionError if one fails.
    """
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    code[0].source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    NotebookClient(book, timeout=240, resources={"metadata": {"path": str(notebook.parent)}}).execute()
    return code


def only_run(outdir: Path, pattern: str = "*") -> Path:
    """The folder of the one run in `outdir`."""
    folders = list((outdir / "checkpoints").glob(f"{pattern}/"))
    assert len(folders) == 1, folders
    return folders[0]


def newest_state(folder: Path) -> dict:
    """The newest checkpoint's state."""
    return ckpt.read_checkpoint(ckpt.run_checkpoints(folder)[0][1])


def state_of(epoch: int, *, time: str = "2026-01-01T00:00:00+00:00", val_loss: float | None = 0.5, **other) -> dict:
    """A small checkpoint's state."""
    keys = {"format": ckpt.FORMAT, "exp_name": "ae-mlp-x", "args": {"model": "ae-mlp"}, "batch": 3, "global_step": 3}
    model = {"weight": torch.arange(4000.0) * epoch}
    return {**keys, "epoch": epoch, "timestamp": time, "val_loss": val_loss, "best": None, "model": model, **other}


def make_run(folder, epochs=(1, 2, 3), **options):
    """A run folder with small checkpoints; returns it."""
    for epoch in epochs:
        ckpt.save_checkpoint_and_link_latest(folder, state_of(epoch, **options))
    return folder


def assert_same(a: object, b: object, where: str = "") -> None:
    """Nested containers are equal, tensors bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert torch.equal(a, b), f"{where} differs by up to {(a - b).abs().max()}"
    else:
        assert a == b, where


def assert_same_training(a: Path, b: Path) -> None:
    """Two runs ended with bit-equal weights, EMA, optimizer, and the same history but for times."""
    one, two = newest_state(a), newest_state(b)
    for key in ("model", "ema", "optimizer", "epoch", "batch", "global_step", "train_loss", "val_loss", "best"):
        assert_same(one[key], two[key], key)
    assert metrics(a) == metrics(b)


def metrics(folder: Path) -> list[dict]:
    """metrics.jsonl without its times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's curves of a run as TensorBoard reads them, but for times."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.parent.parent / "runs" / folder.name), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag not in TIMES and not tag.startswith("hparam/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
