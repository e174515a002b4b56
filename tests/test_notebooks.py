"""The notebooks: stored with the outputs of one whole run that could be anybody's; and the walk-through runs.

test_tsne.py runs the other one.
"""

import re

import nbformat
import pytest
from helpers import AE, PIXEL, REPO, executed, stored

from common.sampling import ReverseStep

WALKTHROUGH = REPO / PIXEL / "walkthrough.ipynb"
LARGEST = 600_000  # bytes
NOTEBOOKS = (WALKTHROUGH, REPO / AE / "tsne_visualization.ipynb")
OWN_PATH = re.compile(r"(?<![\w.:/<~-])/[\w.-]+/[\w./-]*|[A-Z]:\\\w+\\")  # not that of a link, nor a relative one


def texts(cells):
    """All that a reader reads in code cells but their pictures."""
    for cell in cells:
        yield cell.source
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def kinds(cells):
    """The kinds of output of each cell."""
    return [{(output.output_type, *sorted(output.get("data", {}))) for output in cell.outputs} for cell in cells]


def test_every_notebook_is_tested():
    found = {path for path in REPO.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    assert found == set(NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_with_the_outputs_of_one_whole_run(notebook):
    cells = stored(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert notebook.stat().st_size < LARGEST
    assert not [path for text in texts(cells) for path in OWN_PATH.findall(text)]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("saved in /home/me/ddpm/outputs", True),
        ("cache '/tmp/x/y'", True),
        (r"C:\Users\me", True),
        ("https://arxiv.org/abs/2006.11239 ../mnist_ae/model.py images/s x / y", False),
    ],
)
def test_what_counts_as_a_path_of_ones_own(text, is_one):
    assert bool(OWN_PATH.findall(text)) == is_one


def test_the_walkthrough_runs_whole_and_its_checks_hold(cache):
    few = {"T": 40, "PIXEL_STEPS": 12, "AE_EPOCHS": 1, "LATENT_STEPS": 12}
    before = stored(WALKTHROUGH)
    assert set(few) <= set(re.findall(r"^(\w+) =", before[0].source, re.MULTILINE))
    cells = executed(WALKTHROUGH, **few, CACHE_DIR=str(cache))  # a check that does not hold raises
    assert kinds(cells) == kinds(before)  # what is stored was made by these cells
    said = "".join(texts(cells))
    for check in ("small steps", "by hand", "steps agree", "draws the same", "equation 6", "factors agree"):
        assert check in said


def test_the_walkthrough_names_each_equation_where_it_stands():
    """Ho et al. 2020 is gone through in its own numbers, to the fields of `ReverseStep`."""
    text = "".join(cell.source for cell in nbformat.read(WALKTHROUGH, as_version=4).cells)
    for number in (1, 2, 4, 6, 7, 11, 14, 15):
        assert rf"\text{{(Ho {number})}}" in text
    named = set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE))
    assert {"x_scale", "epsilon_scale", "noise_scale", "change_scale"} <= named <= set(ReverseStep._fields)
