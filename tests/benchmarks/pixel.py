"""Pixel diffusion, minute for minute: our U-Net and those of two libraries.

    python tests/benchmarks/pixel.py --cache-dir DIR [--minutes 1 3 10] [--seeds 0 1 2] [--digit 5] [--networks NAME …]

What a network learns is a function of the images that it has seen, not of the clock. So each network's training rate is
measured first, with the machine idle and all its threads; then it trains on as many images as that makes in so many
minutes, which may happen beside other work (--images-per-second gives the rates of an earlier measurement). Everybody
has the same digits, noise, EMA, warm-up and clipping, a cosine to 0 at the end of the minutes, and the learning rate
and batch size that suited it best on fives (for all digits see `contestant`); everybody draws with the same sampler
from the same noise.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from measure import Figures, peak_gigabytes, train
from peers import LABEL_DROPOUT, PlainDenoiser, diffusers_unet, lucidrains
from quality import DIGITS, add_quality, evaluated

from common import threads
from common.args import Parser, number
from common.classifier import load_classifier
from common.data import HF_MNIST, split_train_val
from common.device import get_device, move
from common.diffusion import epsilon_loss, loss_draws, precompute_schedules, uniform_timesteps
from common.error_codes import run_main
from common.flags import add_data_arguments
from common.learner import Learner, learning_rate
from common.modules import module_of
from common.rng import generator
from common.sampling import draw
from common.scores import score

STEPS = 100  # of T = 1000 ancestral ones, for everybody: at 1,000 the peers would draw for an hour
GRID = ("--base-ch", 32, "--lr", 1e-3, "--lr-scheduler", "cosine", "--min-snr-gamma", 1, "--epochs", 20)  # README.md's
TRAINING = "training images/s"
SAMPLES = {16: 50, 64: 20}  # so many samples at once, timed over so many steps; at 256 diffusers' network is slower


def ours(width: int = 24, fine: int = 8, dense: int = 512, attention: bool = True) -> nn.Module:
    """The network of mnist_single_digit."""
    parts = {"fine_ch": fine, "dense_dim": dense, "attention": attention}
    return module_of("ddpm").Denoiser(width, schedules=precompute_schedules(), **parts)


class Contestant(NamedTuple):
    """A network, and the learning rate, batch size and loss that it, or one like it, did best with on fives.

    README.md says what was tried.
    """

    make: Callable[[], nn.Module]
    lr: float = 2e-3
    batch: int = 32
    min_snr_gamma: float = 0.0


NETWORKS = {
    "ours": Contestant(ours, batch=64, min_snr_gamma=1.0),
    "ours-quick": Contestant(lambda: ours(16, fine=0, attention=False), batch=128, min_snr_gamma=1.0),
    "ours-32": Contestant(lambda: ours(32), batch=128),
    "ours-without-dense": Contestant(lambda: ours(dense=0), batch=64),
    "ours-16-without-dense": Contestant(lambda: ours(16, dense=0), batch=64),
    "ours-32-without-dense": Contestant(lambda: ours(32, dense=0), batch=128),
    "ours-24-coarse": Contestant(lambda: ours(24, fine=0, dense=0), batch=64),
    "plain": Contestant(lambda: PlainDenoiser(pixels=True), 1e-3, 128),
    "diffusers-32": Contestant(lambda: diffusers_unet((32, 64, 64))),
    "diffusers-16": Contestant(lambda: diffusers_unet((16, 32, 32)), 4e-3),
    "lucidrains-32": Contestant(lambda: lucidrains(32), 1e-3),
    "lucidrains-16": Contestant(lambda: lucidrains(16), 1e-3),
}


def contestant(name: str, digit: int | None) -> Contestant:
    """The network of that name, with what suits it for one digit, or for all of them (None)."""
    one = NETWORKS[name]
    if digit is None:  # gamma 1 suited everybody, and batches of 128 ours
        one = one._replace(min_snr_gamma=1.0, batch=128 if name.startswith("ours") else one.batch)
    return one


class Training:
    """A contestant in training for so many images; `go()` makes the next step."""

    def __init__(
        self, one: Contestant, digits: HF_MNIST, images: float, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.one, self.seed, self.step, self.total = one, seed, 0, max(int(images / one.batch), 1)
        self.images, self.labels = digits[torch.arange(len(digits))]
        self.device, self.schedules = torch.device(device), precompute_schedules(device=device)
        self.timesteps = uniform_timesteps(self.schedules)
        torch.manual_seed(seed)
        warmup = min(100, self.total // 10)

        def lr_at(step: int) -> float:
            return learning_rate(step, self.total, one.lr, "cosine", warmup)

        options = {"grad_clip": 1.0, "ema": 0.999, "weight_decay": 0.0}
        self.learner = Learner(one.make(), self.device, lr_at=lr_at, **options)
        self.learner.net.train()

    def go(self) -> None:
        rng = generator(self.seed, "pixel benchmark", self.step)
        rows = torch.randint(len(self.images), (self.one.batch,), generator=rng)
        batch = (2 * self.images[rows] - 1, self.labels[rows])
        draws = loss_draws(batch[0].shape, self.timesteps, rng, LABEL_DROPOUT)
        x, labels, *draws = (move(part, self.device) for part in (*batch, *draws))

        def loss_of(_shard: int, _rows: slice) -> torch.Tensor:
            return epsilon_loss(self.learner.net, x, labels, self.schedules, draws, self.one.min_snr_gamma)

        self.learner.gradient(loss_of, len(x))
        self.learner.step(self.step)
        self.step += 1

    def draw(self, labels: list[int], steps: int) -> torch.Tensor:
        """(N, 1, 28, 28) in [0, 1]."""
        net = self.learner.averaged_net.eval()
        x = draw(net, (1, 28, 28), self.schedules, labels=labels, seed=3, steps=steps)
        return x.add(1).div(2).clamp(0, 1).cpu()


def images_per_second(one: Contestant, digits: HF_MNIST, seconds: float = 5.0) -> float:
    """The rate of the median training step; the first two are left out."""
    training, times = Training(one, digits, 1e9), []
    while len(times) < 5 or sum(times) < seconds:
        started = time.perf_counter()
        training.go()
        times.append(time.perf_counter() - started)
    return one.batch / statistics.median(times[2:])


def sampling_of(count: int) -> str:
    """The name of the figure that `sampling_seconds` measures."""
    return f"{count} samples, T = 1000, seconds"


def sampling_seconds(one: Contestant, digits: HF_MNIST, count: int, steps: int) -> float:
    """Seconds for `count` images in T = 1000 steps, from the quickest of three drawings of `steps`."""
    training, found = Training(one, digits, 1), []
    for _ in range(3):
        started = time.perf_counter()
        training.draw([0] * count, steps)
        found.append((time.perf_counter() - started) * 1000 / steps)
    return min(found)


def size(one: Contestant) -> tuple[float, float]:
    """(million parameters, MFLOP of one forward image)."""
    net = one.make().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long), torch.full((1,), 5))
    return sum(p.numel() for p in net.parameters()) / 1e6, counter.get_total_flops() / 1e6


class Judge:
    """Scores drawings of one digit, or of all (None)."""

    def __init__(self, cache_dir: Path, digit: int | None, count: int) -> None:
        self.labels = [digit] * count if digit is not None else [row * 10 // count for row in range(count)]
        self.real = HF_MNIST("test", cache_dir, digit, "hub")
        self.classifier, _ = load_classifier(cache_dir, "hub")

    def __call__(self, training: Training, steps: int = STEPS) -> dict[str, dict[str, float]]:
        images = training.draw(self.labels, steps)
        return score(images, torch.tensor(self.labels), self.real, self.classifier, errors=False)


def everything(figures: Figures, cache_dir: Path, seconds: float) -> None:
    """Speed of every network, and its distance after `seconds` on fives."""
    digits, _ = split_train_val(HF_MNIST("train", cache_dir, 5, "hub"), 42)
    judge = Judge(cache_dir, 5, 200)
    table: dict[str, dict[str, float]] = {}
    for name, one in NETWORKS.items():
        print(f"  digit 5, {name}: {seconds:.0f} s of training", file=sys.stderr, flush=True)
        rate = images_per_second(one, digits)
        row = table[name] = {TRAINING: rate}
        row |= {sampling_of(count): sampling_seconds(one, digits, count, steps) for count, steps in SAMPLES.items()}
        row["parameters, million"], row["MFLOP of one forward image"] = size(one)
        training = Training(one, digits, rate * seconds)
        while training.step < training.total:
            training.go()
        found = judge(training, STEPS if seconds >= 60 else 25)
        row[f"after {seconds:.0f} s: Fréchet distance"] = found["fid"]["value"]
        row[f"after {seconds:.0f} s: … of as many real fives"] = found["fid"]["floor"]
        row[f"after {seconds:.0f} s: recognised as fives, %"] = 100 * found["agreement"]["value"]
        for figure, value in row.items():
            figures.add(f"digit 5, {name}: {figure}", value)
    mine, peers = table["ours"], [row for name, row in table.items() if not name.startswith("ours")]
    for sampling in map(sampling_of, SAMPLES):
        quickest = min(row[sampling] for row in peers)
        figures.add(f"digit 5: {sampling}: the fastest peer's over ours", quickest / mine[sampling])


def all_digits(figures: Figures, out: Path, cache: list[str]) -> None:
    """The real scripts on all digits: an epoch with its previews, and README.md's grid."""
    folder, place = "mnist_single_digit", ("--data", "hub", *cache)
    epoch = ("train.py", "--epochs", 1, "--generate-images", "--outdir", out / "epoch")
    seconds, peak = peak_gigabytes(folder, *epoch, *place)
    figures.add("all digits: an epoch with --generate-images, from start to end", seconds, "s", scaled=True)
    figures.add("all digits: … its peak memory", peak, "GB")
    seconds, run_folder = train(folder, *GRID, "--outdir", out / "grid", *place)
    figures.add("all digits, README.md's grid: training", seconds / 60, "min", scaled=True)
    found = evaluated(run_folder, out, 500, cache, *DIGITS, "--guidance", 1.2, "--steps", 100)
    add_quality(figures, "all digits, README.md's grid", found)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Networks on pixels, minute for minute.", "python tests/benchmarks/pixel.py --cache-dir DIR")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="which (default: all)")
    parser.add_argument("--minutes", nargs="+", type=number(float, 0), default=[1, 3, 10], help="(default: 1 3 10)")
    parser.add_argument("--seeds", nargs="+", type=number(int, 0), default=[0], help="(default: 0)")
    parser.add_argument("--digit", type=number(int, 0), help="one digit (default: all)")
    parser.add_argument("--n", type=number(int, 200), default=500, help="drawings to score (default: 500)")
    parser.add_argument("--images-per-second", nargs="+", type=number(float, 1), help="rates, instead of measuring")
    parser.add_argument("--threads", type=number(int, 1), help="to train and draw with (default: all cores)")
    parser.add_argument("--lr", type=number(float, 0), help="instead of each network's own")
    parser.add_argument("--batch", type=number(int, 1), help="instead of each network's own")
    parser.add_argument("--min-snr-gamma", type=number(float, 0), help="instead of each network's own")
    add_data_arguments(parser)
    parser.add_argument("--device", default="cpu", help="to train and draw with; rates are the CPU's (default: cpu)")
    args = parser.parse_args(argv)
    device = get_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # a GPU computes as exactly as the CPUs that the minutes are of
    threads.use(args.threads or threads.available())
    digits, _ = split_train_val(HF_MNIST("train", args.cache_dir, args.digit, "hub"), 42)
    contestants = [contestant(name, args.digit) for name in args.networks]
    rates = args.images_per_second or [images_per_second(one, digits) for one in contestants]
    if len(rates) != len(args.networks):
        parser.error("--images-per-second needs a rate for each of --networks")
    judge = Judge(args.cache_dir, args.digit, args.n)
    print(
        "| network | images/s | lr, batch, gamma | minutes | seed | distance (real) | agreement | precision | recall |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for minutes in args.minutes:
        for name, one, rate in zip(args.networks, contestants, rates, strict=True):
            one = one._replace(lr=args.lr or one.lr, batch=args.batch or one.batch)
            if args.min_snr_gamma is not None:
                one = one._replace(min_snr_gamma=args.min_snr_gamma)
            for seed in args.seeds:
                training = Training(one, digits, rate * 60 * minutes, seed, device)
                while training.step < training.total:
                    training.go()
                rows = judge(training)
                found = {figure: row["value"] for figure, row in rows.items()}
                training_of = f"{rate:.0f} | {one.lr:g}, {one.batch}, {one.min_snr_gamma:g} | {minutes:g} | {seed}"
                shares = f"{found['agreement']:.1%} | {found['precision']:.3f} | {found['recall']:.3f}"
                distance = f"{found['fid']:.3f} ({rows['fid']['floor']:.3f})"
                print(f"| {name} | {training_of} | {distance} | {shares} |", flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
