"""A run is what it does, not what it is called: which run, and which autoencoder, a start means."""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import (
    AE,
    LATENT,
    PIXEL,
    REPO,
    assert_same_training,
    call,
    finish,
    newest_state,
    only_run,
    start,
)

from common import ckpt
from common.error_codes import BAD_CHECKPOINT, MODEL_MISMATCH, OK, STOPPED_EARLY
from common.session import Session


def fork(folder, *args) -> multiprocessing.Process:
    """A training in a process of its own, which begins at once: a fork of this one."""

    def train():
        result = call(folder, "train.py", *args)
        print(result.text, file=sys.stderr, flush=True)
        sys.exit(result.code)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    return process


def runs(outdir, pattern="*"):
    """The folders of the runs in an output folder."""
    return list((outdir / "checkpoints").glob(f"{pattern}/"))


@pytest.fixture(scope="module")
def all_digits(cache, tmp_path_factory):
    """(flags of a latent training, without its autoencoder's or a digit; the run of an autoencoder of all digits)."""
    rate = ("--lr", 1e-3, "--lr-scheduler", "none", "--batch-size", 256, "--device", "cpu")
    flags = ("--data", "embedded", "--cache-dir", cache, *rate)
    outdir = tmp_path_factory.mktemp("all-digits")
    result = call(AE, "train.py", "--model", "mlp", "--epochs", 1, "--outdir", outdir, *flags)
    assert result.code == 0, result.text
    return (*flags, "--T", 20, "--hidden-dim", 16), only_run(outdir)


# --- runs ---


@pytest.mark.parametrize("named", [True, False])
def test_a_run_of_one_digit_is_not_the_run_of_all(named, all_digits, tmp_path):
    flags, autoencoder = all_digits
    where = ("--ae-ckpt", autoencoder) if named else ()
    if not named:
        shutil.copytree(autoencoder, tmp_path / "checkpoints" / autoencoder.name, symlinks=True)
    given = (*where, *flags, "--epochs", 1, "--outdir", tmp_path, "--auto-resume")
    assert call(LATENT, "train.py", *given, "--only-digit", 3).code == 0
    result = call(LATENT, "train.py", *given)
    assert result.code == 0, result.text
    digits = [newest_state(folder)["args"]["only_digit"] for folder in runs(tmp_path, "lddpm*")]
    assert sorted(digits, key=str) == [3, None]
    assert re.search(r"Passed over lddpm-\S*, the newest, which has --only-digit 3, not (all|auto)", result.text)
    for digit, more in ((3, ("--only-digit", 3)), ("all", ())):
        again = call(LATENT, "train.py", *given, *more)
        assert f"-d{digit}-" in re.search(r"(lddpm-\S*) is already finished", again.text)[1], again.text


def test_two_widths_in_one_folder_are_stopped_and_each_goes_on_with_its_own(tiny, tmp_path):
    given = (*tiny, "--T", 20, "--outdir", tmp_path, "--auto-resume")
    widths = (8, 16)
    both = [fork(PIXEL, *given, "--base-ch", width, "--epochs", 500) for width in widths]
    deadline = time.monotonic() + 120
    while len({path.parent for path in tmp_path.glob("checkpoints/*/*.pt")}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in both:
        process.terminate()
    for process in both:
        process.join(60)
        assert process.exitcode == STOPPED_EARLY
    reached = {newest_state(folder)["args"]["base_ch"]: newest_state(folder)["epoch"] for folder in runs(tmp_path)}
    for width in widths:
        result = call(PIXEL, "train.py", *given, "--base-ch", width, "--epochs", reached[width] + 1)
        assert result.code == 0, result.text
        assert "resumed from" in result.text
    done = {newest_state(folder)["args"]["base_ch"]: newest_state(folder)["epoch"] for folder in runs(tmp_path)}
    assert done == {width: reached[width] + 1 for width in widths}


def test_a_flag_that_is_not_in_the_name_makes_another_run(tiny, tmp_path):
    given = ("--model", "mlp", *tiny, "--epochs", 1, "--outdir", tmp_path, "--auto-resume")
    assert call(AE, "train.py", *given).code == 0
    (first,) = runs(tmp_path)
    result = call(AE, "train.py", *given, "--lr-scheduler", "cosine", "--epochs", 2)
    assert result.code == 0, result.text
    assert "already finished" not in result.text
    said = f"Passed over {first.name}, the newest, which has --lr-scheduler none, not cosine; go on with it: "
    assert said in result.text
    assert len(runs(tmp_path)) == 2
    pasted = paste(result.text.split(said)[1].splitlines()[0])
    assert pasted.code == 0, pasted.text
    assert newest_state(first)["epoch"] == 2
    assert call(AE, "train.py", *given, "--no-auto-resume").code == 0
    assert len(runs(tmp_path)) == 3


def test_a_value_that_a_run_did_not_know_yet_is_its_default(ae_run, copy_of, tiny):
    folder = copy_of(ae_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        del state["args"]["grad_clip"]
        ckpt.save_checkpoint(path, state)
    given = ("--model", "mlp", "--epochs", 2, *tiny, "--outdir", folder.parent.parent, "--auto-resume")
    assert "already finished" in call(AE, "train.py", *given).text
    assert "has --grad-clip 1.0, not 0.5" in call(AE, "train.py", *given, "--grad-clip", 0.5).text


@pytest.mark.parametrize("how", ["--resume", "--auto-resume"])
def test_a_run_behind_a_symlink_keeps_its_name_and_its_record(how, ae_run, copy_of, tiny, tmp_path):
    run, linked = copy_of(ae_run), tmp_path / "other" / "checkpoints" / "link"
    linked.parent.mkdir(parents=True)
    linked.symlink_to(run)
    which = (how, linked) if how == "--resume" else (how, "--outdir", tmp_path / "other")
    result = call(AE, "train.py", "--model", "mlp", *tiny, "--epochs", 3, *which)
    assert result.code == 0, result.text
    assert newest_state(run)["exp_name"] == run.name
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["checkpoints"]
    assert "the end: epoch 3 of 3" in (run.parent.parent / "logs" / f"{run.name}.log").read_text()


def test_a_copy_with_auto_resume_goes_on_with_the_run_that_it_began(ae_run, tiny, tmp_path):
    """As a job does that was submitted with --resume COPY and is requeued: on, not from the start again."""
    copied = shutil.copy(ae_run / "checkpoint_epoch_000001.pt", tmp_path / "mine.pt")
    older = ckpt.read_checkpoint(copied) | {"timestamp": "2020-01-01T00:00:00+00:00"}  # so not begun from the copy
    older["args"]["lr"] = 2e-3
    ckpt.save_checkpoint(tmp_path / "checkpoints" / "older" / "checkpoint_epoch_000001.pt", older)
    given = ("--resume", copied, "--auto-resume", *tiny, "--lr", 2e-3, "--outdir", tmp_path)
    for epochs in (2, 3):
        result = call(AE, "train.py", *given, "--epochs", epochs)
        assert result.code == 0, result.text
    assert newest_state(only_run(tmp_path, "ae-*"))["epoch"] == 3
    assert "is further than" in result.text
    ahead = ckpt.read_checkpoint(copied) | {"timestamp": "2999-01-01T00:00:00+00:00"}  # by a clock that was wrong
    ckpt.save_checkpoint(copied, ahead)
    assert call(AE, "train.py", *given, "--epochs", 4).code == 0
    assert newest_state(only_run(tmp_path, "ae-*"))["epoch"] == 4


def test_of_equal_starts_from_a_copy_one_begins_a_run_and_a_dead_one_leaves_it_to_the_next(ae_run, tiny, tmp_path):
    copied = shutil.copy(ae_run / "checkpoint_epoch_000001.pt", tmp_path / "mine.pt")
    given = ("--resume", copied, "--auto-resume", *tiny, "--outdir", tmp_path, "--epochs", 4)
    both = [fork(AE, *given) for _ in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == OK  # the second waited, and found nothing left to do
    begun = only_run(tmp_path)
    assert newest_state(begun)["epoch"] == 4
    for path in begun.glob("*.pt"):  # as if it had been killed before its first save
        path.unlink()
    assert call(AE, "train.py", *given).code == OK
    assert only_run(tmp_path) == begun
    assert newest_state(begun)["epoch"] == 4


def test_a_copy_that_cannot_go_on_leaves_no_empty_run(ae_run, tiny, tmp_path):
    """It is finished; a flag contradicts it; its data are missing."""
    copied = shutil.copy(ae_run / "latest.pt", tmp_path / "mine.pt")
    for flags, code in (
        (("--auto-resume",), OK),
        (("--latent-dim", 8), MODEL_MISMATCH),
        (("--epochs", 3, "--data", "hub", "--cache-dir", tmp_path), MODEL_MISMATCH),
        (("--epochs", 3, "--batch-size", 10**6), MODEL_MISMATCH),
    ):
        result = call(AE, "train.py", "--resume", copied, *tiny, "--outdir", tmp_path / "out", *flags)
        assert result.code == code, result.text
        assert not list((tmp_path / "out").glob("*/*")), flags


def test_a_folder_without_a_checkpoint_is_taken_over_by_the_same_flags_only(tiny, tmp_path):
    given = ("--model", "mlp", *tiny, "--epochs", 1, "--outdir", tmp_path, "--auto-resume")
    assert call(AE, "train.py", *given, "--grad-clip", 0.5).code == 0
    folder = only_run(tmp_path)
    for path in folder.glob("*.pt"):
        path.unlink()
    assert call(AE, "train.py", *given).code == 0
    assert len(runs(tmp_path)) == 2
    assert call(AE, "train.py", *given, "--grad-clip", 0.5).code == 0
    assert len(runs(tmp_path)) == 2
    assert newest_state(folder)["epoch"] == 1


SWEEP = [
    (),
    ("--lr-scheduler", "cosine"),
    ("--grad-clip", 0.1),
    ("--latent-dim", 8),
    ("--seed", 7),
    ("--only-digit", 4),
]


def test_a_sweep_killed_and_started_again_in_random_order(tiny, tmp_path, pytestconfig):
    """Six commands that differ in one flag each share a folder: six undisturbed runs."""
    given = ("--model", "mlp", *tiny, "--batch-size", 16, "--epochs", 5)
    often = ("--outdir", tmp_path / "sweep", "--auto-resume", "--ckpt-every-sec", 0.2)
    seed = random.SystemRandom().randrange(10**6)
    rng, waiting = random.Random(seed), list(range(len(SWEEP)))
    kills = pytestconfig.getoption("--kills")
    while waiting:
        some = rng.sample(waiting, min(2, len(waiting)))
        started = [(member, fork(AE, *given, *often, *SWEEP[member])) for member in some]
        if kills > 0:
            kills -= 1
            time.sleep(rng.uniform(0.2, 1.5))
            for _, process in started:
                process.kill()
        for member, process in started:
            process.join(300)
            assert process.exitcode in (OK, -signal.SIGKILL), f"seed {seed}"
            if process.exitcode == OK:
                waiting.remove(member)
    begun = [folder for folder in runs(tmp_path / "sweep") if any(folder.iterdir())]  # empty: killed before its lock
    assert len(begun) == len(SWEEP), f"seed {seed}"
    for member, flags in enumerate(SWEEP):
        outdir = tmp_path / f"untouched-{member}"
        assert call(AE, "train.py", *given, "--outdir", outdir, *flags).code == 0
        reference = only_run(outdir)
        (mine,) = [
            folder
            for folder in begun
            if all(
                newest_state(folder)["args"][name] == newest_state(reference)["args"][name]
                for name in ("lr_scheduler", "grad_clip", "latent_dim", "seed", "only_digit")
            )
        ]
        assert_same_training(mine, reference)


# --- autoencoders ---


def test_an_autoencoder_is_its_weights_however_it_is_spelled(ae_run, copy_of, tiny, tmp_path):
    source = copy_of(ae_run)
    outdir = tmp_path / "out"
    given = (*tiny, "--T", 20, "--hidden-dim", 16, "--epochs", 1, "--outdir", outdir, "--auto-resume")
    assert call(LATENT, "train.py", "--ae-ckpt", source, *given).code == 0
    folder = only_run(outdir)
    renamed = source.parent.parent.rename(tmp_path / "renamed") / "checkpoints" / source.name
    copied = shutil.copy(renamed / "latest.pt", tmp_path / "a copy.pt")
    spellings = [renamed, os.path.relpath(renamed, REPO / LATENT), renamed / "latest.pt", renamed / "best", copied]
    for spelling in spellings:
        for how in (("--auto-resume",), ("--resume", folder)):
            result = call(LATENT, "train.py", "--ae-ckpt", spelling, *given, *how)
            assert result.code == 0, result.text
            assert "already finished" in result.text, spelling
    other = call(LATENT, "train.py", "--ae-ckpt", renamed / "checkpoint_epoch_000001.pt", *given)
    assert other.code == 0, other.text
    assert "Passed over" in other.text
    assert "ae_weights" in other.text
    assert len(runs(outdir)) == 2
    provenance = newest_state(folder)["args"]["ae_ckpt"]
    assert provenance == str(source)
    refused = call(LATENT, "train.py", "--ae-ckpt", renamed / "checkpoint_epoch_000001.pt", "--resume", folder)
    assert (refused.code, len(refused.errors)) == (MODEL_MISMATCH, 1), refused.text
    assert "--ae-ckpt" in refused.errors[0]


def test_a_resume_that_names_its_autoencoder_keeps_its_own_digit(all_digits, tmp_path):
    """The digit follows from the autoencoder only where a run begins."""
    flags, autoencoder = all_digits
    given = ("--ae-ckpt", autoencoder, "--outdir", tmp_path)
    assert call(LATENT, "train.py", *given, *flags, "--only-digit", 3, "--epochs", 1).code == 0
    folder = only_run(tmp_path)
    result = call(LATENT, "train.py", *given, "--resume", folder, *flags[:4], "--epochs", 2)
    assert result.code == 0, result.text
    assert (newest_state(folder)["epoch"], newest_state(folder)["args"]["only_digit"]) == (2, 3)


def test_runs_saved_before_the_weights_digest_was_recorded_still_resume(latent_run, copy_of, tiny_latent, conv_run):
    folder = copy_of(latent_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = torch.load(path, weights_only=True)
        del state["args"]["ae_weights"]
        ckpt.save_checkpoint(path, state)
    given = (*tiny_latent, "--amp", "--epochs", 2, "--outdir", folder.parent.parent, "--auto-resume")
    assert "already finished" in call(LATENT, "train.py", *given).text
    first = conv_run  # another autoencoder of the same digit is another run
    other = call(LATENT, "train.py", *given, "--ae-ckpt", first, "--epochs", 1)
    assert other.code == 0, other.text
    assert len(runs(folder.parent.parent)) == 2


def test_a_finished_autoencoder_goes_before_one_that_was_stopped(ae_run, conv_run, tiny, tmp_path):
    """Though the stopped one is newer, and convolutional; the line says which was taken."""
    shutil.copytree(ae_run, tmp_path / "checkpoints" / ae_run.name, symlinks=True)
    stopped = tmp_path / "checkpoints" / conv_run.name
    shutil.copytree(conv_run, stopped, symlinks=True)
    (path,) = stopped.glob("checkpoint_epoch_*.pt")
    state = ckpt.read_checkpoint(path)
    state["args"]["epochs"], state["val_loss"] = 25, None
    ckpt.save_checkpoint(path, state)
    given = (*tiny, "--T", 20, "--hidden-dim", 16, "--epochs", 1, "--outdir", tmp_path)
    result = call(LATENT, "train.py", *given)
    assert result.code == 0, result.text
    line = (
        rf"autoencoder: \S*{ae_run.name}/checkpoint_epoch_000002.pt \(ae-mlp, epoch 2 of 2, val_loss 0\.\d+, only 3s\)"
    )
    assert re.search(line, result.text), result.text
    assert "not finished" not in result.text
    named = call(LATENT, "train.py", *given, "--ae-ckpt", stopped)
    assert named.code == 0, named.text
    assert re.search(r"warning: .*not finished.*epoch 1 of 25, in mid-epoch", named.text)


def test_an_autoencoder_of_another_digit_is_refused_and_not_chosen(ae_run, tiny, tmp_path):
    given = (*tiny, "--T", 20, "--hidden-dim", 16, "--epochs", 1, "--outdir", tmp_path / "out", "--only-digit", 5)
    result = call(LATENT, "train.py", *given, "--ae-ckpt", ae_run)
    assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
    assert "only 3s" in result.errors[0]
    assert "--only-digit 5" in result.errors[0]
    chosen = call(LATENT, "train.py", *given, "--ae-ckpt-dir", ae_run.parent)
    assert (chosen.code, len(chosen.errors)) == (5, 1), chosen.text
    assert "of the wanted digits" in chosen.errors[0]


# --- what is printed, and what stops ---


def paste(command: str, *more: object):
    """Paste a printed command into bash, `python` being a call in this process."""
    line = f'python() {{ printf "%s\\0" "$@"; }}; {command}'
    script, *words = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout.split(b"\0")[:-1]
    return call(AE, script.decode(), *map(os.fsdecode, words), *more)


def stop_after_the_first_epoch(monkeypatch, number: int) -> None:
    """This process gets a signal at the end of epoch 1."""
    end_epoch = Session.end_epoch

    def stopped(session, *args):
        end_epoch(session, *args)
        signal.raise_signal(number)

    monkeypatch.setattr(Session, "end_epoch", stopped)


@pytest.mark.parametrize("name", ["my cache", "it's $HOME", "tab\tand\nline", os.fsdecode(b"not utf-8 \xff")])
def test_the_printed_command_goes_on_when_pasted(name, cache, tmp_path, monkeypatch):
    """After Ctrl-C, with a data set that lies elsewhere, and names that a shell would take apart."""
    elsewhere, outdir = tmp_path / name / "cache", tmp_path / name / "out"
    shutil.copytree(cache, elsewhere)
    given = ("--model", "mlp", "--cache-dir", elsewhere, "--outdir", outdir, "--epochs", 400, "--device", "cpu")
    with monkeypatch.context() as patch:
        stop_after_the_first_epoch(patch, signal.SIGINT)
        stopped = call(AE, "train.py", *given, "--only-digit", 3, "--data", "embedded")
    assert stopped.code == STOPPED_EARLY, stopped.text
    (command,) = re.findall(r"go on with: (.*)", stopped.text)
    pasted = paste(command, "--epochs", 2)
    assert pasted.code == 0, pasted.text
    assert newest_state(only_run(outdir))["epoch"] == 2


def test_the_printed_command_names_no_folder_that_ends_with_its_job(tiny, tmp_path, monkeypatch):
    """But the one that job.sh copies the digits from."""
    copied = shutil.copytree(tiny[3], tmp_path / "job")
    monkeypatch.setenv("SLURM_TMPDIR", str(copied))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "scratch" / "hf_cache").mkdir(parents=True)
    stop_after_the_first_epoch(monkeypatch, signal.SIGTERM)
    given = ("--model", "mlp", *tiny[:2], "--cache-dir", copied, *tiny[4:], "--outdir", tmp_path)
    stopped = call(AE, "train.py", *given)
    assert stopped.code == STOPPED_EARLY, stopped.text
    assert f" --cache-dir {tmp_path / 'scratch' / 'hf_cache'} " in stopped.text.split("go on with: ")[1]


@pytest.fixture
def file_server(monkeypatch):
    """file_server(ending): whatever ends so cannot be opened or listed any more; with "" everything can again."""
    ending = ""

    def fail(event, args):
        if ending and event in ("open", "os.listdir", "os.scandir") and str(args[0]).endswith(ending):
            raise OSError(errno.ESTALE, "Stale file handle", args[0])

    def fails(what: str) -> None:
        nonlocal ending
        ending = what

    sys.addaudithook(fail)  # for as long as this process lives
    monkeypatch.setattr(ckpt, "PATIENCE", 0.5)
    yield fails
    fails("")


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("--resume", "/checkpoint_epoch_000002.pt"),
        ("--auto-resume", "/checkpoint_epoch_000002.pt"),
        ("--auto-resume", "/checkpoints"),
        ("--auto-resume", "-seed42-"),
    ],
)
def test_a_file_server_that_fails_sets_nothing_back(how, what, ae_run, copy_of, tiny, file_server):
    folder = copy_of(ae_run)
    what = folder.name if what == "-seed42-" else what
    before = {path.name for path in folder.iterdir()}
    how = (how, *([folder] if how == "--resume" else []))
    given = ("--model", "mlp", *tiny, "--epochs", 9, "--outdir", folder.parent.parent, *how)
    file_server(what)
    result = call(AE, "train.py", *given)
    file_server("")
    assert (result.code, len(result.errors)) == (BAD_CHECKPOINT, 1), result.text
    assert f"{what}: Stale file handle" in result.errors[0]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} <= before | {".lock"}
    assert "resumed from" in call(AE, "train.py", *given, "--epochs", 3).text
    assert newest_state(folder)["epoch"] == 3


def test_after_early_stopping_the_flag_that_it_names_goes_on(tiny, tmp_path):
    given = ("--model", "mlp", *tiny, "--lr", 1e-30, "--outdir", tmp_path, "--auto-resume", "--epochs", 6)
    stopped = call(AE, "train.py", *given, "--early-stopping-patience", 2)
    assert stopped.code == 0, stopped.text
    again = call(AE, "train.py", *given, "--epochs", 9)
    assert "already finished: early stopping" in again.text
    assert "--early-stopping-patience 0" in again.text
    assert "raise --epochs" not in again.text
    result = call(AE, "train.py", *given, "--early-stopping-patience", 0)
    assert result.code == 0, result.text
    assert newest_state(only_run(tmp_path))["epoch"] == 6


@pytest.mark.usefixtures("judged")
def test_what_was_switched_on_can_be_switched_off_on_resume(tiny, tmp_path):
    given = ("--model", "mlp", *tiny, "--outdir", tmp_path, "--auto-resume")
    assert call(AE, "train.py", *given, "--epochs", 2, "--keep-ckpts", 1, "--eval-every", 2).code == 0
    result = call(AE, "train.py", *given, "--epochs", 5, "--keep-ckpts", 0, "--eval-every", 0)
    assert result.code == 0, result.text
    folder = only_run(tmp_path)
    assert {epoch for epoch, _ in ckpt.run_checkpoints(folder)} >= {3, 4, 5}
    assert not newest_state(folder)["scores"].keys() & {"fid"}


@pytest.mark.slow
def test_a_run_that_keeps_one_checkpoint_can_always_be_read(tiny, tmp_path):
    given = ("--model", "mlp", *tiny, "--batch-size", 405, "--epochs", 150, "--keep-ckpts", 1)
    process = start(AE, "train.py", *given, "--outdir", tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("checkpoints/*/*.pt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    folder, reads = only_run(tmp_path), 0
    while process.poll() is None:
        for place in (folder, folder / "best", folder / "latest.pt"):
            ckpt.open_checkpoint(place, pytest.fail, ckpt.peek_checkpoint)
            reads += 1
    assert finish(process).code == 0
    assert reads > 300
