"""DataLoader workers: who asks for them, and what becomes of a run whose workers find no room or die."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from helpers import AE, LATENT, PIXEL, REPO, SMALL, Result, call, children, environment, finish, start
from torch.utils.data import DataLoader

from common.device import memory_in_one_line
from common.error_codes import OUT_OF_MEMORY, USAGE
from common.session import Session

OWN = {AE: ("--model", "mlp"), LATENT: ("--T", 20, "--hidden-dim", 16), PIXEL: (*SMALL, "--T", 20)}


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("folder", OWN)
def test_only_a_typed_flag_starts_workers(folder, typed, tiny, ae_run, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    started, original = [], Session.batches

    def batches(self, loader):
        started.append(loader.num_workers)
        return original(self, loader)

    monkeypatch.setattr(Session, "batches", batches)
    own = (*OWN[folder], *(("--ae-ckpt", ae_run) if folder == LATENT else ()))
    flags = ("--epochs", 1, "--outdir", tmp_path, *(("--num-workers", 1) if typed else ()))
    result = call(folder, "train.py", *own, *tiny, *flags)
    assert result.code == 0, result.text
    assert started == [int(typed)]
    assert f"num_workers              {1 if typed else 2}" in result.text  # what is shown


def test_a_wrong_variable_is_named_and_a_flag_overrides_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4(x2)")
    flags = ("--model", "mlp", "--epochs", 1, "--outdir", tmp_path, *tiny)
    result = call(AE, "train.py", *flags)
    assert (result.code, len(result.errors)) == (USAGE, 1), result.text
    assert "$SLURM_CPUS_PER_TASK: '4(x2)' is not a whole number" in result.errors[0]
    assert "--num-workers" not in result.text
    assert call(AE, "train.py", "--help").code == 0
    assert call(AE, "train.py", *flags, "--num-workers", 0).code == 0


def test_what_workers_draw_the_same_after_a_resume(tiny, tmp_path, monkeypatch):
    """Their seeds come from the loader's generator."""
    seeds, original = [], DataLoader.__iter__

    def watched(loader):
        seeds.append(loader.generator.initial_seed())
        return original(loader)

    monkeypatch.setattr(DataLoader, "__iter__", watched)
    found = []
    for name, starts in (("once", [3]), ("twice", [1, 3])):
        for epochs in starts:
            flags = ("--model", "mlp", *tiny, "--epochs", epochs, "--outdir", tmp_path / name, "--auto-resume")
            assert call(AE, "train.py", *flags).code == 0
        found.append(seeds.copy())
        seeds.clear()
    assert found[0] == found[1]
    assert len(set(found[0])) == 4  # of three epochs, and of validation


# --- no room in shared memory ---


@pytest.fixture
def with_shared_memory():
    """with_shared_memory(size, script, *args) -> Result, in a mount namespace with a /dev/shm of that size."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]

    def command(size):
        mount = "mount --make-rprivate / && mount -t tmpfs -o size=$0 tmpfs /dev/shm"
        return [*unshare, "sh", "-c", f'{mount} && exec "$@"', size]

    if not shutil.which("unshare") or subprocess.run([*command("64k"), "true"], capture_output=True).returncode:
        pytest.skip("private mounts are not permitted here")

    def inside(size, *args, timeout=60):
        process = subprocess.Popen(
            [*command(size), *map(str, args)],
            cwd=REPO / AE,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return finish(process, timeout)

    return inside


@pytest.mark.parametrize(
    "size", ["8k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("64k", "256k")), "600k"]
)
def test_too_little_shared_memory_ends_the_run_with_one_line(size, with_shared_memory, tiny, tmp_path):
    """From no room for the queues to room for the first batches only: it ends, and never hangs."""
    flags = ("--model", "mlp", "--epochs", 2, "--num-workers", 2, "--outdir", tmp_path, *tiny, "--batch-size", 128)
    result: Result = with_shared_memory(size, "python", "train.py", *flags)
    assert (result.code, result.text.count("error: ")) == (OUT_OF_MEMORY, 1), result.text
    assert "error: --num-workers: workers pass batches through /dev/shm" in result.text  # beside a dying worker's words
    assert "Traceback" not in result.text


@pytest.mark.parametrize(("size", "workers"), [pytest.param("16m", 2, marks=pytest.mark.slow), ("4k", 0)])
def test_enough_shared_memory_or_no_workers(size, workers, with_shared_memory, tiny, tmp_path):
    flags = ("python", "train.py", "--model", "mlp", "--epochs", 1, "--outdir", tmp_path, *tiny)
    result = with_shared_memory(size, *flags, "--num-workers", workers)
    assert result.code == 0, result.text


@pytest.mark.parametrize("number", [signal.SIGBUS, signal.SIGKILL])
def test_a_worker_that_is_killed_ends_the_run_with_one_line(number, tiny, tmp_path):
    """As the kernel does, to a process that writes to shared memory that is not there, or when memory runs out."""
    flags = ("--model", "mlp", "--epochs", 100000, "--num-workers", 2, "--outdir", tmp_path, *tiny, "--batch-size", 1)
    process = start(AE, "train.py", *flags)
    try:
        deadline = time.monotonic() + 60
        while len(workers := children(process.pid)) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no workers"
            time.sleep(0.01)
        time.sleep(0.5)
        for _ in range(3):  # nobody misses one that dies when its epoch is just over
            os.kill(workers[-1], number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
            workers = children(process.pid)
        result = finish(process, 60)
    finally:
        process.kill()
    assert (result.code, result.text.count("error: --num-workers")) == (OUT_OF_MEMORY, 1), result.text
    assert "Traceback" not in result.text


def test_a_worker_that_dies_during_a_destructor_is_one_line_too(monkeypatch):
    """torch's signal handler may interrupt anything: what it raises in a destructor Python prints, with a traceback."""

    class Interrupted:
        def __init__(self, why):
            self.why = why

        def __del__(self):
            raise RuntimeError(self.why)

    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda fault: shown.append(str(fault.exc_value)))
    with memory_in_one_line("choose less"):
        for why in ("DataLoader worker (pid 7) is killed by signal: Bus error.", "another"):
            Interrupted(why)
    assert shown == ["another"]
    Interrupted("DataLoader worker (pid 7) afterwards")
    assert len(shown) == 2


def test_shared_memory_that_cannot_be_used_is_one_line(tiny, tmp_path, monkeypatch):
    """As where /dev/shm is read-only, or belongs to somebody else."""

    def refuse(_self):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", refuse)
    result = call(AE, "train.py", "--model", "mlp", *tiny, "--num-workers", 2, "--outdir", tmp_path)
    assert (result.code, len(result.errors)) == (OUT_OF_MEMORY, 1), result.text
    assert "cannot be used (Read-only file system); drop the flag" in result.errors[0]
    assert not list(tmp_path.glob("checkpoints/*"))
