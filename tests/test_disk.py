"""A disk that fills up, for real: a small tmpfs (root only; skipped where mounting is not permitted)."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from forks import start
from helpers import (
    AE,
    LATENT,
    REPO,
    assert_same,
    assert_same_training,
    call,
    environment,
    finish,
    newest_state,
    only_run,
    scalars,
)

from common import ckpt
from common.ckpt import run_checkpoints
from common.error_codes import SAVE_FAILED, STOPPED_EARLY
from common.files import atomic_write
from common.session import Session


def test_a_full_disk_is_an_oserror_and_leaves_no_litter(disk):
    """torch reports it as RuntimeError, and its writer must not abort the process on the way out."""
    folder = disk("300k")
    script = (
        "import sys, torch\nfrom common import ckpt\n"
        "ckpt.save_checkpoint(sys.argv[1] + '/old.pt', {'x': torch.ones(1000)})\n"
        "for name in ('new.pt', 'old.pt'):\n"
        "    try:\n        ckpt.save_checkpoint(sys.argv[1] + '/' + name, {'x': torch.zeros(1_000_000)})\n"
        "    except OSError as error:\n        print('OSError', error)\n"
        "print(ckpt.read_file(sys.argv[1] + '/old.pt')['x'].sum().item())"
    )
    command = [sys.executable, "-c", script, folder]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment())
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["OSError", "OSError", "1000.0"]
    assert os.listdir(folder) == ["old.pt"]


def test_training_on_a_disk_that_fills_up_goes_on_later(disk, latent_run, tiny_latent):
    size = (latent_run / "checkpoint_epoch_000001.pt").stat().st_size
    outdir = disk(f"{size * 14 // 10 // 1024}k")  # room for one checkpoint and the rest, not for two
    flags = (*tiny_latent, "--epochs", 2, "--outdir", outdir, "--auto-resume")
    result = call(LATENT, "train.py", *flags)
    assert result.code == SAVE_FAILED, result.text
    assert "Traceback" not in result.text
    folder = only_run(outdir)
    assert [epoch for epoch, _ in run_checkpoints(folder)] == [1]
    assert newest_state(folder)["epoch"] == 1
    assert not list(folder.glob(".*.tmp"))
    subprocess.run(["mount", "-o", f"remount,size={size * 4 // 1024}k", outdir], check=True)
    result = call(LATENT, "train.py", *flags)
    assert result.code == 0, result.text
    assert_same_training(folder, latent_run)


def fill(folder):
    """Write a file until not a byte is left."""
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (65536, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass


def over(folder, options: str) -> None:
    """Mount the folder over itself, e.g. read-only: files that are open stay writable, as the run's log."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", f"remount,bind,{options}", folder], check=True)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_fault_that_passes_costs_nothing(fault, disk, tiny, tmp_path, monkeypatch):
    """From the end of epoch 2 to the end of epoch 4 nothing can be written."""
    flags = ("--model", "mlp", "--epochs", 5, *tiny, "--batch-size", 8, "--generate-images", "--keep-ckpts", 1)
    assert call(AE, "train.py", *flags, "--outdir", tmp_path / "reference").code == 0
    outdir, end_epoch = disk("100m"), Session.end_epoch
    begin = {"full": lambda: fill(outdir), "read-only": lambda: over(outdir, "ro")}[fault]
    end = {"full": (outdir / "filler").unlink, "read-only": lambda: subprocess.run(["umount", "-l", outdir])}[fault]

    def troubled(session, *args):
        if session.epoch == 2:
            begin()
        if session.epoch == 4:
            assert newest_state(session.run.checkpoints)["epoch"] == 1  # still whole
            end()
        end_epoch(session, *args)

    monkeypatch.setattr(Session, "end_epoch", troubled)
    result = call(AE, "train.py", *flags, "--outdir", outdir)
    assert result.code == 0, result.text
    assert result.text.count("cannot save a checkpoint") == 2
    assert "Traceback" not in result.text
    folder = only_run(outdir)
    assert not list(outdir.rglob(".*.tmp"))
    assert_same_training(folder, only_run(tmp_path / "reference"))
    assert scalars(folder) == scalars(only_run(tmp_path / "reference"))


def test_a_stop_that_cannot_save_says_so(disk, latent_run, tiny_latent, monkeypatch):
    outdir, step = disk("100m"), Session.step

    def troubled(session, *args):
        step(session, *args)
        if session.at.global_step == 10:
            over(outdir, "ro")
            os.kill(os.getpid(), signal.SIGTERM)

    flags = (*tiny_latent, "--epochs", 2, "--outdir", outdir, "--auto-resume")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "step", troubled)
        result = call(LATENT, "train.py", *flags)
    subprocess.run(["umount", "-l", outdir], check=True)
    assert (result.code, len(result.errors)) == (SAVE_FAILED, 1), result.text
    state = newest_state(only_run(outdir))
    assert (state["epoch"], ckpt.is_complete(state)) == (1, True)
    assert call(LATENT, "train.py", *flags).code == 0
    assert_same_training(only_run(outdir), latent_run)


@pytest.mark.parametrize("fills_up", ["before", "in mid-run"])
def test_a_log_that_cannot_be_written_changes_no_run_and_no_exit_code(
    fills_up, disk, latent_run, tiny_latent, tmp_path
):
    logs, step = disk("64k"), Session.step
    flags = (*tiny_latent, "--epochs", 2, "--outdir", tmp_path, "--logdir", logs, "--debug", "--auto-resume")

    def troubled(session, *args):
        step(session, *args)
        if session.at.global_step == 10:
            fill(logs)
            session.log.info("what no longer fits")
            os.kill(os.getpid(), signal.SIGTERM)

    if fills_up == "before":
        fill(logs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "step", troubled if fills_up == "in mid-run" else step)
        result = call(LATENT, "train.py", *flags)
    assert (result.code, "Traceback" in result.text) == (0 if fills_up == "before" else STOPPED_EARLY, False)
    assert call(LATENT, "train.py", *flags).code == 0
    assert_same_training(only_run(tmp_path), latent_run)


def until(condition, process, patience=60.0):
    """Wait for a condition while a script runs."""
    deadline = time.monotonic() + patience
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("comes_back", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_output_folder_that_becomes_read_only_in_mid_run(comes_back, disk, tiny, ae_run, tmp_path):
    """A read-only mount over it: saves fail, the earlier checkpoint stays, the run retries."""
    outdir = disk("200m")
    flags = ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16, *tiny, "--batch-size", 8, "--outdir", outdir)
    process = start(LATENT, "train.py", *flags, "--epochs", 12)
    until(lambda: list(outdir.glob("checkpoints/*/checkpoint_epoch_000001.pt")), process)
    folder = only_run(outdir)
    subprocess.run(["mount", "--bind", outdir, outdir], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", outdir], check=True)
        saved = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
        log = outdir / "logs" / f"{folder.name}.log"
        until(lambda: "cannot save a checkpoint" in log.read_text(), process)
        if not comes_back:
            result = finish(process)
            assert result.code == SAVE_FAILED, result.text
            assert "cannot save the end of the run" in result.text
            assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")} == saved
    finally:
        subprocess.run(["umount", "-l", outdir], check=True)
    if comes_back:
        result = finish(process)
        assert result.code == 0, result.text
    assert "Traceback" not in result.text
    assert newest_state(folder)["epoch"] == (
        12 if comes_back else max(int(name[-9:-3]) for name in saved if "epoch" in name)
    )


def test_a_full_disk_is_called_that(tmp_path):
    """And not by what torch makes of it."""

    class Full(io.BytesIO):
        def write(self, content):
            if self.tell() + len(content) > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    with pytest.raises(OSError, match="No space left on device") as caught:
        atomic_write(tmp_path / "a.pt", lambda _file: torch.save({"a": torch.zeros(3)}, Full()))
    assert caught.value.errno == errno.ENOSPC
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_deleted_in_mid_run_is_made_again(tiny, ae_run, tmp_path):
    flags = ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16, *tiny, "--batch-size", 8, "--outdir", tmp_path)
    process = start(LATENT, "train.py", *flags, "--epochs", 8)
    until(lambda: list(tmp_path.glob("checkpoints/*/checkpoint_epoch_000001.pt")), process)
    shutil.rmtree(tmp_path, ignore_errors=True)
    result = finish(process)
    assert result.code == 0, result.text
    assert "Traceback" not in result.text
    folder = only_run(tmp_path)
    state = newest_state(folder)
    assert (state["epoch"], ckpt.is_complete(state)) == (8, True)
    assert len(json.loads((folder / "config.json").read_text())["starts"]) == 1
    assert (folder / ".lock").exists()


def test_a_folder_that_is_deleted_just_after_it_was_saved_into(tiny_latent, latent_run, tmp_path, monkeypatch):
    """Between a checkpoint and the look at the lock: it counts as not saved, and the next save makes it all again."""
    save, deleted = ckpt.save_checkpoint_and_link_latest, []

    def save_in_vain(folder, state):
        path = save(folder, state)
        if not deleted:
            deleted.append(shutil.rmtree(tmp_path))
        return path

    monkeypatch.setattr(ckpt, "save_checkpoint_and_link_latest", save_in_vain)
    result = call(LATENT, "train.py", *tiny_latent, "--epochs", 2, "--outdir", tmp_path)
    assert result.code == 0, result.text
    assert (deleted, result.text.count("cannot save a checkpoint")) == ([None], 1)
    folder = only_run(tmp_path)
    assert_same(newest_state(folder)["model"], newest_state(latent_run)["model"])
    assert all((folder / name).exists() for name in ("config.json", ".lock"))
