"""Speed of the main job and of the tools."""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import torch
from measure import ROOT, Figures, best_of, matmul_rate, run, train
from peers import PlainDenoiser, seconds_per_epoch
from torch.utils.flop_counter import FlopCounterMode

from common.diffusion import precompute_schedules
from common.error_codes import STOPPED_EARLY
from common.modules import module_of
from common.sampling import draw

TRAIN_IMAGES = 54_000
FIRST_STEP = """
import sys, time, torch
started = time.perf_counter()
sys.path.insert(0, ".")
import train
from common.session import Session
step = Session.step
def first(self, *args):
    step(self, *args)
    print("FIRST", time.perf_counter() - started, flush=True)
    sys.exit(0)
Session.step = first
train.main(sys.argv[1:])
"""
STOP_AT = """
import os, signal, sys, threading, time
sys.path.insert(0, ".")
import train
from common.error_codes import run_main
from common.session import Session
moment, calls = sys.argv[1], []
def soon():
    def send():
        print("SIGNAL", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGUSR1)
    threading.Timer(0.02 if moment == "validate" else 0.3, send).start()
def patch(name, when, after):
    real = getattr(Session, name)
    def patched(self, *args):
        calls.append(name)
        if len(calls) == when and not after:
            soon()
        result = real(self, *args)
        if len(calls) == when and after:
            soon()
        return result
    setattr(Session, name, patched)
patch(*{"step": ("step", 5, False), "validate": ("validate", 1, False), "preview": ("validate", 1, True)}[moment])
sys.exit(run_main(lambda: train.main(sys.argv[2:])))
"""
SCRIPTS = (
    *(
        (folder, script)
        for folder in ("mnist_ae", "mnist_latent_diffusion", "mnist_single_digit")
        for script in ("train.py", "infer.py")
    ),
    ("mnist_ae", "run_tsne.py"),
    *((".", f"-m common.{tool}") for tool in ("data", "evaluate", "inspect_ckpt", "find_best_ckpt")),
)


def epoch_seconds(run_folder: Path) -> float:
    """Median seconds from the end of one epoch to the end of the next, everything included."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    ends = [datetime.fromisoformat(row["timestamp"]) for row in rows]
    return statistics.median((b - a).total_seconds() for a, b in itertools.pairwise(ends))


def training_flops(model: str, batch: int = 128) -> float:
    """Floating-point operations per image of a forward and backward pass (multiply and add count as two)."""
    net, images = module_of(model).Autoencoder(), torch.rand(batch, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        net(images).square().mean().backward()
    return counter.get_total_flops() / batch


def main_job(figures: Figures, out: Path, cache: list[str], full: bool) -> None:
    """Epochs, drawing and start-up of the autoencoders and the latent diffusion."""
    cache_dir, schedules, epochs = Path(cache[1]), precompute_schedules(), 4 if full else 3
    for model in ("conv", "mlp") if full else ("mlp",):  # the last one serves the latent diffusion
        before = matmul_rate()
        folder = train(
            "mnist_ae", "--model", model, "--epochs", epochs, "--outdir", out / model, "--data", "hub", *cache
        )[1]
        seconds, after = epoch_seconds(folder), matmul_rate()
        peer = seconds_per_epoch(cache_dir, schedules, latent=False) if model == "mlp" else None
        reference = 169.0 if model == "mlp" else None
        figures.add(
            f"{model} autoencoder: one epoch, everything included",
            seconds,
            "s",
            peer=peer,
            reference=reference,
            scaled=True,
        )
        flops = training_flops(f"ae-{model}")
        share = flops * TRAIN_IMAGES / seconds / 1e9 / ((before + after) / 2)
        figures.add(f"{model} autoencoder: training arithmetic per image", flops / 1e6, "MFLOP")
        figures.add(f"{model} autoencoder: share of the matrix product's rate", 100 * share, "%")
    flags = ("--epochs", epochs, "--ae-ckpt", folder, "--outdir", out / "latent", "--data", "hub", *cache)
    latent_run = train("mnist_latent_diffusion", *flags)[1]
    peer = seconds_per_epoch(cache_dir, schedules, latent=True)
    figures.add(
        "latent diffusion: one epoch, everything included",
        epoch_seconds(latent_run),
        "s",
        peer=peer,
        reference=200.0,
        scaled=True,
    )

    imports = best_of(3, lambda: run(".", "-c", "import torch, torchvision")[0])
    walls, loops = [], []
    for _ in range(3):
        command = ("infer.py", "--ckpt", latent_run, "--output", out / "g.png")
        wall, text = run("mnist_latent_diffusion", *command)
        loops.append(float(re.search(r"in ([\d.]+) s", text)[1]))
        walls.append(wall - loops[-1] - imports)
    plain = PlainDenoiser(pixels=False)

    def draw_plainly() -> float:
        started = time.perf_counter()
        draw(plain, (16,), schedules, count=64)
        return time.perf_counter() - started

    peer = best_of(3, draw_plainly)
    figures.add("drawing 64 images, T = 1000: the loop", min(loops), "s", peer=peer, reference=11.0, scaled=True)
    figures.add("drawing: start-up beyond importing torch and torchvision", min(walls), "s")
    for where, flags in (("mnist_ae", ("--model", "mlp")), ("mnist_latent_diffusion", ("--ae-ckpt", folder))):

        def first_step(where=where, flags=flags) -> float:
            command = ("-c", FIRST_STEP, *flags, "--outdir", out / "first", "--data", "hub", *cache)
            return float(re.search(r"FIRST ([\d.]+)", run(where, *command)[1])[1])

        figures.add(f"{where}: first training step after importing torch", best_of(3 if full else 1, first_step), "s")
    for moment in ("step", "validate", "preview"):
        figures.add(f"a stop signal in a {moment}: until the run has saved and ended", _stop(out, cache, moment), "s")


def _stop(out: Path, cache: list[str], moment: str) -> float:
    """Seconds from a signal to the end of a pixel trainer that is in its training steps, a validation, or a preview."""
    flags = ("--only-digit", 5, "--generate-images", "--outdir", out / moment, "--data", "hub", *cache)
    words = [sys.executable, "-c", STOP_AT, moment, *map(str, flags)]
    process = subprocess.Popen(words, cwd=ROOT / "mnist_single_digit", stdout=subprocess.PIPE, text=True)
    sent = float(re.search(r"SIGNAL ([\d.]+)", process.communicate()[0])[1])
    if process.returncode != STOPPED_EARLY:
        sys.exit(f"a stop in {moment} ended with code {process.returncode}")
    return time.time() - sent


def tools(figures: Figures, out: Path, full: bool) -> None:
    """--help of every script; the checkpoint tools on many and on large files."""
    slowest = max((best_of(3, lambda s=s: run(s[0], *s[1].split(), "--help")[0]), s) for s in SCRIPTS)
    figures.add(f"--help, the slowest of {len(SCRIPTS)} ({' '.join(slowest[1])})", slowest[0], "s")
    torch_alone = best_of(3, lambda: run(".", "-c", "import torch")[0])
    figures.add("importing torch", torch_alone, "s")
    large, many = out / "large", out / "many" / "checkpoints" / "run"
    from common import ckpt

    base = {"format": ckpt.FORMAT, "exp_name": "ae-mlp-x", "args": {"model": "ae-mlp"}, "batch": 3, "global_step": 3}
    base |= {"timestamp": "2026-01-01T00:00:00+00:00", "best": None, "train_loss": 0.5}
    size = 1000 if full else 200
    state = {**base, "epoch": 1, "val_loss": 0.5, "model": {str(i): torch.randn(size // 10 * 2**18) for i in range(10)}}
    ckpt.save_checkpoint(large / "checkpoint_epoch_000001.pt", state)
    figures.add(
        f"inspect_ckpt, a file of {size} MB", best_of(3, lambda: run(".", "-m", "common.inspect_ckpt", large)[0]), "s"
    )
    count = 500 if full else 100
    for epoch in range(1, count + 1):
        state = {**base, "epoch": epoch, "val_loss": 1 / epoch, "model": {"weight": torch.randn(5 * 2**20)}}
        many.mkdir(parents=True, exist_ok=True)
        torch.save(state, many / f"checkpoint_epoch_{epoch:06d}.pt")
    seconds = best_of(2, lambda: run(".", "-m", "common.find_best_ckpt", many)[0])
    figures.add(f"find_best_ckpt, {count} files of 20 MB", seconds, "s")
    for path in (*many.glob("*.pt"), *large.glob("*.pt")):
        os.unlink(path)
