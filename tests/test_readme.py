"""The README.md files and CLAUDE.md: no dead links, README.md is short, and every command works as it is typed.

bash types the commands in a fresh copy of the repository, block by block, as a reader would: those of an experiment's
page in its folder, all others in the repository's. Only its `python` and `torchrun` make training and drawing short,
and are forks.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forks import server
from helpers import AE, LATENT, PIXEL, REPO, environment

from common.error_codes import NO_DATA

PAGES = (
    "README.md",
    *(f"{folder}/README.md" for folder in (AE, LATENT, PIXEL, "common", "common/play", "tests/benchmarks")),
    "CLAUDE.md",
)
LONGEST = 9000  # characters of README.md
EXCEPTIONS = {
    # how a command that is not typed begins: why
    "bash tests/run.sh": "is what runs this test",
    "python3 -m venv": "an environment is active, and packages come from the network",
    "job=$(cd mnist_ae && sbatch": "needs a cluster: tests/slurm has one",
    "(cd mnist_latent_diffusion && sbatch": "needs a cluster: tests/slurm has one",
    "(cd mnist_single_digit && sbatch": "needs a cluster: tests/slurm has one",
    "jupyter notebook": "waits for a browser; test_notebooks.py and test_tsne.py execute the notebooks",
    "tensorboard": "serves until it is stopped",
    "python -m common.play": "serves until it is stopped; tests/play opens it in a browser",
    "ssh -L": "needs a cluster",
    "python tests/benchmarks/": "needs full MNIST and an idle machine, for minutes to hours",
    "python tests/mutants.py": "takes minutes",
}
SHORTER = {
    # a word of the command: what is added to it
    "train.py": ["--epochs", "1", "--data", "embedded", "--device", "cpu"],
    "infer.py": ["--num-images", "10", "--device", "cpu"],
    "run_tsne.py": ["--n-samples", "60", "--perplexity", "5", "--data", "embedded"],
    "common.data": ["--data", "embedded"],
    "common.evaluate": ["--n", "200", "--data", "embedded"],
}
SMALLER = {
    LATENT: ["--T", "50"],
    PIXEL: ["--T", "50", "--base-ch", "8", "--fine-ch", "0", "--dense-dim", "16", "--epochs", "4"],
}  # by folder, the same for train.py

PYTHON = """#!{python} -SE
import os, sys
sys.path.insert(0, {tests!r})
from forks import as_python
launcher = ["-m", "torch.distributed.run"] if os.path.basename(sys.argv[0]) == "torchrun" else []
words, shorter = sys.argv[1:], {shorter!r}
for name in [name for name in shorter if name in words and "--export" not in words]:
    words += shorter[name]
    if name == "train.py":
        words += {smaller!r}.get(os.path.basename(os.getcwd()), [])
as_python({server!r}, [*launcher, *words])
"""


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of that language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (REPO / page).read_text(), re.DOTALL | re.MULTILINE)


def typed(block: str) -> str:
    """A block without the commands that are not typed."""
    return "".join(line for line in block.splitlines(keepends=True) if not line.startswith(tuple(EXCEPTIONS)))


@pytest.fixture(scope="module")
def copy(tmp_path_factory, cache, judged) -> Path:
    """A fresh copy of the repository, and beside it a `python` that is quick."""
    folder = tmp_path_factory.mktemp("readme")
    left = ("outputs", "hf_cache", ".git", "__pycache__", ".*_cache", ".venv", "venv", "tsne", "*.npz", "digits")
    copy = Path(shutil.copytree(REPO, folder / "ddpm", ignore=shutil.ignore_patterns(*left)))
    for experiment in (AE, LATENT, PIXEL):
        shutil.copytree(cache, copy / experiment / "hf_cache")  # with a classifier
    (folder / "bin").mkdir()
    places = {"python": sys.executable, "tests": str(REPO / "tests"), "server": server()}
    text = PYTHON.format(shorter=SHORTER, smaller=SMALLER, **places)
    for name in ("python", "torchrun"):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "home").mkdir()
    return copy


def type_in(copy: Path, folder: str, text: str) -> subprocess.CompletedProcess:
    """Type lines into a bash, in a folder of the copy; it stops at the first that fails."""
    path = f"{copy.parent / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    places = {"HOME": str(copy.parent / "home"), "VIRTUAL_ENV": sys.prefix, "PATH": path, "PIP_NO_INDEX": "1"}
    places["PYTHON_EXEC"] = str(copy.parent / "bin" / "python")  # that torchrun is to start
    scratch = {"SCRATCH": str(copy.parent / "scratch")} if "$SCRATCH" in text else {}
    env = environment(**places, **scratch)
    command = ["bash", "-euxo", "pipefail", "-c", text]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run(command, cwd=copy / folder, env=env, timeout=300, **streams)


def git(copy: Path, *words: str) -> str:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    return subprocess.run(["git", *who, *words], cwd=copy, check=True, capture_output=True, text=True).stdout


def test_every_command_works_as_it_is_typed(copy):
    git(copy, "init", "--quiet")
    git(copy, "add", "--all")
    git(copy, "commit", "--quiet", "--message", "a fresh copy")
    for page in PAGES:
        folder = str(Path(page).parent) if page.startswith("mnist_") else "."
        for block in map(typed, blocks(page, "bash")):
            started = time.monotonic()
            result = type_in(copy, folder, block)
            assert result.returncode == 0, f"{page}:\n{block}\n{result.stdout[-3000:]}"
            print(f"{time.monotonic() - started:5.1f} s  {page}: {block.splitlines()[:1]}")
    assert git(copy, "status", "--porcelain") == ""  # nothing tracked was written over, nothing untracked is left about


def test_the_python_examples_work(copy):
    for page in PAGES:
        for block in blocks(page, "python"):
            (copy.parent / "example.py").write_text(block)
            result = type_in(copy, ".", f"PYTHONPATH=$PWD python {copy.parent / 'example.py'}")
            assert result.returncode == 0, f"{page}:\n{block}\n{result.stdout[-3000:]}"


def test_every_exception_is_needed():
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    assert not [start for start in EXCEPTIONS if not any(line.startswith(start) for line in lines)]


def test_every_module_is_on_the_map():
    text = (REPO / "common" / "README.md").read_text()
    files = [path.name for path in (REPO / "common").iterdir() if path.suffix in (".py", ".sh")]
    assert not [name for name in files if name != "__init__.py" and f"`{name}`" not in text]


def test_readme_is_short():
    assert len((REPO / "README.md").read_text()) <= LONGEST


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (REPO / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        linked = (REPO / page).parent / path if path else REPO / page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings
        ], target


def test_every_page_is_tested():
    found = [path.relative_to(REPO) for path in REPO.rglob("*.md")]
    assert {str(path) for path in found if not {"outputs", "hf_cache", ".pytest_cache"} & set(path.parts)} == set(PAGES)


# --- one recipe -------------------------------------------------------------------------------------------------------

STUB = """#!/bin/sh
echo "$(basename "$PWD") $*" >>{log}
case "$*" in
train.py*) echo "checkpoints: /outputs/checkpoints/a run" ;;
*common.data*embedded) ;;
*common.data*) exit {code} ;;
-c*) echo {prefix} ;;
esac
"""


def flags_of(command: str) -> dict[str, str]:
    """The flags of a command that say how to train."""
    return dict(re.findall(r"(--(?:model|batch-size|lr|epochs)) ([\w.-]+)", command))


@pytest.mark.parametrize("code", [0, NO_DATA])
def test_run_sh_trains_the_recipe_that_the_pages_recommend(code, tmp_path):
    """Seen by a `python` that does nothing else. On the embedded digits it takes more epochs, and may stop."""
    (tmp_path / "python").write_text(STUB.format(log=tmp_path / "log", code=code, prefix=tmp_path))
    (tmp_path / "python").chmod(0o755)
    env = environment(VIRTUAL_ENV=str(tmp_path), PATH=f"{tmp_path}:{os.environ['PATH']}", PIP_NO_INDEX="1")
    result = subprocess.run(["bash", REPO / LATENT / "run.sh"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    typed = [line for line in (tmp_path / "log").read_text().splitlines() if " train.py " in line]
    assert [line.split()[0] for line in typed] == [AE, LATENT]
    pages = "".join((REPO / page).read_text() for page in PAGES)
    for line, mark in zip(typed, ("--model mlp", "--batch-size"), strict=True):
        recommended = re.findall(rf"^.*(?:train.py|job.sh) .*{mark} .*--epochs.*$", pages, re.MULTILINE)
        assert len(recommended) >= 3
        assert len({tuple(flags_of(command).items()) for command in recommended}) == 1, recommended
        wanted = flags_of(recommended[0])
        if code:
            del wanted["--epochs"]
        assert wanted.items() <= flags_of(line).items()
        assert "--generate-images" in line
        assert ("--early-stopping-patience" in line) == bool(code)
