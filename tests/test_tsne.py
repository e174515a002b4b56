"""run_tsne.py and the notebook that calls its functions."""

import json
import shutil

import numpy as np
import pytest
from google.protobuf import text_format
from helpers import AE, REPO, call, executed, inside, only_run, recipe, stored
from PIL import Image
from sklearn.metrics import calinski_harabasz_score, silhouette_score
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin

from common.autoencoder import build_autoencoder, read_autoencoder
from common.data import HF_MNIST
from common.error_codes import BAD_CHECKPOINT, BAD_OUTPUT, MODEL_MISMATCH, NO_DATA, OUT_OF_MEMORY, USAGE

NOTEBOOK = REPO / AE / "tsne_visualization.ipynb"
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
        (("--output", "map.jpg"), BAD_OUTPUT),
        (("--checkpoint", "nothing.pt"), BAD_CHECKPOINT),
    ],
)
def test_wrong_input_is_one_line(flags, code, tsne, tmp_path):
    result = tsne("--output", tmp_path / "out", *flags)
    assert result.code == code, result.text
    assert len(result.errors) == 1
    assert "Traceback" not in result.text


def test_too_little_memory_is_one_line(tsne, tmp_path, monkeypatch):
    monkeypatch.setattr("common.latents.tsne_map", lambda *_: np.ones(1 << 50))
    result = tsne("--output", tmp_path / "out")
    assert (result.code, len(result.errors)) == (OUT_OF_MEMORY, 1), result.text
    assert "--n-samples 150" in result.errors[0]
    assert "Traceback" not in result.text


def test_digits_stand_where_their_points_are():
    with inside(AE):
        module = recipe(AE, "run_tsne.py")
    points, labels = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 10
    (axes,), panels = module.plot_map(points, labels, "a run").axes, module.plot_by_digit(points, labels, "a run").axes
    for digit in range(10):
        own = points[labels == digit]
        for drawn in (axes.collections[digit], panels[digit].collections[1]):
            assert (drawn.get_offsets() == own).all()
        assert axes.texts[digit].get_position() == tuple(np.median(own, axis=0))
        assert (axes.texts[digit].get_text(), panels[digit].get_title()) == (str(digit), f"{digit}   (6)")


def test_other_checkpoints(latent_run, ae_run, cache, tmp_path):
    flags = ("--data", "embedded", "--cache-dir", cache, "--output", tmp_path, "--n-samples", 50)
    assert call(AE, "run_tsne.py", "--checkpoint", latent_run, *flags).code == MODEL_MISMATCH
    one_digit = call(AE, "run_tsne.py", "--checkpoint", ae_run, *flags)
    assert one_digit.code == NO_DATA
    assert "only 3s" in one_digit.text


# --- TensorBoard's projector ------------------------------------------------------------------------------------------


@pytest.fixture
def projected(all_digits, copy_of, cache, tmp_path):
    """projected(flags) -> (the TensorBoard folder of a copy of the run, how run_tsne.py --projector ended)."""
    run = copy_of(all_digits)
    flags = ("--data", "embedded", "--cache-dir", cache, "--n-samples", 60, "--perplexity", 5, "--projector")
    folder = run.parent.parent / "runs" / run.name
    where = ("--checkpoint", run, "--output", tmp_path / "out")
    return lambda *more: (folder, call(AE, "run_tsne.py", *where, *flags, *more))


def embedding_in(folder):
    """What TensorBoard is told of the one embedding in a run's folder."""
    config = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (embedding,) = config.embeddings
    return embedding


def test_the_projector_shows_each_latent_with_its_label_and_its_digit(projected, all_digits, cache):
    folder, result = projected("--seed", 7)
    assert result.code == 0, result.text
    assert f"tensorboard --logdir {folder.parent}" in result.text
    assert len(list(folder.glob("events.*"))) == 1  # training's: a second one would only be in the way of a resume
    embedding = embedding_in(folder)
    assert embedding.tensor_name == "latents:00001"  # of epoch 1

    with inside(AE):
        module = recipe(AE, "run_tsne.py")
    autoencoder = build_autoencoder(read_autoencoder(all_digits))
    latents, labels, images = module.encode_digits(autoencoder, HF_MNIST("test", cache, source="embedded"), 60, 7)
    rows = [line.split("\t") for line in (folder / embedding.tensor_path).read_text().splitlines()]
    np.testing.assert_allclose(np.array(rows, dtype=float), latents, atol=1e-6)
    assert (folder / embedding.metadata_path).read_text().splitlines() == [str(label) for label in labels]

    assert list(embedding.sprite.single_image_dim) == [28, 28]
    with Image.open(folder / embedding.sprite.image_path) as sprite:
        pixels = np.asarray(sprite.convert("L"), dtype=int)
    assert pixels.shape == (8 * 28, 8 * 28)  # a square of at least 60 places, filled row by row
    for index, image in enumerate(images[:, 0].numpy()):
        top, left = 28 * (index // 8), 28 * (index % 8)
        np.testing.assert_allclose(pixels[top : top + 28, left : left + 28], 255 * image, atol=1.01)


def test_tensorboard_finds_the_projector_of_a_run(projected):
    """Asked as its server asks it; also where the run's curves were deleted, so that nothing else is there."""
    folder, result = projected()
    assert result.code == 0, result.text
    assert list(configs_that_tensorboard_finds(folder.parent)) == [folder.name]
    shutil.rmtree(folder)
    _, result = projected()
    assert result.code == 0, result.text
    assert list(configs_that_tensorboard_finds(folder.parent)) == [folder.name]


def configs_that_tensorboard_finds(logdir):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    context = TBContext(logdir=str(logdir), data_provider=MultiplexerDataProvider(multiplexer, str(logdir)))
    plugin = ProjectorPlugin(context)
    plugin._update_configs()
    return {run: config.embeddings[0].tensor_shape for run, config in plugin._configs.items()}


def test_a_later_projector_replaces_the_one_before(projected):
    folder, _ = projected()
    before = folder / "00000" / "latents"
    (folder / "00001").rename(before.parent)
    _, result = projected("--seed", 1)
    assert result.code == 0, result.text
    assert not before.exists()
    assert (folder / embedding_in(folder).tensor_path).is_file()
    assert "warning" not in result.text


def test_a_projector_that_cannot_be_written_is_one_line(projected, all_digits, cache, tmp_path):
    lone = tmp_path / "lone.pt"
    shutil.copy(all_digits / "latest.pt", lone)
    folder, result = projected("--checkpoint", lone)
    assert result.code == USAGE, result.text
    assert len(result.errors) == 1
    assert "lone.pt lies in no run" in result.text
    shutil.rmtree(folder.parent)
    folder.parent.write_text("in the way")
    _, result = projected()
    assert result.code == BAD_OUTPUT, result.text
    assert len(result.errors) == 1
    assert not (tmp_path / "out").is_dir() or not list((tmp_path / "out").iterdir())  # found before the long work


# --- the notebook -----------------------------------------------------------------------------------------------------


def test_the_notebook_runs_whole(all_digits, cache, tmp_path, monkeypatch):
    assert 'CHECKPOINT = "latest"' in stored(NOTEBOOK)[0].source
    (tmp_path / "ddpm-output").symlink_to(all_digits.parent.parent)
    monkeypatch.setenv("SCRATCH", str(tmp_path))  # it finds the newest by itself, a job's too
    cells = executed(NOTEBOOK, N_SAMPLES=600, CACHE_DIR=str(cache), DATA="embedded")
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    said = "".join(o.get("text", "") for cell in cells for o in cell.outputs)
    assert "silhouette" in said
    assert all_digits.name in said
    few = "only 500 test digits"
    assert few in said
    assert few[:4] not in str([cell.outputs for cell in stored(NOTEBOOK)])  # where there were as many as asked for
