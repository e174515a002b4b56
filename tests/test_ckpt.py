"""Checkpoints: written so that no crash loses one, found by what they recorded."""

import ast
import errno
import io
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import AE, LATENT, PIXEL, REPO, call, finish, make_run, newest_state, start, state_of

from common import ckpt, files
from common.data import HF_MNIST
from common.error_codes import MODEL_MISMATCH
from common.files import atomic_write

# --- writing ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 704 vs 598")])
def test_a_write_that_fails_midway_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the n")
        raise error

    with pytest.raises(OSError):  # noqa: PT011 - any OSError is what callers handle
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.pt"]


@pytest.mark.parametrize("name", [251 * "n" + ".png", 125 * "ü" + ".png"])  # of 255 bytes at most
def test_a_name_may_be_as_long_as_the_system_lets_it(name, tmp_path):
    atomic_write(tmp_path / name, lambda file: file.write(b"x"))
    assert os.listdir(tmp_path) == [name]


KILLED = """
import os, signal, sys
from common import ckpt
from common.data import HF_MNIST
ckpt.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
HF_MNIST("test", sys.argv[1], source="embedded")
"""


def test_what_a_killed_write_left_goes_with_the_next_write_beside_it(tmp_path):
    """Here of the decoded digits, which are written only once."""
    killed = finish(start(".", "-c", KILLED, tmp_path))
    folder = tmp_path / "decoded"
    assert killed.code == -signal.SIGKILL, killed.text
    assert [path.suffix for path in folder.iterdir()] == [".tmp"]
    HF_MNIST("test", tmp_path, source="embedded")
    assert [path.name for path in folder.iterdir()] == ["embedded-test.pt"]


def test_the_temporary_file_of_a_living_writer_stays(tmp_path):
    def at(age, name):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
        return name

    host, gone = files._host(), 2**22 + 1  # above any process number
    stay = {at(80_000, f".x.pt.{os.getpid()}@{host}.0123abcd.tmp"), at(80_000, f".x.pt.{gone}@another.0123abcd.tmp")}
    stay |= {at(10**6, ".x.pt.tmp"), at(10**6, ".notes.0123abcd.tmp"), at(10**6, f"x.pt.{gone}@{host}.0123abcd.tmp")}
    at(0, f".y.png.{gone}@{host}.0123abcd.tmp")
    at(90_000, f".y.png.{os.getpid()}@another.0123abcd.tmp")
    atomic_write(tmp_path / "file", lambda file: file.write(b"x"))
    assert {path.name for path in tmp_path.iterdir()} == stay | {"file"}


def test_machines_are_told_apart_by_their_whole_names(monkeypatch):
    names = ("cluster-compute-node-001", "cluster-compute-node-002")
    hosts = set()
    for name in names:
        monkeypatch.setattr(files.os, "uname", lambda name=name: SimpleNamespace(nodename=name))
        hosts.add(files._host.__wrapped__())
    assert len(hosts) == 2


def test_no_reader_takes_a_temporary_file_for_a_checkpoint(tmp_path):
    during = []
    atomic_write(tmp_path / "checkpoint_epoch_000001.pt", lambda _: during.extend(os.listdir(tmp_path)))
    assert len(during) == 1
    shutil.copy(make_run(tmp_path / "real", [1]) / "checkpoint_epoch_000001.pt", tmp_path / during[0])
    (tmp_path / "checkpoint_epoch_000001.pt").unlink()
    assert ckpt.run_checkpoints(tmp_path) == []


def test_latest_and_best_are_relative_symlinks_that_move_with_the_tree(tmp_path):
    run = tmp_path / "run"
    for epoch, best in ((1, 1), (2, 2), (3, 2)):
        state = state_of(epoch, best={"epoch": best, "val_loss": 0.1})
        ckpt.save_checkpoint_and_link_latest(run, state)
    assert os.readlink(run / "latest.pt") == "checkpoint_epoch_000003.pt"
    assert os.readlink(run / "best.pt") == "checkpoint_epoch_000002.pt"
    moved = run.rename(tmp_path / "elsewhere")
    for name, epoch in {"latest": 3, "latest.pt": 3, "best": 2, "best.pt": 2, "": 3}.items():
        assert ckpt.load_checkpoint(moved / name)["epoch"] == epoch, name


def test_latest_is_a_copy_where_symlinks_are_not_allowed(tmp_path, monkeypatch):
    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(os, "symlink", forbidden)
    make_run(tmp_path / "run")
    assert not (tmp_path / "run" / "latest.pt").is_symlink()
    assert ckpt.read_checkpoint(tmp_path / "run" / "latest.pt")["epoch"] == 3


def test_nothing_loads_without_weights_only():
    calls = [
        ast.unparse(node)
        for folder in ("common", AE, LATENT, PIXEL)
        for path in (REPO / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads")
    ]
    assert calls
    assert all("weights_only=True" in call for call in calls), calls


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_every": 3}, [8, 6, 4, 3]),
        ({"keep_last": 2}, [8, 7, 4]),
        ({"keep_last": 1}, [8, 4]),
        ({"keep_last": 2, "keep_every": 3}, [8, 6, 4]),
        ({"keep_last": 20}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({}, [8, 7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_prune_never_removes_the_newest_and_the_best(options, kept, tmp_path):
    run = make_run(tmp_path / "run", range(1, 9))
    ckpt.prune(run, best_epoch=4, **options)
    assert [epoch for epoch, _ in ckpt.run_checkpoints(run)] == kept


def test_a_checkpoint_is_saved_even_if_nothing_can_link_to_it(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = make_run(tmp_path / "run", [1])
    monkeypatch.setattr(os, "symlink", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert ckpt.read_checkpoint(ckpt.save_checkpoint_and_link_latest(run, state_of(2)))["epoch"] == 2
    assert os.readlink(run / "latest.pt") == "checkpoint_epoch_000001.pt"  # as it was


def test_set_aside_renames_later_epochs(tmp_path):
    run = make_run(tmp_path / "run")
    aside = ckpt.set_aside(run, after=1)
    assert [epoch for epoch, _ in ckpt.run_checkpoints(run)] == [1]
    assert sorted(ckpt.read_file(path)["epoch"] for path in aside) == [2, 3]


def test_a_trained_checkpoint_holds_what_design_names(ae_run, latent_run):
    keys = {"model", "ema", "optimizer", "scaler", "epoch", "global_step", "batch", "args", "exp_name", "timestamp"}
    keys |= {"train_loss", "val_loss", "best", "format"}
    for run, model in ((ae_run, "ae-mlp"), (latent_run, "lddpm")):
        state = torch.load(run / "latest.pt", weights_only=True)
        assert keys <= state.keys()
        assert state["args"]["model"] == model == ckpt.infer_model_from_checkpoint(run)
        assert (state["epoch"], state["exp_name"]) == (2, run.name)
        assert ckpt.is_complete(state)
    assert {"ae_model", "ae_latent_dim", "ae_only_digit", "ae_ckpt"} <= state["args"].keys()
    assert os.path.isabs(state["args"]["ae_ckpt"])
    assert state["ae_ckpt_data"]["args"]["model"] == "ae-mlp"


# --- finding ---


def test_newest_by_recorded_time_not_by_mtime(tmp_path):
    for name, day in (("run-s1-a", 3), ("run-s1-b", 1), ("run-s2-c", 9)):
        make_run(tmp_path / name, [1], time=f"2026-01-0{day}T00:00:00+00:00")
    for age, name in enumerate(("run-s1-b", "run-s2-c", "run-s1-a")):  # the oldest by content is the youngest file
        for path in (tmp_path / name).iterdir():
            os.utime(path, (1e9 - age * 1e6,) * 2, follow_symlinks=False)
    found = {prefix: ckpt.find_latest_checkpoint(tmp_path, prefix) for prefix in ("run-s1-", "run-*-", "", "run-s3-")}
    names = {prefix: path and path.parent.name for prefix, path in found.items()}
    assert names == {"run-s1-": "run-s1-a", "run-*-": None, "": "run-s2-c", "run-s3-": None}


def test_dangling_and_cyclic_latest(tmp_path):
    for target in ("checkpoint_epoch_000009.pt", "latest.pt"):
        run = make_run(tmp_path / target)
        (run / "latest.pt").unlink()
        (run / "latest.pt").symlink_to(target)
        assert ckpt.open_checkpoint(run)[0].name == "checkpoint_epoch_000003.pt"
        assert ckpt.find_latest_checkpoint(tmp_path, target).name == "checkpoint_epoch_000003.pt"
        with pytest.raises(ckpt.UnreadableCheckpoint):
            ckpt.open_checkpoint(run / "latest.pt")
        warnings = []
        resumed = ckpt.resolve_resume_path(str(run / "latest.pt"), False, tmp_path, "run-", warnings.append)
        assert resumed.name == "checkpoint_epoch_000003.pt"
        assert len(warnings) == 1
        assert "latest.pt: it points to no file" in warnings[0]


def test_resume_path(tmp_path):
    run = make_run(tmp_path / "checkpoints" / "run-a")
    other = make_run(tmp_path / "checkpoints" / "run-b", time="2026-02-02T00:00:00+00:00")
    first, last = run / "checkpoint_epoch_000001.pt", run / "checkpoint_epoch_000003.pt"

    def resolve(resume, auto, prefix="run-"):
        return ckpt.resolve_resume_path(resume and str(resume), auto, run.parent, prefix)

    assert resolve(None, False) is None
    assert resolve(None, True) == other / "checkpoint_epoch_000003.pt"
    assert resolve(None, True, "nothing-") is None
    assert resolve(first, False) == first
    assert resolve(first, True) == last  # a requeued job with both flags goes on, not back
    assert resolve(run, False) == last
    assert resolve(run / "latest.pt", False) == last
    with pytest.raises(ckpt.UnreadableCheckpoint):
        resolve(tmp_path / "nowhere", False)
    with pytest.raises(ckpt.UnreadableCheckpoint):
        resolve(tmp_path / "nowhere", True)


def test_resume_through_a_symlink_to_the_runs_folder_is_that_run(tmp_path):
    run = make_run(tmp_path / "checkpoints" / "run-a")
    (tmp_path / "shortcut").symlink_to(run)
    found = ckpt.resolve_resume_path(str(tmp_path / "shortcut"), False, run.parent, "run-")
    assert found == run / "checkpoint_epoch_000003.pt"


def test_the_best_that_was_saved_stays_when_a_better_one_could_not_be(tmp_path):
    for epoch in (1, 2):
        ckpt.save_checkpoint_and_link_latest(tmp_path, state_of(epoch, best={"epoch": epoch, "val_loss": 1 / epoch}))
    state = state_of(4, best={"epoch": 3, "val_loss": 0.1})  # epoch 3 was better, and its save failed
    ckpt.save_checkpoint_and_link_latest(tmp_path, state)
    ckpt.prune(tmp_path, keep_last=1, best_epoch=3)
    assert [epoch for epoch, _ in ckpt.run_checkpoints(tmp_path)] == [4, 2]
    ckpt.save_checkpoint(tmp_path / "checkpoint_epoch_000003.pt", state_of(3, val_loss=None))  # within its epoch
    ckpt.relink(tmp_path, state)
    assert (tmp_path / "best.pt").resolve().name == "checkpoint_epoch_000002.pt"
    (tmp_path / "checkpoint_epoch_000003.pt").write_bytes(b"damaged")  # no reason not to go on from epoch 4
    ckpt.relink(tmp_path, state)
    assert (tmp_path / "best.pt").resolve().name == "checkpoint_epoch_000002.pt"


def test_a_link_that_could_not_be_made_is_made_by_the_next_save(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EDQUOT, "no inode left")

    best = {"epoch": 2, "val_loss": 0.1}
    ckpt.save_checkpoint_and_link_latest(tmp_path, state_of(1, best={"epoch": 1, "val_loss": 0.2}))
    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "link", fails)
        ckpt.save_checkpoint_and_link_latest(tmp_path, state_of(2, best=best))
    assert os.readlink(tmp_path / "best.pt") == "checkpoint_epoch_000001.pt"
    ckpt.save_checkpoint_and_link_latest(tmp_path, state_of(3, best=best))
    assert os.readlink(tmp_path / "best.pt") == "checkpoint_epoch_000002.pt"
    assert os.readlink(tmp_path / "latest.pt") == "checkpoint_epoch_000003.pt"


def test_without_symlinks_the_best_is_copied_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no symlinks on this file system")

    copied, copy = [], files.shutil.copyfile
    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(files.shutil, "copyfile", lambda a, b: copied.append(Path(a).name) or copy(a, b))
    for epoch in (1, 2, 3):
        ckpt.save_checkpoint_and_link_latest(tmp_path, state_of(epoch, best={"epoch": 1, "val_loss": 0.1}))
    assert [name[-4] for name in copied] == ["1", "1", "2", "3"]  # latest.pt and best.pt, then latest.pt
    assert ckpt.read_checkpoint(tmp_path / "best.pt")["epoch"] == 1


@pytest.mark.parametrize("known", [True, False])
def test_a_file_server_that_fails_for_a_moment_takes_no_link_away(known, tmp_path, monkeypatch):
    """`Path.exists` and `is_file` call that a no, from Python 3.14 on."""
    state = state_of(1, best={"epoch": 1, "val_loss": 0.1})
    ckpt.save_checkpoint_and_link_latest(tmp_path, state)
    state["best"] = state["best"] if known else None

    def stat(path, **_how):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        for asks in ("exists", "is_file"):
            patch.setattr(Path, asks, lambda _self: False)
        with pytest.raises(OSError, match="Input/output"):
            ckpt.relink(tmp_path, state)
    assert [(tmp_path / name).resolve().name for name in (ckpt.LATEST, ckpt.BEST)] == ["checkpoint_epoch_000001.pt"] * 2


def test_macos_is_asked_to_flush_the_drive_too(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda _descriptor, what: asked.append(what))
    atomic_write(tmp_path / "file", lambda file: file.write(b"x"))
    assert asked == [51, 51]  # the file and its folder


def failing(monkeypatch, names, times=10**9):
    """Reading files whose names contain one of `names` fails that often as a file server does; returns the failures."""
    failures, read_bytes = [], Path.read_bytes

    def read(path):
        if any(name in path.name for name in names) and len(failures) < times:
            failures.append(path)
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    return failures


def test_a_fault_that_passes_is_waited_for(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run-a")
    failures = failing(monkeypatch, ["000003"], times=3)
    assert ckpt.newest_readable(run, pytest.fail)[0].name == "checkpoint_epoch_000003.pt"
    assert len(failures) == 3


def test_a_disk_that_goes_on_failing_begins_nothing_anew_and_goes_back_to_no_older_file(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run-a")
    failing(monkeypatch, ["000003"])
    monkeypatch.setattr(ckpt, "PATIENCE", 0.1)
    for read in (
        lambda: ckpt.newest_readable(run, pytest.fail),
        lambda: ckpt.resolve_resume_path(None, True, tmp_path, "run-", pytest.fail),
        lambda: ckpt.resolve_resume_path(str(run), False, tmp_path, "run-", pytest.fail),
    ):
        with pytest.raises(ckpt.UnreadableCheckpoint, match="Stale file handle"):
            read()


def test_a_glance_tells_a_failing_disk_from_a_damaged_file(tmp_path, monkeypatch):
    """zipfile takes an error of the disk where it looks for an archive's end for a file that is no archive."""
    path = make_run(tmp_path / "run-a", [1]) / "checkpoint_epoch_000001.pt"

    class Failing(io.FileIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda file, *_, **__: Failing(file))
    monkeypatch.setattr(ckpt, "PATIENCE", 0.1)
    with pytest.raises(ckpt.UnreadableCheckpoint, match="Input/output error") as caught:
        ckpt.peek_checkpoint(path)
    assert caught.value.passing


def test_a_file_that_is_pruned_between_listing_and_reading_is_looked_for_again(tmp_path, monkeypatch):
    """As a run with --keep-ckpts 1 prunes it while somebody reads."""
    run, list_checkpoints = make_run(tmp_path / "run", [1]), ckpt.run_checkpoints
    epochs = iter(range(2, 6))

    def listed(folder):
        found = list_checkpoints(folder)
        if epoch := next(epochs, None):
            make_run(run, [epoch])
            ckpt.prune(run, keep_last=1, best_epoch=None)
        return found

    monkeypatch.setattr(ckpt, "run_checkpoints", listed)
    path, state = ckpt.open_checkpoint(run, pytest.fail)
    assert (path.name, state["epoch"]) == ("checkpoint_epoch_000005.pt", 5)


def test_a_file_that_is_pruned_between_two_looks_at_it_is_looked_for_again(tmp_path, monkeypatch):
    run, look, pruned = make_run(tmp_path / "run", [1, 2]), os.stat, []

    def look_and_prune(path, **how):
        found = look(path, **how)
        if str(path).endswith("000002.pt") and not pruned:
            pruned.append(path)
            make_run(run, [3])
            os.unlink(path)
        return found

    for read in (ckpt.read_checkpoint, ckpt.peek_checkpoint):
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", look_and_prune)
            assert ckpt.open_checkpoint(run, pytest.fail, read)[0].name == "checkpoint_epoch_000003.pt"
        assert pruned.pop()
        make_run(run, [2])
        (run / "checkpoint_epoch_000003.pt").unlink()
    assert files.no_file(run) == "is a folder, not a file"


def test_the_other_kind_of_model_is_refused(ae_run, latent_run, tiny, tmp_path):
    places = (*tiny, "--outdir", tmp_path)
    for folder, script, args in (
        (LATENT, "infer.py", ("--ckpt", ae_run)),
        (LATENT, "infer.py", ("--ckpt", latent_run, "--ae-ckpt", latent_run)),
        (LATENT, "train.py", ("--ae-ckpt", latent_run, *places)),
        (LATENT, "train.py", ("--resume", ae_run, "--epochs", 9)),
        (AE, "infer.py", ("--ckpt", latent_run)),
        (AE, "train.py", ("--resume", latent_run, "--epochs", 9)),
        (AE, "train.py", ("--resume", latent_run, "--model", "mlp", "--epochs", 9)),
    ):
        result = call(folder, script, *args)
        assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), (args, result.text)
    assert newest_state(latent_run)["epoch"] == 2


def test_that_a_job_goes_on_and_not_back_is_said(tmp_path):
    run, warned = make_run(tmp_path / "run"), []
    for named, lines in (("checkpoint_epoch_000001.pt", 1), ("checkpoint_epoch_000003.pt", 0), ("latest.pt", 0)):
        found = ckpt.resolve_resume_path(str(run / named), True, tmp_path, "run", warned.append)
        assert (found.name, len(warned)) == ("checkpoint_epoch_000003.pt", lines), warned
        warned.clear()
