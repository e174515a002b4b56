"""What common/README.md says under "Change one thing" is done as it stands there: a noise schedule, another logger."""

import contextlib
import io
import itertools
import json
import re
import shutil

import pytest
from forks import run
from helpers import AE, LATENT, PIXEL, REPO, SMALL, call, only_run

from common import classifier

PAGE = (REPO / "common" / "README.md").read_text()


def section(title: str) -> str:
    """The part of the page under a heading."""
    return re.search(rf"^### {title}.*?\n(.*?)(?=^##)", PAGE, re.DOTALL | re.MULTILINE)[1]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of that language, without the indentation that a list gives them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def test_a_noise_schedule_is_added_as_the_page_says(tiny, tmp_path):
    left_out = shutil.ignore_patterns("outputs", "hf_cache", ".git", ".*_cache", "__pycache__", "figures")
    copy = shutil.copytree(REPO, tmp_path / "copy", ignore=left_out)
    function, last_line, test = blocks(section("A noise schedule"), "py")
    schedules, tests = copy / "common" / "schedules.py", copy / "tests" / "test_diffusion.py"
    *lines, last = schedules.read_text().splitlines(keepends=True)
    schedules.write_text("".join([*lines, function, "\n\n", last_line]))
    assert last.split(" for ")[0] == last_line.split(" for ")[0]
    tests.write_text(tests.read_text() + "\n\n" + test)
    name = re.search(r"def test_(\w+)", test)[1]
    checked = run(copy, "-m pytest", "-q", "-p", "no:cacheprovider", tests, "-k", name)
    assert "1 passed" in checked.text, checked.text
    words = re.search(r"train.py (.*?)\)", section("A noise schedule"))[1].split()
    trained = run(copy / PIXEL, "train.py", *words, *tiny, "--T", 20, "--epochs", 1, "--outdir", tmp_path)
    assert trained.code == 0, trained.text
    config = json.loads((only_run(tmp_path) / "config.json").read_text())
    assert config["flags"]["schedule"]["value"] == "sigmoid"
    drawn = run(copy / PIXEL, "infer.py", "--ckpt", only_run(tmp_path), "--n", 2, "--out", tmp_path / "a.png")
    assert drawn.code == 0, drawn.text


@pytest.fixture
def rows(tiny, tiny_latent, tmp_path, monkeypatch):
    """By experiment, the rows in metrics.jsonl of a run that is scored in its second epoch."""
    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: classifier.DigitClassifier().eval())
    cache = shutil.copytree(tiny[3] / "decoded", tmp_path / "cache" / "decoded").parent
    own = {AE: ("--model", "mlp", *tiny), LATENT: tiny_latent, PIXEL: (*SMALL, "--fine-ch", 0, "--T", 4, *tiny)}
    found = {}
    for folder, flags in own.items():
        more = ("--epochs", 2, "--eval-every", 2, "--cache-dir", cache, "--outdir", tmp_path / folder)
        result = call(folder, "train.py", *flags, *more)
        assert result.code == 0, result.text
        lines = (only_run(tmp_path / folder) / "metrics.jsonl").read_text().splitlines()
        found[folder] = [json.loads(line) for line in lines]
    return found


def test_the_fields_of_metrics_are_those_that_the_page_names(rows):
    table = re.findall(r"^\| (`.*?) \|.*\| (.*?) \|$", section("Another logger"), re.MULTILINE)
    named = {field: when for fields, when in table for field in re.findall(r"`(.*?)`", fields)}
    always = {field for field, when in named.items() if when == "always"}
    unscored = {field for field, when in named.items() if not when.startswith(("…", "in the epochs"))}
    scored = named.keys() - unscored
    labelled = {field for field in scored if field.endswith("_labelled")}
    latents = {"latent/mean", "latent/std"}
    wanted = {PIXEL: always, LATENT: always | latents, AE: unscored}
    assert wanted[AE] == always | latents | {"latent/max"}
    for folder, (first, second) in rows.items():
        assert first.keys() == wanted[folder], folder
        assert second.keys() == wanted[folder] | (scored - labelled if folder == AE else scored), folder


def test_the_lines_that_follow_a_run_hand_on_every_row_once(tiny, tmp_path):
    """While it trains, and also where a resume cuts the file back."""
    (text,) = blocks(section("Another logger"), "python")
    program: dict = {}
    exec(text, program)
    slept = []
    program["time"] = type("Time", (), {"sleep": slept.append})
    given = ("--model", "mlp", *tiny, "--outdir", tmp_path, "--auto-resume")
    assert call(AE, "train.py", *given, "--epochs", 2).code == 0
    file = only_run(tmp_path) / "metrics.jsonl"
    followed = program["follow"](file)
    seen = list(itertools.islice(followed, 2))
    whole = file.read_text()
    file.write_text(whole + whole.splitlines()[1][:30])  # a line that is still being written, or was torn by a kill
    with contextlib.redirect_stdout(io.StringIO()):
        assert call(AE, "train.py", *given, "--epochs", 4).code == 0
    seen += itertools.islice(followed, 2)
    assert seen == [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["epoch"] for row in seen] == [1, 2, 3, 4]
