"""Pixel diffusion on digit 5, minute for minute: our U-Net, a plain denoiser, and two libraries' U-Nets.

Every network trains for the same wall time on the same digits at batch 128, with the same EMA, at the better of two
learning rates (by the loss after a quarter of the time), then draws with the same sampler, judged by common.evaluate.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Figures, peak_gigabytes, train
from peers import LABEL_DROPOUT, PlainDenoiser, diffusers_unet, lucidrains
from quality import DIGITS, add_quality, evaluated
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.classifier import load_classifier
from common.data import HF_MNIST, split_train_val
from common.diffusion import draw, epsilon_loss, loss_draws, precompute_schedules, uniform_timesteps
from common.evaluate import score
from common.learner import Learner
from common.modules import module_of
from common.rng import generator

DIGIT, BATCH, DRAWINGS = 5, 128, 200
STEPS = 250  # of T = 1000, for everybody: at 1,000 the peers would draw for an hour
RATES = (2e-4, 1e-3)
GRID = ("--base-ch", 48, "--lr", 1e-3, "--lr-scheduler", "cosine", "--epochs", 20)  # README.md's, of all digits
TRAINING, SAMPLING = "training images/s", "16 samples, T = 1000, seconds"
# where the matrix product runs at measure.REFERENCE_RATE
REFERENCES = {
    "plain FiLM denoiser, 64 channels": {TRAINING: 26.0, SAMPLING: 161.0},
    "denoising-diffusion-pytorch": {TRAINING: 13.0, SAMPLING: 380.0},
    "diffusers": {TRAINING: 24.0, SAMPLING: 200.0},
}


def ours() -> nn.Module:
    """The network of mnist_single_digit at its default width."""
    return module_of("ddpm").Denoiser(schedules=precompute_schedules())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ours": ours,
    "plain FiLM denoiser, 64 channels": lambda: PlainDenoiser(pixels=True),
    "denoising-diffusion-pytorch": lucidrains,
    "diffusers": diffusers_unet,
}


class Trained:
    """A network in training: `advance(seconds)` goes on for that long."""

    def __init__(self, name: str, rate: float, digits: HF_MNIST) -> None:
        self.name, self.rate, self.steps, self.seconds, self.losses = name, rate, 0, 0.0, []
        self.images, self.labels = digits[torch.arange(len(digits))]
        self.schedules = precompute_schedules()
        self.timesteps = uniform_timesteps(self.schedules)
        torch.manual_seed(0)
        warm_up = lambda step: rate * min(1.0, (step + 1) / 11)  # noqa: E731  (the slowest make 70 steps in 100 s)
        options = {"grad_clip": 1.0, "ema": 0.999, "weight_decay": 0.0}
        self.learner = Learner(NETWORKS[name](), torch.device("cpu"), lr_at=warm_up, **options)

    def advance(self, seconds: float) -> None:
        net, until = self.learner.net.train(), self.seconds + seconds
        while self.seconds < until:
            started = time.perf_counter()
            rng = generator(0, "pixel benchmark", self.steps)
            rows = torch.randint(len(self.images), (BATCH,), generator=rng)
            x, labels = 2 * self.images[rows] - 1, self.labels[rows]
            draws = loss_draws(x.shape, self.timesteps, rng, LABEL_DROPOUT)

            def loss_of(_shard: int, _rows: slice, what: tuple = (net, x, labels, self.schedules, draws)):
                return epsilon_loss(*what)

            self.losses.append(self.learner.gradient(loss_of, len(x)).item())
            self.learner.step(self.steps)
            self.steps += 1
            self.seconds += time.perf_counter() - started

    @property
    def loss(self) -> float:
        return sum(self.losses[-20:]) / len(self.losses[-20:])

    def draw(self, count: int, steps: int | None = None) -> torch.Tensor:
        net = self.learner.averaged_net.eval()
        x = draw(net, (1, 28, 28), self.schedules, labels=[DIGIT] * count, seed=3, steps=steps)
        return x.add(1).div(2).clamp(0, 1)


def everything(figures: Figures, cache_dir: Path, seconds: float, longer: float | None) -> None:
    """Rows for every network after `seconds` of training; for ours also after `longer`."""
    digits, _ = split_train_val(HF_MNIST("train", cache_dir, DIGIT, "hub"), 42)
    real, (judge, _) = HF_MNIST("test", cache_dir, DIGIT, "hub"), load_classifier(cache_dir, "hub")
    full = longer is not None
    steps, count = (STEPS, DRAWINGS) if full else (25, DRAWINGS // 4)
    wanted = torch.full((count,), DIGIT)
    table: dict[str, dict[str, float]] = {}
    trained: dict[str, Trained] = {}
    for name in NETWORKS:
        print(f"  digit 5, {name}: training for {seconds:.0f} s and more", file=sys.stderr, flush=True)
        pilots = [Trained(name, rate, digits) for rate in RATES]
        for pilot in pilots:
            pilot.advance(seconds / 4)
        best = trained[name] = min(pilots, key=lambda pilot: pilot.loss)
        best.advance(seconds * 3 / 4)
        row = table[name] = {"learning rate": best.rate, TRAINING: best.steps * BATCH / best.seconds}
        row["parameters, million"] = sum(p.numel() for p in best.learner.net.parameters()) / 1e6
        one = (torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long), torch.full((1,), DIGIT))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            best.learner.averaged_net.eval()(*one)
        row["MFLOP of one forward image"] = counter.get_total_flops() / 1e6
        _score(row, f"after {seconds:.0f} s", best.draw(count, steps), wanted, real, judge)
        if name == "ours" and longer:
            best.advance(longer - seconds)
            _score(row, f"after {longer:.0f} s", best.draw(count, steps), wanted, real, judge)
    for name, seconds_per_draw in _drawing_seconds(trained).items():
        table[name][SAMPLING] = seconds_per_draw
    for name, row in table.items():
        for figure, value in row.items():
            figures.add(f"digit 5, {name}: {figure}", value, reference=REFERENCES.get(name, {}).get(figure))
    mine, peers = table["ours"], [row for name, row in table.items() if name != "ours"]
    fastest, quickest = max(row[TRAINING] for row in peers), min(row[SAMPLING] for row in peers)
    figures.add("digit 5: our training images/s over the fastest peer's", mine[TRAINING] / fastest)
    figures.add("digit 5: the fastest peer's sampling time over ours", quickest / mine[SAMPLING])


def all_digits(figures: Figures, out: Path, cache: list[str]) -> None:
    """The real scripts on all digits: an epoch with its previews, and README.md's grid."""
    folder, place = "mnist_single_digit", ("--data", "hub", *cache)
    epoch = ("train.py", "--epochs", 1, "--generate-images", "--outdir", out / "epoch")
    seconds, peak = peak_gigabytes(folder, *epoch, *place)
    figures.add("all digits: an epoch with --generate-images, from start to end", seconds, "s", scaled=True)
    figures.add("all digits: … its peak memory", peak, "GB")
    seconds, run_folder = train(folder, *GRID, "--outdir", out / "grid", *place)
    figures.add("all digits, README.md's grid: training", seconds / 60, "min", scaled=True)
    found = evaluated(run_folder, out, 500, cache, *DIGITS, "--guidance", 2, "--steps", 100)
    add_quality(figures, "all digits, README.md's grid", found)


def _drawing_seconds(trained: dict[str, Trained]) -> dict[str, float]:
    """Each network's quickest of three drawings of 16 images in T = 1000 steps; they take turns."""
    quickest = dict.fromkeys(trained, float("inf"))
    for _ in range(3):
        for name, one in trained.items():
            steps = 1000 if name == "ours" else 50  # every step costs the same
            started = time.perf_counter()
            one.draw(16, steps)
            quickest[name] = min(quickest[name], (time.perf_counter() - started) * 1000 / steps)
    return quickest


def _score(
    row: dict[str, float], when: str, images: torch.Tensor, wanted: torch.Tensor, real: HF_MNIST, judge: nn.Module
) -> None:
    found = score(images, wanted, real, judge, errors=False)
    row[f"{when}: Fréchet distance"] = found["fid"]["value"]
    row[f"{when}: … of as many real fives"] = found["fid"]["floor"]
    row[f"{when}: recognised as fives, %"] = 100 * found["agreement"]["value"]
