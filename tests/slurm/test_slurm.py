"""The job scripts under a real Slurm: time limits, requeues, cancelling, preemption, job arrays."""

import json
import os
import re
import shutil
import statistics
import sys
from datetime import datetime
from itertools import pairwise

import pytest
from helpers import AE, FULL_MNIST, LATENT, PIXEL, REPO, assert_same_training, finish, only_run, run, start

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
SECONDS = 45  # of training, for a job whose allocations train for 20 at the most
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


def epochs_for(seconds: float, folder: str, where: tuple, flags: tuple) -> int:
    """How many epochs take about that long, by a short run."""
    assert (result := run(folder, "train.py", *where, "--epochs", 6, *flags)).code == 0, result.text
    rows = (only_run(where[-1]) / "metrics.jsonl").read_text().splitlines()
    ends = [datetime.fromisoformat(json.loads(row)["timestamp"]) for row in rows]
    return round(seconds / statistics.median((b - a).total_seconds() for a, b in pairwise(ends)))


def test_jobs_go_on_through_time_limits_until_they_are_done(cluster, data, ae_run, tmp_path):
    """One of either kind at once, on a core each; the runs that they are compared with take what the two leave.

    The latent one trains with two tasks, which share its core.
    """
    given, epochs, where = {}, {}, ("--cache-dir", cluster.scratch / "hf_cache", "--outdir")
    for folder in (PIXEL, LATENT):
        flags = ("--data=hub", *data, "--only-digit", 3, "--lr-scheduler", "none", "--device", "cpu", *SMALL[folder])
        flags += ("--ae-ckpt", ae_run, "--shards", 2) if folder == LATENT else ()
        seconds = SECONDS / 3 if folder == LATENT else SECONDS
        epochs[folder] = epochs_for(seconds, folder, (*where, tmp_path / f"trial-{folder}"), flags)
        given[folder] = (f"--epochs={epochs[folder]}", *flags)
    tasks = {PIXEL: (), LATENT: ("--ntasks=2", "--overcommit")}
    jobs = {folder: cluster.submit(REPO / folder, *SOON, *tasks[folder], flags=given[folder]) for folder in given}
    untouched = {folder: start(folder, "train.py", *where, tmp_path / folder, *given[folder]) for folder in jobs}
    try:
        for process in untouched.values():
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        cluster.wait_for_end(",".join(jobs.values()), patience=900)
        results = {folder: finish(process, timeout=600) for folder, process in untouched.items()}
    finally:
        for process in untouched.values():
            process.kill()
    for folder, job in jobs.items():
        assert results[folder].code == 0, results[folder].text
        text = cluster.log(job)
        assert text.count("time limit: saved; requeueing job") >= 2, text
        assert "resumed from" in text  # not twice for sure: a signal may come before an allocation began to train
        assert text.count("outputs in") >= 2  # appended to, not truncated: all allocations are in one file
        assert f"epoch {epochs[folder]} of {epochs[folder]} is done" in text
        prefix = {PIXEL: "ddpm-d3", LATENT: "lddpm-"}[folder]
        interrupted = only_run(cluster.scratch / "ddpm-output", f"{prefix}*")
        assert_same_training(interrupted, only_run(tmp_path / folder))
        starts = json.loads((interrupted / "config.json").read_text())["starts"]
        assert {start["processes"] for start in starts} == {2 if folder == LATENT else 1}
    assert not list(cluster.temporary.glob("tmp.*"))  # every allocation removed its copy of the data


def test_what_two_tasks_began_one_goes_on_with(cluster, data, ae_run, tmp_path):
    """And four GPUs, none of which is there, are four processes."""
    flags = (*data, "--only-digit", 3, "--seed=9", "--device=cpu", "--ae-ckpt", ae_run, "--shards=4", *SMALL[LATENT])
    for options, epochs in ((("--ntasks=2", "--overcommit"), 2), ((), 3), (("--gres=gpu:4",), 4)):
        job = cluster.submit(REPO / LATENT, *options, flags=(*flags, f"--epochs={epochs}", "--lr-scheduler=none"))
        cluster.wait_for_end(job)
        assert f"epoch {epochs} of {epochs} is done" in cluster.log(job), cluster.log(job)
    run = only_run(cluster.scratch / "ddpm-output", "lddpm-*-seed9-*")
    assert [start["processes"] for start in json.loads((run / "config.json").read_text())["starts"]] == [2, 1, 4]
    wrong = cluster.submit(REPO / LATENT, "--gres=gpu:1", "--gpus-per-node=4", flags=flags)
    cluster.wait_for_end(wrong)
    assert "error: job.sh's own --gres stands beside --gpus-per-node: say sbatch --gres=gpu:4" in cluster.log(wrong)


def test_a_job_whose_limit_comes_before_a_step_gives_up(cluster, data, tmp_path):
    """Its --time is below the signal's lead: Slurm signals soon after each start; here the trainer is slow to begin."""
    (tmp_path / "python").write_text(f'#!/bin/bash\n[ "$1" != train.py ] || sleep 600\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    before, cluster.env = cluster.env, cluster.env | {"PATH": f"{tmp_path}:{cluster.env['PATH']}"}
    try:
        job = cluster.submit(REPO / PIXEL, "--time=00:01:00", "--signal=B:USR1@115", flags=(*data, "--device=cpu"))
    finally:
        cluster.env = before
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


def test_preemption_saves_and_slurm_starts_the_job_again(cluster, data):
    job = long_job(cluster, data, seed=2)
    urgent = ("--partition=urgent", "--cpus-per-task=2", "--gres=none", "--mem=0", f"--output={cluster.scratch}/u.out")
    other = cluster.call("sbatch", "--parsable", *urgent, "--wrap", "sleep 1")
    cluster.wait_for_text(job, "stopped by SIGTERM")
    cluster.wait_for_end(other)
    cluster.wait_for_text(job, "resumed from", patience=90)
    cluster.call("scancel", job)
    cluster.wait_for_end(job)


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


def test_a_job_without_a_scratch_folder_says_so(cluster):
    env = {key: value for key, value in cluster.env.items() if key != "SCRATCH"}
    before, cluster.env = cluster.env, env
    try:
        job = cluster.submit(REPO / AE, flags=("--model", "mlp"))
    finally:
        cluster.env = before
    cluster.wait_for_end(job)
    assert "error: set SCRATCH" in cluster.log(job)
