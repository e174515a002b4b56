"""The networks keep their shapes and promises, and infer.py turns checkpoints into pictures."""

import inspect
import math

import pytest
import torch
from forks import run
from helpers import AE, LATENT, PIXEL, call, recipe
from PIL import Image

from common.autoencoder import build_autoencoder, read_autoencoder
from common.ckpt import read_checkpoint, save_checkpoint
from common.data import HF_MNIST, split_train_val
from common.error_codes import BAD_OUTPUT, MODEL_MISMATCH, USAGE
from common.images import over
from common.modules import module_of
from common.rng import generator

MODELS = ["ae-mlp", "ae-conv"]


def noise(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=generator(0, "test"))


def grid_size(count: int, columns: int | None = None) -> tuple[int, int]:
    """(width, height) of a grid of 28x28 images with padding 2."""
    columns = columns or math.ceil(math.sqrt(count))
    if count == 1:
        return 28, 28  # torchvision gives a single image no frame
    return columns * 30 + 2, math.ceil(count / columns) * 30 + 2


# --- networks ---


@pytest.mark.parametrize(
    ("model", "network", "folder"), [("ddpm", "Denoiser", PIXEL), ("lddpm", "LatentDenoiser", LATENT)]
)
def test_a_network_by_itself_is_what_the_trainer_trains(model, network, folder):
    """Their defaults stand in two places, so that a notebook can say `Denoiser()`."""
    flags = recipe(folder, "train.py").parse_args([]).flags()
    parameters = inspect.signature(getattr(module_of(model), network)).parameters
    named = {"base_ch", "fine_ch", "dense_dim", "attention", "hidden_dim"} & parameters.keys()
    assert named
    assert {name: parameters[name].default for name in named} == {name: flags[name] for name in named}


def test_a_module_is_read_once_however_it_is_asked_for():
    assert module_of("lddpm") is module_of("lddpm", "model") is module_of("lddpm", network="model")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("latent_dim", [16, 5])
def test_an_autoencoder(model, latent_dim):
    net = module_of(model).Autoencoder(latent_dim=latent_dim, use_sigmoid=True).eval()
    images = noise(3, 1, 28, 28).abs().clamp(0, 1)
    with torch.no_grad():
        z = net.encode(images)
        decoded = net.decode(100 * noise(3, latent_dim))
        assert z.shape == (3, latent_dim)
        assert decoded.shape == images.shape
        assert decoded.min() >= 0
        assert decoded.max() <= 1
        torch.testing.assert_close(net(images), net.decode(z))
        torch.testing.assert_close(net.encode(images[:1]), z[:1], rtol=1e-4, atol=1e-5)  # rows do not mix


@pytest.mark.parametrize("model", MODELS)
def test_an_autoencoder_can_learn(model, cache):
    torch.manual_seed(0)
    net = module_of(model).Autoencoder(latent_dim=16)
    images, _ = HF_MNIST("test", cache, source="embedded")[torch.arange(8)]
    optimizer = torch.optim.Adam(net.parameters(), 3e-4)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.mse_loss(net(images), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("latent_dim", "hidden_dim"), [(16, 32), (5, 16)])
def test_the_denoiser(latent_dim, hidden_dim):
    net = module_of("lddpm").LatentDenoiser(latent_dim, hidden_dim)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # a last layer that starts at zero would hide the rest
    z, labels = noise(6, latent_dim), torch.tensor([0, 9, net.null_label, 3, 3, 3])
    outputs = []
    with torch.no_grad():
        predict = net.predictor()
        for t in (0, 7, 999):
            wanted = net(z, torch.full((6,), t), labels)
            assert wanted.shape == z.shape
            torch.testing.assert_close(predict(z, t, labels), wanted, rtol=1e-5, atol=1e-5)
            outputs.append(wanted)
        other = net(z, torch.full((6,), 999), torch.full((6,), 5))
        torch.testing.assert_close(net.restore(net.standardise(z)), z)
    assert not torch.allclose(outputs[0], outputs[1])  # the timestep matters
    assert not torch.allclose(other, outputs[2])  # and so does the label


def test_latents_are_standardised(latent_run, cache):
    """The statistics in the checkpoint are those of the training latents, so that they have mean 0 and deviation 1."""
    state = read_checkpoint(latent_run / "latest.pt")
    autoencoder = build_autoencoder(state["ae_ckpt_data"])
    train, _ = split_train_val(HF_MNIST("train", cache, 3, "embedded"), 42)
    z = autoencoder.encode(train[torch.arange(len(train))][0])
    torch.testing.assert_close(state["model"]["latent_mean"], z.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["model"]["latent_std"], z.std(0), rtol=1e-4, atol=1e-4)


def test_drawing_is_a_function_of_the_seed_and_each_label_counts(latent_run):
    draw, _ = module_of("lddpm").load_for_drawing(latent_run)
    images = draw(labels=[3] * 5, seed=1)
    assert images.shape == (5, 1, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, draw(labels=[3] * 5, seed=1))
    others = [draw(labels=[3] * 5, seed=2), draw(labels=[4] * 5, seed=1), draw(count=5, seed=1)]
    others += [
        draw(labels=[3] * 5, seed=1, **o)
        for o in ({"guidance": 3.0}, {"sampler": "ddim"}, {"sampler": "dpm"}, {"steps": 7})
    ]
    assert not any(torch.equal(images, other) for other in others)
    torch.testing.assert_close(draw(labels=[3] * 5, seed=1, guidance=0.0), draw(count=5, seed=1))


def test_drawing_uses_the_ema_weights_only(latent_run, tmp_path):
    def drawn_with(**changes):
        path = tmp_path / "checkpoint_epoch_000002.pt"
        save_checkpoint(path, read_checkpoint(latent_run / "latest.pt") | changes)
        return module_of("lddpm").load_for_drawing(path)[0](count=3, seed=1)

    state = read_checkpoint(latent_run / "latest.pt")
    as_it_is = drawn_with()
    assert torch.equal(drawn_with(model={}), as_it_is)
    doubled = {name: 2 * value if value.is_floating_point() else value for name, value in state["ema"].items()}
    assert not torch.equal(drawn_with(ema=doubled), as_it_is)


# --- infer.py ---


def test_latent_infer_draws_a_picture_of_the_right_size(latent_run, tmp_path):
    output = tmp_path / "new folder" / "generated.png"
    result = run(LATENT, "infer.py", "--ckpt", latent_run, "--num-images", 10, "--output", output)
    assert result.code == 0, result.text
    assert Image.open(output).size == grid_size(10)
    again = tmp_path / "again.png"
    assert call(LATENT, "infer.py", "--checkpoint", latent_run / "latest.pt", "--n", 10, "--out", again).code == 0
    assert output.read_bytes() == again.read_bytes()  # the same seed, in another process


def test_latent_infer_flags_change_the_picture(latent_run, conv_run, ae_run, tmp_path):
    def draw(*flags) -> bytes:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        result = call(LATENT, "infer.py", "--ckpt", latent_run / "best", "--n", 4, "--output", output, *flags)
        assert result.code == 0, result.text
        assert Image.open(output).size == grid_size(4)
        return output.read_bytes()

    variants = [(), ("--seed", 1), ("--digit", 3, "--guidance", 100), ("--sampler", "ddim")]
    variants += [("--sampler", "ddim", "--steps", 5), ("--sampler", "dpm", "--steps", 5), ("--ae-ckpt", conv_run)]
    pictures = [draw(*flags) for flags in variants]
    assert len(set(pictures)) == len(variants)
    assert draw("--ae-ckpt", ae_run) == pictures[0]  # the very autoencoder that lies in the checkpoint
    assert draw("--digit", 3, "--guidance", 1) == pictures[0]  # a model of threes draws threes
    call(AE, "infer.py", "--ckpt", ae_run, "--export", tmp_path / "small.pt")
    for other, warned in ((conv_run, True), (tmp_path / "small.pt", False)):
        result = call(LATENT, "infer.py", "--ckpt", latent_run, "--ae-ckpt", other, "--output", tmp_path / "a.png")
        assert ("decodes otherwise than the autoencoder" in result.text) is warned, result.text


@pytest.mark.parametrize("count", [1, 2, 5])
def test_small_grids(latent_run, tmp_path, count):
    assert call(LATENT, "infer.py", "--ckpt", latent_run, "--n", count, "--output", tmp_path / "x.png").code == 0
    assert Image.open(tmp_path / "x.png").size == grid_size(count)


def test_latent_infer_refuses_what_cannot_be(latent_run, tmp_path):
    wide = call(
        AE,
        "train.py",
        *("--model", "mlp", "--latent-dim", 8, "--epochs", 1, "--only-digit", 3, "--data", "embedded"),
        *("--cache-dir", tmp_path / "c", "--outdir", tmp_path),
    )
    assert wide.code == 0, wide.text
    for flags, code in (
        (("--steps", 21), USAGE),
        (("--digit", "none", "--guidance", 2), USAGE),
        (("--digit", 3, "none"), USAGE),
        (("--digit", 4), MODEL_MISMATCH),  # trained on threes only
        (("--ae-ckpt", next((tmp_path / "checkpoints").iterdir())), MODEL_MISMATCH),
        (("--output", tmp_path / "picture.gif"), BAD_OUTPUT),
        (("--output", "/proc/nowhere/x.png"), BAD_OUTPUT),
    ):
        result = call(LATENT, "infer.py", "--ckpt", latent_run, "--n", 1, "--output", tmp_path / "x.png", *flags)
        assert (result.code, len(result.text.splitlines())) == (code, 1), (flags, result.text)


@pytest.mark.parametrize("kind", ["ae_run", "conv_run"])
def test_ae_infer_in_both_modes(kind, cache, tmp_path, request):
    folder = request.getfixturevalue(kind)
    common = ("--ckpt", folder, "--cache-dir", cache, "--data", "embedded")
    result = call(AE, "infer.py", *common, "--output", tmp_path / "a.png", "--num-images", 5)
    assert result.code == 0, result.text
    assert "mean squared error over 50 test digits (embedded)" in result.text
    columns = math.ceil(math.sqrt(2 * 5))
    assert Image.open(tmp_path / "a.png").size == grid_size(2 * columns * math.ceil(5 / columns), columns)
    result = call(AE, "infer.py", *common, "--output", tmp_path / "c.png", "--num-images", 5, "--seed", 1)
    assert result.code == 0, result.text
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    result = call(AE, "infer.py", *common, "--output", tmp_path / "b.png", "--interpolate", "--n", 3, "--walk-steps", 7)
    assert result.code == 0, result.text
    assert Image.open(tmp_path / "b.png").size == grid_size(21, 7)


@pytest.mark.parametrize(("asked", "walks", "told"), [(3, 3, False), (4, 3, True)])
def test_a_walk_takes_two_digits_and_an_odd_one_is_left_out(asked, walks, told, ae_run, cache, tmp_path, monkeypatch):
    seven = HF_MNIST("test", cache, 3, "embedded").subset(torch.arange(7))
    monkeypatch.setattr("common.data.held_out", lambda *_: seven)
    how = ("--interpolate", "--n", asked, "--walk-steps", 2, "--output", tmp_path / "a.png")
    result = call(AE, "infer.py", "--ckpt", ae_run, *how)
    assert result.code == 0, result.text
    assert Image.open(tmp_path / "a.png").size == grid_size(2 * walks, 2)
    assert ("of 8 test digits there are only 7 (embedded)" in result.text) == ("there are only" in result.text) == told


def test_reconstructions_stand_under_their_originals():
    originals = torch.arange(5.0).view(5, 1, 1, 1)
    images, columns = over(originals, originals + 100)
    rows = images.flatten().view(-1, columns)
    shown = [
        (a, b) for top, bottom in zip(rows[::2], rows[1::2], strict=True) for a, b in zip(top, bottom, strict=True)
    ]
    assert [(int(a), int(b)) for a, b in shown[:5]] == [(i, i + 100) for i in range(5)]


def test_an_embedded_autoencoder_reconstructs_like_the_original(ae_run, latent_run):
    inside_data = read_checkpoint(latent_run / "latest.pt")["ae_ckpt_data"]
    images = noise(2, 1, 28, 28)
    assert torch.equal(build_autoencoder(inside_data)(images), build_autoencoder(read_autoencoder(ae_run))(images))
