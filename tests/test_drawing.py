"""What infer.py leaves besides its grid: the process, arrays, single files; and a run's curves.png."""

import json
import os
import re
import shutil
from types import SimpleNamespace
from unittest.mock import MagicMock

import matplotlib.figure
import numpy as np
import pytest
import torch
from forks import run
from helpers import AE, LATENT, PIXEL, call
from PIL import Image

from common import drawing, load, record, sampling
from common.ckpt import read_checkpoint, save_checkpoint
from common.curves import draw_curves
from common.error_codes import BAD_CHECKPOINT, BAD_IMAGE, BAD_OUTPUT, MODEL_MISMATCH, OUT_OF_MEMORY, USAGE
from common.images import row_names, save_gif, to_bytes
from common.modules import module_of
from common.run import Run


@pytest.fixture(scope="module")
def runs(latent_run, pixel_run):
    """A trained run of either diffusion experiment, by folder."""
    return {LATENT: latent_run, PIXEL: pixel_run}


def pixels(path):
    return np.asarray(Image.open(path).convert("L"))


def cells(path, rows, columns):
    """(rows, columns, 28, 28) of a grid with padding 2."""
    grid = pixels(path)
    assert grid.shape == (rows * 30 + 2, columns * 30 + 2)
    return np.stack([[grid[30 * r + 2 :, 30 * c + 2 :][:28, :28] for c in range(columns)] for r in range(rows)])


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
@pytest.mark.parametrize("sampler", [(), ("--sampler", "ddim", "--steps", 10), ("--sampler", "dpm", "--steps", 20)])
def test_the_process_runs_from_noise_to_the_very_images_of_the_grid(folder, sampler, runs, tmp_path):
    flags = ("--ckpt", runs[folder], "--num-images", 4, "--digit", 3, *sampler)
    assert call(folder, "infer.py", *flags, "--output", tmp_path / "plain.png").code == 0
    shown = call(folder, "infer.py", *flags, "--output", tmp_path / "a.png", "--show-process", "--process-steps", 6)
    assert shown.code == 0, shown.text
    assert "a_process.png" in shown.text
    assert "a_process.gif" in shown.text
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "plain.png")).all()  # watching changes nothing
    final = cells(tmp_path / "a.png", 2, 2).reshape(4, 28, 28).astype(float)
    strip = cells(tmp_path / "a_process.png", 4, 6).astype(float)
    assert (strip[:, -1] == final).all()
    distance = np.abs(strip - final[:, None]).mean((0, 2, 3))
    assert distance[:3].min() > distance[3:].max()
    with Image.open(tmp_path / "a_process.gif") as film:
        assert film.n_frames == 6
        assert film.info["loop"] == 0
        durations = []
        for index in range(6):
            film.seek(index)
            durations.append(film.info["duration"])
        last = np.asarray(film.convert("L"))
    assert durations[-1] > durations[0]
    assert (last[::2, ::2] == pixels(tmp_path / "a.png")).all()


def test_every_frame_of_an_animation_is_its_grid_level_by_level(tmp_path):
    """Also where a frame lacks some levels of grey, or has few."""
    levels = torch.arange(256.0).view(16, 16)
    without = levels.clone()
    without[levels.remainder(7) == 0] = 255
    frames = [level.div(255).expand(3, -1, -1) for level in (levels, without, levels.clamp(max=3), levels)]
    save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == len(frames)
        for index, frame in enumerate(frames):
            film.seek(index)
            assert (np.asarray(film.convert("L")) == to_bytes(frame[0]).numpy()).all(), index


def test_few_steps_make_a_short_film(runs, tmp_path):
    flags = ("--ckpt", runs[LATENT], "--num-images", 4, "--show-process", "--steps", 3)
    assert call(LATENT, "infer.py", *flags, "--output", tmp_path / "a.png").code == 0
    with Image.open(tmp_path / "a_process.gif") as film:
        assert film.n_frames == 4


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_arrays_and_single_files_hold_the_same_images(folder, runs, tmp_path):
    forms = ("--save-npz", tmp_path / "a.npz", "--save-dir", tmp_path / "singly")
    flags = ("--ckpt", runs[folder], "--num-images", 4, "--seed", 7, "--output", tmp_path / "a.png", *forms)
    result = call(folder, "infer.py", *flags, "--digit", 3)
    assert result.code == 0, result.text
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        images, labels, settings = arrays["images"], arrays["labels"], json.loads(str(arrays["settings"]))
        assert arrays["seed"] == 7
    assert (images.dtype, images.shape, labels.tolist()) == (np.uint8, (4, 28, 28), [3] * 4)
    assert (images == cells(tmp_path / "a.png", 2, 2).reshape(4, 28, 28)).all()
    assert (settings["digit"], settings["seed"], settings["exp_name"]) == ([3], 7, runs[folder].name)
    names = [f"{index:05d}_3.png" for index in range(4)]
    assert sorted(path.name for path in (tmp_path / "singly").iterdir()) == names
    assert all((pixels(tmp_path / "singly" / name) == image).all() for name, image in zip(names, images, strict=True))


def test_without_labels(runs, tmp_path):
    forms = ("--save-npz", tmp_path / "a.npz", "--save-dir", tmp_path / "singly", "--output", tmp_path / "a.png")
    flags = ("--ckpt", runs[LATENT], "--num-images", 2, "--digit", "none")
    assert call(LATENT, "infer.py", *flags, *forms).code == 0
    assert np.load(tmp_path / "a.npz")["labels"].tolist() == [-1, -1]
    assert sorted(path.name for path in (tmp_path / "singly").iterdir()) == ["00000.png", "00001.png"]


@pytest.fixture
def of_ones_and_sevens(runs, tmp_path):
    """A checkpoint that says of its training data: three sevens for each one."""
    path = tmp_path / "checkpoint_epoch_000001.pt"
    state = read_checkpoint(runs[LATENT] / "latest.pt")
    state["args"] |= {"only_digit": None, "class_counts": [0, 1000, 0, 0, 0, 0, 0, 3000, 0, 0]}
    save_checkpoint(path, state)
    return path


def test_what_nobody_asked_for_follows_the_class_shares_by_the_seed(of_ones_and_sevens, tmp_path):
    """And the labels that are saved are those that were drawn with, at guidance 1."""
    flags = ("--ckpt", of_ones_and_sevens, "--steps", 2, "--num-images", 400, "--save-npz", tmp_path / "a.npz")
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call(LATENT, "infer.py", *flags, "--output", tmp_path / "a.png", "--seed", seed).code == 0
        with np.load(tmp_path / "a.npz") as arrays:
            drawn[name] = (arrays["labels"].tolist(), arrays["images"])
    assert drawn["a"][0] == drawn["b"][0] != drawn["c"][0]
    labels, images = drawn["a"]
    assert set(labels) == {1, 7}
    assert labels.count(7) / 400 == pytest.approx(3 / 4, abs=0.08)
    draw, _ = module_of("lddpm").load_for_drawing(of_ones_and_sevens)
    again = draw(labels=labels, seed=1, steps=2, guidance=1.0)
    assert (to_bytes(again).squeeze(1).numpy() == images).all()


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_a_model_of_one_digit_draws_its_digit(folder, runs, tmp_path):
    counts = read_checkpoint(runs[folder] / "latest.pt")["args"]["class_counts"]
    assert counts == [450 if digit == 3 else 0 for digit in range(10)]
    flags = ("--ckpt", runs[folder], "--num-images", 2, "--steps", 2, "--output", tmp_path / "a.png")
    assert call(folder, "infer.py", *flags, "--save-dir", tmp_path / "singly").code == 0
    assert sorted(path.name for path in (tmp_path / "singly").iterdir()) == ["00000_3.png", "00001_3.png"]


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_only_labels_are_guided_and_what_is_not_guided_says_so(folder, runs, tmp_path, monkeypatch):
    """With --digit none every image is one row of the network's work, not two of the same null label."""
    asked, guided = [], sampling.guided

    def spy(predict, *how, **more):
        return guided(lambda x, t, labels: asked.append(len(x)) or predict(x, t, labels), *how, **more)

    monkeypatch.setattr(sampling, "guided", spy)
    flags = ("--ckpt", runs[folder], "--num-images", 4, "--steps", 3, "--save-npz", tmp_path / "a.npz")
    for more, rows, guidance in (
        ((), 4, 1.0),
        (("--guidance", 2), 8, 2.0),
        (("--digit", "none"), 4, 1.0),
        (("--digit", 3), 8, 1.1),
        (("--digit", 3, "--guidance", 1), 4, 1.0),
    ):
        asked.clear()
        assert call(folder, "infer.py", *flags, *more, "--output", tmp_path / "a.png").code == 0
        assert asked == [rows] * 3
        assert json.loads(str(np.load(tmp_path / "a.npz")["settings"]))["guidance"] == guidance


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_a_guide_is_another_checkpoint_of_the_same_kind_of_model(folder, runs, tmp_path):
    state = read_checkpoint(runs[folder] / "latest.pt")
    for name, weights in state["ema"].items():
        if name.endswith("bias"):
            weights.add_(0.1)
    save_checkpoint(tmp_path / "weaker.pt", state)
    flags = ("--ckpt", runs[folder], "--num-images", 4, "--digit", 3, "--steps", 3, "--output", tmp_path / "a.png")
    found = {}
    for name, more in {
        "alone": (),
        "weaker": ("--guide", tmp_path / "weaker.pt"),
        "weaker, by name": ("--guide", tmp_path / "weaker.pt", "--guide-scale", 2),
        "weaker, not at all": ("--guide", tmp_path / "weaker.pt", "--guide-scale", 1),
        "only at first": ("--guidance", 300, "--guidance-interval", -9, 1),
        "everywhere": ("--guidance", 300),  # two epochs have taught the network little about labels
    }.items():
        result = call(folder, "infer.py", *flags, *more, "--save-npz", tmp_path / "a.npz")
        assert result.code == 0, result.text
        with np.load(tmp_path / "a.npz") as saved:
            found[name] = saved["images"].astype(int)
            settings = json.loads(str(saved["settings"]))
        if more:
            told = settings[more[0].removeprefix("--").replace("-", "_")]
            assert str(told).startswith(str(more[1]))  # of a run its file
    assert (found["alone"] == found["weaker, not at all"]).all()
    assert (found["weaker"] == found["weaker, by name"]).all()
    assert (found["alone"] != found["weaker"]).any()
    assert (found["everywhere"] != found["only at first"]).any()
    assert (found["alone"] != found["only at first"]).any()


def test_what_cannot_guide_says_so(runs, ae_run, tmp_path):
    state = read_checkpoint(runs[PIXEL] / "latest.pt")
    state["args"]["schedule"] = "cosine"
    save_checkpoint(tmp_path / "noise.pt", state)
    state = read_checkpoint(runs[LATENT] / "latest.pt")
    state["ema"]["module.latent_mean"] += state["ema"]["module.latent_std"] / 2
    save_checkpoint(tmp_path / "moved.pt", state)
    state["ema"]["module.latent_mean"] -= state["ema"]["module.latent_std"] * 0.49  # of another split
    save_checkpoint(tmp_path / "split.pt", state)
    state["ema"]["module.latent_std"] *= 2
    save_checkpoint(tmp_path / "wide.pt", state)
    for name, changed in (
        ("latents", {"ae_weights": "0" * 12}),
        ("fours", {"only_digit": 4}),
        ("x", {"labelled": False}),
        ("shirts", {"dataset": "0" * 12}),
        ("later", {"beta_start": 2e-4}),
        ("noisier", {"beta_end": 0.03}),
        ("longer", {"T": 21}),
    ):
        state = read_checkpoint(runs[LATENT] / "latest.pt")
        state["args"] |= changed
        save_checkpoint(tmp_path / f"{name}.pt", state)
    for folder, more, code, said in (
        (PIXEL, ("--guide", runs[LATENT]), MODEL_MISMATCH, "type lddpm; ddpm is needed"),
        (PIXEL, ("--guide", tmp_path / "noise.pt"), MODEL_MISMATCH, "--schedule cosine, this one linear"),
        (LATENT, ("--guide", tmp_path / "latents.pt"), MODEL_MISMATCH, "another autoencoder"),
        (LATENT, ("--guide", tmp_path / "fours.pt"), MODEL_MISMATCH, "seen 4s only"),
        (LATENT, ("--guide", tmp_path / "x.pt"), MODEL_MISMATCH, "takes no labels"),
        (LATENT, ("--guide", tmp_path / "shirts.pt"), MODEL_MISMATCH, "other data"),
        (LATENT, ("--guide", tmp_path / "later.pt"), MODEL_MISMATCH, "--beta-start 0.0002, this one 0.0001"),
        (LATENT, ("--guide", tmp_path / "noisier.pt"), MODEL_MISMATCH, "--beta-end 0.03, this one 0.02"),
        (LATENT, ("--guide", tmp_path / "longer.pt"), MODEL_MISMATCH, "--T 21, this one 20"),
        (LATENT, ("--guide", tmp_path / "moved.pt"), MODEL_MISMATCH, "standardises latents by those of other digits"),
        (LATENT, ("--guide", tmp_path / "wide.pt"), MODEL_MISMATCH, "standardises latents by those of other digits"),
        (LATENT, ("--guide", tmp_path / "none.pt"), BAD_CHECKPOINT, "none.pt"),
        (LATENT, ("--guide", ""), USAGE, "the value is empty"),
        (LATENT, ("--guide", runs[LATENT], "--guide-scale", 3), USAGE, "it is what is to be guided"),
        (PIXEL, ("--guide-scale", 2), USAGE, "give --guide PATH"),
        (PIXEL, ("--guidance", 2, "--guidance-interval", 1, -1), USAGE, "below"),
        (PIXEL, ("--guidance-interval", -1, 1), USAGE, "--guidance SCALE"),
        (PIXEL, ("--guidance", 2, "--guidance-interval", 9, 10), USAGE, "9 to 10 has none of the timesteps"),
        (LATENT, ("--guidance", 2, "--guidance-interval", 1, 2), USAGE, "1 to 2 has none of the timesteps"),  # of two
    ):
        flags = ("--ckpt", runs[folder], "--num-images", 2, "--steps", 2, "--output", tmp_path / "a.png")
        result = call(folder, "infer.py", *flags, *more)
        assert (result.code, said in result.text) == (code, True), result.text
        assert len(result.text.splitlines()) == 1, result.text
        assert not (tmp_path / "a.png").exists()
    flags = ("--ckpt", runs[LATENT], "--num-images", 2, "--steps", 2, "--output", tmp_path / "a.png")
    assert call(LATENT, "infer.py", *flags, "--guide", tmp_path / "split.pt").code == 0
    for more in (("--guide", ae_run), ("--guidance-interval", -1, 1), ("--guide-scale", 0), ("--tstr",)):
        result = call("common", "evaluate.py", "--ckpt", ae_run, *more)
        assert result.code == MODEL_MISMATCH, result.text
    result = call(
        "common", "evaluate.py", "--ckpt", runs[LATENT], "--guide", tmp_path / "fours.pt", "--cache-dir", tmp_path
    )
    assert (result.code, len(result.text.splitlines())) == (MODEL_MISMATCH, 1)  # before a classifier is trained


def test_bytes_are_rounded_as_in_the_grid():
    values = torch.linspace(0, 1, 1001)
    assert torch.equal(to_bytes(values), (values * 255 + 0.5).floor().to(torch.uint8))


def test_nothing_that_is_drawn_from_is_overwritten(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("common.sampling.sample", lambda *_: pytest.fail("drawn"))
    Image.new("L", (28, 28), 255).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    for flags, said in (
        (("--from-image", tmp_path / "mine.png"), "is read here"),
        (("--save-dir", tmp_path / "singly", "--save-npz", tmp_path / "singly" / "a.npz"), "among the single images"),
    ):
        result = call(LATENT, "infer.py", "--ckpt", runs[LATENT], "--output", tmp_path / "mine.png", *flags)
        assert (result.code, len(result.text.splitlines())) == (BAD_OUTPUT, 1), result.text
        assert said in result.text
    assert (tmp_path / "mine.png").read_bytes() == before
    both = tmp_path / "both.png"
    for output in (both, both / "deep" / "a.png"):
        result = call(LATENT, "infer.py", "--ckpt", runs[LATENT], "--output", output, "--save-dir", both)
        assert (result.code, len(result.text.splitlines())) == (BAD_OUTPUT, 1), result.text
        assert not both.exists()


@pytest.mark.parametrize("name", ["ckpt", "guide", "ae_ckpt"])
def test_no_checkpoint_is_overwritten(name, runs, ae_run, tmp_path):
    """A file may have any name."""
    kept = tmp_path / "mine.png"
    source = ae_run if name == "ae_ckpt" else runs[LATENT]
    shutil.copy(source / "checkpoint_epoch_000001.pt", kept)
    before = kept.read_bytes()
    given = {"ckpt": runs[LATENT], name: kept}
    words = [word for flag, value in given.items() for word in (f"--{flag.replace('_', '-')}", value)]
    other = tmp_path / "other.png"
    os.link(kept, other)  # the same file, as it is under another case where a disk knows none
    for output in (kept, other):
        result = call(LATENT, "infer.py", *words, "--output", output)
        assert (result.code, len(result.errors)) == (BAD_OUTPUT, 1), result.text
        assert "would be overwritten" in result.errors[0]
        assert kept.read_bytes() == before


def test_data_that_a_run_learned_from_are_not_overwritten_and_a_film_may_be_drawn_from(runs, copy_of, tmp_path):
    run = copy_of(runs[PIXEL])
    path, data = run / "checkpoint_epoch_000001.pt", tmp_path / "mine.npz"
    state = read_checkpoint(path)
    state["args"]["data"] = str(data)
    save_checkpoint(path, state)
    data.write_bytes(b"precious")
    draw = ("--ckpt", path, "--num-images", 2, "--output", tmp_path / "a.png")
    result = call(PIXEL, "infer.py", *draw, "--save-npz", data)
    assert (result.code, len(result.errors)) == (BAD_OUTPUT, 1), result.text
    assert data.read_bytes() == b"precious"
    Image.new("L", (28, 28), 255).save(tmp_path / "a_process.png")
    again = (*draw, "--from-image", tmp_path / "a_process.png")
    assert call(PIXEL, "infer.py", *again).code == 0
    assert call(PIXEL, "infer.py", *again, "--show-process").code == BAD_OUTPUT


def test_what_was_drawn_is_kept_where_its_picture_is_too_large(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save_output", MagicMock(side_effect=MemoryError))
    npz, singly = tmp_path / "a.npz", tmp_path / "singly"
    flags = ("--num-images", 3, "--digit", 3, 3, 3, "--scale", 50, "--save-npz", npz, "--save-dir", singly)
    result = call(LATENT, "infer.py", "--ckpt", runs[LATENT], "--output", tmp_path / "a.png", *flags)
    assert (result.code, len(result.errors)) == (OUT_OF_MEMORY, 1), result.text
    assert "--scale than 50" in result.errors[0]
    assert (len(np.load(npz)["images"]), len(list(singly.iterdir()))) == (3, 3)


def test_what_is_not_finite_is_no_picture(runs, copy_of, tmp_path):
    run = copy_of(runs[PIXEL])
    path = run / "checkpoint_epoch_000001.pt"
    state = read_checkpoint(path)
    state["ema"]["module.head.2.layer.weight"].fill_(3e38)
    save_checkpoint(path, state)
    result = call(PIXEL, "infer.py", "--ckpt", path, "--output", tmp_path / "a.png")
    assert (result.code, len(result.errors)) == (BAD_CHECKPOINT, 1), result.text
    assert "not finite" in result.errors[0]
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match="not finite"):
        load(path, "cpu").draw(count=2)


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--show-process", "--process-steps", 1), USAGE),
        (("--show-process", "--process-steps", 22), USAGE),  # T is 20
        (("--show-process", "--process-steps", 12, "--steps", 10), USAGE),
        (("--digit", 3, 3, 3, "--num-images", 2), USAGE),  # which of them?
        (("--process-steps", 5), USAGE),  # without --show-process it would do nothing
        (("--save-npz", "/proc/nowhere/a.npz"), BAD_OUTPUT),
        (("--save-npz", "a.zip"), BAD_OUTPUT),
        (("--save-dir", "."), BAD_OUTPUT),  # not empty
        (("--save-dir", "/proc/nowhere"), BAD_OUTPUT),
        (("--output", "/proc/nowhere/a.png"), BAD_OUTPUT),
        (("--output", "/proc/a.png"), BAD_OUTPUT),  # a folder that is there
        (("--output", "a.jpg"), BAD_OUTPUT),
        (("--output", f"/tmp/{'a' * 252}.png"), BAD_OUTPUT),
    ],
)
def test_a_bad_wish_is_one_line_before_anything_is_drawn(flags, code, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("common.sampling.sample", lambda *_: pytest.fail("drawn"))
    result = call(LATENT, "infer.py", "--ckpt", runs[LATENT], "--output", tmp_path / "a.png", *flags)
    assert result.code == code, result.text
    assert len(result.text.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a_process.png", "a_process.gif"])
def test_a_folder_where_the_process_should_lie_is_found_before_anything_is_drawn(name, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("common.sampling.sample", lambda *_: pytest.fail("drawn"))
    (tmp_path / name).mkdir()
    result = call(LATENT, "infer.py", "--ckpt", runs[LATENT], "--output", tmp_path / "a.png", "--show-process")
    assert (result.code, len(result.text.splitlines())) == (BAD_OUTPUT, 1), result.text
    assert f"{name}: it is a folder" in result.text


@pytest.mark.parametrize(("flag", "code"), [("--output", BAD_OUTPUT), ("--from-image", BAD_IMAGE)])
def test_a_link_that_leads_to_itself_is_one_line(flag, code, runs, tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    result = call(
        LATENT, "infer.py", "--ckpt", runs[LATENT], "--output", tmp_path / "a.png", flag, tmp_path / "loop.png"
    )
    assert (result.code, len(result.text.splitlines())) == (code, 1), result.text


PLURAL = re.compile(r"(?<![\d.,])1 (images|pictures|steps|batches|epochs|files|digits|tensors|parameters)\b")


def test_one_of_a_kind_is_no_plural(runs, tiny, tmp_path):
    few = ("--ckpt", runs[LATENT], "--steps", 1, "--num-images", 1, "--output", tmp_path / "a.png")
    wrong = call(LATENT, "infer.py", *few, "--show-process", "--process-steps", 3)
    assert (wrong.code, len(wrong.errors)) == (USAGE, 1), wrong.text
    assert wrong.errors[0].endswith("--process-steps 3 is more than the 2 pictures of 1 step")
    drawn = call(LATENT, "infer.py", *few, "--save-dir", tmp_path / "singly")
    once = ("--model", "mlp", "--batch-size", 500, "--epochs", 9, "--early-stopping-patience", 1, "--lr", 1e-30)
    trained = call(AE, "train.py", *tiny, *once, "--outdir", tmp_path)
    assert "no better val_loss for 1 epoch" in trained.text
    torch.save(torch.ones(1), tmp_path / "a.pt")
    shown = run(".", "-m common.inspect_ckpt", tmp_path / "a.pt")
    for result in (drawn, trained, shown):
        assert result.code == 0, result.text
        assert not PLURAL.search(result.text), result.text


@pytest.mark.parametrize("scale", [1, 3])
def test_scale_makes_the_pixels_of_pictures_larger(scale, runs, ae_run, cache, tmp_path):
    few = ("--num-images", 4)
    drawn = ("--ckpt", runs[LATENT], *few, "--show-process", "--process-steps", 3)
    rebuilt = ("--ckpt", ae_run, *few, "--data", "embedded", "--cache-dir", cache)
    for folder, flags, names in ((LATENT, drawn, ("a", "a_process")), (AE, rebuilt, ("a",))):
        for size, where in ((1, tmp_path / "small"), (scale, tmp_path / "large")):
            result = call(folder, "infer.py", *flags, "--scale", size, "--output", where / "a.png")
            assert result.code == 0, result.text
        for name in names:
            small, large = (pixels(tmp_path / where / f"{name}.png") for where in ("small", "large"))
            assert (large == small.repeat(scale, 0).repeat(scale, 1)).all(), (folder, name)


def test_rows_say_their_digit(runs, tmp_path):
    """Beside the very same grid; a row of several digits has no name."""
    drawn = ("--ckpt", runs[LATENT], "--num-images", 9, "--digit", 3, "--steps", 2)
    for name, flags in (("plain", ()), ("named", ("--row-labels",))):
        assert call(LATENT, "infer.py", *drawn, *flags, "--output", tmp_path / f"{name}.png").code == 0
    plain, named = (pixels(tmp_path / f"{name}.png") for name in ("plain", "named"))
    assert (named[:, 18:] == plain).all()
    rows = [named[2 + 30 * row : 30 + 30 * row, :18] for row in range(3)]
    assert rows[0].max() > 100
    assert all((row == rows[0]).all() for row in rows)
    assert row_names([1, 1, 1, 2, 3, 3, 7, 7, 7]) == ["1", "", "7"]
    assert row_names([4, 4, 5]) == ["4", "5"]
    result = call(LATENT, "infer.py", *drawn[:4], "--digit", "none", "--row-labels", "--output", tmp_path / "x.png")
    assert (result.code, len(result.errors)) == (USAGE, 1), result.text


def test_every_run_leaves_its_curves(runs, ae_run):
    for folder in (*runs.values(), ae_run):
        with Image.open(folder.parent.parent / "samples" / folder.name / "curves.png") as picture:
            assert picture.size == (640, 480)
            blue = (np.asarray(picture.convert("RGB")) == (0x00, 0x72, 0xB2)).all(-1).sum()
            orange = (np.asarray(picture.convert("RGB")) == (0xD5, 0x5E, 0x00)).all(-1).sum()
        assert blue > 20
        assert orange > 20


@pytest.fixture
def drawn_axes(tmp_path, monkeypatch):
    """drawn_axes(train_losses, val_losses, rates, title) -> the two axes of the curves.png that was drawn."""
    figures = []

    class Figure(matplotlib.figure.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Figure)

    def drawn(train, val, rates, title="a run"):
        rows = zip(train, val, rates, strict=True)
        keys = ("epoch", "train_loss", "val_loss", "lr")
        lines = [json.dumps(dict(zip(keys, (n, *row), strict=True))) for n, row in enumerate(rows, 1)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title)
        return figures[-1].axes

    return drawn


def test_the_curves_are_called_what_they_are(drawn_axes):
    losses, rate = drawn_axes([1.0, 0.5], [2.0, 1.0], [3.0, 1.5])
    assert {line.get_label(): list(line.get_ydata()) for line in losses.lines} == {
        "training": [1.0, 0.5],
        "validation": [2.0, 1.0],
    }
    assert list(rate.lines[0].get_ydata()) == [3.0, 1.5]
    losses, _ = drawn_axes([1.0, 0.5], [2.0, 1.0], [3.0, 1.5], "ae-mlp-dall")
    assert [line.get_label() for line in losses.lines] == ["training", "validation: squared error alone"]


@pytest.mark.parametrize(
    ("high", "low"), [(0.05, 0.0072), (0.34, 0.31), (1.1, 0.3), (0.9, 0.02), (2.0, 0.005), (30, 0.004), (1, 1), (9, 1)]
)
@pytest.mark.parametrize("rates", [(2e-4, 1e-4, 0), (4e-4, 2e-4, 1e-7), (1e-3, 1e-4, 1e-5), (2e-4, 2e-4, 2e-4)])
def test_ticks_have_their_own_names_and_cover_the_axis(high, low, rates, drawn_axes):
    middle = (high * low) ** 0.5
    for axes in drawn_axes([high, middle, low], [high, middle, low], rates):
        bottom, top = axes.get_ylim()
        ticks = {
            value: axes.yaxis.get_major_formatter()(value) for value in axes.get_yticks() if bottom <= value <= top
        }
        for value, name in ticks.items():
            assert float(name) == pytest.approx(value, rel=1e-5, abs=1e-12), name
            assert len(name) <= 7, name
        assert len(set(ticks.values())) == len(ticks) >= 2
        if axes.get_yscale() == "log":
            half = (bottom * top) ** 0.5
            assert min(ticks) < half < max(ticks)


@pytest.mark.parametrize("seconds", [0.01, 5.0])
def test_curves_cost_no_more_than_a_thirtieth_of_the_time(seconds, ae_run, tmp_path, monkeypatch):
    """By a clock of the test's own: an epoch takes a second, and a drawing is quick or slow."""
    now, drawn = 0.0, []

    def draw(*_paths):
        nonlocal now
        now += seconds
        drawn.append(now)

    monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(record, "draw_curves", draw)
    written = record.Record(Run(ae_run.name, tmp_path, tmp_path, None), pytest.fail)
    for _ in range(1000):
        now += 1
        written._curves(cheaply=True)
    assert len(drawn) >= now / (seconds + 1) / 40
    assert (len(drawn) - 1) * seconds <= now / 30  # the first one's cost is not known before
