"""A run that was stopped or killed and resumed repeats an uninterrupted one, bit for bit, in everything it leaves."""

import os
import re
import shutil
import signal
import time

import pytest
import torch
from helpers import (
    AE,
    LATENT,
    PIXEL,
    SMALL,
    assert_same,
    assert_same_training,
    call,
    finish,
    metrics,
    newest_state,
    only_run,
    scalars,
    start,
)

from common import ckpt, classifier, drawing, slurm
from common.error_codes import INTERRUPTED, STOPPED_EARLY
from common.session import Session

EPOCHS = 5
STEPS = 26  # an epoch: 405 threes in batches of 16


@pytest.fixture(scope="module")
def flags(tiny, ae_run):
    """flags(folder) -> flags of a run of EPOCHS epochs of STEPS steps, under a learning rate that moves."""
    common = (*tiny, "--batch-size", 16, "--epochs", EPOCHS, "--lr-scheduler", "cosine")
    own = {
        AE: ("--model", "mlp"),
        LATENT: ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16),
        PIXEL: (*SMALL, "--T", 20, "--samples-per-epoch", 4),
    }
    return lambda folder, *more: (*own[folder], *common, *more)


@pytest.fixture(scope="module")
def references(flags, tmp_path_factory):
    """The uninterrupted runs, by experiment folder."""
    outdirs = {folder: tmp_path_factory.mktemp(f"reference-{folder}") for folder in (AE, LATENT, PIXEL)}
    for folder, outdir in outdirs.items():
        result = call(folder, "train.py", *flags(folder, "--outdir", outdir))
        assert result.code == 0, result.text
    return {folder: only_run(outdir) for folder, outdir in outdirs.items()}


def send_at(monkeypatch, name: str, when: int, *numbers: signal.Signals, owner=Session, after: bool = True) -> list:
    """This process gets signals (SIGTERM) right after, or before, the `when`-th call of a method; returns the calls."""
    original, calls = getattr(owner, name), []

    def send():
        if len(calls) == when:
            for number in numbers or [signal.SIGTERM]:
                os.kill(os.getpid(), number)

    def counted(*args, **kwargs):
        calls.append(name)
        if not after:
            send()
        result = original(*args, **kwargs)
        if after:
            send()
        return result

    monkeypatch.setattr(owner, name, counted)
    return calls


def log_of(folder):
    """The text of a run's log file."""
    return (folder.parent.parent / "logs" / f"{folder.name}.log").read_text()


def assert_same_record(folder, reference) -> None:
    """Log, TensorBoard and pictures tell the story once, without gaps."""
    lines = re.findall(r" epoch +(\d+)/\d+ +train_loss", log_of(folder))
    assert lines == [str(epoch) for epoch in range(1, EPOCHS + 1)]
    assert scalars(folder) == scalars(reference)
    assert [epoch for epoch, _ in ckpt.run_checkpoints(folder)] == list(range(EPOCHS, 0, -1))
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp",)) or "aside" in path.name]


def test_the_reference_has_full_curves(references):
    for folder in references.values():
        curves = scalars(folder)
        ends = [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
        for tag in ("loss/train", "loss/validation"):
            assert [step for step, _ in curves[tag]] == ends
        for tag, points in curves.items():
            steps = [step for step, _ in points]
            assert steps == sorted(set(steps)), tag
        assert [row["epoch"] for row in metrics(folder)] == list(range(1, EPOCHS + 1))


# --- stops at chosen moments, in this process ---

MOMENTS = {
    "in the middle of the first epoch": ("step", 7),
    "where TensorBoard has a point": ("step", 50),
    "before the last batch": ("step", 2 * STEPS - 1),
    "after the last batch": ("step", 2 * STEPS),
    "at the end of an epoch": ("end_epoch", 3),
    "after the very last batch": ("step", EPOCHS * STEPS),
    "before anything is learned": ("attach", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_and_resumed(moment, flags, references, tmp_path, monkeypatch):
    given = flags(LATENT, "--outdir", tmp_path, "--auto-resume")
    with monkeypatch.context() as patch:
        send_at(patch, *MOMENTS[moment])
        stopped = call(LATENT, "train.py", *given)
    assert stopped.code == STOPPED_EARLY, stopped.text
    assert "SIGTERM" in stopped.text
    assert re.search(r"go on with: .*--resume", stopped.text)
    state = newest_state(only_run(tmp_path))
    assert state["epoch"] < EPOCHS or not ckpt.is_complete(state)
    resumed = call(LATENT, "train.py", *given)
    assert resumed.code == 0, resumed.text
    assert_same_training(only_run(tmp_path), references[LATENT])
    assert_same_record(only_run(tmp_path), references[LATENT])


IN_A_ROW = [
    ("attach", 1),  # before anything is learned
    ("step", 1),  # the first step
    ("step", STEPS - 2),
    ("step", 1),  # the last step of the first epoch
    ("end_epoch", 1),
    ("step", 4),
    ("validate", 1),
    ("step", STEPS),
]


@pytest.mark.parametrize("folder", [AE, PIXEL])
def test_stopped_many_times_in_a_row(folder, flags, references, tmp_path, monkeypatch):
    """Resumed by --auto-resume and by --resume in turn, each time with other flags that must not matter."""
    given = flags(folder, "--outdir", tmp_path)
    for turn, moment in enumerate([*IN_A_ROW, None]):
        resume = ("--resume", only_run(tmp_path) / "latest.pt") if turn % 2 else ("--auto-resume",)
        often = ("--ckpt-every-sec", 0.01, "--num-workers", 2, "--generate-images")
        seldom = ("--ckpt-every-sec", 300, "--num-workers", 0, "--no-generate-images")
        with monkeypatch.context() as patch:
            if moment:
                send_at(patch, *moment)
            result = call(folder, "train.py", *given, *resume, *(often if turn in (0, 3, 6) else seldom))
        assert result.code == (STOPPED_EARLY if moment else 0), f"{moment}: {result.text}"
    assert_same_training(only_run(tmp_path), references[folder])
    assert_same_record(only_run(tmp_path), references[folder])


@pytest.mark.parametrize("folder", [AE, LATENT, PIXEL])
def test_stopped_while_validating(folder, flags, references, tmp_path, monkeypatch):
    given = flags(folder, "--outdir", tmp_path, "--auto-resume")
    with monkeypatch.context() as patch:
        send_at(patch, "validate", 2, after=False)
        assert call(folder, "train.py", *given).code == STOPPED_EARLY
    state = newest_state(only_run(tmp_path))
    assert (state["epoch"], state["batch"], state["val_loss"]) == (2, STEPS, None)
    assert call(folder, "train.py", *given).code == 0
    assert_same_training(only_run(tmp_path), references[folder])
    assert_same_record(only_run(tmp_path), references[folder])


@pytest.mark.usefixtures("judged")
def test_stopped_while_the_classifier_is_trained(flags, cache, references, tmp_path, monkeypatch):
    own_cache = tmp_path / "cache" / "decoded"
    own_cache.mkdir(parents=True)
    for path in (cache / "decoded").glob("embedded-*"):
        shutil.copy(path, own_cache)
    given = flags(AE, "--outdir", tmp_path, "--eval-every", 1, "--cache-dir", own_cache.parent)
    calls = send_at(monkeypatch, "random_affine", 3, owner=classifier)
    stopped = call(AE, "train.py", *given)
    assert stopped.code == STOPPED_EARLY, stopped.text
    assert len(calls) == 3  # at once
    state = newest_state(only_run(tmp_path))
    assert (state["epoch"], state["batch"], state["val_loss"]) == (1, 0, None)  # before training
    monkeypatch.undo()
    monkeypatch.setattr(drawing, "EVAL_IMAGES", 100)
    given = (*given, "--cache-dir", cache, "--auto-resume")
    assert call(AE, "train.py", *given).code == 0
    assert_same(newest_state(only_run(tmp_path))["model"], newest_state(references[AE])["model"])


def test_a_second_ctrl_c_counts_whatever_came_between(monkeypatch):
    monkeypatch.setattr(slurm, "_received", None)
    for number in (signal.SIGINT, signal.SIGTERM):
        slurm._on_signal(number, None)
    assert slurm.stop_requested() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        slurm._on_signal(signal.SIGINT, None)


class Interrupting:
    """A file in the middle of whose writing Ctrl-C is pressed twice."""

    def __init__(self, file):
        self.file, self.writes = file, 0

    def write(self, data):
        self.writes += 1
        if self.writes == 9:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("where", ["in a step", "in a save", "before a rename"])
def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing_saved(where, flags, references, tmp_path, monkeypatch):
    given = flags(AE, "--outdir", tmp_path, "--auto-resume")
    twice = (signal.SIGINT, signal.SIGINT)
    with monkeypatch.context() as patch:
        if where == "in a step":
            send_at(patch, "step", STEPS + 5, *twice, after=False)
        elif where == "in a save":
            files = iter([lambda file: file, Interrupting])  # the first save is left in peace
            patch.setattr(torch, "save", lambda state, file, save=torch.save: save(state, next(files)(file)))
        else:
            send_at(patch, "replace", 5, *twice, owner=ckpt.os, after=False)
        left = call(AE, "train.py", *given)
    assert left.code == INTERRUPTED, left.text
    assert "what was saved is safe" in left.text
    folder = only_run(tmp_path)
    assert newest_state(folder)["epoch"] == 1
    assert not list(folder.glob(".*.tmp"))
    assert call(AE, "train.py", *given).code == 0
    assert_same_training(folder, references[AE])
    assert_same_record(folder, references[AE])


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_stopped_while_a_preview_is_drawn(folder, flags, references, tmp_path, monkeypatch):
    given = flags(folder, "--outdir", tmp_path, "--generate-images")
    with monkeypatch.context() as patch:
        send_at(patch, "validate", 2)
        stopped = call(folder, "train.py", *given)
    assert stopped.code == STOPPED_EARLY, stopped.text
    kept = only_run(tmp_path)
    assert not ckpt.is_complete(newest_state(kept))
    assert call(folder, "train.py", "--resume", kept, *given).code == 0
    assert_same_training(kept, references[folder])
    pictures = sorted(path.name for path in (tmp_path / "samples" / kept.name).iterdir())
    assert pictures == ["curves.png", *(f"epoch_{epoch:06d}.png" for epoch in range(1, EPOCHS + 1))]


def test_stopped_at_every_epoch_again_and_again(flags, references, tmp_path, monkeypatch):
    given = flags(AE, "--outdir", tmp_path, "--auto-resume")
    codes = []
    for _ in range(8):
        with monkeypatch.context() as patch:
            send_at(patch, "step", STEPS - 3, signal.SIGUSR2)
            codes.append(call(AE, "train.py", *given).code)
        if codes[-1] == 0:
            break
    assert codes[:-1] == [STOPPED_EARLY] * (len(codes) - 1)
    assert codes[-1] == 0
    assert len(codes) == 6
    assert_same_training(only_run(tmp_path), references[AE])
    assert_same_record(only_run(tmp_path), references[AE])


# --- real processes ---


def wait_for(process, condition, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("folder", "number", "workers"),
    [
        pytest.param(AE, signal.SIGUSR1, 0, marks=pytest.mark.slow),
        (AE, signal.SIGINT, 2),
        (LATENT, signal.SIGTERM, 0),
    ],
)
def test_a_real_process_stopped_from_outside(folder, number, workers, flags, references, tmp_path):
    """The signal goes to the whole group, as a terminal's does: workers must not die of it before the save."""
    given = flags(folder, "--outdir", tmp_path, "--auto-resume", "--num-workers", workers)
    process = start(folder, "train.py", *given, group=True)
    wait_for(process, lambda: list(tmp_path.glob("checkpoints/*/checkpoint_epoch_000001.pt")), "the first checkpoint")
    os.killpg(process.pid, number)
    stopped = finish(process)
    assert stopped.code == STOPPED_EARLY, stopped.text
    assert number.name in stopped.text
    assert stopped.errors == []
    resumed = call(folder, "train.py", *given)
    assert resumed.code == 0, resumed.text
    assert_same_training(only_run(tmp_path), references[folder])
    assert_same_record(only_run(tmp_path), references[folder])


SLOW_END = """
import atexit, runpy, sys, time
sys.path.insert(0, "..")
atexit.register(lambda: (print("OVER", flush=True), time.sleep(1)))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_that_comes_when_all_is_done_is_none(number, flags, tmp_path):
    """Python takes a while to end: a job that is done must not look like one that was killed."""
    process = start(AE, "-c", SLOW_END, *flags(AE, "--outdir", tmp_path))
    said = iter(process.stdout.readline, "OVER\n")
    assert any("the end: " in line for line in said), "ended early"
    assert list(said)
    process.send_signal(number)
    ended = finish(process)
    assert (ended.code, ended.errors) == (0, []), ended.text


SLOW_WORKERS = """
import runpy, sys, time
sys.path.insert(0, "..")
from common import device
real = device.seed_worker
def slow(worker):
    print("WORKER", flush=True)
    time.sleep(1)
    real(worker)
device.seed_worker = slow
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_a_signal_while_workers_start_kills_none_of_them(flags, tmp_path):
    given = flags(AE, "--outdir", tmp_path, "--auto-resume", "--num-workers", 2)
    process = start(AE, "-c", SLOW_WORKERS, *given, group=True)
    while "WORKER" not in (line := process.stdout.readline()):
        assert line, "ended early"
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGTERM)
    stopped = finish(process)
    assert stopped.code == STOPPED_EARLY, stopped.text
    assert "and saved" in stopped.text


@pytest.fixture
def two_threads(monkeypatch):
    """This process and those that it starts are to compute with two threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    yield {"OMP_NUM_THREADS": "2"}
    torch.set_num_threads(1)


@pytest.mark.parametrize("folder", [*(pytest.param(other, marks=pytest.mark.slow) for other in (AE, LATENT)), PIXEL])
def test_two_threads_and_the_default_widths(folder, tiny, ae_run, tmp_path, two_threads):
    """The other tests run small networks on one thread; sums that threads share must come out the same too."""
    own = {AE: ("--model", "conv"), LATENT: ("--ae-ckpt", ae_run), PIXEL: ()}[folder]
    given = (*own, *tiny, "--epochs", 2)
    assert call(folder, "train.py", *given, "--outdir", tmp_path / "untouched").code == 0
    given = (*given, "--outdir", tmp_path / "killed", "--auto-resume")
    process = start(folder, "train.py", *given, "--ckpt-every-sec", 0.01, env=two_threads)
    first = "killed/checkpoints/*/checkpoint_epoch_000001.pt"
    wait_for(process, lambda: list(tmp_path.glob(first)), "first checkpoint")
    process.kill()
    finish(process)
    assert newest_state(only_run(tmp_path / "killed"))["args"]["threads"] == 2
    assert call(folder, "train.py", *given).code == 0
    assert_same_training(only_run(tmp_path / "killed"), only_run(tmp_path / "untouched"))


# --- what must not matter ---


@pytest.mark.parametrize(
    "extra",
    [("--generate-images",), ("--num-workers", 2), ("--ckpt-every-sec", 0.02), ("--ckpt-save-every", 3), ("--debug",)],
    ids=lambda extra: extra[0],
)
def test_flags_that_change_no_weight(extra, flags, references, tmp_path):
    result = call(LATENT, "train.py", *flags(LATENT, "--outdir", tmp_path, *extra))
    assert result.code == 0, result.text
    folder = only_run(tmp_path)
    assert_same_training(folder, references[LATENT])
    previews = list((tmp_path / "samples" / folder.name).glob("epoch_*.png"))
    assert bool(previews) == ("--generate-images" in extra)
    if "--ckpt-save-every" in extra:
        best = newest_state(folder)["best"]["epoch"]
        assert {epoch for epoch, _ in ckpt.run_checkpoints(folder)} == {3, best, EPOCHS}


def test_another_seed_does_change_the_weights(flags, references, tmp_path):
    assert call(LATENT, "train.py", *flags(LATENT, "--outdir", tmp_path, "--seed", 1)).code == 0
    mine, theirs = newest_state(only_run(tmp_path))["model"], newest_state(references[LATENT])["model"]
    assert any(not torch.equal(mine[name], theirs[name]) for name in theirs)
