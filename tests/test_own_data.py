"""Data other than MNIST, FILE.npz and hub:OWNER/NAME, through the real scripts: what they are is their content."""

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import AE, LATENT, PIXEL, SMALL, assert_same_training, call, newest_state, only_run
from PIL import Image

from common import ckpt, classifier, data, load, mnist, own_data
from common.cache import decoded_path, keep, pictures_in
from common.data import HF_MNIST
from common.error_codes import (
    BAD_CHECKPOINT,
    BAD_OUTPUT,
    MODEL_MISMATCH,
    NO_AE_CHECKPOINT,
    NO_DATA,
    OK,
    OUT_OF_MEMORY,
    USAGE,
    Exit,
)
from common.play import judge
from common.play.runs import Shelf, find
from common.play.wishes import Refused

CLASSES = 3


def shapes(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Bars, posts and boxes at random places: a data set that has three classes, and looks like no digit."""
    rng = np.random.default_rng(seed)
    images, labels = np.zeros((count, 28, 28), np.uint8), np.arange(count) % CLASSES
    for image, label in zip(images, labels, strict=True):
        top, left = rng.integers(2, 14, 2)
        height, width = [(4, 12), (12, 4), (10, 10)][label]
        image[top : top + height, left : left + width] = rng.integers(150, 256)
    return {"images": images, "labels": labels}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of such a data set."""
    path = tmp_path_factory.mktemp("shapes") / "shapes.npz"
    np.savez(path, **shapes(600))
    return path


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Flags of a run that takes a second."""
    cache = tmp_path_factory.mktemp("own-cache")
    return ("--batch-size", 64, "--device", "cpu", "--lr", 1e-3, "--lr-scheduler", "none", "--cache-dir", cache)


@pytest.fixture(scope="module")
def autoencoder(file, quick, tmp_path_factory):
    """The run folder of an autoencoder of the shapes."""
    outdir = tmp_path_factory.mktemp("own-ae")
    given = ("--model", "mlp", "--data", file, *quick, "--epochs", 4, "--generate-images", "--outdir", outdir)
    result = call(AE, "train.py", *given)
    assert result.code == OK, result.text
    assert "540 images of" in result.text
    assert f"for tests: {own_data.TENTH}" in result.text
    return only_run(outdir)


@pytest.fixture(scope="module")
def latent(file, quick, autoencoder, tmp_path_factory):
    """The run folder of a latent diffusion on them, trained by way of the newest autoencoder in a folder."""
    outdir = tmp_path_factory.mktemp("own-latent")
    folder = ("--ae-ckpt-dir", autoencoder.parent, "--T", 20, "--hidden-dim", 16)
    result = call(LATENT, "train.py", *folder, "--data", file, *quick, "--epochs", 1, "--outdir", outdir)
    assert result.code == OK, result.text
    return only_run(outdir)


def test_it_is_recorded_by_its_content(autoencoder, latent, file):
    own = HF_MNIST("train", source=str(file))
    for folder in (autoencoder, latent):
        flags = newest_state(folder)["args"]
        assert (flags["data"], flags["dataset"]) == (str(file), own.fingerprint)
        assert flags["class_counts"] == [own.labels.eq(label).sum().item() for label in range(10)]


def test_it_is_looked_at_and_drawn(autoencoder, latent, file, quick, tmp_path):
    """Each tool takes the data of the run where no --data says otherwise; the cache holds no MNIST."""
    place = quick[-2:]
    result = call(AE, "infer.py", "--ckpt", autoencoder, *place, "--output", tmp_path / "a.png")
    assert result.code == OK, result.text
    assert f"60 test images ({file})" in result.text
    tsne = ("--n-samples", 60, "--perplexity", 5, "--output", tmp_path / "tsne")
    assert call(AE, "run_tsne.py", "--ckpt", autoencoder, *place, *tsne).code == OK
    for script, more in (("infer.py", ("--output", tmp_path / "other.png")), ("run_tsne.py", tsne)):
        result = call(AE, script, "--ckpt", autoencoder, *place, *more, "--data", "embedded")
        assert (result.code, len(result.text.splitlines())) == (MODEL_MISMATCH, 1), result.text
        assert "embedded is other data" in result.text
    assert not (tmp_path / "other.png").exists()
    draw = ("--ckpt", latent, "--n", 9, "--output", tmp_path / "b.png", "--save-npz", tmp_path / "b.npz")
    assert call(LATENT, "infer.py", *draw).code == OK
    assert set(np.load(tmp_path / "b.npz")["labels"]) <= {0, 1, 2}
    assert call(LATENT, "infer.py", *draw, "--digit", 0, 1, 2).code == OK
    result = call(LATENT, "infer.py", *draw, "--digit", 7)
    assert (result.code, len(result.text.splitlines())) == (MODEL_MISMATCH, 1), result.text
    assert "seen nothing of class 7: --digit can be 0, 1, 2" in result.text
    with pytest.raises(ValueError, match="seen nothing of class 7"):
        load(latent, "cpu").draw([1, 7])


def test_the_page_looks_at_a_run_with_its_own_data(autoencoder, latent, file, tmp_path):
    shelf = Shelf(find([str(autoencoder), str(latent)], print), "cpu", 1, str(tmp_path))
    described = {run["model"]: run for run in shelf.described()}
    assert described["lddpm"]["digits"] == [0, 1, 2]
    assert described["lddpm"]["data"] == "shapes", "and no path"
    assert "digits" not in described["ae-mlp"]
    own = HF_MNIST("test", source=str(file))
    opened = shelf.open(described["ae-mlp"]["id"])
    assert torch.equal(shelf.digits(opened).images, own.images)
    assert shelf.data_of(opened) == (tmp_path, str(file)), "by which its classifier is chosen"
    opened.run.flags["dataset"] = "other"
    for look in (lambda: shelf.digits(opened), lambda: judge._classifier(shelf, opened)):
        with pytest.raises(Refused, match="has changed since"):
            look()
    opened.run.flags["data"] = str(tmp_path / "gone.npz")
    with pytest.raises(Refused, match=r"^gone\.npz, this run's data, is not where"):
        shelf.digits(opened)
    opened.run.flags |= {"data": "hub:a/shapes", "dataset": own.fingerprint}
    with pytest.raises(Refused, match=r"fetch it with python -m common.data --data hub:a/shapes"):
        shelf.digits(opened)
    assert judge.labels_of(shelf, opened, own.images[:2]) is None
    keep(own_data.hub_file("a/shapes", tmp_path), shapes(600), pytest.fail)
    assert torch.equal(shelf.digits(opened).images, own.images)


def test_it_is_scored_by_a_classifier_of_its_own(autoencoder, latent, file, quick, tmp_path, monkeypatch):
    learned = []

    def train(digits, **_):
        learned.append(digits)
        torch.manual_seed(0)
        return classifier.DigitClassifier().eval().requires_grad_(False)

    monkeypatch.setattr(classifier, "train_classifier", train)
    place, target = quick[-2:], tmp_path / "scores.json"
    own = HF_MNIST("train", source=str(file))
    for run_folder, more in ((latent, ("--sampler", "dpm")), (autoencoder, ())):
        result = call("common", "evaluate.py", "--ckpt", run_folder, *place, "--n", 200, "--json", target, *more)
        assert result.code == OK, result.text
        details = json.loads(target.read_text())["details"]
        assert (details["dataset"], details["held_out"]) == (own.fingerprint, own_data.TENTH)
    assert len(learned) == 1, "kept for the second"
    assert torch.equal(learned[0].images, own.images)
    assert (quick[-1] / "decoded" / f"classifier-{own.fingerprint}-v{classifier.VERSION}.pt").is_file()
    result = call("common", "evaluate.py", "--ckpt", latent, *place, "--n", 200, "--data", "embedded")
    assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
    assert "embedded is other data" in result.errors[0]


def test_pixels_of_it_and_scores_during_training(file, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "train_classifier", lambda *_, **__: classifier.DigitClassifier().eval())
    where = ("--data", file, *quick, "--outdir", tmp_path, "--cache-dir", tmp_path / "cache")
    result = call(PIXEL, "train.py", *where, "--T", 4, *SMALL, "--fine-ch", 0, "--epochs", 1, "--eval-every", 1)
    assert result.code == OK, result.text
    assert "agreement_labelled" in newest_state(only_run(tmp_path))["scores"]


# --- the data are part of what a run is ---


def test_a_run_goes_on_with_the_same_data_wherever_they_lie(file, quick, autoencoder, tmp_path):
    (tmp_path / "moved").mkdir()
    copy, other = tmp_path / "moved" / "again.npz", tmp_path / "other.npz"
    shutil.copy(file, copy)
    np.savez(other, **shapes(600, seed=1))
    where = ("--model", "mlp", *quick, "--outdir", tmp_path, "--auto-resume")
    for epochs, path, runs in ((1, file, 1), (2, copy, 1), (1, other, 2)):
        result = call(AE, "train.py", *where, "--data", path, "--epochs", epochs)
        assert result.code == OK, result.text
        assert len(list((tmp_path / "checkpoints").iterdir())) == runs
    assert "which has dataset" in result.text
    (mine,) = [path for path in (tmp_path / "checkpoints").iterdir() if newest_state(path)["epoch"] == 2]
    whole = tmp_path / "whole"
    assert call(AE, "train.py", *where, "--data", file, "--epochs", 2, "--outdir", whole).code == OK
    assert_same_training(only_run(whole), mine)
    plain = ("--resume", mine, "--epochs", 3)
    for given in (("--data", other), ("--data", "embedded")):
        result = call(AE, "train.py", *plain, *given)
        assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
        assert "contradicts the run to be resumed" in result.errors[0]
    np.savez(copy, **shapes(600, seed=1))  # what the run's own path leads to now
    result = call(AE, "train.py", *plain)
    assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
    assert f"{copy} is not what this run began with" in result.errors[0]
    copy.unlink()
    result = call(AE, "train.py", *plain)
    assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text
    assert call(AE, "train.py", *plain, "--data", file).code == OK
    assert newest_state(mine)["epoch"] == 3


def test_an_old_run_learned_from_mnist(ae_run, file, tmp_path, copy_of):
    folder = copy_of(ae_run)
    state = newest_state(folder)
    del state["args"]["dataset"]
    ckpt.save_checkpoint_and_link_latest(folder, state)
    result = call(AE, "train.py", "--resume", folder, "--epochs", 3, "--data", file)
    assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
    assert "which has mnist" in result.errors[0]


def test_an_autoencoder_of_other_data_is_not_taken(file, quick, autoencoder, ae_run, tmp_path):
    plain = ("--T", 20, *quick, "--epochs", 1, "--outdir", tmp_path, "--data")
    for given, where in (("embedded", autoencoder), (file, ae_run)):
        result = call(LATENT, "train.py", *plain, given, "--ae-ckpt", where)
        assert (result.code, len(result.errors)) == (MODEL_MISMATCH, 1), result.text
        assert "learned from other data: give --data" in result.errors[0]
        result = call(LATENT, "train.py", *plain, given, "--ae-ckpt-dir", where.parent)
        assert (result.code, len(result.errors)) == (NO_AE_CHECKPOINT, 1), result.text
    assert not list(tmp_path.glob("checkpoints/*"))


# --- what is wrong with them is one line ---

GOOD = shapes(120)
WRONG = [
    ({}, "holds no images"),
    ({"images": GOOD["images"]}, "holds no labels"),
    ({**GOOD, "test_images": GOOD["images"]}, "holds no test_labels"),
    ({**GOOD, "images": GOOD["images"].astype(np.float32)}, "images are float32 of shape (120, 28, 28); they must be"),
    ({**GOOD, "images": GOOD["images"][:, :27]}, "of shape (120, 27, 28); they must be uint8 of shape (N, 28, 28)"),
    ({**GOOD, "images": GOOD["images"][..., None].repeat(3, -1)}, "of shape (120, 28, 28, 3)"),
    ({**GOOD, "images": np.uint8(3)}, "of shape ()"),
    ({**GOOD, "labels": GOOD["labels"][:9]}, "of shape (9,); they must be whole numbers, (120,)"),
    ({**GOOD, "labels": GOOD["labels"] / 2}, "labels are float64"),
    ({**GOOD, "labels": np.arange(120) % 11}, "labels name 11 classes; at most 10"),
    ({**GOOD, "labels": GOOD["labels"] - 1}, "labels go from -1 to 1; classes are numbered from 0 to 9"),
    ({**GOOD, "labels": np.array(["a"] * 120)}, "labels are <U1"),
    ({**GOOD, "labels": np.array([None] * 120)}, "is damaged, or no .npz file"),
    (shapes(50), "too few images to learn from: 45"),
    ({**GOOD, "test_images": GOOD["images"][:5], "test_labels": GOOD["labels"][:5]}, "too few images for tests: 5"),
]


@pytest.mark.parametrize(("arrays", "said"), WRONG, ids=[said for _, said in WRONG])
def test_wrong_arrays_are_one_line(arrays, said, quick, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    for folder, flags in ((PIXEL, ()), (AE, ("--model", "mlp"))):
        result = call(folder, "train.py", *flags, "--data", tmp_path / "a.npz", *quick, "--outdir", tmp_path / "out")
        assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
        assert said in result.text
    assert not list(tmp_path.glob("out/checkpoints/*"))


def test_a_file_that_cannot_be_read_is_one_line(file, quick, tmp_path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    (tmp_path / "cut.npz").write_bytes(content[:-200])
    (tmp_path / "text.npz").write_text("a,b\n")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "folder.npz").mkdir()
    np.save(tmp_path / "one.npy", GOOD["images"])
    (tmp_path / "one.npy").rename(tmp_path / "array.npz")
    for name in ("flipped", "cut", "text", "empty", "folder", "array", "missing"):
        result = call(".", "common/data.py", "--data", tmp_path / f"{name}.npz", *quick[-2:])
        assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
        assert f"{name}.npz" in result.text


@pytest.mark.parametrize("source", ["shapes.npy", "hub:shapes", "hub:a/b/c", "hub:", "mnist"])
def test_a_source_that_is_none(source, tmp_path):
    result = call(AE, "train.py", "--model", "mlp", "--data", source, "--outdir", tmp_path)
    assert (result.code, len(result.text.splitlines())) == (USAGE, 1), result.text
    assert "FILE.npz" in result.text


def test_test_images_of_its_own_are_kept_apart(tmp_path):
    own, other = shapes(300), shapes(60, seed=1)
    np.savez(tmp_path / "a.npz", **own, test_images=other["images"], test_labels=other["labels"])
    train, test = (HF_MNIST(split, source=str(tmp_path / "a.npz")) for split in ("train", "test"))
    assert (train.images.numpy() == own["images"]).all()
    assert (test.images.numpy() == other["images"]).all()
    assert test.held_out == "its own"


def test_else_a_tenth_is_held_out_and_always_the_same(file):
    train, test = (HF_MNIST(split, source=str(file)) for split in ("train", "test"))
    assert (len(train), len(test), test.held_out) == (540, 60, own_data.TENTH)
    rows = torch.cat([train.images, test.images]).flatten(1)
    assert sorted(map(bytes, rows.numpy())) == sorted(map(bytes, shapes(600)["images"].reshape(600, -1)))
    assert torch.equal(test.images, HF_MNIST("test", source=str(file)).images)
    assert test.labels.unique().tolist() == [0, 1, 2]


def test_labels_are_part_of_what_data_are(file, tmp_path):
    arrays = shapes(600)
    np.savez(tmp_path / "a.npz", images=arrays["images"], labels=(arrays["labels"] + 1) % CLASSES)
    one, two = (HF_MNIST("train", source=str(path)) for path in (file, tmp_path / "a.npz"))
    assert one.fingerprint != two.fingerprint
    np.savez_compressed(tmp_path / "b.npz", labels=arrays["labels"].astype(np.uint8), images=arrays["images"])
    assert HF_MNIST("train", source=str(tmp_path / "b.npz")).fingerprint == one.fingerprint


# --- the hub ---


def stored(cache, owner, name, *, config="default", splits=("train", "test"), columns=("image", "label"), size=28):
    """A data set as the `datasets` library leaves it in its cache."""
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Picture

    folder = cache / f"{owner}___{name}" / config / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    image, label = columns
    for seed, split in enumerate(splits):
        arrays = shapes(150 if split == "train" else 30, seed)
        pictures = [Picture.fromarray(picture).resize((size, size)) for picture in arrays["images"]]
        features = Features({image: Image(), label: ClassLabel(3)})
        written = Dataset.from_dict({image: pictures, label: arrays["labels"].tolist()}, features=features)
        written.save_to_disk(folder / "temporary")
        (arrow,) = (folder / "temporary").glob("*.arrow")
        arrow.rename(folder / f"{name}-{split}.arrow")
        shutil.rmtree(folder / "temporary")


def test_a_data_set_of_the_hub_is_fetched_once_and_kept_under_its_name(tmp_path, monkeypatch):
    stored(tmp_path, "zoo", "shapes")
    result = call("common", "data.py", "--data", "hub:zoo/shapes", "--cache-dir", tmp_path)
    assert result.code == OK, result.text
    assert "train: 150 images (hub:zoo/shapes)" in result.text
    assert "test: 30 images (hub:zoo/shapes, its own)" in result.text
    shutil.rmtree(tmp_path / "zoo___shapes")
    monkeypatch.setattr(own_data, "_splits_in_cache", lambda *_: pytest.fail("decoded again"))
    train, test = (HF_MNIST(split, tmp_path, source="hub:zoo/shapes") for split in ("train", "test"))
    assert (train.images.numpy() == shapes(150)["images"]).all()
    assert (test.images.numpy() == shapes(30, seed=1)["images"]).all()
    assert (test.labels.numpy() == shapes(30, seed=1)["labels"]).all()
    monkeypatch.undo()
    stored(tmp_path, "zoo", "shapes")
    for odd in ({}, [1], torch.zeros(2), {"images": train.images, "labels": train.labels, "test_images": 3}):
        torch.save(odd, own_data.hub_file("zoo/shapes", tmp_path))
        assert len(HF_MNIST("test", tmp_path, source="hub:zoo/shapes")) == 30  # decoded anew
    stored(tmp_path, "zoo", "others", splits=("train", "validation", "test"))
    assert len(HF_MNIST("test", tmp_path, source="hub:zoo/others")) == 30
    assert not torch.equal(HF_MNIST("test", tmp_path, source="hub:zoo/others").images, test.images)
    stored(tmp_path, "zoo", "untested", splits=("train", "validation"))
    validation = HF_MNIST("test", tmp_path, source="hub:zoo/untested")
    assert (len(validation), validation.held_out) == (30, "its own")
    np.savez(tmp_path / "a.npz", **shapes(150), test_images=test.images, test_labels=test.labels)
    assert HF_MNIST("test", source=str(tmp_path / "a.npz")).fingerprint == train.fingerprint  # the same data


def test_what_is_being_prepared_is_not_taken_for_a_data_set(tmp_path, monkeypatch):
    """The `datasets` library writes split after split into HASH.incomplete, which a kill leaves behind."""
    stored(tmp_path, "zoo", "shapes", splits=("train",))
    folder = tmp_path / "zoo___shapes" / "default" / "0.0.0"
    (folder / "abc").rename(folder / "abc.incomplete")
    result = call(".", "common/data.py", "--data", "hub:zoo/shapes", "--cache-dir", tmp_path)
    assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text
    assert not list(tmp_path.rglob("hub-*.pt"))
    stored(tmp_path, "zoo", "shapes")
    assert len(HF_MNIST("test", tmp_path, source="hub:zoo/shapes")) == 30
    path = tmp_path / "ylecun___mnist" / "mnist" / "0.0.0" / "abc.incomplete" / "mnist-train.arrow"
    path.parent.mkdir(parents=True)
    path.touch()
    assert mnist._arrow_files("train", tmp_path) == []
    monkeypatch.setattr(Path, "glob", lambda *_: [tmp_path / "gone" / "mnist-train.arrow"])
    assert mnist._arrow_files("train", tmp_path) == []


def test_what_is_not_cached_is_downloaded(tmp_path, monkeypatch):
    import datasets

    stored(tmp_path / "there", "zoo", "shapes", splits=("train",))
    there = own_data._splits_in_cache("zoo/shapes", tmp_path / "there", pytest.fail)
    monkeypatch.setattr("common.cache.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: {"zoo/Shapes": there}[name])
    assert HF_MNIST("train", tmp_path, source="hub:zoo/Shapes").held_out == own_data.TENTH
    result = call(".", "common/data.py", "--data", "hub:zoo/unknown", "--cache-dir", tmp_path)
    assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
    assert "downloading zoo/unknown failed" in result.text


HUB_FAULTS = [
    ({"size": 32}, "of shape (150, 32, 32)"),
    ({"columns": ("image", "kind"), "splits": ("test",)}, "cannot be reached"),  # no train split in the cache
    ({"columns": ("picture", "image")}, None),  # any names will do
]


@pytest.mark.parametrize(("how", "said"), HUB_FAULTS, ids=str)
def test_what_is_wrong_with_a_data_set_of_the_hub_is_one_line(how, said, tmp_path):
    stored(tmp_path, "zoo", "shapes", **how)
    result = call(".", "common/data.py", "--data", "hub:zoo/shapes", "--cache-dir", tmp_path)
    assert (result.code, len(result.errors)) == ((NO_DATA, 1) if said else (OK, 0)), result.text
    assert (said or "") in result.text
    if said:
        assert not list(tmp_path.rglob("hub-*.pt"))


def test_without_the_hub_a_line_says_how_to_fetch(tmp_path):
    result = call(AE, "train.py", "--model", "mlp", "--data", "hub:zoo/none", "--cache-dir", tmp_path)
    assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
    assert f"python -m common.data --data hub:zoo/none --cache-dir {tmp_path}" in result.text


def test_a_damaged_cache_of_the_hub_is_named_and_fetched_again(tmp_path, monkeypatch):
    import datasets

    stored(tmp_path / "there", "zoo", "shapes")
    there = own_data._splits_in_cache("zoo/shapes", tmp_path / "there", pytest.fail)
    stored(tmp_path, "zoo", "shapes")
    for arrow in tmp_path.glob("zoo___shapes/**/*.arrow"):
        arrow.write_bytes(arrow.read_bytes()[:1000])
    asked, warnings = [], []
    monkeypatch.setattr("common.cache.hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda _, download_mode, **__: asked.append(download_mode) or there)
    assert len(HF_MNIST("train", tmp_path, source="hub:zoo/shapes", warn=warnings.append)) == 150
    assert (asked, len(warnings)) == (["force_redownload"], 1)


def test_several_configurations_are_not_guessed_among(tmp_path):
    for config in ("digits", "letters"):
        stored(tmp_path, "zoo", "shapes", config=config)
    result = call(".", "common/data.py", "--data", "hub:zoo/shapes", "--cache-dir", tmp_path)
    assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
    assert "several configurations" in result.text


def test_of_several_versions_the_newest_in_time_is_taken(tmp_path):
    stored(tmp_path, "zoo", "shapes", splits=("test", "train"))
    older = tmp_path / "zoo___shapes" / "default" / "9.0.0"
    older.with_name("0.0.0").rename(older)
    for arrow in older.rglob("*.arrow"):
        os.utime(arrow, (0, 0))
    stored(tmp_path, "zoo", "shapes")
    for split, count, seed in (("train", 150, 0), ("test", 30, 1)):
        found = HF_MNIST(split, tmp_path, source="hub:zoo/shapes").images
        assert (found.numpy() == shapes(count, seed)["images"]).all()


def test_a_warm_cache_of_mnist_serves_nobody_elses_name(cache, tmp_path, monkeypatch):
    digits = HF_MNIST("test", cache, source="embedded")
    monkeypatch.setitem(mnist.COUNTS, "mnist-test", 500)
    monkeypatch.setitem(mnist.COUNTS, "mnist-train", 500)
    for split in ("train", "test"):
        keep(decoded_path(tmp_path, f"mnist-{split}"), {"images": digits.images, "labels": digits.labels}, pytest.fail)
    assert len(HF_MNIST("test", tmp_path, source="hub")) == 500
    stored(tmp_path, "zoo", "shapes")
    assert len(HF_MNIST("test", tmp_path, source="hub:zoo/shapes")) == 30


def test_mnist_by_its_name_is_mnist(tmp_path):
    result = call(".", "common/data.py", "--data", "hub:ylecun/mnist", "--cache-dir", tmp_path)
    assert result.code == NO_DATA
    assert "full MNIST" in result.text


@pytest.fixture(scope="module")
def rare(quick, tmp_path_factory):
    """rare(labels) -> (run folder of an autoencoder, flags) of data with these for tests, and 60 of each to learn."""

    def rare(labels, *flags):
        folder = tmp_path_factory.mktemp("rare")
        tests = {f"test_{name}": part[: len(labels)] for name, part in shapes(60).items()} | {"test_labels": labels}
        some = shapes(600)
        some["labels"] = np.arange(600) % 10
        np.savez(folder / "rare.npz", **some, **tests)
        given = ("--model", "mlp", "--data", folder / "rare.npz", *quick, "--epochs", 1, "--outdir", folder, *flags)
        assert call(AE, "train.py", *given).code == OK
        return only_run(folder), ("--cache-dir", quick[-1], "--device", "cpu", "--output", folder / "out.png")

    return rare


def test_a_class_without_test_images_is_one_line(rare):
    for count, flags in ((0, ()), (1, ("--interpolate",))):
        run, where = rare(np.array([3] * count + [1] * 20), "--only-digit", 3)
        result = call(AE, "infer.py", "--ckpt", run, *where, *flags)
        assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
        result = call(AE, "run_tsne.py", "--ckpt", run, *where, "--perplexity", 0.5)
        assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text
    result = call(AE, "infer.py", "--ckpt", run, *where)  # one can be shown
    assert result.code == OK, result.text
    assert "there are only 1 (" in result.text


def test_a_cache_that_is_a_file_is_not_ok(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(Exit) as caught:
        data.main(["--data", "embedded", "--cache-dir", str(tmp_path / "cache")])
    assert caught.value.code == BAD_OUTPUT


def test_latents_of_images_that_are_all_alike(quick, tmp_path):
    """A latent that never varies cannot be brought to deviation 1."""
    one = {name: values[:1].repeat(100, 0) for name, values in shapes(1).items()}
    np.savez(tmp_path / "one.npz", **one)
    where = ("--data", tmp_path / "one.npz", *quick, "--epochs", 1, "--outdir", tmp_path / "out")
    assert call(AE, "train.py", "--model", "mlp", *where).code == OK
    result = call(LATENT, "train.py", "--ae-ckpt-dir", tmp_path / "out/checkpoints", *where, "--T", 20)
    assert result.code == OK, result.text
    assert load(tmp_path / "out/checkpoints").draw().isfinite().all()


def test_a_map_of_as_many_classes_as_images_is_one_line(rare, tmp_path):
    run, where = rare(np.arange(10))
    result = call(AE, "run_tsne.py", "--ckpt", run, *where[:4], "--output", tmp_path, "--perplexity", 5)
    assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text


def test_a_file_that_does_not_fit_into_memory_is_not_called_damaged(file, monkeypatch):
    def too_large(*_args, **_how):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(np, "load", too_large)
    with pytest.raises(Exit) as caught:
        HF_MNIST("train", source=str(file))
    assert caught.value.code == OUT_OF_MEMORY


def test_an_autoencoder_of_nan_shows_nothing(autoencoder, file, quick, copy_of, tmp_path):
    run = copy_of(autoencoder)
    path = ckpt.run_checkpoints(run)[0][1]
    state = ckpt.read_checkpoint(path)
    for weights in (state["model"], state["ema"] or {}):
        for weight in weights.values():
            if weight.is_floating_point():
                weight.fill_(float("nan"))
    ckpt.save_checkpoint(path, state)
    for script, flags in (("infer.py", ()), ("infer.py", ("--interpolate",)), ("run_tsne.py", ("--perplexity", 5))):
        result = call(AE, script, "--ckpt", path, *quick[-2:], "--output", tmp_path / "x.png", *flags)
        assert (result.code, len(result.errors)) == (BAD_CHECKPOINT, 1), result.text
        assert not list(tmp_path.glob("x.png"))


def test_a_palettes_indices_are_not_taken_for_grey():
    content = io.BytesIO()
    Image.fromarray(np.full((28, 28, 3), 200, np.uint8)).quantize(4).save(content, "PNG")
    rows = SimpleNamespace(to_pylist=lambda: [{"bytes": content.getvalue()}])
    found = pictures_in(SimpleNamespace(data=SimpleNamespace(column=lambda _: rows)), "image")
    assert found.shape == (1, 28, 28, 3)  # which is refused as any coloured picture
    assert (found == 200).all()
