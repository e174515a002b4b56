"""The number of threads: measured at a run's first step, recorded, kept; and what a busy machine is told."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import AE, LATENT, PIXEL, SMALL, assert_same_training, call, newest_state, only_run, run

from common import ckpt, drawing, threads
from common.args import AUTO

NOBODY_ASKED = {"OMP_NUM_THREADS": ""}  # unset would be inherited: libgomp ignores an empty one


def start_of(folder, which=-1) -> dict:
    """What config.json says of a start."""
    return json.loads((folder / "config.json").read_text())["starts"][which]


@pytest.fixture
def cores(monkeypatch):
    """cores(n): this process believes to have n cores, and torch is left with one thread afterwards."""
    yield lambda count: monkeypatch.setattr(threads, "available", lambda: count)
    torch.set_num_threads(1)


@pytest.fixture
def nobody_asked(monkeypatch):
    """Nobody gave this process a number, and torch is left with one thread afterwards."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(1)


def timed(monkeypatch, seconds):
    """work() that takes seconds(number of threads), by a clock that only it moves; returns it."""
    now = [0.0]
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += seconds(torch.get_num_threads())

    return work


def test_no_tool_takes_more_threads_than_there_are_cores(cores, capsys):
    """Of a hundred thousand OpenMP would die."""
    cores(1)
    threads._warn_once.cache_clear()
    for asked, said in ((1, 0), (3, 1), (3, 0)):  # once: a page settles them for each run
        threads.settle(asked, lambda: pytest.fail("it was told"))
        assert torch.get_num_threads() == 1
        assert capsys.readouterr().err.count("--threads 3 is more than there are cores to use: 1 compute") == said


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu.max": "", "cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({}, math.inf),
    ],
)
def test_a_containers_limit_counts_as_so_many_cores(files, limit, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._limit(tmp_path) == limit


def test_no_more_cores_than_the_limit_are_used(monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for limit, cores in ((3, 3), (math.inf, 8)):
        monkeypatch.setattr(threads, "_limit", lambda _groups, limit=limit: limit)
        assert threads.available.__wrapped__() == cores


@pytest.mark.parametrize(("share", "cores"), [("3", 3), ("4096", 8), ("0", 8), ("many", 8), ("", 8)])
def test_the_cores_are_slurms_share_of_those_that_are_there(share, cores, monkeypatch):
    monkeypatch.setattr(threads, "_limit", lambda _groups: math.inf)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", share)
    assert threads.available.__wrapped__() == cores


@pytest.mark.parametrize(
    ("text", "number"), [("2", 2), ("2,1", 2), (" 3 , 1", 3), ("99", 8), ("0", None), ("x", None), ("", None)]
)
def test_openmps_number_is_the_first_of_its_list(text, number, cores, monkeypatch):
    """The others are for threads within threads."""
    cores(8)
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads.prepare() == number


@pytest.mark.usefixtures("nobody_asked")
@pytest.mark.parametrize(("count", "few"), [(5, 5), (drawing.FEW + 1, drawing.FEW)])
def test_a_trial_draws_a_few_of_the_images(count, few, monkeypatch):
    drawn = []
    monkeypatch.setattr(threads, "fastest", lambda work: (1, work()))
    asked, labels = SimpleNamespace(threads=AUTO, guidance=2.0), list(range(count))
    drawing.choose_threads(asked, lambda **how: drawn.append(how), count, labels, torch.device("cpu"))
    assert drawn == [{"labels": labels[:few], "count": few, "steps": 1, "guidance": 2.0}]


@pytest.mark.parametrize(
    ("here", "seconds", "best"),
    [
        (8, lambda n: 1 / n, 8),
        (8, lambda n: max(1 / n, 0.25), 4),
        (6, lambda n: 1 / n, 6),
        (2, lambda n: 1 if n == 1 else 0.99, 1),  # hardly worth another core
        (2, lambda n: 1 if n == 1 else 40, 1),
        (1, lambda n: 1, 1),
    ],
)
def test_the_fastest_number_is_taken(here, seconds, best, cores, monkeypatch):
    cores(here)
    found, measured = threads.fastest(timed(monkeypatch, seconds))
    assert (found, torch.get_num_threads()) == (best, best)
    assert measured[best] == pytest.approx(seconds(best))


def test_a_hopeless_number_is_tried_twice_only(cores, monkeypatch):
    cores(2)
    calls = []
    work = timed(monkeypatch, lambda n: calls.append(n) or (0.01 if n == 1 else 3.0))
    threads.fastest(work)
    assert calls.count(2) == 2


def test_steps_that_became_slow_are_noticed_once():
    pace = threads.Pace(usual=1.0)
    steps = [1.0] * 40 + [3.0] * 40
    noticed = [index for index, seconds in enumerate(steps) if pace.slowed(seconds)]
    assert len(noticed) == 1
    assert 40 < noticed[0] < 55
    assert not any(threads.Pace().slowed(seconds) for seconds in [2.0] * 100)


@pytest.mark.usefixtures("nobody_asked")
@pytest.mark.parametrize("folder", [AE, LATENT, PIXEL])
def test_a_run_measures_records_and_keeps_its_number(folder, tiny, tiny_latent, cache, tmp_path):
    """One of them in a real process. The trial has changed no bit of what follows."""
    own = {AE: ("--model", "conv", *tiny), LATENT: tiny_latent, PIXEL: (*SMALL, "--T", 20, *tiny)}[folder]
    begin = partial(run, env=NOBODY_ASKED) if folder == AE else call
    result = begin(folder, "train.py", *own, "--epochs", 1, "--outdir", tmp_path / "measured")
    assert result.code == 0, result.text
    line = re.search(r"threads: (\d+) of (\d+) \(images/s in a trial: [\d,]+ with 1", result.text)
    assert line, result.text
    assert int(line[2]) == threads.available()
    measured = only_run(tmp_path / "measured")
    number = newest_state(measured)["args"]["threads"]
    assert number == int(line[1]) == start_of(measured)["threads"]
    given = (*own, "--epochs", 2, "--outdir", tmp_path / "given")
    assert call(folder, "train.py", *given, "--threads", number).code == 0
    again = call(folder, "train.py", "--resume", measured, "--epochs", 2, "--cache-dir", cache)
    assert again.code == 0, again.text
    assert "in a trial" not in again.text
    assert start_of(measured)["threads"] == number
    assert_same_training(measured, only_run(tmp_path / "given"))


@pytest.mark.usefixtures("nobody_asked")
@pytest.mark.skipif(threads.available() < 2, reason="needs two cores")
def test_a_resume_keeps_what_it_would_not_choose_and_changes_what_it_is_told(tiny, tmp_path, monkeypatch):
    given = ("--model", "mlp", *tiny, "--outdir", tmp_path, "--auto-resume")
    assert call(AE, "train.py", *given, "--epochs", 1, "--threads", 2).code == 0
    folder = only_run(tmp_path)
    assert call(AE, "train.py", *given, "--epochs", 2).code == 0
    assert [start_of(folder, which)["threads"] for which in (0, 1)] == [2, 2]
    told = call(AE, "train.py", *given, "--epochs", 3, "--threads", 1)
    assert "this resume changes --threads 2 -> 1" in told.text
    assert newest_state(folder)["args"]["threads"] == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert "--threads 1 -> 2" in call(AE, "train.py", *given, "--epochs", 4).text
    assert only_run(tmp_path) == folder  # whatever the number, it is the same run


@pytest.mark.usefixtures("nobody_asked")
def test_a_resume_computes_with_the_recorded_number(ae_run, copy_of, tiny, cores):
    """Not only writes it down again."""
    cores(2)
    folder = copy_of(ae_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        state["args"]["threads"] = 2
        ckpt.save_checkpoint(path, state)
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, *tiny)
    assert result.code == 0, result.text
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("nobody_asked")
def test_a_resume_that_cannot_have_as_many_says_so(ae_run, copy_of, tiny):
    folder = copy_of(ae_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        state["args"]["threads"] = 4096
        ckpt.save_checkpoint(path, state)
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, *tiny)
    assert result.code == 0, result.text
    assert result.text.count(f"4096 threads, and here are {threads.available()} cores: its last bits may differ") == 1


@pytest.mark.usefixtures("nobody_asked")
def test_a_run_saved_before_the_number_was_recorded_keeps_that_of_its_last_start(ae_run, copy_of, tiny):
    folder = copy_of(ae_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        del state["args"]["threads"]
        ckpt.save_checkpoint(path, state)
    assert start_of(folder)["threads"] == 1
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, *tiny)
    assert result.code == 0, result.text
    assert "in a trial" not in result.text
    assert newest_state(folder)["args"]["threads"] == 1


@pytest.mark.usefixtures("nobody_asked")
def test_a_run_stopped_before_its_first_step_takes_the_number_that_is_typed(ae_run, copy_of, tiny):
    folder = copy_of(ae_run)
    for _, path in ckpt.run_checkpoints(folder):
        state = ckpt.read_checkpoint(path)
        state["args"]["threads"] = AUTO
        ckpt.save_checkpoint(path, state)
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, *tiny, "--threads", 2)
    assert result.code == 0, result.text
    assert "in a trial" not in result.text
    assert newest_state(folder)["args"]["threads"] == 2


@pytest.mark.parametrize("count", [1, 2])
def test_a_machine_that_became_busy_is_told_once_what_one_thread_would_bring(count, cores, tiny, tmp_path, monkeypatch):
    """And the weights are those of a run that never looked. A run of one thread has nothing to gain."""
    cores(2)
    given = ("--model", "mlp", *tiny, "--epochs", 3, "--threads", count)
    assert call(AE, "train.py", *given, "--outdir", tmp_path / "quiet").code == 0
    monkeypatch.setattr(threads, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(threads, "SLOW", 0.0)
    result = call(AE, "train.py", *given, "--outdir", tmp_path / "busy")
    assert result.code == 0, result.text
    assert result.text.count("this machine is busy") == result.text.count("resume with --threads 1") == count - 1
    assert_same_training(only_run(tmp_path / "quiet"), only_run(tmp_path / "busy"))


def test_drawing_measures_too_unless_it_is_told(latent_run, tmp_path, monkeypatch, cores):
    cores(2)
    tried, fastest = [], threads.fastest
    monkeypatch.setattr(threads, "fastest", lambda work: tried.append(work) or fastest(work))
    given = ("--ckpt", latent_run, "--num-images", 4, "--output", tmp_path / "a.png", "--digit", 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert call(LATENT, "infer.py", *given, "--threads", 2).code == 0
    assert (tried, torch.get_num_threads()) == ([], 2)
    assert call(LATENT, "infer.py", *given).code == 0
    assert len(tried) == 1
    for asked in (1, 2):
        monkeypatch.setenv("OMP_NUM_THREADS", str(asked))
        assert call(LATENT, "infer.py", *given).code == 0
        assert (len(tried), torch.get_num_threads()) == (1, asked)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_a_wrong_number_is_one_line(value):
    result = call(AE, "train.py", "--model", "mlp", "--threads", value)
    assert (result.code, len(result.text.splitlines())) == (2, 1), result.text
