"""run_tsne.py and the notebook that calls its functions."""

import json

import nbformat
import numpy as np
import pytest
from helpers import AE, REPO, call, inside, only_run, recipe
from nbclient import NotebookClient
from PIL import Image
from sklearn.metrics import calinski_harabasz_score, silhouette_score

from common.autoencoder import build_autoencoder, read_autoencoder
from common.data import HF_MNIST
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, MODEL_MISMATCH, NO_DATA, USAGE

NAMES = ("tsne_latent_space.png", "tsne_by_digit.png", "reconstructions.png", "metrics.json")


@pytest.fixture(scope="module")
def all_digits(cache, tmp_path_factory):
    """A run that knows all digits."""
    outdir = tmp_path_factory.mktemp("ae-all")
    result = call(
        AE, "train.py", "--model", "mlp", "--epochs", 1, "--data", "embedded", "--cache-dir", cache, "--outdir", outdir
    )
    assert result.code == 0, result.text
    return only_run(outdir)


@pytest.fixture
def tsne(all_digits, cache):
    """tsne(flags) -> how run_tsne.py ended, on few digits."""
    flags = ("--data", "embedded", "--cache-dir", cache, "--n-samples", 150)
    return lambda *more: call(AE, "run_tsne.py", "--checkpoint", all_digits, *flags, *more)


def test_a_folder_gets_the_files_under_their_names(tsne, all_digits, cache, tmp_path):
    result = tsne("--output", tmp_path / "out")
    assert result.code == 0, result.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    for name in NAMES[:2]:
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(set(picture.convert("RGB").resize((80, 80)).getdata())) > 50  # not an empty frame
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    autoencoder = build_autoencoder(read_autoencoder(all_digits))
    with inside(AE):
        module = recipe(AE, "run_tsne.py")
    digits = HF_MNIST("test", cache, source="embedded")
    _, labels, images = module.encode_digits(autoencoder, digits, 150, 42)
    latents = autoencoder.encode(images).numpy()
    assert found["silhouette"] == pytest.approx(silhouette_score(latents, labels), abs=1e-5)
    assert found["calinski_harabasz"] == pytest.approx(calinski_harabasz_score(latents, labels), rel=1e-4)
    assert f"{found['silhouette']:.4f}" in result.text


def test_a_png_is_the_map_and_the_rest_lies_beside_it(tsne, tmp_path):
    result = tsne("--output", tmp_path / "my map.PNG")
    assert result.code == 0, result.text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("my map.PNG", *NAMES[1:]))


def test_the_map_keeps_clusters_apart_and_is_the_same_every_time(all_digits):
    with inside(AE):
        module = recipe(AE, "run_tsne.py")
    clusters = np.repeat(10 * np.eye(4, 16), 20, axis=0)
    latents = (clusters + np.random.default_rng(0).normal(size=(80, 16))).astype(np.float32)
    first, again = module.tsne_map(latents, 10), module.tsne_map(latents, 10)
    assert (first == again).all()
    assert silhouette_score(first, np.repeat(range(4), 20)) > 0.5
    assert module.tsne_map(latents[:, :1], 10).shape == (80, 2)  # --latent-dim 1


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--perplexity", 150), USAGE),
        (("--perplexity", 0), USAGE),
        (("--n-samples", 5), USAGE),
        (("--output", "/proc/nowhere"), BAD_OUTPUT),
        (("--output", "reconstructions.png"), USAGE),
        (("--output", "map.jpg"), USAGE),
        (("--checkpoint", "nothing.pt"), BAD_CHECKPOINT),
    ],
)
def test_wrong_input_is_one_line(flags, code, tsne, tmp_path):
    result = tsne("--output", tmp_path / "out", *flags)
    assert result.code == code, result.text
    assert len(result.errors) == 1
    assert "Traceback" not in result.text


def test_other_checkpoints(latent_run, ae_run, cache, tmp_path):
    flags = ("--data", "embedded", "--cache-dir", cache, "--output", tmp_path, "--n-samples", 50)
    assert call(AE, "run_tsne.py", "--checkpoint", latent_run, *flags).code == MODEL_MISMATCH
    one_digit = call(AE, "run_tsne.py", "--checkpoint", ae_run, *flags)
    assert one_digit.code == NO_DATA
    assert "only 3s" in one_digit.text


def test_the_notebook_runs_whole(all_digits, cache, monkeypatch):
    notebook = nbformat.read(REPO / AE / "tsne_visualization.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)  # committed without outputs
    assert "CHECKPOINT = None" in code[0].source
    monkeypatch.setenv("SCRATCH", str(all_digits.parent.parent))  # it finds the newest by itself
    settings = {"N_SAMPLES": 150, "CACHE_DIR": str(cache), "DATA": "embedded"}
    code[0].source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(REPO / AE)}}).execute()
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    said = "".join(o.get("text", "") for cell in code for o in cell.outputs)
    assert "silhouette" in said
    assert all_digits.name in said
