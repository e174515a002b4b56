"""Quality of the main job: defaults, the recommended command, and the same design written plainly."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import torch
from measure import Figures, run, train
from peers import LABEL_DROPOUT, PlainAutoencoder, PlainDenoiser
from torch.nn.functional import mse_loss

from common.classifier import judge, load_classifier, train_classifier
from common.data import HF_MNIST, split_train_val
from common.diffusion import epsilon_loss, loss_draws, precompute_schedules, uniform_timesteps
from common.drawing import wanted_labels
from common.rng import generator
from common.sampling import draw
from common.scores import score

LATENT = "mnist_latent_diffusion"
MANY = 5000  # drawings in the full mode
FEW, FEW_STEPS = 1000, 250  # in the short mode
DIGITS = ("--digit", *range(10))
PLAIN_LR = 1e-3  # with a cosine: far better for the plain design than the usual 2e-4 all the way
# README.md's recommended command
RECOMMENDED_AE = ("--model", "mlp", "--epochs", 20)
RECOMMENDED_LATENT = ("--batch-size", 256, "--lr", 4e-4, "--epochs", 36)


def classifier(figures: Figures, cache_dir: Path) -> None:
    """How long the judge takes to train, and how good it is."""
    train_set, test = (HF_MNIST(split, cache_dir, source="hub") for split in ("train", "test"))
    started = time.perf_counter()
    net = train_classifier(train_set)
    figures.add("digit classifier: training", time.perf_counter() - started, "s", scaled=True)
    _, probabilities = judge(net, test[torch.arange(len(test))][0])
    figures.add(
        "digit classifier: accuracy on the 10,000 test digits",
        100 * (probabilities.argmax(1) == test.labels).float().mean().item(),
        "%",
    )


def evaluated(path: Path, out: Path, count: int, cache: list[str], *flags: object) -> dict[str, dict[str, float]]:
    """The figures of common.evaluate."""
    scores = out / "scores.json"
    scores.unlink(missing_ok=True)
    run(".", "-m", "common.evaluate", "--ckpt", path, "--json", scores, "--n", count, *flags, *cache)
    content = json.loads(scores.read_text())
    return next(entry["figures"] for name, entry in content.items() if name.startswith("details"))


def ours(figures: Figures, out: Path, cache: list[str], title: str, ae: tuple, latent: tuple, count: int) -> None:
    """Train both stages and score them."""
    place = ("--outdir", out / re.sub(r"\W", "", title), "--data", "hub", *cache)
    first, ae_run = train("mnist_ae", *ae, *place)
    second, latent_run = train(LATENT, "--ae-ckpt", ae_run, *latent, *place)
    figures.add(f"{title}: training, both stages", first + second, "s", scaled=True)
    text = run("mnist_ae", "infer.py", "--ckpt", ae_run, "--data", "hub", "--output", out / "r.png", *cache)[1]
    error = float(re.search(r": ([\d.]+)$", text, re.MULTILINE)[1])
    figures.add(f"{title}: test reconstruction error", error, reference=0.0170)
    steps = ("--steps", FEW_STEPS) if count == FEW else ()
    for name, path, flags in (
        ("reconstructions", ae_run, ()),
        ("with labels", latent_run, (*DIGITS, *steps)),
        *([("with labels, guidance 1", latent_run, (*DIGITS, "--guidance", 1))] if count == MANY else []),
        ("labels by class shares", latent_run, steps),
        ("without labels", latent_run, ("--digit", "none", *steps)),
    ):
        add_quality(figures, f"{title}: {name}", evaluated(path, out, count, cache, *flags))


def add_quality(figures: Figures, title: str, found: dict[str, dict[str, float]]) -> None:
    fid = found["fid"]
    figures.add(f"{title}: Fréchet distance (real digits {fid['floor']:.3f})", fid["value"])
    figures.add(f"{title}: … over that of real digits", fid["value"] / fid["floor"])
    if "agreement" in found:
        figures.add(f"{title}: agreement with the wanted digit", 100 * found["agreement"]["value"], "%")


def plain(figures: Figures, cache_dir: Path, epochs: tuple[int, int], count: int) -> None:
    """The plain design, trained as long on the same digits (from memory, which spares it its own way of reading)."""
    train_set, _ = split_train_val(HF_MNIST("train", cache_dir, source="hub"), 42)
    images, labels = train_set[torch.arange(len(train_set))]
    test = HF_MNIST("test", cache_dir, source="hub")
    schedules, autoencoder, denoiser = precompute_schedules(), PlainAutoencoder(), PlainDenoiser(pixels=False)
    uniform = uniform_timesteps(schedules)
    title = f"plain design, {epochs[0]} + {epochs[1]} epochs"
    for net, many in ((autoencoder, epochs[0]), (denoiser, epochs[1])):
        optimizer, rng = torch.optim.AdamW(net.parameters(), PLAIN_LR), generator(0, "plain")
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, many * math.ceil(len(images) / 128))
        for _ in range(many):
            for rows in torch.randperm(len(images), generator=rng).split(128):
                if net is denoiser:
                    with torch.no_grad():
                        z = autoencoder.encode(images[rows])
                    draws = loss_draws(z.shape, uniform, rng, LABEL_DROPOUT)
                    loss = epsilon_loss(net, z, labels[rows], schedules, draws)
                else:
                    loss = mse_loss(net(images[rows]), images[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                cosine.step()
    real, (net, _) = test, load_classifier(cache_dir, "hub")
    with torch.no_grad():
        shown = test[torch.arange(len(test))][0]
        figures.add(f"{title}: test reconstruction error", mse_loss(autoencoder(shown), shown).item())
        for name, wanted in (("with labels", wanted_labels(range(10), count, 42, {})), ("without labels", None)):
            steps = FEW_STEPS if count == FEW else None
            z = draw(denoiser, (16,), schedules, labels=wanted, count=count, steps=steps)
            asked = None if wanted is None else torch.tensor(wanted)
            add_quality(figures, f"{title}: {name}", score(autoencoder.decode(z), asked, real, net, errors=False))


def everything(figures: Figures, out: Path, cache: list[str], full: bool) -> None:
    """All of it; in the short mode after one epoch each, with fewer drawings and steps, and less of it."""
    if full:
        classifier(figures, Path(cache[1]))
        ours(figures, out, cache, "defaults, mlp", ("--model", "mlp"), (), MANY)
        ours(figures, out, cache, "recommended", RECOMMENDED_AE, RECOMMENDED_LATENT, MANY)
        plain(figures, Path(cache[1]), (25, 30), MANY)
    else:
        one = ("--epochs", 1)
        ours(figures, out, cache, "1 + 1 epochs, mlp", ("--model", "mlp", *one), one, FEW)
        plain(figures, Path(cache[1]), (1, 1), FEW)
