"""Paths, and the small runs that many tests look at (made once, never changed by a test)."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: small tensors, and the same sums in every process
os.environ["OMP_WAIT_POLICY"] = "passive"  # see helpers.environment
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from helpers import AE, CLOSED_PORT, FULL_MNIST, LATENT, PIXEL, SMALL, Result, call, only_run, run

# these take minutes: they begin first, so that the processes of run.sh end at about the same time
LONG = (
    "test_slurm.py",
    "test_soak.py",
    "test_choice.py",
    "test_readme.py",
    "test_ranks.py",
    "test_page.py",
    "test_play.py",
)


def pytest_configure():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background is told to ignore it


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --all"))
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests marked slow: minutes for the rarer cases")
    parser.addoption("--kills", type=int, default=2, help="SIGKILLs per run in the soak tests (default: 2)")
    parser.addoption("--tab-seconds", type=int, default=3, help="how long twenty tabs ask at once (default: 3)")
    parser.addoption("--write-losses", action="store_true", help="test_losses.py writes what it finds to losses.json")


@pytest.fixture(autouse=True, scope="session")
def _clean_environment():
    for name in list(os.environ):
        if name.startswith(("SLURM_", "HF_")) or name == "SCRATCH":
            del os.environ[name]
    os.environ["HF_ENDPOINT"] = CLOSED_PORT


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make) -> a copy of the folder that make(folder) fills: one of run.sh's processes makes it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        original, begun = shared / name, shared / f"{name}-begun"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not original.is_dir():
                shutil.rmtree(begun, ignore_errors=True)
                begun.mkdir()
                make(begun)
                begun.rename(original)
        return Path(shutil.copytree(original, tmp_path_factory.mktemp(name) / "made", symlinks=True))

    return get


@pytest.fixture(scope="session")
def made_run(made_once):
    """made_run(start, folder, *flags) -> the folder of the run that `start` (run or call) trains, made once."""

    def get(name: str, start: Callable[..., Result], folder: str, *flags: object) -> Path:
        def make(outdir: Path) -> None:
            result = start(folder, "train.py", "--outdir", outdir, *flags)
            assert result.code == 0, result.text

        return only_run(made_once(name, make))

    return get


@pytest.fixture(scope="session")
def fetched(made_once) -> tuple[Path, str]:
    """A data set cache filled with the embedded digits by `python -m common.data`, and what that said."""

    def make(folder: Path) -> None:
        result = run(".", "-m common.data", "--data", "embedded", "--cache-dir", folder)
        assert result.code == 0, result.text
        (folder / "said.txt").write_text(result.text)

    folder = made_once("cache", make)
    return folder, (folder / "said.txt").read_text()


@pytest.fixture(scope="session")
def cache(fetched) -> Path:
    """A data set cache that holds the decoded embedded digits."""
    return fetched[0]


@pytest.fixture(scope="session")
def judged(cache, made_once) -> tuple:
    """(classifier of the embedded digits, its accuracy, the held-out digits): in `cache`, where scripts find it."""
    from common.classifier import load_classifier
    from common.data import HF_MNIST

    def make(folder: Path) -> None:
        load_classifier(cache, "embedded")
        for file in (cache / "decoded").glob("classifier-embedded-*.pt"):
            shutil.copy(file, folder)

    shutil.copytree(made_once("classifier", make), cache / "decoded", dirs_exist_ok=True)
    net, accuracy = load_classifier(cache, "embedded")
    return net, accuracy, HF_MNIST("test", cache, source="embedded")


@pytest.fixture(scope="session")
def tiny(cache) -> tuple:
    """Flags of a training run that takes a second: the 450 embedded threes."""
    rate = ("--lr", 1e-3, "--lr-scheduler", "none")
    return ("--data", "embedded", "--cache-dir", cache, "--only-digit", 3, "--batch-size", 64, "--device", "cpu", *rate)


@pytest.fixture(scope="session")
def ae_run(made_run, tiny) -> Path:
    """The run folder of an MLP autoencoder: the real script, 2 epochs."""
    return made_run("ae", run, AE, "--model", "mlp", "--epochs", 2, "--generate-images", *tiny)


@pytest.fixture(scope="session")
def conv_run(made_run, tiny) -> Path:
    """The run folder of a convolutional autoencoder, 1 epoch."""
    return made_run("conv", call, AE, "--model", "conv", "--epochs", 1, *tiny)


@pytest.fixture(scope="session")
def tiny_latent(tiny, ae_run) -> tuple:
    """Flags of a latent run that takes a second."""
    return ("--ae-ckpt", ae_run, "--T", 20, "--hidden-dim", 16, *tiny)


@pytest.fixture(scope="session")
def latent_run(made_run, tiny_latent) -> Path:
    """The run folder of a latent diffusion: the real script, 2 epochs."""
    return made_run("latent", run, LATENT, "--epochs", 2, "--generate-images", "--amp", *tiny_latent)


@pytest.fixture(scope="session")
def pixel_run(made_run, tiny) -> Path:
    """The run folder of a pixel diffusion, 1 epoch."""
    return made_run("pixel", call, PIXEL, "--epochs", 1, *SMALL, "--T", 20, *tiny)


@pytest.fixture
def copy_of(tmp_path):
    """copy_of(run folder) -> the same run in an output tree of its own, free to be damaged."""

    def copy(folder: Path) -> Path:
        outdir = tmp_path / f"copy-{len(list(tmp_path.glob('copy-*')))}"
        shutil.copytree(folder.parent.parent, outdir, symlinks=True)
        return outdir / "checkpoints" / folder.name

    return copy


@pytest.fixture(scope="session")
def full_mnist(tmp_path_factory) -> Path:
    """A copy of the full MNIST cache; skips where there is none."""
    if not FULL_MNIST.is_dir():
        pytest.skip(f"no full MNIST at {FULL_MNIST}")
    return Path(shutil.copytree(FULL_MNIST, tmp_path_factory.mktemp("full") / "hf_cache"))


@pytest.fixture
def disk(tmp_path):
    """disk(size) -> a mounted folder of that size (a tmpfs)."""
    mounts = []

    def mount(size: str):
        folder = tmp_path / f"disk-{len(mounts)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs is not permitted here")
        mounts.append(folder)
        return folder

    yield mount
    for folder in mounts:
        subprocess.run(["umount", "-l", folder], check=True)
