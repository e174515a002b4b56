"""Which run a start means: resumed, extended, taken over, or new."""

import argparse
import errno
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    AE,
    LATENT,
    PIXEL,
    REPO,
    SMALL,
    assert_same,
    assert_same_training,
    call,
    environment,
    inside,
    metrics,
    newest_state,
    only_run,
    recipe,
    run,
    scalars,
)

from common import ckpt, files, record
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, MODEL_MISMATCH, NO_DATA, OUT_OF_MEMORY, run_main
from common.events import Events
from common.logger_utils import log_args_rich
from common.run import Run


@pytest.fixture
def train(tiny_latent, tmp_path):
    """train(flags) -> the result of a latent training of 2 epochs in this test's output folder."""

    def train(*flags, **_):
        return call(LATENT, "train.py", *tiny_latent, "--epochs", 2, "--outdir", tmp_path / "out", *flags)

    return train


def runs(outdir) -> list[str]:
    return sorted(path.name for path in (outdir / "checkpoints").iterdir())


def test_a_finished_run_says_so_and_stays_as_it_is(latent_run, copy_of, tiny_latent):
    folder = copy_of(latent_run)
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    outdir = folder.parent.parent
    flags = (*tiny_latent, "--amp", "--epochs", 2, "--outdir", outdir, "--auto-resume")
    for _ in range(2):
        result = call(LATENT, "train.py", *flags)
        assert result.code == 0, result.text
        assert "already finished" in result.text
    assert {path: path.read_bytes() for path in folder.glob("*.pt")} == before
    assert runs(outdir) == [folder.name]


def test_fewer_epochs_than_a_run_has_begun_train_nothing(ae_run, copy_of, cache):
    """The curve of the learning rate would be at its end."""
    path = copy_of(ae_run) / "checkpoint_epoch_000002.pt"
    ckpt.save_checkpoint(path, ckpt.read_checkpoint(path) | {"val_loss": None, "batch": 1})
    before = path.read_bytes()
    result = call(AE, "train.py", "--resume", path.parent, "--epochs", 1, "--cache-dir", cache)
    assert (result.code, path.read_bytes()) == (0, before), result.text
    assert "is already in epoch 2, beyond --epochs 1" in result.text
    result = call(AE, "train.py", "--resume", path.parent, "--epochs", 2, "--cache-dir", cache)
    assert (result.code, newest_state(path.parent)["val_loss"] is not None) == (0, True), result.text


def test_saves_within_an_epoch_do_not_count_as_its_steps(tiny, tmp_path, monkeypatch):
    save, took = ckpt.save_checkpoint_and_link_latest, 0.2

    def slowly(*how):
        time.sleep(took)
        return save(*how)

    monkeypatch.setattr(ckpt, "save_checkpoint_and_link_latest", slowly)
    given = ("--model", "mlp", *tiny, "--epochs", 1, "--outdir", tmp_path, "--ckpt-every-sec", 1e-3)
    result = call(AE, "train.py", *given)
    assert result.code == 0, result.text
    row = json.loads((only_run(tmp_path) / "metrics.jsonl").read_text())
    assert row["global_step"] > 4
    assert row["seconds"] < took * row["global_step"] / 2


@pytest.mark.parametrize("environment", [{}, {"GIT_DIR": "/nowhere/.git"}])
def test_the_commit_is_this_repositorys(environment, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    head = ["git", "rev-parse", "HEAD"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    known = subprocess.run(head, cwd=REPO, capture_output=True, text=True, env=plain)
    assert record.git_commit() == (known.stdout.strip() or None)
    subprocess.run(["git", "init", "-q", tmp_path], check=True, env=plain)
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-q", "--allow-empty", "-m", "a"], check=True, env=plain)
    monkeypatch.setattr(record, "__file__", str(tmp_path / "copy" / "common" / "record.py"))
    (tmp_path / "copy" / "common").mkdir(parents=True)
    assert record.git_commit() is None  # of the repository around it


def test_a_finished_runs_links_are_repaired(ae_run, copy_of, cache):
    """A kill may fall between a checkpoint and its links."""
    folder = copy_of(ae_run)
    for name in ("latest.pt", "best.pt"):
        (folder / name).unlink()
    (folder / "latest.pt").symlink_to("checkpoint_epoch_000001.pt")
    for source, epochs in ((folder, 2), (folder / "checkpoint_epoch_000001.pt", 1)):
        result = call(AE, "train.py", "--resume", source, "--epochs", epochs, "--cache-dir", cache)
        assert "already finished" in result.text
        assert (folder / "latest.pt").resolve().name == "checkpoint_epoch_000002.pt"
        assert (folder / "best.pt").is_symlink()


@pytest.mark.parametrize("broken", [True, False])
def test_a_finished_run_is_never_discarded(broken, ae_run, copy_of, monkeypatch):
    """A listing that fails, or tells nothing, is no proof that there is nothing."""
    folder = copy_of(ae_run)
    source = folder / "checkpoint_epoch_000002.pt"
    begun = Run(folder.name, folder.parent.parent, folder.parent.parent / "logs", None, {}, None if broken else source)

    def listed(_path):
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        return []

    with monkeypatch.context() as patch:
        patch.setattr("common.run.os.listdir", listed)
        begun.discard_if_empty()
    assert source.is_file()


@pytest.mark.parametrize("name", ["checkpoint_epoch_000001.pt", "checkpoint_epoch_000001.pt.aside-0a1b2c3d"])
def test_a_folder_in_which_weights_lie_is_never_discarded(name, tmp_path):
    """Those that were set aside too; without any, nothing stays."""
    begun = Run("a", tmp_path, tmp_path / "logs", None)
    begun.checkpoints.mkdir(parents=True)
    (begun.checkpoints / name).touch()
    begun.discard_if_empty()
    (begun.checkpoints / name).unlink()
    begun.discard_if_empty()
    assert not begun.checkpoints.exists()


def test_leftovers_of_a_killed_write_go_and_the_config_names_the_real_data(ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    outdir = folder.parent.parent
    dead, living = (f"{process}@{files._host()}.0123abcd.tmp" for process in (2**22 + 1, os.getpid()))
    for path in (folder / ".checkpoint_epoch_000003.pt", outdir / "samples" / folder.name / ".epoch_000002.png"):
        path.with_name(f"{path.name}.{dead}").write_bytes(b"half")
    scores = folder / f".checkpoint_epoch_000002.scores.json.{living}"
    scores.write_bytes(b"being written, by another process")
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--data", "auto", "--cache-dir", cache)
    assert result.code == 0, result.text
    assert list(outdir.rglob(".*.tmp")) == [scores]
    assert json.loads((folder / "config.json").read_text())["flags"]["data"]["value"] == "embedded"


def test_a_run_folder_that_cannot_be_written_to(ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # what root cannot write to either
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--cache-dir", cache)
    assert (result.code, len(result.errors)) == (BAD_OUTPUT, 1), result.text
    shutil.rmtree(folder.parent.parent / "samples")
    (folder.parent.parent / "samples").touch()
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--cache-dir", cache, "--outdir", folder / "other")
    assert (result.code, len(result.errors)) == (BAD_OUTPUT, 1), result.text
    assert "choose another --outdir" not in result.text, "it would change nothing"
    assert "copy checkpoint_epoch_000002.pt and --resume the copy" in result.text


@pytest.mark.parametrize("folder", [AE, PIXEL])
def test_more_epochs_are_the_same_as_if_asked_for_at_once(folder, tiny, tmp_path):
    flags = ({AE: ("--model", "conv"), PIXEL: (*SMALL, "--T", 20)}[folder]) + tiny
    for name, epochs in (("extended", (1, 3)), ("at-once", (3,))):
        for count in epochs:
            result = call(folder, "train.py", *flags, "--epochs", count, "--outdir", tmp_path / name, "--auto-resume")
            assert result.code == 0, result.text
    assert_same_training(only_run(tmp_path / "extended"), only_run(tmp_path / "at-once"))


def test_keep_ckpts(train, tmp_path):
    """Also across a resume, which remembers it."""
    assert train("--epochs", 4, "--keep-ckpts", 2, "--ckpt-every-sec", 0.01).code == 0
    folder = only_run(tmp_path / "out")
    for newest in (4, 5):
        best = newest_state(folder)["best"]["epoch"]
        kept = {epoch for epoch, _ in ckpt.run_checkpoints(folder)}
        assert kept == {newest, newest - 1, best}
        assert (folder / "best.pt").resolve().name == f"checkpoint_epoch_{best:06d}.pt"
        assert train("--epochs", 5, "--auto-resume").code == 0


def test_more_epochs_extend_a_finished_run(train, tmp_path, latent_run, cache, copy_of):
    """Without a scheduler, 2 + 1 epochs are the same as 3."""
    folder = copy_of(latent_run)
    result = call(LATENT, "train.py", "--resume", folder / "latest.pt", "--epochs", 3, "--cache-dir", cache)
    assert result.code == 0, result.text
    assert train("--epochs", 3).code == 0
    assert "re-drawn" not in result.text  # there is no curve
    assert_same_training(folder, only_run(tmp_path / "out"))
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert [entry["resumed_from"] is None for entry in starts] == [True, False]
    assert starts[0].keys() >= {"time", "command", "torch", "threads", "python", "git_commit", "device"}


def test_what_was_typed_is_recorded_as_typed(latent_run):
    flags = json.loads((latent_run / "config.json").read_text())["flags"]
    assert flags["data"] == {"value": "embedded", "from": "flag"}
    assert flags["dataset"]["from"] == "default"


def test_argparses_own_arguments_are_logged_too(caplog):
    log = logging.getLogger("plain")
    with caplog.at_level(logging.INFO, "plain"):
        log_args_rich(log, argparse.Namespace(lr=0.1, epochs=3))
    assert [record.message.split() for record in caplog.records] == [["epochs", "3"], ["lr", "0.1"]]


def test_figures_that_may_not_be_read_stop_no_resume(ae_run, copy_of, cache, monkeypatch):
    folder, read = copy_of(ae_run), Path.read_text

    def refused(path, *how, **more):
        if path.name == "metrics.jsonl":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(path, *how, **more)

    monkeypatch.setattr(Path, "read_text", refused)
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--cache-dir", cache)
    assert result.code == 0, result.text
    assert "cannot write metrics.jsonl" in result.text


@pytest.mark.parametrize("line", ["null", '{"epoch": null}', '{"epoch": [1]}', '{"epoch": NaN}', '{"epoch": 1'])
def test_a_line_of_metrics_that_is_none_goes_and_the_others_stay(line, ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n")
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--cache-dir", cache)
    assert result.code == 0, result.text
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


@pytest.fixture
def recorded(tmp_path):
    """(the record of a run without anything, what it has warned of)."""
    begun, told = Run("a", tmp_path, tmp_path / "logs", None), []
    begun.checkpoints.mkdir(parents=True)
    return record.Record(begun, told.append), told


def test_figures_that_are_no_numbers_are_null(recorded, monkeypatch):
    """Elsewhere than in Python NaN is no JSON."""
    monkeypatch.setattr(record.Record, "scalars", lambda *_: None)
    monkeypatch.setattr(record.Record, "_curves", lambda *_, **__: None)
    kept, told = recorded
    kept.epoch({"epoch": 1, "fid": math.nan, "recall": -math.inf, "lr": 0.5, "classifier": "abc"}, 7)
    kept.flush()
    row = json.loads((kept.run.checkpoints / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"epoch": 1, "fid": None, "recall": None, "lr": 0.5, "classifier": "abc"}
    assert told == []


@pytest.mark.parametrize("changed", [{}, {"torch": "1.13.1"}, {"device": "cuda:0"}, {"threads": 8}])
def test_a_resume_says_what_changed_about_the_machine(changed, recorded):
    kept, told = recorded
    now = {"torch": str(torch.__version__), "device": "cpu", "threads": 1}
    kept.run.state = {"args": now | changed}
    (kept.run.checkpoints / "config.json").write_text(json.dumps({"starts": [now | changed | {"threads": 5}]}))
    kept.start(argparse.Namespace(threads=1, origin={}, flags=dict), torch.device("cpu"))
    last = "results may differ in their last bits"
    assert told == [f"{name} was {value} and is now {now[name]}: {last}" for name, value in changed.items()]


@pytest.mark.parametrize(
    ("text", "lost"), [("null", 1), ("[" * 9999, 1), ("", 1), ('{"starts": 3}', 0), ('{"starts": [null]}', 0)]
)
def test_a_run_goes_on_whatever_became_of_its_config(text, lost, ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    (folder / "config.json").write_text(text)
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--cache-dir", cache)
    assert result.code == 0, result.text
    assert len(json.loads((folder / "config.json").read_text())["starts"]) == 1
    assert result.text.count("set aside as config.json.aside-") == lost
    assert [path.read_text() for path in folder.glob("config.json.aside-*")] == [text] * lost


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's affinity masks")
def test_a_bound_openmp_still_sees_every_core(tiny, tmp_path):
    """Clusters like OMP_PROC_BIND, under which importing torch narrows the affinity mask to one core."""
    unset = {"OMP_NUM_THREADS": "", "OMP_PROC_BIND": "true"}
    outdir = ("--outdir", tmp_path / "out")
    result = run(AE, "train.py", "--model", "mlp", "--epochs", 1, *outdir, *tiny, env=unset)
    assert result.code == 0, result.text
    assert f" of {len(os.sched_getaffinity(0))} (images/s in a trial" in result.text


def test_lines_say_how_far_it_is_what_it_has_reached_and_what_is_left(train, monkeypatch):
    monkeypatch.setattr("common.progress.PLAIN_LINE_EVERY", 0.0)
    result = train("--epochs", 3)
    assert re.search(r"epoch 2/3: batch 1/\d+, mean loss so far \d\.\d{6}$", result.text, re.MULTILINE)
    lines = re.findall(r"epoch +\d/3 .* ([\d.]+) s(?:, (\d+) s left)?$", result.text, re.MULTILINE)
    assert [bool(left) for _, left in lines] == [True, True, False]
    assert int(lines[0][1]) + 0.5 >= 2 * float(lines[0][0])


def test_extending_under_a_curve_says_that_it_is_redrawn(train, tmp_path):
    assert train("--lr-scheduler", "cosine").code == 0
    result = train("--auto-resume", "--lr-scheduler", "cosine", "--epochs", 3)
    assert result.code == 0, result.text
    assert "re-drawn" in result.text


def test_resuming_an_older_epoch_sets_the_later_files_aside(ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    later = (folder / "checkpoint_epoch_000002.pt").read_bytes()
    assert os.readlink(folder / "best.pt") == "checkpoint_epoch_000002.pt"
    first = folder / "checkpoint_epoch_000001.pt"
    # a learning rate of almost nothing: the first epoch stays the best
    result = call(AE, "train.py", "--resume", first, "--epochs", 2, "--lr", 1e-30, "--cache-dir", cache)
    assert result.code == 0, result.text
    (aside,) = [path for path in folder.iterdir() if "aside" in path.name]
    assert aside.read_bytes() == later
    assert aside.name in result.text
    assert [epoch for epoch, _ in ckpt.run_checkpoints(folder)] == [2, 1]
    assert [row["epoch"] for row in metrics(folder)] == [1, 2]
    assert newest_state(folder)["best"]["epoch"] == 1
    assert os.readlink(folder / "latest.pt") == "checkpoint_epoch_000002.pt"
    assert os.readlink(folder / "best.pt") == "checkpoint_epoch_000001.pt"  # not the epoch that was set aside
    log = (folder.parent.parent / "logs" / f"{folder.name}.log").read_text()
    assert [log.count(f"epoch {epoch:>3}/2  train_loss") for epoch in (1, 2)] == [1, 1]
    assert log.rstrip().endswith(f"checkpoints: {folder.resolve()}")  # what was logged after the cut is there


def test_a_finished_run_keeps_its_record_when_an_older_epoch_is_resumed_for_nothing(ae_run, copy_of, cache):
    folder = copy_of(ae_run)
    before = metrics(folder)
    first = folder / "checkpoint_epoch_000001.pt"
    result = call(AE, "train.py", "--resume", first, "--epochs", 1, "--cache-dir", cache)
    assert result.code == 0, result.text
    assert "already finished" in result.text
    assert metrics(folder) == before
    assert [epoch for epoch, _ in ckpt.run_checkpoints(folder)] == [2, 1]


def test_a_resume_that_fails_before_it_trains_cuts_nothing(ae_run, copy_of, tmp_path):
    folder = copy_of(ae_run)
    first = folder / "checkpoint_epoch_000001.pt"
    state = ckpt.read_checkpoint(first)
    state["args"]["data"] = "hub"
    ckpt.save_checkpoint(first, state)
    before = metrics(folder)
    result = call(AE, "train.py", "--resume", first, "--epochs", 5, "--cache-dir", tmp_path / "empty")
    assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text
    assert metrics(folder) == before
    assert [epoch for epoch, _ in ckpt.run_checkpoints(folder)] == [2, 1]


def test_auto_resume_with_nothing_to_resume_starts_and_says_so(train, tmp_path):
    result = train("--auto-resume")
    assert result.code == 0, result.text
    assert "nothing to resume" in result.text
    warnings = [line for line in result.text.splitlines() if "warning" in line]
    assert len(warnings) == 1  # of 20 steps; a job's first start is as it should be
    assert "pure noise" in warnings[0]
    other = train("--auto-resume", "--seed", 5)
    assert "warning: nothing to resume" in other.text  # here something was passed over


def test_auto_resume_takes_no_other_experiments_run(train, tmp_path, cache):
    """Another seed, width, batch size or T in the same folder is another experiment."""
    assert train().code == 0
    (first,) = runs(tmp_path / "out")
    for count, other in enumerate((("--seed", 4), ("--T", 21), ("--hidden-dim", 17), ("--batch-size", 65)), 2):
        result = train("--auto-resume", *other)
        assert result.code == 0, result.text
        assert "resumed" not in result.text
        assert len(runs(tmp_path / "out")) == count
    assert "already finished" in train("--auto-resume").text
    without_ae = ("--T", 20, "--hidden-dim", 16, "--only-digit", 3, "--batch-size", 64, "--lr", 1e-3)
    without_ae = (*without_ae, "--lr-scheduler", "none", "--cache-dir", cache, "--epochs", 2)
    result = call(LATENT, "train.py", "--auto-resume", "--outdir", tmp_path / "out", *without_ae)
    assert result.code == 0, result.text
    assert f"{first} is already finished" in result.text  # seed 4 is newer, and 42 is not a beginning of it


@pytest.mark.parametrize(
    ("flag", "there", "given"), [("--latent-dim", 16, 8), ("--only-digit", 3, 5), ("--seed", 42, 7)]
)
def test_a_contradiction_shows_both_values(ae_run, flag, there, given):
    result = call(AE, "train.py", "--resume", ae_run, "--epochs", 9, flag, given)
    assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
    assert f"{flag} {given}" in result.errors[0]
    assert f"{there}" in result.errors[0].replace(str(ae_run), "")
    same = call(AE, "train.py", "--resume", ae_run, flag, there)
    assert same.code == 0, same.text


def test_places_and_bookkeeping_may_change(latent_run, copy_of, cache, tmp_path):
    folder = copy_of(latent_run)
    result = call(
        LATENT,
        "train.py",
        *("--resume", folder, "--epochs", 3, "--cache-dir", cache, "--logdir", tmp_path / "logs"),
        *("--num-workers", 1, "--ckpt-save-every", 2, "--outdir", tmp_path / "unused"),
    )
    assert result.code == 0, result.text
    assert (tmp_path / "logs" / f"{folder.name}.log").is_file()
    assert newest_state(folder)["epoch"] == 3  # in its own folder
    assert f"where the checkpoint lies; --outdir {tmp_path / 'unused'} is for new runs" in result.text
    assert not (tmp_path / "unused" / "checkpoints").exists()


def test_a_killed_runs_empty_folder_is_taken_over(train, tmp_path, tiny_latent):
    assert train().code == 0
    outdir = tmp_path / "out"
    folder = only_run(outdir)
    for path in folder.glob("*.pt"):
        path.unlink()
    assert train("--auto-resume").code == 0
    assert runs(outdir) == [folder.name]
    assert newest_state(folder)["epoch"] == 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert train().code == 0
    assert len(runs(outdir)) == 2  # without --auto-resume nothing is taken over


def test_a_damaged_newest_checkpoint_costs_one_epoch(latent_run, copy_of, tiny_latent):
    folder = copy_of(latent_run)
    newest = folder / "checkpoint_epoch_000002.pt"
    good = newest.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    newest.write_bytes(damaged)
    flags = (*tiny_latent, "--amp", "--epochs", 2, "--outdir", folder.parent.parent, "--auto-resume")
    result = call(LATENT, "train.py", *flags)
    assert result.code == 0, result.text
    assert "checkpoint_epoch_000002.pt" in result.text  # named
    assert_same_training(folder, latent_run)


def test_a_moved_and_a_deleted_autoencoder_change_nothing(ae_run, copy_of, tiny, tmp_path, latent_run, cache):
    source, outdir = copy_of(ae_run), tmp_path / "out"
    flags = ("--ae-ckpt", source / "latest.pt", "--T", 20, "--hidden-dim", 16, *tiny, "--outdir", outdir)
    assert call(LATENT, "train.py", *flags, "--epochs", 1).code == 0
    shutil.rmtree(source)
    folder = only_run(outdir)
    resumed = call(LATENT, "train.py", "--resume", folder, "--epochs", 2, "--cache-dir", cache)
    assert resumed.code == 0, resumed.text
    assert_same_training(folder, latent_run)
    again = call(LATENT, "train.py", "--auto-resume", *flags[2:], "--epochs", 2)
    assert again.code == 0, again.text
    assert "already finished" in again.text
    requeued = call(LATENT, "train.py", "--auto-resume", *flags, "--epochs", 2)  # a job's flags still name the file
    assert requeued.code == 0, requeued.text
    assert "already finished" in requeued.text
    assert call(LATENT, "train.py", *flags, "--epochs", 2).code == BAD_CHECKPOINT
    drawn = call(LATENT, "infer.py", "--ckpt", folder, "--n", 2, "--output", tmp_path / "x.png")
    assert drawn.code == 0, drawn.text


def test_a_copied_checkpoint_goes_on_as_a_new_run(latent_run, tmp_path, cache):
    copied = shutil.copy(latent_run / "checkpoint_epoch_000001.pt", tmp_path / "mine.pt")
    flags = ("--resume", copied, "--epochs", 2, "--outdir", tmp_path / "out", "--cache-dir", cache)
    result = call(LATENT, "train.py", *flags)
    assert result.code == 0, result.text
    folder = only_run(tmp_path / "out")
    assert folder.name.rsplit("-", 2)[0] == latent_run.name.rsplit("-", 2)[0]
    for key in ("model", "ema", "optimizer"):
        assert_same(newest_state(folder)[key], newest_state(latent_run)[key], key)


def test_a_path_relative_to_the_run_folder_means_that_run(latent_run, copy_of, cache, tmp_path):
    folder = copy_of(latent_run)
    with inside(LATENT):
        script = recipe(LATENT, "train.py")
        os.chdir(folder)
        flags = ["--resume", "checkpoint_epoch_000002.pt", "--epochs", "3", "--cache-dir", str(cache)]
        run_main(lambda: script.main([*flags, "--outdir", str(tmp_path / "out")]))
    assert newest_state(folder)["epoch"] == 3
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_early_stopping_counts_epochs_without_a_better_loss(train, tmp_path):
    """Across a resume as in one go: of an untrainable net the first epoch stays the best."""
    flags = ("--epochs", 50, "--lr", 1e-30, "--early-stopping-patience", 2, "--auto-resume")
    assert train(*flags, "--epochs", 2).code == 0
    result = train(*flags)
    assert result.code == 0, result.text
    assert "early stopping" in result.text
    state = newest_state(only_run(tmp_path / "out"))
    assert (state["epoch"], state["best"]["epoch"]) == (3, 1)
    assert "already finished" in train(*flags).text


def test_a_resume_of_what_is_not_there(tmp_path):
    result = call(LATENT, "train.py", "--resume", tmp_path / "nothing.pt", "--outdir", tmp_path / "out")
    assert (result.code, len(result.errors)) == (BAD_CHECKPOINT, 1), result.text
    assert not (tmp_path / "out").exists()


def test_wrong_input_leaves_no_empty_run(tmp_path, cache):
    flags = ("--model", "mlp", "--data", "hub", "--cache-dir", tmp_path / "empty", "--outdir", tmp_path / "out")
    result = call(AE, "train.py", *flags)
    assert result.code == NO_DATA, result.text
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() or "ae-mlp" in path.name]


def test_a_log_that_cannot_be_written_leaves_no_empty_run(train, tmp_path):
    assert train("--logdir", "/dev/null").code == BAD_OUTPUT
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))


CUT = """
import sys
from pathlib import Path
from common.record import Record
record = Record.__new__(Record)
record._try = lambda _name, write: write()
record._filter(Path(sys.argv[1]), lambda line: "later" not in line)
"""


def test_a_log_is_cut_back_letter_by_letter_in_any_locale(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("of Zoë\nlater\n", encoding="utf-8")
    env = environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(REPO))
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", CUT, str(log)], env=env, check=True)
    assert log.read_text(encoding="utf-8") == "of Zoë\n"


def test_a_picture_too_large_for_the_memory_costs_no_epoch(train, tmp_path, monkeypatch):
    def too_large(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("common.record.Record.images", too_large)
        result = train("--generate-images")
    assert (result.code, len(result.errors)) == (OUT_OF_MEMORY, 1), result.text
    assert "--samples-per-epoch" in result.errors[0]
    result = train("--auto-resume")
    assert result.code == 0, result.text
    assert "resumed from" in result.text
    assert [row["epoch"] for row in metrics(only_run(tmp_path / "out"))] == [1, 2]


def test_a_broken_package_costs_curves_and_pictures_but_no_epoch(train, tmp_path, monkeypatch):
    def broken(*_):
        raise ImportError("numpy.core.multiarray failed to import")

    for place in ("common.record.draw_curves", "common.record.make_image_grid", "common.record.save_image_grid"):
        monkeypatch.setattr(place, broken)
    result = train("--generate-images")
    assert result.code == 0, result.text
    assert result.text.count("multiarray failed to import); training goes on") == 3
    assert newest_state(only_run(tmp_path / "out"))["epoch"] == 2


def test_a_flag_that_cannot_have_an_effect_is_said(train):
    wasted = ("--samples-per-epoch says how --generate-images is to look", "--eval-every 3 is more than --epochs 2")
    result = train("--samples-per-epoch", 4, "--eval-every", 3)
    assert [result.text.count(text) for text in wasted] == [1, 1], result.text
    result = train("--samples-per-epoch", 4, "--generate-images")
    assert [result.text.count(text) for text in wasted] == [0, 0], result.text


def test_config_names_the_digits_that_were_used(ae_run, latent_run):
    for folder in (ae_run, latent_run):
        assert json.loads((folder / "config.json").read_text())["flags"]["data"]["value"] == "embedded"


def test_tensorboard_goes_on_even_where_the_clock_went_back(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "run"
    now = 2e9
    for purge_step, points in ((0, {0: 1.0, 10: 2.0, 20: 3.0}), (11, {11: 4.0, 21: 5.0})):
        monkeypatch.setattr("common.events.time.time", lambda now=now: now)
        events = Events(folder, purge_step)
        for step, value in points.items():
            events.scalars({"x": value}, step)
        events.flush()
        now -= 3600
    assert scalars(tmp_path / "checkpoints" / "run") == {"x": [(0, 1.0), (10, 2.0), (11, 4.0), (21, 5.0)]}


def test_tensorboard_has_the_loss_of_a_step_in_fifty_whatever_an_epoch_has(tiny, tmp_path):
    """Also where an epoch's first step is the one in fifty: 2 steps an epoch."""
    few = ("--batch-size", 225, "--epochs", 30, "--keep-ckpts", 1, "--outdir", tmp_path)
    assert call(AE, "train.py", "--model", "mlp", *tiny, *few).code == 0
    assert [step for step, _ in scalars(only_run(tmp_path))["loss/step"]] == [1, 51]
