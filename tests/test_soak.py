"""Runs that are killed again and again, many at once, or in the middle of a save: nothing of them is lost.

`tests/run.sh --all -k soak --kills 25` kills each run 25 times.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import time

import pytest
from forks import start
from helpers import AE, LATENT, PIXEL, SMALL, assert_same_training, call, finish, metrics, only_run, scalars

from common import ckpt

KILL_IN_SAVE = """
import os, signal, sys
sys.path.insert(0, ".")
import train
from common import ckpt
from common.error_codes import run_main
when, at = sys.argv[1], int(sys.argv[2])
real = getattr(ckpt.os, when)
calls = []
def deadly(*args):
    calls.append(args)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(ckpt.os, when, deadly)
sys.exit(run_main(lambda: train.main(sys.argv[3:])))
"""


def flags_of(folder, tiny, ae_run, epochs):
    """Flags of a small run."""
    own = {
        AE: ("--model", "mlp"),
        LATENT: ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16),
        PIXEL: ("--T", 20, *SMALL, "--fine-ch", 0),
    }
    shown = ("--generate-images", *(() if folder == AE else ("--samples-per-epoch", 4)))
    return (*own[folder], *tiny, "--batch-size", 32, "--epochs", epochs, "--lr-scheduler", "cosine", *shown)


@pytest.mark.parametrize("folder", [LATENT, *(pytest.param(folder, marks=pytest.mark.slow) for folder in (AE, PIXEL))])
def test_soak(folder, tiny, ae_run, tmp_path, pytestconfig):
    """SIGKILL at random instants of a real run: around its restoring, or after it saved; each start goes on."""
    kills = pytestconfig.getoption("--kills")
    epochs = 4 + (3 if folder == PIXEL else 6) * kills  # enough to be killed that often
    given = flags_of(folder, tiny, ae_run, epochs)
    reference = call(folder, "train.py", *given, "--outdir", tmp_path / "untouched")
    assert reference.code == 0, reference.text
    given = (*given, "--outdir", tmp_path / "killed", "--auto-resume", "--ckpt-every-sec", 0.02)
    seed = random.SystemRandom().randrange(10**6)  # the trainer above has seeded `random`
    rng, done = random.Random(seed), 0
    while done < kills:
        process = start(folder, "train.py", *given)
        sign = rng.choice(["config.json", "checkpoint_*.pt"])
        before, deadline = newest(tmp_path, sign), time.monotonic() + 120
        while newest(tmp_path, sign) == before and process.poll() is None:
            assert time.monotonic() < deadline, f"no new {sign} after {done} kills (seed {seed})"
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        result = finish(process)
        assert result.code == -signal.SIGKILL, f"ended after {done} kills, seed {seed}: {result.text}"
        done += 1
    print(f"{folder}: {done} kills, seed {seed}")
    result = call(folder, "train.py", *given)
    assert result.code == 0, f"seed {seed}: {result.text}"
    untouched, killed = only_run(tmp_path / "untouched"), only_run(tmp_path / "killed")
    assert_same_training(killed, untouched)
    log = (tmp_path / "killed" / "logs" / f"{killed.name}.log").read_text()
    lines = re.findall(r" epoch +(\d+)/\d+ +train_loss", log)
    assert lines == [str(epoch + 1) for epoch in range(epochs)], f"seed {seed}"
    assert scalars(killed) == scalars(untouched), f"seed {seed}"
    assert [epoch for epoch, _ in ckpt.run_checkpoints(killed)] == list(range(epochs, 0, -1))
    assert not [path for path in killed.parent.parent.rglob("*") if path.suffix == ".tmp" or "aside" in path.name]


def newest(folder, pattern):
    """The latest modification time of the killed run's files of that name; 0 if there are none."""
    found = [0]
    for path in folder.glob(f"killed/checkpoints/*/{pattern}"):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.stat().st_mtime_ns)
    return max(found)


@pytest.mark.parametrize(("when", "at"), [("fsync", 6), ("replace", 4), ("replace", 9)])
def test_killed_in_the_middle_of_a_save(when, at, tiny, ae_run, latent_run, tmp_path):
    """SIGKILL when the file is written but not flushed, or flushed but not renamed, or renamed but not linked."""
    flags = ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16, *tiny, "--epochs", 2, "--outdir", tmp_path)
    given = (*flags, "--auto-resume", "--ckpt-every-sec", 0.001)
    killed = finish(start(LATENT, "-c", KILL_IN_SAVE, when, at, *given))
    assert killed.code == -signal.SIGKILL, killed.text
    result = call(LATENT, "train.py", *given)
    assert result.code == 0, result.text
    assert "resumed from" in result.text
    assert_same_training(only_run(tmp_path), latent_run)
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.slow
def test_ten_array_tasks_share_a_folder_are_killed_and_resumed_together(cache, tmp_path):
    base = ("--data", "embedded", "--cache-dir", cache, "--device", "cpu", "--T", 10, *SMALL)
    base = (*base, "--batch-size", 32, "--epochs", 3, "--outdir", tmp_path, "--auto-resume")
    tasks = [start(PIXEL, "train.py", *base, "--only-digit", digit, "--ckpt-every-sec", 0.01) for digit in range(10)]
    deadline = time.monotonic() + 240
    while len({path.parent for path in tmp_path.glob("checkpoints/*/*.pt")}) < 10:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for task in tasks:
        task.kill()
        finish(task)
    tasks = [start(PIXEL, "train.py", *base, "--only-digit", digit) for digit in range(10)]
    for digit, task in enumerate(tasks):
        result = finish(task, timeout=300)
        assert result.code == 0, result.text
        assert f"ddpm-d{digit}-" in result.text
        folder = only_run(tmp_path, f"ddpm-d{digit}-*")  # one run each: continued, not begun anew
        assert [row["epoch"] for row in metrics(folder)] == [1, 2, 3]


def test_a_tree_with_spaces_behind_a_symlink_copied_with_new_times(tiny, ae_run, latent_run, tmp_path):
    """--auto-resume goes by what the runs recorded, not by when a file was last written."""
    flags = ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16, *tiny)
    real, link = tmp_path / "my outputs", tmp_path / "a link"
    real.mkdir()
    link.symlink_to(real, target_is_directory=True)
    for _ in range(2):  # an older and a newer run of the same experiment
        assert call(LATENT, "train.py", *flags, "--epochs", 1, "--outdir", link).code == 0
    older, newer = sorted(path.name for path in (real / "checkpoints").iterdir())
    copy = tmp_path / "copy of all"
    shutil.copytree(real, copy, symlinks=True)
    for age, name in enumerate((older, newer)):
        for path in (copy / "checkpoints" / name).iterdir():
            os.utime(path, (2e9 - age * 1e6,) * 2, follow_symlinks=False)
    for outdir in (link, copy):
        result = call(LATENT, "train.py", *flags, "--epochs", 2, "--outdir", outdir, "--auto-resume")
        assert result.code == 0, result.text
        assert_same_training(outdir / "checkpoints" / newer, latent_run)
