"""The digits: where they come from, what they look like, and in which order they are served."""

import io
import itertools
import os
import shutil
import ssl
import sys
import threading
import time
import urllib.error
from pathlib import Path

import pytest
import torch
from helpers import AE, CLOSED_PORT, LATENT, call, run

from common import mnist
from common.cache import hub_answers
from common.ckpt import read_file
from common.data import HF_MNIST, SEEN, held_out, make_mnist_loader, split_train_val
from common.error_codes import NO_DATA, Exit

SOON = 30  # seconds: five for the hub to answer, and more for a busy machine to read the digits


@pytest.fixture(scope="module")
def train(cache) -> HF_MNIST:
    return HF_MNIST("train", cache, source="embedded")


@pytest.fixture(scope="module")
def test(cache) -> HF_MNIST:
    return HF_MNIST("test", cache, source="embedded")


def flat(batches) -> list[float]:
    return list(itertools.chain.from_iterable(batches))


def order_of(loader, epoch: int, start: int = 0) -> list[list[float]]:
    """What identifies each image, batch by batch."""
    loader.sampler.epoch, loader.sampler.start = epoch, start
    return [images.sum((1, 2, 3)).tolist() for images, _ in loader]


def test_embedded_splits_are_whole_and_disjoint(train, test):
    assert (len(train), len(test)) == (4500, 500)
    assert (train.source, test.source) == ("embedded", "embedded")
    assert train.labels.bincount().tolist() == [450] * 10
    assert test.labels.bincount().tolist() == [50] * 10
    seen = {image.numpy().tobytes() for image in train.images}
    assert not seen & {image.numpy().tobytes() for image in test.images}


def test_an_item_and_a_batch(train):
    image, label = train[7]
    assert (image.shape, image.dtype, type(label)) == ((1, 28, 28), torch.float32, int)
    for index in (torch.tensor([7, 8, 9]), [7, 8, 9]):
        images, labels = train[index]
        assert (images.shape, images.dtype) == ((3, 1, 28, 28), torch.float32)
        assert (labels.shape, labels.dtype) == ((3,), torch.int64)
        assert torch.equal(images[0], image)
        assert labels[0] == label
    everything, _ = train[torch.arange(len(train))]
    assert (everything.min(), everything.max()) == (0, 1)
    assert everything.mean().item() == pytest.approx(0.13, abs=0.01)  # ink is bright, paper dark
    assert torch.equal((everything * 255).round().byte().squeeze(1), train.images)


def test_only_digit(cache, train):
    threes = HF_MNIST("train", cache, only_digit=3, source="embedded")
    assert threes.class_counts == [0, 0, 0, 450, 0, 0, 0, 0, 0, 0]
    assert len(threes) == 450
    assert threes.labels.eq(3).all()
    assert torch.equal(threes.images, train.images[train.labels == 3])
    assert threes[0][1] == 3


def test_validation_is_a_seeded_tenth(train):
    parts = {seed: split_train_val(train, seed) for seed in (1, 2)}
    again = split_train_val(train, 1)
    for learned, held_back in parts.values():
        assert (len(learned), len(held_back)) == (4050, 450)
        rows = torch.cat([learned.images, held_back.images]).flatten(1)
        assert sorted(map(bytes, rows.numpy())) == sorted(map(bytes, train.images.flatten(1).numpy()))
        assert held_back.labels.unique().numel() == 10
    assert torch.equal(parts[1][1].images, again[1].images)
    assert not torch.equal(parts[1][1].images, parts[2][1].images)


def test_too_few_digits_to_split(train):
    with pytest.raises(Exit) as caught:
        split_train_val(train.subset(torch.arange(3)), 1)
    assert caught.value.code == NO_DATA


def test_the_order_is_a_function_of_seed_and_epoch(train):
    small = train.subset(torch.arange(100))
    loader = make_mnist_loader(small, 32, seed=1)
    first, second = order_of(loader, 1), order_of(loader, 2)
    assert [len(batch) for batch in first] == [32, 32, 32, 4]
    assert first == order_of(make_mnist_loader(small, 32, seed=1), 1)
    assert first != second
    assert first != order_of(make_mnist_loader(small, 32, seed=2), 1)
    in_place = small[torch.arange(100)][0].sum((1, 2, 3)).tolist()
    assert sorted(flat(first)) == sorted(flat(second)) == sorted(in_place)
    assert flat(order_of(make_mnist_loader(small, 32, shuffle=False), 1)) == in_place


def test_start_continues_the_epoch_exactly(train):
    loader = make_mnist_loader(train.subset(torch.arange(100)), 32, seed=1)
    whole = order_of(loader, 3)
    for start in range(5):
        assert order_of(loader, 3, start) == whole[start:]
        assert len(loader.sampler) == 4 - start


def test_embedded_digits_are_no_test_of_a_run_that_learned_from_all(cache, capsys):
    """They are training digits of full MNIST."""
    for learned, seen in (("hub", True), ("embedded", False)):
        digits = held_out("embedded", cache, {"data": learned})
        assert (digits.held_out == SEEN) is seen
        assert ("it has learned from" in capsys.readouterr().err) is seen


def test_workers_change_nothing(train):
    small = train.subset(torch.arange(100))
    loader = make_mnist_loader(small, 32, num_workers=2)
    assert order_of(loader, 2) == order_of(make_mnist_loader(small, 32), 2)
    if sys.platform == "linux":  # where others are the default from Python 3.14 on
        assert loader.multiprocessing_context.get_start_method() == "fork"


OTHERS = {"list": [1], "none": None, "tensor": torch.zeros(2), "empty": {}, "numbers": {"images": 1, "labels": 2}}


@pytest.mark.parametrize("damage", ["truncate", "flip", *OTHERS])
def test_a_damaged_decoded_cache_is_made_anew(tmp_path, cache, test, damage):
    file = shutil.copytree(cache, tmp_path / "cache") / "decoded" / "embedded-test.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flip" else content[:-100])
    if damage in OTHERS:
        torch.save(OTHERS[damage], file)
    warnings = []
    again = HF_MNIST("test", tmp_path / "cache", source="embedded", warn=warnings.append)
    assert torch.equal(again.images, test.images)
    assert torch.equal(read_file(file)["images"], test.images)
    assert [text.startswith(f"passing over {file}") for text in warnings] == [True]


def test_the_decoded_cache_is_used(cache, monkeypatch):
    monkeypatch.setattr(mnist, "_embedded", lambda *_: pytest.fail("decoded again"))
    assert len(HF_MNIST("test", cache, source="embedded")) == 500


def test_a_runs_log_tells_of_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "decoded").touch()
    flags = ("--data", "embedded", "--only-digit", 3, "--epochs", 1, "--cache-dir", tmp_path / "cache")
    result = call(AE, "train.py", "--model", "mlp", *flags, "--outdir", tmp_path)
    assert result.code == 0, result.text
    (log,) = (tmp_path / "logs").glob("*.log")
    assert "cannot keep the decoded digits" in log.read_text()


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert len(HF_MNIST("test", tmp_path / "file" / "cache", source="embedded")) == 500
    assert "cannot keep the decoded digits" in capsys.readouterr().err


def test_full_mnist_from_the_datasets_cache(full_mnist, monkeypatch):
    monkeypatch.setattr(mnist, "_from_hub", lambda *_: pytest.fail("asked the network"))
    train = HF_MNIST("train", full_mnist)
    assert (len(train), train.source) == (60_000, "hub")
    pixels = train.images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert train.labels.bincount()[[0, 5]].tolist() == [5923, 5421]
    assert len(HF_MNIST("test", full_mnist, only_digit=0, source="hub")) == 980
    monkeypatch.setattr(mnist, "_from_datasets_cache", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(HF_MNIST("train", full_mnist, source="hub").images, train.images)


def arrow_file(cache, digits, split="train", version="1") -> Path:
    """A file as the `datasets` library leaves it, with these digits."""
    from datasets import ClassLabel, Features, Image
    from datasets.arrow_writer import ArrowWriter
    from PIL import Image as Picture

    path = cache / "ylecun___mnist" / "mnist" / "0.0.0" / version / f"mnist-{split}.arrow"
    path.parent.mkdir(parents=True)
    with ArrowWriter(features=Features({"image": Image(), "label": ClassLabel(10)}), path=str(path)) as writer:
        for image, label in zip(digits.images.numpy(), digits.labels.tolist(), strict=True):
            file = io.BytesIO()
            Picture.fromarray(image).save(file, "PNG")
            writer.write({"image": {"bytes": file.getvalue(), "path": None}, "label": label})
        writer.finalize()
    return path


@pytest.mark.parametrize("damage", ["short", "truncated", "flipped", "empty", "text"])
def test_a_datasets_cache_that_is_not_whole_is_named_and_passed_over(damage, test, cache, tmp_path):
    """For every kind of damage: what it reads is not full MNIST, and nothing of it stays."""
    path = arrow_file(tmp_path, test)
    content = bytearray(path.read_bytes())
    if damage == "flipped":  # in the middle of a picture
        content[content.index(b"IDAT", len(content) // 2) + 9] ^= 255
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>sign in</html>\n"}
    path.write_bytes(damaged.get(damage, content))
    result = call("common", "data.py", "--cache-dir", tmp_path)
    assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text
    assert str(path) in result.text.splitlines()[0]
    assert "Traceback" not in result.text
    assert ("500 digits instead of 60,000" in result.text) == (damage == "short")
    assert not list(tmp_path.rglob("mnist-*.pt"))
    shutil.copytree(cache / "decoded", tmp_path / "decoded")
    warnings = []
    assert len(HF_MNIST("train", tmp_path, warn=warnings.append)) == 4500
    assert [str(path) in warnings[0], "5,000 EMBEDDED DIGITS" in warnings[1]] == [True, True]


def test_an_older_file_serves_where_the_newest_is_damaged(test, tmp_path, monkeypatch):
    monkeypatch.setitem(mnist.COUNTS, "mnist-train", 500)
    whole = arrow_file(tmp_path, test, version="1")
    short = arrow_file(tmp_path, test.subset(torch.arange(400)), version="2")
    os.utime(whole, (1, 1))
    warnings = []
    assert torch.equal(HF_MNIST("train", tmp_path, source="hub", warn=warnings.append).images, test.images)
    assert len(warnings) == 1
    assert str(short) in warnings[0]


def test_a_decoded_cache_that_is_short_is_not_trusted(test, train, cache, tmp_path):
    """As earlier versions may have left it."""
    content = {"images": test.images, "labels": test.labels}
    shutil.copytree(cache / "decoded", tmp_path / "decoded")
    for name in ("mnist-train", "embedded-train"):
        torch.save(content, tmp_path / "decoded" / f"{name}.pt")
    warnings = []
    assert torch.equal(HF_MNIST("train", tmp_path, warn=warnings.append).images, train.images)
    assert "mnist-train.pt: it holds 500 digits instead of 60,000" in warnings[0]
    assert "EMBEDDED DIGITS" in warnings[1]
    assert "embedded-train.pt: it holds 500 digits instead of 4,500" in warnings[2]
    assert len(read_file(tmp_path / "decoded" / "embedded-train.pt")["labels"]) == 4500


def test_a_damaged_cache_is_downloaded_anew(test, tmp_path, monkeypatch):
    """Asked plainly, the library would give the damaged file again."""
    import datasets

    monkeypatch.setitem(mnist.COUNTS, "mnist-train", 500)
    monkeypatch.setattr("common.cache.hub_answers", lambda: True)
    asked = []

    def load(_name, *, split, cache_dir, download_mode):
        asked.append(download_mode)
        return datasets.Dataset.from_file(str(arrow_file(Path(cache_dir) / "downloaded", test)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    arrow_file(tmp_path, test.subset(torch.arange(10)))
    digits = HF_MNIST("train", tmp_path, source="hub", warn=lambda _: None)
    assert (len(digits), digits.source, asked) == (500, "hub", ["force_redownload"])


def test_what_another_start_downloads_meanwhile_is_not_downloaded_again(test, tmp_path, monkeypatch):
    """Of ten first starts at once, as an array's tasks are."""
    import datasets

    monkeypatch.setitem(mnist.COUNTS, "mnist-train", 500)
    monkeypatch.setattr("common.cache.hub_answers", lambda: bool(arrow_file(tmp_path, test)))
    asked = []

    def load(_name, *, split, cache_dir, download_mode):
        asked.append(download_mode)
        return datasets.Dataset.from_file(str(arrow_file(Path(cache_dir) / "downloaded", test)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(HF_MNIST("train", tmp_path, source="hub", warn=lambda _: None)) == 500
    assert asked == [None]


def test_fetching_fails_where_only_the_embedded_digits_can_be_had(tmp_path):
    result = call("common", "data.py", "--cache-dir", tmp_path)
    assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
    assert "where there is internet" in result.text
    assert "python -m common.data" not in result.text  # that is what just failed


def test_in_a_job_the_advice_names_the_folder_that_outlives_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    for flags, place in (((), tmp_path / "scratch" / "hf_cache"), (("--cache-dir", tmp_path / "x"), tmp_path / "x")):
        result = call("mnist_ae", "train.py", "--model", "mlp", "--data", "hub", *flags)
        assert result.code == NO_DATA
        assert f"--cache-dir {place}`" in result.errors[0]


def test_hub_without_a_hub_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", CLOSED_PORT)
    began = time.monotonic()
    result = run(".", "-m common.data", "--data", "hub", "--cache-dir", tmp_path)
    assert (result.code, len(result.text.splitlines())) == (NO_DATA, 1), result.text
    assert "--data embedded" in result.text  # tells a way out
    assert time.monotonic() - began < SOON
    result = call(
        "mnist_ae", "train.py", "--model", "mlp", "--data", "hub", "--cache-dir", tmp_path, "--outdir", tmp_path
    )
    assert (result.code, len(result.errors)) == (NO_DATA, 1), result.text


def test_auto_reaches_the_embedded_digits_soon_and_says_so(tmp_path):
    warnings, began = [], time.monotonic()
    digits = HF_MNIST("train", tmp_path, warn=warnings.append)
    assert time.monotonic() - began < SOON
    assert digits.source == "embedded"
    assert len(warnings) == 1
    assert "5,000 EMBEDDED DIGITS" in warnings[0]


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_variables_are_obeyed(cache, monkeypatch, name):
    asked = []  # in a thread of its own, where nothing that is raised would be noticed

    def urlopen(request, **_how):
        asked.append(request.full_url)
        raise OSError

    monkeypatch.setenv(name, "1")
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert not hub_answers()
    assert HF_MNIST("test", cache, warn=lambda _: None).source == "embedded"
    assert asked == []


def test_a_hub_is_asked_for_mnist_and_answers(monkeypatch):
    """A mirror knows data sets, and need not know anything else."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/api/datasets/ylecun/mnist" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path, answers in (("", True), ("/elsewhere", False)):
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}{path}")
            assert hub_answers() is answers
        server.shutdown()


@pytest.mark.parametrize(("error", "answers"), [(ssl.SSLCertVerificationError, True), (ssl.SSLEOFError, False)])
def test_a_hub_whose_certificate_is_unknown_here_answers(error, answers, monkeypatch):
    """What downloads brings certificates of its own: Python's may be missing, as python.org's are on a new Mac.

    A firewall that hangs up is no hub.
    """

    def urlopen(*_args, **_how):
        raise urllib.error.URLError(error("as it came"))

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert hub_answers() is answers


def test_a_hub_that_talks_nonsense_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://my mirror")  # http.client.InvalidURL: neither OSError nor ValueError
    assert hub_answers() is False


def test_fetch_ahead_of_time(fetched):
    cache, said = fetched
    assert "train: 4,500 digits (embedded)" in said
    assert "test: 500 digits (embedded)" in said
    assert len(list((cache / "decoded").glob("embedded-*.pt"))) == 2  # beside a classifier, perhaps


def test_the_checkpoint_remembers_which_digits(latent_run, tmp_path):
    """A run on embedded digits does not continue on full MNIST."""
    result = call(LATENT, "train.py", "--resume", latent_run, "--epochs", 3, "--data", "hub", "--cache-dir", tmp_path)
    assert result.code != 0
    assert "embedded" in result.errors[0]
    assert "hub" in result.errors[0]
