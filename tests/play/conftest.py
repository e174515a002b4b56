"""What the tests of the server and those of the page share."""

import shutil
from pathlib import Path

import pytest
from serving import Server


@pytest.fixture(scope="module")
def runs(tmp_path_factory, latent_run, pixel_run, ae_run) -> dict[str, Path]:
    """Copies of a run of each kind, in one folder of runs, by their models' names."""
    outdir = tmp_path_factory.mktemp("play")
    for one in (latent_run, pixel_run, ae_run):
        shutil.copytree(one.parent.parent, outdir, symlinks=True, dirs_exist_ok=True)
    names = {"lddpm": latent_run, "ddpm": pixel_run, "ae-mlp": ae_run}
    return {model: outdir / "checkpoints" / run.name for model, run in names.items()}


@pytest.fixture(scope="module")
def server(runs, cache, tmp_path_factory):
    copy = shutil.copytree(cache, tmp_path_factory.mktemp("page") / "cache")
    for kept in copy.glob("decoded/classifier-*"):  # another file's tests may have needed it
        kept.unlink()
    server = Server(runs["lddpm"].parent, "--cache-dir", copy)
    yield server
    server.process.kill()
    server.process.wait(60)


@pytest.fixture(scope="module")
def elsewhere(runs, tmp_path_factory):
    """A server that was told of no runs, where jobs and trainers left some in $SCRATCH; not on loopback only."""
    scratch = tmp_path_factory.mktemp("scratch")
    shutil.copytree(runs["ae-mlp"], scratch / "ddpm-output" / "checkpoints" / "of-a-job", symlinks=True)
    shutil.copytree(runs["ddpm"], scratch / "checkpoints" / "of-a-trainer", symlinks=True)
    server = Server("--host", "0.0.0.0", env={"SCRATCH": str(scratch)})
    yield server
    server.process.kill()
    server.process.wait(60)
