"""Two processes never train one run: names are claimed exclusively, and a run in training is locked."""

import errno
import json
import multiprocessing
import os
import shutil
from time import sleep

import pytest
from helpers import LATENT, call

from common import run as run_module
from common.args import Args
from common.error_codes import RUN_LOCKED, Exit


def test_two_runs_started_in_the_same_second_get_different_names(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = pool.starmap(claim_name, [(tmp_path,)] * 4)
    assert len(set(names)) == 4
    assert len(list(tmp_path.iterdir())) == 4


def claim_name(folder):
    return run_module._claim(folder, "run")[0]


def hold(folder, ready, done):
    lock = run_module._lock(folder, 0)
    ready.set()
    done.wait(60)
    lock.close()


def test_a_run_that_is_being_trained_is_locked(latent_run, copy_of, tiny_latent, monkeypatch):
    folder = copy_of(latent_run)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(folder, ready, done))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(Exit) as caught:
            run_module._lock(folder, 0)
        assert caught.value.code == RUN_LOCKED
        assert f"process {holder.pid}" in str(caught.value)
        monkeypatch.setattr(run_module, "LOCK_PATIENCE", 0.6)
        result = call(LATENT, "train.py", "--resume", folder, "--epochs", 3)
        assert (result.code, len(result.errors)) == (RUN_LOCKED, 1), result.text
    finally:
        done.set()
        holder.join()
    run_module._lock(folder, 0).close()  # free again


def test_a_lock_is_taken_again_where_the_folder_was_deleted(tmp_path):
    folder = tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    run = run_module.Run("run", tmp_path, tmp_path / "logs", run_module._lock(folder, 0))
    assert run.lock_again() is False
    shutil.rmtree(folder)
    folder.mkdir()
    assert run.lock_again() is True
    assert run.lock_again() is False
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(lock_code, (folder,)) == RUN_LOCKED
    run.lock.close()


def test_a_failing_file_server_costs_no_lock(tmp_path, monkeypatch):
    """Any second descriptor of the lock's file, once closed, would give up the lock."""
    folder = tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    run = run_module.Run("run", tmp_path, tmp_path / "logs", run_module._lock(folder, 0))
    with monkeypatch.context() as patch:
        patch.setattr(run_module.os, "stat", stale)
        assert run.lock_again() is False
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(lock_code, (folder,)) == RUN_LOCKED
    run.lock.close()


def stale(*_args, **_how):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def lock_code(folder):
    try:
        run_module._lock(folder, 0)
    except Exit as error:
        return error.code


def test_a_folder_taken_over_before_it_was_locked_is_left_to_the_other(tmp_path, monkeypatch):
    locks = iter([Exit(RUN_LOCKED, "quicker"), "lock"])

    def lock(*_):
        if isinstance(answer := next(locks), Exit):
            raise answer
        return answer

    monkeypatch.setattr(run_module, "_lock", lock)
    monkeypatch.setattr(run_module.time, "sleep", lambda _: sleep(1))
    name, held = run_module._claim(tmp_path, "run")
    assert held == "lock"
    assert [path.name for path in sorted(tmp_path.iterdir())][-1] == name
    assert len(list(tmp_path.iterdir())) == 2


def test_looking_for_a_folder_to_take_over_locks_no_other_runs(tmp_path, monkeypatch):
    """It would keep that run's own start from it, which would then begin anew."""
    folder = tmp_path / "run-20260101-000000"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"flags": {"grad_clip": {"value": 0.1, "from": "flag"}}}))
    args = Args()
    args.grad_clip, args.kinds = 1.0, {"grad_clip": "training"}
    locked, lock = [], run_module._lock
    monkeypatch.setattr(run_module, "_lock", lambda where, patience: locked.append(where) or lock(where, patience))
    assert run_module._take_over(tmp_path, "run", args) is None
    assert locked == []
    args.grad_clip = 0.1
    name, held = run_module._take_over(tmp_path, "run", args)
    held.close()
    assert (name, locked) == (folder.name, [folder])


def test_posix_lets_a_lock_that_is_held_answer_permission_denied(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_module.fcntl, "lockf", refuse)
    with pytest.raises(Exit) as caught:
        run_module._lock(tmp_path, 0)
    assert caught.value.code == RUN_LOCKED


def test_the_lock_waits_for_a_predecessor_to_end(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready, done))
    holder.start()
    assert ready.wait(30)
    context.Process(target=lambda: (ready.wait(), done.wait(1), done.set())).start()
    run_module._lock(tmp_path, 30).close()
    holder.join()


def test_a_dead_process_holds_no_lock(latent_run, copy_of, tiny):
    folder = copy_of(latent_run)
    flags = ("--resume", folder, "--epochs", 500, *tiny)
    process = multiprocessing.get_context("fork").Process(target=call, args=(LATENT, "train.py", *flags))
    process.start()
    while not (folder / "checkpoint_epoch_000003.pt").exists():
        assert process.exitcode is None
        sleep(0.02)
    with pytest.raises(Exit):
        run_module._lock(folder, 0)
    process.kill()
    process.join()
    run_module._lock(folder, 0).close()
