"""Two processes never train one run: names are claimed exclusively, and a run in training is locked."""

import errno
import json
import multiprocessing
import os
import shutil
from time import sleep

import pytest
from helpers import AE, LATENT, call, newest_state, state_of

from common import ckpt, files
from common import run as run_module
from common.args import AUTO, Args
from common.error_codes import BAD_OUTPUT, OK, RUN_LOCKED, Exit
from common.files import alone_in
from common.session import Session


def test_two_runs_started_in_the_same_second_get_different_names(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = pool.starmap(claim_name, [(tmp_path,)] * 4)
    assert len(set(names)) == 4
    assert len(list(tmp_path.iterdir())) == 4


def claim_name(folder):
    return claim(folder)[0]


def open_at_once(outdir, all_here, done, codes, patience=0.1):
    """Begins or resumes a run with --auto-resume, exactly when the others do; holds it for as long as they look."""
    args = plain_args(lr=1.0)
    args.outdir, args.logdir, args.resume, args.auto_resume, args.model = outdir, None, None, True, "ae-mlp"
    args.kinds["outdir"], args.origin = "place", dict.fromkeys(("outdir", "lr"), "default")
    args.defaults = {}
    run_module.LOCK_PATIENCE = patience
    here = (lambda _: None, lambda _: all_here.wait(60))  # settle() is the last thing before a run is claimed
    try:
        run = run_module.open_run(args, lambda _: "run", ("ae-mlp",), print, *here)
        codes.put(OK)
        done.wait(60)
        run.lock.close()
    except Exit as end:
        codes.put(end.code)


def test_of_equal_starts_at_the_same_moment_one_begins_a_run(tmp_path):
    context = multiprocessing.get_context("fork")
    all_here, done, codes = context.Barrier(3), context.Event(), context.Queue()
    processes = [context.Process(target=open_at_once, args=(tmp_path, all_here, done, codes)) for _ in range(3)]
    for process in processes:
        process.start()
    ended = sorted(codes.get(timeout=60) for _ in processes)
    done.set()
    for process in processes:
        process.join(60)
    assert ended == [OK, RUN_LOCKED, RUN_LOCKED]
    assert len(os.listdir(tmp_path / "checkpoints")) == 1


def claim(folder, logs=None):
    return run_module._claim(folder, "run", logs or folder.parent / "logs", plain_args(lr=1.0))


def plain_args(**values):
    args = Args()
    args.kinds = dict.fromkeys(values, "training")
    args.auto_resume = True
    for name, value in values.items():
        setattr(args, name, value)
    return args


def hold(folder, ready, done, saved=None):
    lock = run_module._lock(folder, 0)
    ready.set()
    done.wait(60)
    for path in saved.iterdir() if saved else ():
        path.rename(folder / path.name)
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


def test_a_lock_is_taken_again_where_the_folder_was_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    run = run_module.Run("run", tmp_path, tmp_path / "logs", run_module._lock(folder, 0))
    assert run.lock_again() is False
    shutil.rmtree(folder)
    folder.mkdir()
    assert run.lock_again() is True
    assert run.lock_again() is False
    (folder / run_module.LOCK).unlink()
    failing = ckpt.UnreadableCheckpoint(folder, "Input/output error", OSError(errno.EIO, "Input/output error"))
    with monkeypatch.context() as patch:  # that it cannot be found out is a save that fails, not the end
        patch.setattr(ckpt, "newest_readable", lambda *_: (_ for _ in ()).throw(failing))
        with pytest.raises(OSError, match="Input/output error"):
            run.hold((1, 1), print)
    assert [run.hold((1, 1), print) for _ in range(2)] == [True, False]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(lock_code, (folder,)) == RUN_LOCKED
    run.lock.close()


@pytest.mark.parametrize("moment", ["step", "validate"])
@pytest.mark.parametrize("taken", [True, False], ids=["while it trains", "after it ended"])
def test_a_run_whose_lock_was_deleted_leaves_it_to_who_took_it(taken, moment, tiny, tmp_path, monkeypatch):
    """Nothing of the other's is overwritten, pruned or written into."""
    flags = ("--model", "mlp", *tiny, "--outdir", tmp_path, "--keep-ckpts", 1)
    flags += ("--ckpt-every-sec", 1e-3) if moment == "step" else ()  # saves between two steps
    held = []

    def meanwhile(session):
        if session.epoch == 2 and not held:
            folder = session.run.checkpoints
            newest = folder / "checkpoint_epoch_000001.pt"
            ckpt.save_checkpoint(folder / "checkpoint_epoch_000009.pt", ckpt.read_checkpoint(newest) | {"epoch": 9})
            (folder / run_module.LOCK).unlink()
            held.append({path.name: path.read_bytes() for path in folder.iterdir()})
            if taken:  # by another process: within one there is a single lock
                monkeypatch.setattr(run_module.fcntl, "lockf", blocked)

    def blocked(*_args):
        raise BlockingIOError

    work = getattr(Session, moment)
    monkeypatch.setattr(Session, moment, lambda self, *how: (meanwhile(self), work(self, *how))[1])
    result = call(AE, "train.py", *flags, "--epochs", 3)
    assert result.code == RUN_LOCKED, result.text
    (folder,) = (tmp_path / "checkpoints").iterdir()
    now = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != run_module.LOCK}
    assert now == held[0]


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


def test_a_lock_names_its_holder_and_nobody_before(tmp_path):
    (tmp_path / run_module.LOCK).write_text("process 12345678 on a-machine-of-a-very-long-name.example.org")
    with run_module._lock(tmp_path, 0) as held:
        held.seek(0)
        assert held.read() == f"process {os.getpid()} on {os.uname().nodename}"


def stale(*_args, **_how):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def lock_code(folder):
    try:
        run_module._lock(folder, 0)
    except Exit as error:
        return error.code


def test_a_folder_taken_over_before_it_was_locked_is_left_to_the_other(tmp_path, monkeypatch):
    locks = iter([Exit(RUN_LOCKED, "quicker"), "lock"])

    def lock(*_, **__):
        if isinstance(answer := next(locks), Exit):
            raise answer
        return answer

    monkeypatch.setattr(run_module, "_lock", lock)
    monkeypatch.setattr(run_module.time, "sleep", lambda _: sleep(1))
    (tmp_path / "checkpoints").mkdir()
    name, held = claim(tmp_path / "checkpoints")
    assert held == "lock"
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())][-1] == name
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_looking_for_a_folder_to_take_over_locks_no_other_runs(tmp_path, monkeypatch):
    """It would keep that run's own start from it, which would then begin anew."""
    folder = tmp_path / "run-20260101-000000"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"flags": {"grad_clip": {"value": 0.1, "from": "flag"}}}))
    args = plain_args(grad_clip=1.0)
    locked, lock = [], run_module._lock
    monkeypatch.setattr(
        run_module, "_lock", lambda where, *how, **more: locked.append(where) or lock(where, *how, **more)
    )
    assert run_module._take_over(tmp_path, "run", args) is None
    assert locked == []
    args.grad_clip = 0.1
    name, held = run_module._take_over(tmp_path, "run", args)
    held.close()
    assert (name, locked) == (folder.name, [folder])


def test_where_there_are_no_locks_nothing_is_taken_over(tmp_path, monkeypatch):
    """Nobody can tell a dead run's folder from one in which another member of the sweep trains."""
    (tmp_path / "checkpoints").mkdir()
    name, held = claim(tmp_path / "checkpoints")
    held.close()
    monkeypatch.setattr(run_module.fcntl, "lockf", no_locks)
    assert run_module._take_over(tmp_path / "checkpoints", "run", plain_args(lr=1.0)) is None
    monkeypatch.undo()
    taken, held = run_module._take_over(tmp_path / "checkpoints", "run", plain_args(lr=1.0))
    held.close()
    assert taken == name


def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_folder_says_at_once_whose_it_is_and_is_left_alone_until_it_does(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    name, held = claim(tmp_path / "checkpoints")
    held.close()
    folder = tmp_path / "checkpoints" / name
    assert json.loads((folder / "config.json").read_text())["starts"] == []
    (folder / "config.json").unlink()
    assert run_module._take_over(tmp_path / "checkpoints", "run", plain_args(lr=1.0)) is None
    os.utime(folder, (0, 0))
    taken, held = run_module._take_over(tmp_path / "checkpoints", "run", plain_args(lr=1.0))
    held.close()
    assert taken == name


def test_the_same_command_waits_for_its_run_that_has_not_saved_yet(
    latent_run, tiny_latent, copy_of, tmp_path, monkeypatch
):
    """It is refused while that trains, and goes on with what that has saved when it ends."""
    begun = copy_of(latent_run)
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in begun.glob("*.pt"):
        path.rename(aside / path.name)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(begun, ready, done, aside))
    holder.start()
    flags = (*tiny_latent, "--amp", "--auto-resume", "--outdir", begun.parent.parent, "--epochs", 3)
    try:
        assert ready.wait(30)
        monkeypatch.setattr(run_module, "LOCK_PATIENCE", 0.6)
        result = call(LATENT, "train.py", *flags)
        assert (result.code, f"process {holder.pid}" in result.text) == (RUN_LOCKED, True), result.text
        monkeypatch.setattr(run_module, "LOCK_PATIENCE", 30.0)
        monkeypatch.setattr(run_module.time, "sleep", lambda seconds: done.set() or sleep(seconds))
        result = call(LATENT, "train.py", *flags)
        assert (result.code, "resumed from" in result.text) == (0, True), result.text
    finally:
        done.set()
        holder.join()
    assert [path.name for path in begun.parent.iterdir()] == [begun.name]


def test_another_member_of_a_sweep_is_not_waited_for_while_its_flags_are_not_all_known(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    begun = run_module._claim(tmp_path / "checkpoints", "run", tmp_path / "logs", plain_args(shards=AUTO))
    begun[1].close()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(tmp_path / "checkpoints" / begun[0], ready, done))
    holder.start()
    try:
        assert ready.wait(30)
        assert run_module._take_over(tmp_path / "checkpoints", "run", plain_args(shards=2)) is None
    finally:
        done.set()
        holder.join()


@pytest.mark.parametrize("happens", ["ends in vain", "is deleted and made anew", "becomes another's"])
def test_what_became_of_a_folder_while_it_was_waited_for(happens, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    name, held = claim(tmp_path / "checkpoints")
    held.close()
    folder = tmp_path / "checkpoints" / name
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(folder, ready, done))
    holder.start()
    assert ready.wait(30)

    def meanwhile(_seconds):
        if happens == "becomes another's":
            (folder / "config.json").write_text(json.dumps({"flags": {"lr": {"value": 2.0, "from": "flag"}}}))
        elif folder.exists():
            shutil.rmtree(folder)
            if happens == "is deleted and made anew":
                folder.mkdir()
        done.set()
        holder.join()

    monkeypatch.setattr(run_module.time, "sleep", meanwhile)
    where = (tmp_path / "checkpoints", "run", tmp_path / "logs")
    found, (mine, lock) = run_module._found_or_claimed(plain_args(lr=1.0), *where, ("ae-mlp",))
    lock.close()
    assert done.is_set()
    assert (found, mine != name or happens == "ends in vain") == (None, True)


def test_nobody_waits_for_who_waits_for_another_run(tmp_path):
    """While a start waits for the end of an equal one, those of other runs begin theirs."""
    context = multiprocessing.get_context("fork")
    done, codes = context.Event(), context.Queue()
    here = [context.Barrier(1), done, codes]
    first = context.Process(target=open_at_once, args=(tmp_path, *here))
    first.start()
    assert codes.get(timeout=60) == OK
    second = context.Process(target=open_at_once, args=(tmp_path, *here), kwargs={"patience": 60})
    second.start()
    sleep(1.5)  # it waits by now
    with alone_in(tmp_path / "checkpoints"):
        assert second.is_alive()
        done.set()  # the first one ends in vain
        first.join(60)
        sleep(1)
        assert codes.empty()
    assert codes.get(timeout=60) == OK  # the second has taken it over
    second.join(60)


def test_what_is_saved_just_as_folders_are_looked_at_is_found(tmp_path, monkeypatch):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()

    def meanwhile(*_):
        state = state_of(1, args={"model": "ae-mlp", "lr": 1.0})
        ckpt.save_checkpoint_and_link_latest(checkpoints / "run-20260101-000000", state)

    monkeypatch.setattr(run_module, "_take_over", meanwhile)
    found, claimed = run_module._found_or_claimed(
        plain_args(lr=1.0), checkpoints, "run", tmp_path / "logs", ("ae-mlp",)
    )
    assert (found[0].parent.name, claimed) == ("run-20260101-000000", None)


def test_a_folder_of_the_dead_is_left_where_an_equal_run_has_saved_meanwhile(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    claim(checkpoints)[1].close()
    ckpt.save_checkpoint_and_link_latest(
        checkpoints / "run-20260101-000000", state_of(1, args={"model": "ae-mlp", "lr": 1.0})
    )
    (path, _), claimed = run_module._found_or_claimed(
        plain_args(lr=1.0), checkpoints, "run", tmp_path / "logs", ("ae-mlp",)
    )
    assert (path.parent.name, claimed) == ("run-20260101-000000", None)


def test_the_lock_of_a_file_that_was_deleted_is_none(tmp_path, monkeypatch):
    """Who made the folder anew has that of the new file."""
    lockf, calls = run_module.fcntl.lockf, []

    def as_it_is_deleted(*how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(lockf(*how))

    monkeypatch.setattr(run_module.fcntl, "lockf", as_it_is_deleted)
    with run_module._lock(tmp_path, 0) as file:
        assert os.path.samestat(os.stat(tmp_path / ".lock"), os.fstat(file.fileno()))


def test_runs_with_one_logdir_have_a_log_each(tmp_path, monkeypatch):
    """Else one would cut the other's, or delete it."""
    for name in "ab":
        (tmp_path / name).mkdir()
    claims = [claim(tmp_path / name, tmp_path / "logs") for name in "ab"]
    assert len({name for name, _ in claims}) == 2
    assert len(list((tmp_path / "logs").iterdir())) == 2
    assert [len(list((tmp_path / name).iterdir())) for name in "ab"] == [1, 1]
    for _, held in claims:
        held.close()


def test_a_disk_that_is_full_at_the_claim_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_module.os, "write", full)
    run_module._lock(tmp_path, 0).close()
    monkeypatch.setattr(run_module.Path, "mkdir", full)
    with pytest.raises(Exit, match="No space left") as caught:
        claim(tmp_path)
    assert caught.value.code == BAD_OUTPUT


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


@pytest.mark.parametrize("place", ["", "latest", "checkpoint_epoch_000001.pt"])
def test_a_resume_takes_what_was_saved_while_it_waited_unless_it_names_one_checkpoint(
    place, latent_run, copy_of, tmp_path, monkeypatch
):
    folder, lock = copy_of(latent_run), run_module._lock
    newest = (folder / "checkpoint_epoch_000002.pt").rename(tmp_path / "newest.pt")
    ckpt.relink(folder, ckpt.read_checkpoint(folder / "checkpoint_epoch_000001.pt"))

    def lock_at_last(*what):
        newest.rename(folder / "checkpoint_epoch_000002.pt")
        return lock(*what)

    monkeypatch.setattr(run_module, "_lock", lock_at_last)
    result = call(LATENT, "train.py", "--resume", folder / place, "--epochs", 2, "--device", "cpu")
    assert ("already finished" in result.text) == (not place.startswith("checkpoint")), result.text
    assert newest_state(folder)["epoch"] == 2


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


def count_up(path):
    for _ in range(20):
        with alone_in(path.parent):
            before = int(path.read_text())
            sleep(0.001)
            path.write_text(str(before + 1))


def test_one_process_at_a_time_is_alone_in_a_folder(tmp_path):
    (tmp_path / "count").write_text("0")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(count_up, [tmp_path / "count"] * 4)
    assert (tmp_path / "count").read_text() == "80"


def test_nobody_waits_for_long_to_be_alone(tmp_path, monkeypatch):
    """One that hangs in its block costs the others no figure."""
    monkeypatch.setattr(files, "ALONE_PATIENCE", 0.2)
    with alone_in(tmp_path), alone_in(tmp_path):
        pass
