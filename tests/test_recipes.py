"""What the recipes hand to the loss, what the loss does with it, and what the figures are figures of."""

import os
import re
import stat
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import AE, LATENT, PIXEL, SMALL, call, metrics, newest_state, only_run, recipe
from torch.nn.functional import mse_loss

from common import classifier, diffusion, drawing, evaluate, sampling, scores
from common.args import Args
from common.autoencoder import build_autoencoder
from common.ckpt import load_averaged, read_checkpoint
from common.data import HF_MNIST, split_train_val
from common.files import atomic_write
from common.learner import Learner
from common.metrics import frechet_distance
from common.modules import module_of
from common.rng import generator
from common.session import Session
from common.time_embedding import sinusoidal_embedding


def noise(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed, "recipes"))


# --- the loss ---


class Spy:
    """A net that predicts no noise and remembers what it was asked."""

    null_label = 10

    def __call__(self, x, t, labels):
        self.x, self.t, self.labels = x, t, labels
        return torch.zeros_like(x)


def test_the_loss_noises_every_row_to_the_timestep_that_the_net_is_told():
    schedules = diffusion.precompute_schedules(20, 1e-3, 0.3)  # neighbouring timesteps differ a lot
    x0, labels, net = noise(20_000, 2), torch.arange(20_000) % 10, Spy()
    timesteps = diffusion.uniform_timesteps(schedules)
    draws = diffusion.loss_draws(x0.shape, timesteps, generator(0, "loss"), 0.3)
    loss = diffusion.epsilon_loss(net, x0, labels, schedules, draws)
    signal, width = schedules.sqrt_alpha_bar[net.t, None], schedules.sqrt_one_minus_alpha_bar[net.t, None]
    epsilon = (net.x - signal * x0) / width
    for t in range(20):
        rows = net.t == t
        assert rows.float().mean().item() == pytest.approx(1 / 20, abs=0.001)
        assert epsilon[rows].std().item() == pytest.approx(1, abs=0.1), t
    assert abs(np.corrcoef(epsilon.flatten(), x0.flatten())[0, 1]) < 0.03
    assert loss.item() == pytest.approx(epsilon.square().mean().item(), rel=1e-4)
    hidden = net.labels == net.null_label
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert torch.equal(net.labels[~hidden], labels[~hidden])


@pytest.mark.parametrize("model", ["lddpm", "ddpm"])
def test_epsilon_is_mixed_from_v_and_x(model):
    """Salimans & Ho 2022, appendix D: epsilon = alpha v + sigma x; v starts at 0, and here a bias makes it 1."""
    net = module_of(model).LatentDenoiser() if model == "lddpm" else module_of(model).Denoiser()
    x = noise(3, 16) if model == "lddpm" else noise(3, 1, 28, 28)
    t, labels = torch.tensor([0, 500, 999]), torch.tensor([1, 2, 10])
    alpha_bar = (1 - torch.linspace(1e-4, 2e-2, 1000).double()).cumprod(0)[t].view(-1, *[1] * (x.ndim - 1))
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, labels), (x * (1 - alpha_bar).sqrt()).float(), rtol=1e-4, atol=1e-5)
        (net.leave if model == "lddpm" else net.finish.out[2]).layer.bias.fill_(1)
        wanted = alpha_bar.sqrt() + x * (1 - alpha_bar).sqrt()
        torch.testing.assert_close(net(x, t, labels), wanted.float(), rtol=1e-4, atol=1e-5)


def test_the_time_embedding():
    t = torch.tensor([0, 1, 37, 999])
    angles = t.numpy()[:, None] * 10_000.0 ** (-np.arange(32) / 32)
    wanted = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(sinusoidal_embedding(t, 64).numpy(), wanted, atol=1e-4)


# --- the recipes ---


@pytest.fixture
def watched(tiny, tiny_latent, tmp_path, monkeypatch):
    """watched(folder) -> (what a short run of its trainer did, its run folder)."""

    def watch(folder):
        seen = SimpleNamespace(x0=[], settings=set(), losses=[], rows=[], numbers=[], rates=[], loaders={})
        seen.clip, seen.decay = set(), set()
        loss, draws, gradient, step = diffusion.epsilon_loss, diffusion.loss_draws, Learner.gradient, Learner.step
        batches, validate = Session.batches, Session.validate

        def epsilon_loss(net, x0, *rest):
            seen.x0.append(x0)
            return loss(net, x0, *rest)

        def loss_draws(shape, timesteps, rng, dropout):
            seen.settings.add((dropout, tuple(timesteps.tolist())))
            return draws(shape, timesteps, rng, dropout)

        def learner_gradient(self, *what):
            value = gradient(self, *what)
            seen.losses.append(value.item())
            return value

        def learner_step(self, number):
            seen.numbers.append(number)
            seen.clip.add(self.grad_clip)
            seen.decay |= {group["weight_decay"] for group in self.optimizer.param_groups}
            seen.rates.append(step(self, number))
            return seen.rates[-1]

        def session_batches(self, loader):
            seen.loaders["train"] = loader
            for batch in batches(self, loader):
                seen.rows.append(len(batch[0]))
                yield batch

        def session_validate(self, loader, *rest):
            seen.loaders["val"] = loader
            return validate(self, loader, *rest)

        monkeypatch.setattr(diffusion, "epsilon_loss", epsilon_loss)
        monkeypatch.setattr(diffusion, "loss_draws", loss_draws)
        monkeypatch.setattr(Learner, "gradient", learner_gradient)
        monkeypatch.setattr(Learner, "step", learner_step)
        monkeypatch.setattr(Session, "batches", session_batches)
        monkeypatch.setattr(Session, "validate", session_validate)
        own = {AE: ("--model", "mlp", *tiny), LATENT: tiny_latent, PIXEL: (*SMALL, "--T", 20, *tiny)}[folder]
        result = call(folder, "train.py", *own, "--epochs", 2, "--seed", 5, "--outdir", tmp_path)
        assert result.code == 0, result.text
        return seen, only_run(tmp_path)

    return watch


@pytest.mark.parametrize("folder", [AE, LATENT, PIXEL])
def test_a_recipe_learns_from_shuffled_digits_that_validation_never_sees(folder, watched):
    seen, run = watched(folder)
    train, val = seen.loaders["train"], seen.loaders["val"]
    assert (train.sampler.shuffle, train.sampler.seed, val.sampler.shuffle) == (True, 5, False)
    rows = [part.dataset[torch.arange(part.sampler.size)][0].flatten(1) for part in (train, val)]
    assert [len(part) for part in rows] == [405, 45]
    learned = {row.numpy().tobytes() for row in rows[0]}
    assert not [row for row in rows[1] if row.numpy().tobytes() in learned]
    assert seen.numbers == list(range(14))
    assert seen.rates == sorted(set(seen.rates))  # a warm-up, and no scheduler: each above the last
    assert (seen.clip, seen.decay) == ({1.0}, {0.0})
    per_epoch = [slice(0, 7), slice(7, 14)]
    wanted = [np.average(seen.losses[part], weights=seen.rows[part]) for part in per_epoch]
    assert [row["train_loss"] for row in metrics(run)] == pytest.approx(wanted)
    state = newest_state(run)
    assert state["best"]["val_loss"] == min(row["val_loss"] for row in metrics(run))
    averaged, weights = state["ema"], state["model"]
    assert (averaged is None) == (folder == AE)
    if averaged:
        assert any(not torch.equal(averaged[f"module.{name}"], value) for name, value in weights.items())


def test_latent_diffusion_learns_standardised_latents(watched):
    seen, _ = watched(LATENT)
    z = torch.cat(seen.x0)
    assert z.mean(0).abs().max() < 0.1
    assert (z.std(0) - 1).abs().max() < 0.1
    ((dropout, timesteps),) = seen.settings
    assert dropout == 0.3
    assert timesteps == tuple(diffusion.timestep_distribution(diffusion.precompute_schedules(20)).tolist())


def test_pixel_diffusion_learns_images_between_minus_one_and_one(watched):
    seen, _ = watched(PIXEL)
    x = torch.cat(seen.x0)
    assert (x.min(), x.max()) == (-1, 1)
    ((dropout, timesteps),) = seen.settings
    assert dropout == 0.1
    assert timesteps == tuple(diffusion.uniform_timesteps(diffusion.precompute_schedules(20)).tolist())


def held_back(cache):
    """(images, labels) of the 45 threes that a run with seed 42 validates on."""
    _, digits = split_train_val(HF_MNIST("train", cache, 3, "embedded"), 42)
    return digits[torch.arange(len(digits))]


@pytest.mark.parametrize("folder", [LATENT, PIXEL])
def test_min_snr_gamma_is_in_the_loss_that_is_trained_and_validated(folder, tiny, tiny_latent, tmp_path, monkeypatch):
    own = tiny_latent if folder == LATENT else (*SMALL, "--fine-ch", 0, "--T", 20, *tiny)
    seen, loss = [], diffusion.epsilon_loss

    def epsilon_loss(net, x0, labels, schedules, draws, min_snr_gamma=0.0):
        seen.append((net.training, min_snr_gamma))
        return loss(net, x0, labels, schedules, draws, min_snr_gamma)

    monkeypatch.setattr(diffusion, "epsilon_loss", epsilon_loss)
    found = []
    for gamma in (0, 0.5):
        result = call(
            folder, "train.py", *own, "--min-snr-gamma", gamma, "--epochs", 1, "--outdir", tmp_path / str(gamma)
        )
        assert result.code == 0, result.text
        assert set(seen) == {(True, gamma), (False, gamma)}
        seen.clear()
        found += metrics(only_run(tmp_path / str(gamma)))
    alike, weighted = found  # at T = 20 all timesteps have little noise, and count less
    assert all(weighted[loss] < alike[loss] for loss in ("train_loss", "val_loss"))


def test_the_validation_loss_is_that_of_the_averaged_weights_under_noise_that_never_changes(latent_run, cache):
    state = read_checkpoint(latent_run / "latest.pt")
    schedules = diffusion.precompute_schedules(20)
    net = module_of("lddpm").LatentDenoiser(16, 16, schedules=schedules)
    load_averaged(net, state, latent_run)
    images, labels = held_back(cache)
    with torch.no_grad():
        z = net.standardise(build_autoencoder(state["ae_ckpt_data"]).encode(images))
        timesteps, rng = diffusion.timestep_distribution(schedules), generator(42, "validation", 0)
        draws = diffusion.loss_draws(z.shape, timesteps, rng, 0.3)
        wanted = diffusion.epsilon_loss(net, z, labels, schedules, draws)
    assert state["val_loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_an_autoencoders_validation_loss_is_its_squared_error(ae_run, cache):
    state = read_checkpoint(ae_run / "latest.pt")
    images, _ = held_back(cache)
    assert state["val_loss"] == pytest.approx(mse_loss(build_autoencoder(state)(images), images).item(), rel=1e-5)


def test_drawn_latents_are_decoded_at_their_own_scale(latent_run, monkeypatch):
    monkeypatch.setattr(sampling, "sample", lambda *_, **__: torch.stack([torch.zeros(16), torch.ones(16)]))
    draw, state = module_of("lddpm").load_for_drawing(latent_run)
    mean, std = state["model"]["latent_mean"], state["model"]["latent_std"]
    with torch.no_grad():
        wanted = build_autoencoder(state["ae_ckpt_data"]).decode(torch.stack([mean, mean + std]))
    torch.testing.assert_close(draw(count=2), wanted)


# --- what is drawn, and what is written about it ---


def test_equal_runs_of_labels_go_with_the_images_into_every_file(tmp_path):
    assert drawing.wanted_labels([3, 5, 8], 7, 42, {}) == [3, 3, 3, 5, 5, 8, 8]
    assert drawing.wanted_labels([], 7, 42, {}) is None
    images = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(-1, -1, 28, 28)
    state = {"exp_name": "x", "epoch": 1, "args": {"T": 5}}
    args = SimpleNamespace(seed=7, from_image=None, guidance_interval=None, guide=None)
    drawing._save_npz(images, [3, 8, 5], args, state, tmp_path / "a.npz")
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["labels"].tolist() == [3, 8, 5]
    assert arrays["images"][:, 0, 0].tolist() == [0, 128, 255]
    drawing._save_singly(images, [3, 8, 5], tmp_path)
    names = ["00000_3.png", "00001_8.png", "00002_5.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names


def test_walks_are_straight_lines_between_their_digits():
    identity = SimpleNamespace(encode=lambda images: images.flatten(1)[:, :1], decode=lambda z: z)
    ends = torch.tensor([0.0, 10.0, 4.0, 30.0]).view(4, 1, 1, 1)  # 0 -> 4 and 10 -> 30
    walks = recipe(AE, "infer.py").walks_between(identity, ends, 5)
    assert walks.flatten().tolist() == [0, 1, 2, 3, 4, 10, 15, 20, 25, 30]


def test_the_reconstruction_error_is_the_mean_over_all_test_digits(ae_run, cache, tmp_path):
    flags = ("--ckpt", ae_run, "--cache-dir", cache, "--data", "embedded", "--output", tmp_path / "a.png")
    said = call(AE, "infer.py", *flags).text
    images, _ = HF_MNIST("test", cache, 3, "embedded")[torch.arange(50)]
    wanted = mse_loss(build_autoencoder(read_checkpoint(ae_run / "latest.pt"))(images), images).item()
    assert float(re.search(r": ([\d.]+)$", said, re.MULTILINE)[1]) == pytest.approx(wanted, abs=1e-5)


def test_labels_follow_the_class_shares_by_the_seed():
    counts = [5, 0, 1, 1, 1, 1, 1, 0, 10, 0]
    new, old, one = ({"only_digit": digit} for digit in (None, None, 3))
    new["class_counts"] = counts
    for trained, shares in ((new, [count / 20 for count in counts]), (old, [0.1] * 10), (one, [0, 0, 0, 1] + [0] * 6)):
        labels = drawing.wanted_labels(None, 20_000, 1, trained)
        assert np.bincount(labels, minlength=10) / 20_000 == pytest.approx(shares, abs=0.01)
        assert labels == drawing.wanted_labels(None, 20_000, 1, trained)
        assert (labels == drawing.wanted_labels(None, 20_000, 2, trained)) == (trained is one)


def test_previews_and_scores_are_what_infer_draws_by_default():
    asked = []
    args = Args()
    counts = [1, 0, 0, 3, 0, 0, 0, 0, 0, 0]
    args.derive(only_digit=None, samples_per_epoch=20, seed=7, class_counts=counts, labelled=True)
    preview, scored = drawing.preview_and_scored(args, lambda **what: asked.append(what) or torch.zeros(1))
    preview()
    assert asked.pop() == {"labels": drawing.wanted_labels(None, 20, 7, args.flags()), "count": 20}
    _, wanted = scored[""]()
    assert asked.pop() == {"labels": wanted.tolist(), "count": 1000, "guidance": 1.0}
    assert wanted.bincount(minlength=4).div(len(wanted)).tolist() == pytest.approx([0.25, 0, 0, 0.75], abs=0.05)
    _, wanted = scored["_labelled"]()
    assert asked.pop() == {"labels": [0] * 500 + [3] * 500, "count": 1000, "guidance": 1.1}


# --- scores ---


CORNERS = SimpleNamespace(  # a classifier whose features are four pixels, and whose classes are the brightest of them
    features=lambda images: images[:, 0, :2, :2].flatten(1), head=lambda features: 100 * features
)


class Digits:
    """Held-out "digits" of random corners."""

    def __init__(self, count):
        self.images = torch.rand(count, 1, 28, 28, generator=generator(0, "corners"))
        self.labels = CORNERS.features(self.images).argmax(1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def test_scores_compare_with_one_half_and_the_floor_comes_from_the_other():
    real = Digits(2000)
    first, second = scores.halves(real)
    assert not set(first.tolist()) & set(second.tolist())
    assert not torch.equal(first, scores.halves(real, 1)[0])
    floors = {}
    for count in (200, 1000):
        found = scores.score(*(part[:count] for part in real[second]), real, CORNERS, errors=False, splits=1)
        for name, row in found.items():
            assert row["value"] == row["floor"] or name in ("precision", "recall"), name  # the very same digits
        assert found["agreement"]["value"] == 1
        floors[count] = found["fid"]["floor"]
    assert floors[200] > 2 * floors[1000] > 0.0005  # of as many digits; with itself the reference would score 0


def test_the_distance_is_the_mean_over_the_splits_and_its_floor_has_their_spread():
    real, drawn = Digits(800), Digits(300).images
    found = scores.score(drawn, None, real, CORNERS, splits=3)["fid"]
    features = CORNERS.features(real.images).numpy()
    values, floors = [], []
    for split in range(3):
        first, second = scores.halves(real, split)
        values.append(frechet_distance(CORNERS.features(drawn).numpy(), features[first]))
        floors.append(frechet_distance(features[second[:300]], features[first]))
    assert found["value"] == pytest.approx(statistics.mean(values))
    assert found["floor"] == pytest.approx(statistics.mean(floors))
    assert found["floor_error"] == pytest.approx(statistics.stdev(floors))


def test_drawings_that_are_all_alike_have_precision_but_no_recall():
    alike = 0.5 + 0.02 * torch.rand(1000, 1, 28, 28, generator=generator(1, "corners"))
    found = scores.score(alike, None, Digits(2000), CORNERS, errors=False)
    assert found["precision"]["value"] > 0.9
    assert found["recall"]["value"] < 0.1


def test_the_recall_of_drawings_that_come_class_by_class_is_that_of_all_of_them():
    drawn = Digits(2000)
    recall = [
        scores.score(drawn[rows][0], None, Digits(800), CORNERS, errors=False, splits=1)["recall"]["value"]
        for rows in (torch.arange(2000), drawn.labels.argsort())
    ]
    assert recall[1] == pytest.approx(recall[0], abs=0.1)


def test_reconstructions_are_scored_on_the_digits_of_the_floor(monkeypatch):
    real = Digits(100)
    monkeypatch.setattr("common.evaluate.read_autoencoder", lambda path: path)
    monkeypatch.setattr("common.evaluate.build_autoencoder", lambda *_: lambda images: images)
    images, labels, _ = evaluate._reconstruct("x", real, 30, torch.device("cpu"))
    second = scores.halves(real)[1][:30]
    assert torch.equal(images, real[second][0])
    assert labels == real[second][1].tolist()


def test_the_judge_learns_from_the_training_digits_only(cache, tmp_path, monkeypatch):
    learned = []

    def train(digits, **_):
        learned.append(digits)
        return classifier.DigitClassifier().eval().requires_grad_(False)

    monkeypatch.setattr(classifier, "train_classifier", train)
    classifier.load_classifier(tmp_path, "embedded")
    assert torch.equal(learned[0].images, HF_MNIST("train", cache, source="embedded").images)


# --- files ---


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_soon_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def spy_replace(*paths):
        events.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    atomic_write(tmp_path / "a", lambda file: file.write(b"x"))
    assert events == ["file", "rename", "folder"]
