"""A disk that fills up, for real: a small tmpfs (root only; skipped where mounting is not permitted)."""

import os
import subprocess
import sys

import pytest
from helpers import LATENT, REPO, assert_same_training, call, environment, newest_state, only_run, run

from common.ckpt import run_checkpoints
from common.error_codes import SAVE_FAILED


@pytest.fixture
def disk(tmp_path):
    """disk(size) -> a mounted folder of that size."""
    mounts = []

    def mount(size: str):
        folder = tmp_path / f"disk-{len(mounts)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
        mounts.append(folder)
        return folder

    yield mount
    for folder in mounts:
        subprocess.run(["umount", "-l", folder], check=True)


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
    result = run(LATENT, "train.py", *flags)
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
