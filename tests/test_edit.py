"""Drawing that begins with an image: SDEdit (--from-image, --strength) and inpainting (--inpaint, --resample)."""

import io
import json
import os
import struct
import warnings
import zipfile
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import AE, LATENT, PIXEL, call
from PIL import Image
from test_ranks import Launched

from common import diffusion, load, sampling
from common.ckpt import read_checkpoint, save_checkpoint
from common.error_codes import BAD_IMAGE, MODEL_MISMATCH, USAGE, Exit
from common.flags import DEFAULT_STRENGTH, SAMPLERS
from common.images import read_images, to_bytes

T = 200
SCHEDULES = diffusion.precompute_schedules(T, 1e-4, 0.1)  # its last alpha_bar is 4e-5


@pytest.fixture(scope="module")
def runs(latent_run, pixel_run):
    """A trained run of either diffusion experiment, by folder."""
    return {LATENT: latent_run, PIXEL: pixel_run}


@pytest.fixture
def digit(tmp_path):
    """A picture of the right size with all kinds of grey: (file, (28, 28) uint8)."""
    levels = np.arange(28 * 28).reshape(28, 28) * 7 % 256
    levels[[0, -1]] = levels[:, [0, -1]] = 0
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "digit.png")
    return tmp_path / "digit.png", levels.astype(np.uint8)


@pytest.fixture
def right_half(tmp_path):
    """A mask: (file, (28, 28) bool)."""
    white = np.zeros((28, 28), dtype=bool)
    white[:, 14:] = True
    Image.fromarray(white.astype(np.uint8) * 255).save(tmp_path / "right.png")
    return tmp_path / "right.png", white


def arrays(path):
    with np.load(path, allow_pickle=False) as saved:
        return saved["images"], saved["labels"].tolist(), json.loads(str(saved["settings"]))


# --- the mathematics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("strength", "timesteps"), [(0.001, 1), (0.3, 60), (0.5, 100), (0.999, 200), (1.0, 200)])
def test_an_image_is_noised_to_its_strength_and_denoised_from_there(sampler, strength, timesteps, net):
    seen, asked = [], []
    image = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    net.watch = asked.append
    how = {"count": 3, "sampler": sampler, "seed": 5, "callback": lambda left, x: seen.append(x)}
    sampling.draw(net, (1, 28, 28), SCHEDULES, from_image=image, strength=strength, **how)
    z = sampling.noise_source(5, (3, 1, 28, 28))(0)
    noised = diffusion.q_sample(image, torch.full((3,), timesteps - 1), z, SCHEDULES)
    torch.testing.assert_close(seen[0], z if strength == 1 else noised)
    assert asked == [step.t for step in sampling.reverse_steps(SCHEDULES.first(timesteps), sampler=sampler)]
    assert asked[0] == timesteps - 1


class Net(torch.nn.Module):
    """Stands in for a model of pixels."""

    null_label = 10

    def __init__(self):
        super().__init__()
        self.watch = lambda t: None

    def predictor(self):
        def predict(x, t, labels):
            self.watch(t)
            return torch.tanh(x) * (t + 1) / T

        return predict


@pytest.fixture
def net():
    return Net()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm", "dpm-sde"])
def test_the_perfect_denoiser_keeps_of_an_image_what_noise_leaves(sampler):
    """For data N(0.5, 0.3^2): E[x_0 | x_t] and the ODE's solution are known, and the image at 1.0 shifts both."""
    mean, deviation, x0 = 0.5, 0.3, 1.0
    for timesteps in (30, 60, 100):
        some = SCHEDULES.first(timesteps)
        signal, noise = some.sqrt_alpha_bar[-1].item(), some.sqrt_one_minus_alpha_bar[-1].item()

        def best(x, t):
            abar = SCHEDULES.alpha_bar[t].double().item()
            return (x - abar**0.5 * mean) * (1 - abar) ** 0.5 / (abar * deviation**2 + 1 - abar)

        plan = sampling.reverse_steps(some, min(timesteps, 40) if sampler.startswith("dpm") else None, sampler)
        source = sampling.noise_source(1, (20_000, 1))
        drawn = sampling.sample(best, source, plan, start=torch.full((20_000, 1), x0))
        variance = signal**2 * deviation**2 + noise**2  # of x_t
        if sampler in ("ddpm", "dpm-sde"):
            share = (signal * deviation) ** 2 / variance
            spread = (share * noise / signal) ** 2 + deviation**2 * (1 - share)
        else:
            share = signal * deviation / variance**0.5
            spread = deviation**2 * noise**2 / variance
        assert drawn.mean().item() == pytest.approx(mean + share * (x0 - mean), abs=0.012), timesteps
        assert drawn.std().item() == pytest.approx(spread**0.5, rel=0.06), timesteps


def test_at_full_strength_nothing_of_the_image_is_left(net):
    image = torch.rand(28, 28)
    plain, over, nearly = (
        sampling.draw(net, (1, 28, 28), SCHEDULES, count=2, **how)
        for how in ({}, {"from_image": image}, {"from_image": image, "strength": 0.997})
    )
    assert torch.equal(plain, over)
    assert not torch.equal(plain, nearly)


def correlated(rho):
    """The best predictor of epsilon for pairs of correlation rho, each N(0, 1)."""
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    def best(x, t):
        abar = SCHEDULES.alpha_bar[t].double().item()
        noisy = abar * covariance + (1 - abar) * torch.eye(2, dtype=torch.float64)
        return (x.double() @ torch.linalg.inv(noisy) * (1 - abar) ** 0.5).float()

    return best


@pytest.mark.parametrize("sampler", ["ddpm", "dpm", "ddim", "dpm-sde"])
def test_what_is_drawn_anew_fits_what_is_kept_and_resampling_makes_it_fit_better(sampler):
    """Of pairs with correlation 0.9 the first is kept at 1.5: the second's expectation is 1.35."""
    rows, rho, kept = 20_000, 0.9, 1.5
    x_0, anew = torch.tensor([kept, 7.0]).expand(rows, 2), torch.tensor([False, True]).expand(rows, 2)
    plan = sampling.reverse_steps(SCHEDULES, 40, sampler)
    errors = {}
    for times in (1, 8):
        some = sampling.resampled(plan, times)
        drawn = sampling.sample(correlated(rho), sampling.noise_source(1, (rows, 2)), some, known=(x_0, anew))
        assert (drawn[:, 0] - kept).abs().max() < 1e-6
        errors[times] = abs(drawn[:, 1].mean().item() - rho * kept)
    assert errors[1] < 0.8  # 1.35 for what does not look at what is kept
    assert errors[8] < 0.6 * errors[1], errors


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_the_way_what_is_kept_is_as_noisy_as_the_rest(sampler):
    rows, kept, seen = 20_000, 1.5, []
    x_0, anew = torch.tensor([kept, 7.0]).expand(rows, 2), torch.tensor([False, True]).expand(rows, 2)
    plan = sampling.reverse_steps(SCHEDULES, 12, sampler)
    noise, known = sampling.noise_source(1, (rows, 2)), (x_0, anew)
    sampling.sample(correlated(0.9), noise, plan, lambda left, x: seen.append(x[:, 0]), known=known)
    for step, x in zip(plan, seen[1:], strict=True):
        assert x.mean().item() == pytest.approx(step.next_signal * kept, abs=0.03)
        assert x.std().item() == pytest.approx((1 - step.next_signal**2) ** 0.5, abs=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 9, 10, 25, 40])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_resampling_goes_every_stretch_again_and_each_step_begins_where_the_last_one_led(sampler, steps, times):
    plan = sampling.reverse_steps(SCHEDULES, steps, sampler)
    some = sampling.resampled(plan, times)
    assert len(some) == times * steps
    assert sorted(step.t for step in some) == sorted([step.t for step in plan] * times)
    for before, after in pairwise(some):
        assert before.next_signal * before.back_scale == pytest.approx(after.signal, rel=1e-9)
        assert before.back_scale == 1 or after.change_scale == 0
    assert sum(step.back_scale < 1 for step in some) == (times - 1) * {1: 1, 9: 9, 10: 10, 25: 9, 40: 10}[steps]
    assert some[-1].next_signal == pytest.approx(1)
    assert some[-1].back_scale == 1
    if times == 1:
        assert some == plan


def test_what_is_noised_again_keeps_its_variance():
    plan = [sampling.ReverseStep(0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, back_scale=0.6)]  # leads from x to x
    z = sampling.noise_source(1, (10,))
    torch.testing.assert_close(sampling.sample(lambda x, t: x, z, plan), 0.6 * z(0) + 0.8 * z(1))


def test_every_row_has_its_own_image_and_mask_in_whatever_part_it_is_drawn(net, monkeypatch):
    images, masks = torch.rand(2, 6, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    how = {"from_image": images, "inpaint": masks, "strength": 0.5, "steps": 5, "count": 6}
    whole = sampling.draw(net, (1, 28, 28), SCHEDULES, **how)
    assert torch.equal(whole == images, masks <= 0.5)  # what is above a half is drawn anew
    monkeypatch.setattr(sampling, "PART", 2)
    torch.testing.assert_close(sampling.draw(net, (1, 28, 28), SCHEDULES, **how), whole)
    second = SimpleNamespace(rank=1, size=2, all=lambda mine: [[torch.zeros_like(mine[0])] * 2, mine])
    shared = sampling.draw(net, (1, 28, 28), SCHEDULES, world=second, **how)
    torch.testing.assert_close(shared[2:4], whole[2:4])


WRONG = [
    ({"strength": 0.5}, "give from_image"),
    ({"inpaint": torch.ones(28, 28)}, "give from_image"),
    ({"from_image": torch.rand(28, 28), "strength": 0}, "strength must be greater than 0 and at most 1, not 0"),
    ({"from_image": torch.rand(28, 28), "strength": 1.1}, "at most 1, not 1.1"),
    ({"from_image": torch.rand(28, 28), "strength": float("nan")}, "at most 1, not nan"),
    ({"from_image": torch.rand(28, 28), "strength": 0.5, "steps": 11}, "leaves 10 timesteps: .* not 11"),
    ({"from_image": torch.rand(27, 28)}, r"from_image must be of shape .* not \(27, 28\)"),
    ({"from_image": torch.rand(2, 3, 28, 28)}, r"not \(2, 3, 28, 28\)"),
    ({"from_image": torch.rand(0, 1, 28, 28)}, r"not \(0, 1, 28, 28\)"),
    ({"from_image": "digit.png"}, "from_image must be of shape"),
    ({"from_image": torch.full((28, 28), 255)}, "from 0"),
    ({"from_image": torch.full((28, 28), float("nan"))}, "from 0"),
    ({"from_image": torch.rand(5, 28, 28), "count": 4}, "has 5 images: draw at least as many, not 4"),
    ({"from_image": torch.rand(28, 28), "inpaint": torch.ones(28, 27)}, "inpaint must be of shape"),
    ({"from_image": torch.rand(28, 28), "inpaint": torch.ones(28, 28), "resample": 0}, "resample must be at least 1"),
    ({"from_image": torch.rand(28, 28), "resample": 5}, "resample fits what is drawn anew .* give inpaint"),
    (
        {"from_image": torch.rand(2, 28, 28), "inpaint": torch.ones(3, 28, 28), "count": 6},
        "2 and 3 images",
    ),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_cannot_be_drawn_is_a_value_error(wrong, said, pixel_run):
    with pytest.raises(ValueError, match=said):
        load(pixel_run, "cpu").draw(**wrong)


def test_latents_have_no_pixels_to_keep(latent_run, digit, right_half):
    with pytest.raises(ValueError, match="only a model of pixels"):
        load(latent_run, "cpu").draw(from_image=torch.rand(28, 28), inpaint=torch.ones(28, 28))
    result = call(LATENT, "infer.py", "--ckpt", latent_run, "--from-image", digit[0], "--inpaint", right_half[0])
    assert (result.code, len(result.text.splitlines())) == (MODEL_MISMATCH, 1), result.text
    assert "only a model of pixels" in result.text


# --- a trained run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
@pytest.mark.parametrize("more", [(), ("--digit", 3), ("--sampler", "dpm"), ("--sampler", "ddim", "--steps", 5)])
def test_infer_and_notebooks_draw_the_same_from_an_image(folder, more, runs, digit, tmp_path):
    flags = ("--ckpt", runs[folder], "--from-image", digit[0], "--strength", 0.5, "--num-images", 4, "--seed", 7)
    files = ("--output", tmp_path / "a.png", "--save-npz", tmp_path / "a.npz", "--device", "cpu", "--show-process")
    result = call(folder, "infer.py", *flags, *more, *files)
    assert result.code == 0, result.text
    images, labels, settings = arrays(tmp_path / "a.npz")
    assert (settings["from_image"], settings["strength"], settings["inpaint"]) == (str(digit[0]), 0.5, None)
    assert labels == [3] * 4  # the runs have seen no others
    how = {"sampler": "dpm"} if "dpm" in more else {"sampler": "ddim", "steps": 5} if "ddim" in more else {}
    image = torch.from_numpy(digit[1]).float() / 255
    run = load(runs[folder], "cpu")
    drawn = run.draw(3 if "--digit" in more else None, from_image=image, strength=0.5, count=4, seed=7, **how)
    assert (to_bytes(drawn).squeeze(1).numpy() == images).all()
    assert not (images[0] == images[1]).all()  # variations
    assert not torch.equal(drawn, run.draw(from_image=image, strength=0.5, count=4, seed=8))
    with Image.open(tmp_path / "a_process.gif") as film:
        assert film.n_frames == settings["steps"] + 1


def test_latents_are_encoded_and_standardised_and_little_strength_changes_little(latent_run, ae_run):
    """What comes back at a strength of one timestep is the autoencoder's own reconstruction, nearly."""
    images = load(ae_run, "cpu").decode(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 5)
    rebuilt = load(ae_run, "cpu").decode(load(ae_run, "cpu").encode(images))
    drawn = load(latent_run, "cpu").draw(from_image=images, strength=0.01, count=4)
    assert (drawn - rebuilt).abs().mean() < 0.1 * (rebuilt - rebuilt.flip(0)).abs().mean()


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_without_a_digit_the_network_is_not_told_one(folder, runs, digit, tmp_path):
    """Of a run that has seen several: the picture says what it is. And the default strength is the model's."""
    path = tmp_path / "checkpoint_epoch_000001.pt"
    state = read_checkpoint(runs[folder] / "latest.pt")
    state["args"] |= {"only_digit": None, "class_counts": [100] * 10}
    save_checkpoint(path, state)
    files = ("--output", tmp_path / "a.png", "--save-npz", tmp_path / "a.npz", "--device", "cpu")
    result = call(folder, "infer.py", "--ckpt", path, "--from-image", digit[0], "--num-images", 2, *files)
    assert result.code == 0, result.text
    images, labels, settings = arrays(tmp_path / "a.npz")
    assert labels == [-1, -1]
    assert settings["strength"] == DEFAULT_STRENGTH[state["args"]["model"]]
    image = torch.from_numpy(digit[1]).float() / 255
    drawn = load(path, "cpu").draw(from_image=image, count=2)
    assert (to_bytes(drawn).squeeze(1).numpy() == images).all()
    guided = call(folder, "infer.py", "--ckpt", path, "--from-image", digit[0], "--guidance", 2, *files)
    assert (guided.code, len(guided.errors)) == (USAGE, 1), guided.text
    assert "--digit" in guided.errors[0]
    with pytest.raises(ValueError, match="an effect only on labels"):
        load(path, "cpu").draw(from_image=image, guidance=2)


def test_each_of_several_images_gets_an_equal_run(runs, tmp_path):
    images = np.zeros((3, 28, 28), dtype=np.uint8)
    images[:, 10:20, 10:20] = np.array([50, 150, 250])[:, None, None]
    np.savez(tmp_path / "some.npz", images=images, labels=[1, 2, 3])
    flags = ("--ckpt", runs[PIXEL], "--from-image", tmp_path / "some.npz", "--strength", 0.05, "--num-images", 6)
    result = call(PIXEL, "infer.py", *flags, "--output", tmp_path / "a.png", "--save-npz", tmp_path / "a.npz")
    assert result.code == 0, result.text
    levels = arrays(tmp_path / "a.npz")[0][:, 10:20, 10:20].mean((1, 2))
    assert abs(levels - [50, 50, 150, 150, 250, 250]).max() < 20


@pytest.mark.parametrize("more", [(), ("--resample", 3, "--steps", 15), ("--strength", 0.5, "--sampler", "dpm")])
def test_what_is_kept_is_kept_exactly_and_the_rest_is_drawn(more, runs, digit, right_half, tmp_path):
    flags = ("--ckpt", runs[PIXEL], "--from-image", digit[0], "--inpaint", right_half[0], "--num-images", 4, *more)
    drawn = {}
    for seed in (1, 2):
        files = ("--output", tmp_path / "a.png", "--save-npz", tmp_path / f"{seed}.npz", "--show-process")
        result = call(PIXEL, "infer.py", *flags, *files, "--seed", seed, "--device", "cpu")
        assert result.code == 0, result.text
        drawn[seed], _, settings = arrays(tmp_path / f"{seed}.npz")
    kept = ~right_half[1]
    for images in drawn.values():
        assert (images[:, kept] == digit[1][kept]).all()
        assert len({image.tobytes() for image in images}) == 4
    assert not (drawn[1] == drawn[2]).all()
    assert settings["inpaint"] == str(right_half[0])
    assert settings["strength"] == (0.5 if "--strength" in more else 1.0)
    passes = settings["resample"] * settings["steps"]
    with Image.open(tmp_path / "a_process.gif") as film:
        assert film.n_frames == min(20, passes + 1)
        film.seek(film.n_frames - 1)
        last = np.asarray(film.convert("L"))[::2, ::2]
    assert (last == np.asarray(Image.open(tmp_path / "a.png").convert("L"))).all()
    image, mask = torch.from_numpy(digit[1]).float() / 255, torch.from_numpy(right_half[1])
    named = ("sampler", "steps", "strength", "resample", "guidance") if more else ()  # else all by default
    how = {name: settings[name] for name in named}
    again = load(runs[PIXEL], "cpu").draw(from_image=image, inpaint=mask, count=4, seed=2, **how)
    assert torch.equal(again[:, 0, torch.from_numpy(kept)], image[torch.from_numpy(kept)].expand(4, -1))
    assert (to_bytes(again).squeeze(1).numpy() == drawn[2]).all()


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_processes_draw_from_an_image_as_one_does(folder, runs, digit, right_half, tmp_path):
    more = ("--inpaint", right_half[0], "--resample", 2, "--steps", 3) if folder == PIXEL else ("--strength", 0.4)
    flags = ("--ckpt", runs[folder], "--from-image", digit[0], "--num-images", 300, *more, "--show-process")
    for size in (1, 2):
        files = ("--output", tmp_path / str(size) / "a.png", "--save-npz", tmp_path / str(size) / "a.npz")
        results = Launched(folder, size, *flags, *files, "--device", "cpu", script="infer.py").finish()
        assert [result.code for result in results] == [0] * size, results
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["a.npz", "a.png", "a_process.gif", "a_process.png"]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


# --- wrong wishes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(digit, right_half, tmp_path, monkeypatch):
    """Some files to be wrong about, in the current folder of the script."""
    Image.new("L", (30, 28), 255).save(tmp_path / "wide.png")
    Image.new("L", (28, 28), 0).save(tmp_path / "black.png")
    Image.new("L", (28, 28), 100).save(tmp_path / "dark.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(digit[0].read_bytes()[:-60])
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "shape.npz", images=np.zeros((2, 27, 28)))
    np.savez(tmp_path / "range.npz", images=np.full((2, 28, 28), 2.0))
    np.savez(tmp_path / "names.npz", one=np.zeros((28, 28)), two=np.zeros((28, 28)))
    np.savez(tmp_path / "objects.npz", images=np.array([{}], dtype=object))
    np.savez(tmp_path / "complex.npz", images=np.zeros((2, 28, 28), dtype=complex))
    Image.fromarray(np.full((28, 28), np.nan, dtype=np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(np.full((28, 28), 2**31 - 1, dtype=np.int32)).save(tmp_path / "bits.tif")
    Image.fromarray(np.full((28, 28), -1, dtype=np.float32)).save(tmp_path / "minus.tif")
    np.savez(tmp_path / "twenty.npz", images=np.zeros((20, 28, 28)))
    np.savez(tmp_path / "two.npz", images=np.ones((2, 28, 28)))
    return tmp_path


FROM = ("--from-image", "digit.png")


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--strength", 0.5), USAGE, "--strength says what becomes of a picture"),
        (("--inpaint", "right.png"), USAGE, "--inpaint says what becomes of a picture"),
        (("--resample", 2), USAGE, "--resample says what becomes of a picture"),
        ((*FROM, "--resample", 2), USAGE, "give --inpaint MASK too"),
        ((*FROM, "--strength", 0), USAGE, "greater than 0"),
        ((*FROM, "--strength", 1.01), USAGE, "at most 1"),
        ((*FROM, "--strength", "nan"), USAGE, "not a number"),
        ((*FROM, "--strength", 0.5, "--steps", 11), USAGE, "the 10 timesteps that --strength 0.5 leaves"),
        ((*FROM, "--inpaint", "right.png", "--resample", 0), USAGE, "at least 1"),
        (("--from-image", "nothing.png"), BAD_IMAGE, "nothing.png: no such file"),
        (("--from-image", "text.png"), BAD_IMAGE, "text.png cannot be read"),
        (("--from-image", "cut.png"), BAD_IMAGE, "cut.png cannot be read"),
        (("--from-image", "folder.png"), BAD_IMAGE, "not a file"),
        (("--from-image", "pipe.png"), BAD_IMAGE, "not a file"),
        (("--from-image", "text.npz"), BAD_IMAGE, "text.npz cannot be read"),
        (("--from-image", "shape.npz"), BAD_IMAGE, "(2, 27, 28)"),
        (("--from-image", "range.npz"), BAD_IMAGE, "from 0 (black) to 1"),
        (("--from-image", "names.npz"), BAD_IMAGE, "no array named images, but one, two"),
        (("--from-image", "objects.npz"), BAD_IMAGE, "objects.npz cannot be read"),
        (("--from-image", "complex.npz"), BAD_IMAGE, "of type complex128"),
        (("--from-image", "nan.tif"), BAD_IMAGE, "not all of its numbers are finite"),
        (("--from-image", "bits.tif"), BAD_IMAGE, "from 2.14748e+09 to 2.14748e+09; up to 65535"),
        (("--from-image", "minus.tif"), BAD_IMAGE, "from -1 to -1; up to 65535"),
        (("--from-image", "twenty.npz"), USAGE, "--num-images 16 is less than one of each of the 20"),
        ((*FROM, "--inpaint", "wide.png"), BAD_IMAGE, "wide.png is 30 x 28 pixels"),
        ((*FROM, "--inpaint", "black.png"), BAD_IMAGE, "black.png has nothing white"),
        ((*FROM, "--inpaint", "dark.png"), BAD_IMAGE, "dark.png has nothing white"),
        ((*FROM, "--inpaint", "nothing.png"), BAD_IMAGE, "nothing.png: no such file"),
        ((*FROM, "--inpaint", "two.npz"), BAD_IMAGE, "2 masks"),
    ],
    ids=str,
)
def test_a_wrong_wish_is_one_line_before_anything_is_drawn(flags, code, said, files, pixel_run, monkeypatch):
    monkeypatch.setattr("common.sampling.sample", lambda *_: pytest.fail("drawn"))
    paths = [files / flag if isinstance(flag, str) and flag.endswith(("png", "npz", "tif")) else flag for flag in flags]
    result = call(PIXEL, "infer.py", "--ckpt", pixel_run, "--output", files / "a.png", *paths)
    assert result.code == code, result.text
    assert len(result.text.splitlines()) == 1, result.text
    assert said in result.text
    assert not (files / "a.png").exists()


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_an_autoencoder_draws_from_no_image(folder, ae_run, digit):
    result = call(folder, "infer.py", "--ckpt", ae_run, "--from-image", digit[0], "--strength", 0.5)
    assert (result.code, len(result.text.splitlines())) == (MODEL_MISMATCH, 1), result.text
    result = call(AE, "infer.py", "--ckpt", ae_run, "--from-image", digit[0])
    assert (result.code, len(result.text.splitlines())) == (USAGE, 1), result.text


def test_a_wrong_picture_is_said_once_by_several_processes(pixel_run, files):
    flags = ("--ckpt", pixel_run, "--from-image", files / "text.png", "--device", "cpu")
    results = Launched(PIXEL, 2, *flags, script="infer.py").finish()
    assert [result.code for result in results] == [BAD_IMAGE] * 2, results
    assert [len(result.errors) for result in results] == [1, 0]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_of_the_right_size_is_taken_as_it_is(digit):
    images, size = read_images(digit[0])
    assert size == (28, 28)
    assert (to_bytes(images)[0, 0].numpy() == digit[1]).all()


@pytest.fixture
def stroke():
    """White on black, 56 x 112: a bar whose shrunken form is known."""
    levels = np.zeros((112, 56), dtype=np.uint8)
    levels[40:80, 20:28] = 255
    wanted = np.zeros((28, 28))
    wanted[10:20, 12:14] = 1  # a quarter of the size, with black to the left and to the right
    return Image.fromarray(levels), wanted


def with_alpha(picture):
    """Black ink on nothing."""
    clear = Image.new("L", picture.size, 0)
    return Image.merge("LA", (clear, picture))


@pytest.mark.parametrize(
    "form",
    [
        lambda picture: picture,
        lambda picture: picture.convert("RGB"),
        lambda picture: picture.convert("1"),
        lambda picture: picture.convert("P"),
        lambda picture: picture.point(lambda level: 255 - level),
        lambda picture: Image.fromarray(np.asarray(picture).astype(np.uint16) * 257),
        with_alpha,
    ],
    ids=["grey", "colour", "bits", "palette", "ink on paper", "16 bits", "transparent"],
)
def test_any_picture_becomes_a_digit_white_on_black(form, stroke, tmp_path):
    form(stroke[0]).save(tmp_path / "a.png")
    images, size = read_images(tmp_path / "a.png")
    assert size == (56, 112)
    assert np.abs(images[0, 0].numpy() - stroke[1]).max() < 0.005


def white_on_nothing(picture):
    ink = picture.point(lambda level: 255 if level else 0)  # what is transparent has a colour too, mostly black
    return Image.merge("LA", (ink, picture)).convert("RGBA")


@pytest.mark.parametrize(
    "form",
    [
        white_on_nothing,
        lambda picture: Image.fromarray(np.asarray(picture, dtype=np.float32) / 255),
        lambda picture: Image.fromarray(np.asarray(picture, dtype=np.float32)),
        lambda picture: Image.fromarray(np.asarray(picture, dtype=np.float32) / 255 * 1.008 - 0.004),
        lambda picture: Image.fromarray(np.asarray(picture, dtype=np.int32)),
        lambda picture: Image.fromarray(np.asarray(picture, dtype=np.int32) * 257),
        lambda picture: Image.fromarray(np.asarray(picture, dtype=np.uint16)),
    ],
    ids=["white on nothing", "0 to 1", "to 255.0", "smoothed", "32 bits", "32 bits to 65535", "16 bits to 255"],
)
def test_no_scale_of_numbers_makes_a_picture_black(form, stroke, tmp_path):
    form(stroke[0]).save(tmp_path / "a.tiff")
    assert np.abs(read_images(tmp_path / "a.tiff")[0][0, 0].numpy() - stroke[1]).max() < 0.005


def test_a_photograph_lies_as_its_camera_says(stroke, tmp_path):
    turned = stroke[0].rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "a.png", exif=exif)
    images, size = read_images(tmp_path / "a.png")
    assert size == (56, 112)
    assert np.abs(images[0, 0].numpy() - stroke[1]).max() < 0.005


def test_a_picture_of_nothing_is_empty(tmp_path):
    for size in ((28, 28), (40, 40)):
        Image.new("RGBA", size, (255, 255, 255, 0)).save(tmp_path / "a.png")
        assert not read_images(tmp_path / "a.png")[0].any()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: np.save(path.open("wb"), np.zeros((28, 28))), "it is no .npz file"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "mine"), "what it holds is no array"),
    ],
)
def test_what_is_no_npz_is_called_so(write, said, tmp_path):
    write(tmp_path / "a.npz")
    with pytest.raises(Exit, match=said):
        read_images(tmp_path / "a.npz")


def test_a_small_picture_is_enlarged_and_a_mask_is_never_inverted(tmp_path):
    levels = np.zeros((14, 14), dtype=np.uint8)
    levels[3:5] = 255
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert (read_images(tmp_path / "a.png")[0][0, 0].numpy() == levels.repeat(2, 0).repeat(2, 1) / 255).all()
    Image.fromarray(255 - levels).save(tmp_path / "b.png")
    assert torch.equal(*(read_images(tmp_path / name)[0] for name in ("a.png", "b.png")))
    assert read_images(tmp_path / "b.png", mask=True)[0].mean() == pytest.approx(12 / 14)


def test_one_of_the_right_size_is_never_inverted(tmp_path):
    """The page's sketches are of it, however much of their edge is white."""
    levels = np.full((28, 28), 255, dtype=np.uint8)
    levels[20:] = 0
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert (read_images(tmp_path / "a.png")[0][0, 0].numpy() == levels / 255).all()


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(Exit, match="exceeds limit") as raised:
        read_images(tmp_path / "a.png")
    assert raised.value.code == BAD_IMAGE


def test_what_pillow_only_warns_of_is_no_fault(tmp_path):
    Image.new("L", (28, 28)).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")  # its notes are cut off
    with warnings.catch_warnings(record=True) as said:
        with Image.open(tmp_path / "a.png") as file:
            file.getexif()
        assert said
        said.clear()
        assert read_images(tmp_path / "a.png")[0].shape == (1, 1, 28, 28)
        assert not said


def test_a_fault_without_words_is_one_line_too(tmp_path):
    """An archive that says it holds more than it does: Python's EOFError has no text."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (500, 28, 28)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    at = content.index(b"PK\x01\x02") + 20  # both sizes, in the archive's directory
    content[at : at + 8] = struct.pack("<II", 500_000, 500_000)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(Exit, match="cannot be read as a picture") as raised:
        read_images(tmp_path / "a.npz")
    assert raised.value.code == BAD_IMAGE


@pytest.mark.parametrize("kind", [np.uint8, np.float32, np.float64, bool])
@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 1, 28, 28)])
def test_arrays_of_images(kind, shape, tmp_path):
    values = np.arange(np.prod(shape)).reshape(shape) % 2
    np.savez(tmp_path / "a.npz", (255 * values if kind is np.uint8 else values).astype(kind))
    images, size = read_images(tmp_path / "a.npz")
    assert (images.shape, size) == ((3, 1, 28, 28), (28, 28))
    assert (images.numpy().reshape(shape) == values).all()
