"""The job scripts under a real Slurm: time limits, requeues, cancelling, preemption, job arrays."""

import json
import re
import shutil
import sys

import pytest
from helpers import AE, FULL_MNIST, LATENT, PIXEL, REPO, assert_same_training, call, only_run, run

SMALL = {
    PIXEL: (
        "--base-ch",
        8,
        "--fine-ch",
        0,
        "--T",
        20,
        "--batch-size",
        32,
        "--samples-per-epoch",
        4,
        "--generate-images",
    ),
    LATENT: ("--hidden-dim", 32, "--T", 20, "--batch-size", 16, "--samples-per-epoch", 4, "--generate-images"),
}
SOON = ("--time=00:01:00", "--signal=B:USR1@45")  # Slurm may signal up to a minute early: about 5 to 20 s in


@pytest.fixture(scope="module")
def data(cluster, cache):
    """Flags for the digits on this cluster, fetched once to $SCRATCH/hf_cache as README.md says."""
    if FULL_MNIST.is_dir():
        shutil.copytree(FULL_MNIST, cluster.scratch / "hf_cache")
        assert run(".", "-m common.data", "--data", "hub", "--cache-dir", cluster.scratch / "hf_cache").code == 0
        return ()  # job.sh says --data=hub
    shutil.copytree(cache, cluster.scratch / "hf_cache")
    return ("--data=embedded",)


SLOW = """
import os, sys, time
sys.path.insert(0, ".")
import train
from common.error_codes import run_main
from common.learner import Learner
step = Learner.step
def slow(self, number):
    time.sleep(0.4 if os.path.exists({mark!r}) else 0)
    return step(self, number)
Learner.step = slow
sys.exit(run_main(lambda: train.main(sys.argv[1:])))
"""


def python_in(folder, trainer: str) -> str:
    """A PATH with a `python` in `folder` that does what bash's `trainer` says when train.py is to run."""
    (folder / "python").write_text(f'#!/bin/bash\n[ "$1" != train.py ] || {trainer}\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return str(folder)


def test_jobs_go_on_through_time_limits_until_they_are_done(cluster, data, ae_run, tmp_path):
    """One of either kind at once, on a core each; the latent one trains with two tasks, which share its core.

    Until each came to two limits they train slowly, so that a limit comes to them at any time, but soon.
    """
    mark = tmp_path / "slowly"
    mark.touch()
    (tmp_path / "slow.py").write_text(SLOW.format(mark=str(mark)))
    slow = python_in(tmp_path, f'set -- {tmp_path}/slow.py "${{@:2}}"')
    epochs = 20 if data else 2  # of 13 steps at least, or of 173: more than two limits leave time for
    flags = ("--data=hub", *data, "--only-digit", 3, "--lr-scheduler", "none", "--device", "cpu", "--epochs", epochs)
    given = {PIXEL: (*flags, *SMALL[PIXEL]), LATENT: (*flags, *SMALL[LATENT], "--ae-ckpt", ae_run, "--shards", 2)}
    tasks = {PIXEL: (), LATENT: ("--ntasks=2", "--overcommit")}
    jobs = {
        folder: cluster.submit(REPO / folder, *SOON, *tasks[folder], flags=given[folder], path=slow) for folder in given
    }
    for folder in given:
        where = ("--cache-dir", cluster.scratch / "hf_cache", "--outdir", tmp_path / folder)
        assert (result := call(folder, "train.py", *where, *given[folder])).code == 0, result.text
    all_jobs, saved = ",".join(jobs.values()), "time limit: saved; requeueing job"
    cluster.wait_until(
        "two requeues", lambda: all(cluster.log(job).count(saved) >= 2 for job in jobs.values()), all_jobs, patience=600
    )
    mark.unlink()
    cluster.wait_for_end(all_jobs, patience=400)
    for folder, job in jobs.items():
        text = cluster.log(job)
        assert text.count("resumed from") >= 2, text
        assert text.count("outputs in") >= 3  # appended to, not truncated: all allocations are in one file
        assert f"epoch {epochs} of {epochs} is done" in text
        prefix = {PIXEL: "ddpm-d3", LATENT: "lddpm-"}[folder]
        interrupted = only_run(cluster.scratch / "ddpm-output", f"{prefix}*")
        assert_same_training(interrupted, only_run(tmp_path / folder))
        starts = json.loads((interrupted / "config.json").read_text())["starts"]
        assert {start["processes"] for start in starts} == {2 if folder == LATENT else 1}
    assert not list(cluster.temporary.glob("tmp.*"))  # every allocation removed its copy of the data


@pytest.fixture(scope="module")
def hopeless(cluster, data, tmp_path_factory) -> str:
    """A job whose --time is below the signal's lead: Slurm signals soon after each start; its trainer is slow to begin.

    Slurm looks at limits twice a minute: other tests use the time.
    """
    path = python_in(tmp_path_factory.mktemp("hopeless"), "sleep 600")
    soon = ("--time=00:01:00", "--signal=B:USR1@115")
    return cluster.submit(REPO / PIXEL, *soon, flags=(*data, "--device=cpu"), path=path)


@pytest.mark.usefixtures("hopeless")
def test_what_two_tasks_began_one_goes_on_with(cluster, data, ae_run):
    """And four GPUs, none of which is there, are four processes. All are submitted from within a job of two tasks."""
    flags = (*data, "--only-digit", 3, "--seed=9", "--device=cpu", "--ae-ckpt", ae_run, "--shards=4", *SMALL[LATENT])
    flags = (*flags, "--batch-size=64")
    wrong = cluster.submit(REPO / LATENT, "--gres=gpu:1", "--gpus-per-node=4", flags=flags)
    for options, epochs in ((("--ntasks=2", "--overcommit"), 2), ((), 3), (("--gres=gpu:4",), 4)):
        own = (*flags, f"--epochs={epochs}", "--lr-scheduler=none")
        job = cluster.submit(REPO / LATENT, *options, flags=own, SLURM_NTASKS="2")
        cluster.wait_for_end(job)
        assert f"epoch {epochs} of {epochs} is done" in cluster.log(job), cluster.log(job)
    run = only_run(cluster.scratch / "ddpm-output", "lddpm-*-seed9-*")
    assert [start["processes"] for start in json.loads((run / "config.json").read_text())["starts"]] == [2, 1, 4]
    cluster.wait_for_end(wrong)
    assert "error: job.sh's own --gres stands beside --gpus-per-node: say sbatch --gres=gpu:4" in cluster.log(wrong)


def test_a_job_without_a_scratch_folder_says_so(cluster):
    job = cluster.submit(REPO / AE, flags=("--model", "mlp"), scratch=False)
    cluster.wait_for_end(job)
    assert "error: set SCRATCH" in cluster.log(job)


def test_a_job_whose_limit_comes_before_a_step_gives_up(cluster, hopeless):
    job = hopeless
    cluster.wait_for_end(job, patience=400)
    text = cluster.log(job)
    assert [text.count(f"BE TRAINED, {starts} in a row; requeueing job {job}") for starts in (1, 2, 3)] == [1, 1, 0], (
        text
    )
    assert f"GIVING UP JOB {job}: 3 TIMES IN A ROW" in text
    assert not list(cluster.scratch.glob("ddpm-output/.no-progress-*"))


def long_job(cluster, data, *options, seed) -> str:
    """A pixel job that would take hours, once it has saved its first checkpoint."""
    flags = (*data, "--only-digit", 7, "--seed", seed, "--epochs=100000", "--device=cpu", *SMALL[PIXEL])
    job = cluster.submit(REPO / PIXEL, *options, flags=flags)
    cluster.wait_for_text(job, "train_loss")
    return job


def test_scancel_saves_and_does_not_requeue(cluster, data):
    job = long_job(cluster, data, seed=1)
    cluster.call("scancel", job)
    cluster.wait_for_end(job)
    text = cluster.log(job)
    assert "stopped by SIGTERM" in text
    assert "and saved" in text
    assert "requeueing" not in text
    assert cluster.states(job) == set()


@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.slow), ("--partition=patient", "--ntasks=2", "--overcommit")]
)
def test_preemption_saves_and_slurm_starts_the_job_again(options, cluster, data):
    """Also where its tasks are told some time before the job ends."""
    job = long_job(cluster, data, *options, seed=2 + len(options))
    urgent = ("--partition=urgent", "--cpus-per-task=2", "--gres=none", "--mem=0", f"--output={cluster.scratch}/u.out")
    other = cluster.call("sbatch", "--parsable", *urgent, "--wrap", "sleep 1")
    cluster.wait_for_text(job, "stopped by SIGTERM")
    cluster.wait_for_end(other)
    cluster.wait_for_text(job, "resumed from", patience=90)
    cluster.call("scancel", "--batch", "--signal=TERM", job)  # to the shell alone, as by --signal=B:TERM@60
    cluster.wait_for_end(job)
    text = cluster.log(job)
    assert text.count("and saved; go on with") == 2, text
    assert "not requeued from here: submit the same command again" in text


def test_an_array_trains_a_digit_per_task_and_each_requeues_itself(cluster, data):
    flags = (*data, "--epochs=4", "--seed=3", "--device=cpu", *SMALL[PIXEL])
    job = cluster.submit(REPO / PIXEL, "--array=4-5", flags=flags)
    first = cluster.scratch / f"ddpm-train-{job}_4.out"
    cluster.wait_until("first epoch", lambda: first.exists() and "train_loss" in first.read_text(), job)
    cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_4")
    cluster.wait_for_text(job, "resumed from", patience=90)
    cluster.wait_for_end(job)
    outdir = cluster.scratch / "ddpm-output"
    for digit in (4, 5):
        folder = only_run(outdir, f"ddpm-d{digit}-*-seed3-*")
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 4
    assert re.search(rf"requeueing job {job}_4\b", first.read_text())
    assert "resumed from" in first.read_text()
