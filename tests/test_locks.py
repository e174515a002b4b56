"""Two processes never train one run: names are claimed exclusively, and a run in training is locked."""

import multiprocessing

import pytest
from helpers import LATENT, call, finish, start

from common import run as run_module
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
    process = start(LATENT, "train.py", *flags)
    while not (folder / "checkpoint_epoch_000004.pt").exists():
        assert process.poll() is None, process.communicate()[0]
    process.kill()
    finish(process)
    run_module._lock(folder, 0).close()
