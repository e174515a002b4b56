"""Speed (and with --full quality) of the main job, each figure beside the matrix-product rate of the same run.

    python tests/benchmarks/run.py --cache-dir mnist_latent_diffusion/hf_cache [--full] [--json figures.json]

Needs full MNIST in the cache folder. About three minutes on two cores, with --full about twelve. The reference figures
are the best-known public code of the same design, on two cores where a 2048 x 2048 float32 matrix product ran at
47 GFLOP/s; "at 47" scales ours to that rate. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common.device import set_threads  # noqa: E402
from common.modules import module_of  # noqa: E402

REFERENCE_RATE = 47.0  # GFLOP/s
TRAIN_IMAGES = 54_000


def matmul_rate(repeats: int = 15) -> float:
    """Median GFLOP/s of a 2048^3 float32 matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds[2:]) / 1e9


def run(folder: str, *command: str) -> tuple[float, str]:
    """(wall seconds, stdout) of `python ...` started in an experiment's folder."""
    started = time.perf_counter()
    reply = subprocess.run([sys.executable, *command], cwd=ROOT / folder, capture_output=True, text=True)
    if reply.returncode:
        sys.exit(f"{' '.join(command)} failed in {folder}:\n{reply.stdout}{reply.stderr}")
    return time.perf_counter() - started, reply.stdout


def train(folder: str, out: Path, *flags: str) -> tuple[float, Path]:
    """(seconds from the end of one epoch to the end of the next, everything included; checkpoint folder)."""
    _, text = run(folder, "train.py", "--epochs", "4", "--outdir", str(out), "--data", "hub", *flags)
    run_folder = Path(re.findall(r"^checkpoints: (.+)$", text, re.MULTILINE)[-1])
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    ends = [datetime.fromisoformat(row["timestamp"]) for row in rows]
    return statistics.median((b - a).total_seconds() for a, b in itertools.pairwise(ends)), run_folder


def training_flops(model: str, batch: int = 128) -> float:
    """Floating-point operations per image of a forward and backward pass (multiply and add count as two)."""
    net, images = module_of(model).Autoencoder(), torch.rand(batch, 1, 28, 28)
    with FlopCounterMode(display=False) as counter:
        net(images).square().mean().backward()
    return counter.get_total_flops() / batch


def quality(out: Path, cache: list[str]) -> Iterator[tuple[str, float, str]]:
    """(figure, value, unit) of 25 + 30 epochs with every flag at its default, MLP autoencoder, drawn 5,000 times."""
    text = run("mnist_ae", "train.py", "--model", "mlp", "--outdir", str(out / "q"), "--data", "hub", *cache)[1]
    ae_run = re.findall(r"^checkpoints: (.+)$", text, re.MULTILINE)[-1]
    text = run("mnist_latent_diffusion", "train.py", "--outdir", str(out / "q"), "--data", "hub", *cache)[1]
    latent_run = re.findall(r"^checkpoints: (.+)$", text, re.MULTILINE)[-1]
    text = run("mnist_ae", "infer.py", "--ckpt", ae_run, "--data", "hub", "--output", f"{out}/r.png", *cache)[1]
    yield (
        "test reconstruction error x 1000 (public code: 17)",
        1000 * float(re.search(r": ([\d.]+)$", text, re.M)[1]),
        "",
    )
    digits = ["--digit", *map(str, range(10))]
    for name, path, flags in (
        ("reconstructions", ae_run, []),
        ("drawn with labels", latent_run, digits),
        ("drawn with labels, guidance 1", latent_run, [*digits, "--guidance", "1"]),
        ("drawn without labels", latent_run, []),
    ):
        scores = out / f"{name}.json"
        run(".", "-m", "common.evaluate", "--ckpt", path, "--json", str(scores), *flags, *cache)
        content = json.loads(scores.read_text())
        figures = content.get("details_labelled", content.get("details"))["figures"]
        yield f"{name}: Fréchet distance", figures["fid"]["value"], ""
        yield f"{name}: the same of real digits", figures["fid"]["floor"], ""
        if "agreement" in figures:
            yield f"{name}: agreement", 100 * figures["agreement"]["value"], "%"


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


def best_of(count: int, measure) -> float:
    return min(measure() for _ in range(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="a folder with full MNIST (python -m common.data fills it)")
    parser.add_argument("--full", action="store_true", help="also the convolutional autoencoder, and sample quality")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    cache = ["--cache-dir", str(Path(args.cache_dir).resolve())]
    threads = set_threads()
    rows: list[dict] = []

    def add(figure: str, value: float, unit: str, reference: float | None = None, scaled: bool = False) -> None:
        rate = matmul_rate()
        at47 = value * rate / REFERENCE_RATE if scaled else None
        rows.append({"figure": figure, "value": value, "unit": unit, "matmul": rate, "at 47": at47})
        rows[-1] |= {"reference": reference, "times faster": reference / at47 if reference and at47 else None}
        print(f"  measured: {figure}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        os.environ.pop("SCRATCH", None)
        run(".", "-m", "common.data", *cache, "--data", "hub")  # warm the decoded cache
        for model in ("mlp", "conv") if args.full else ("mlp",):
            before = matmul_rate()
            seconds, ae_run = train("mnist_ae", out / model, "--model", model, *cache)
            after = matmul_rate()
            add(f"{model} autoencoder, one epoch", seconds, "s", 169.0 if model == "mlp" else None, scaled=True)
            flops = training_flops(f"ae-{model}")
            add(f"{model} autoencoder, training FLOP per image", flops / 1e6, "MFLOP")
            share = flops * TRAIN_IMAGES / seconds / 1e9 / ((before + after) / 2)
            add(f"{model} autoencoder, share of the matmul rate", 100 * share, "%")
            if model == "mlp":
                mlp_run = ae_run
        seconds, latent_run = train("mnist_latent_diffusion", out / "latent", "--ae-ckpt", str(mlp_run), *cache)
        add("latent diffusion, one epoch", seconds, "s", 200.0, scaled=True)

        imports = best_of(3, lambda: run(".", "-c", "import torch, torchvision")[0])
        walls, loops = [], []
        for _ in range(3):
            wall, text = run(
                "mnist_latent_diffusion", "infer.py", "--ckpt", str(latent_run), "--output", f"{out}/g.png"
            )
            loops.append(float(re.search(r"in ([\d.]+) s", text)[1]))
            walls.append(wall - loops[-1] - imports)
        add("drawing 64 images, T = 1000, the loop", min(loops), "s", 11.0, scaled=True)
        add("drawing: start-up beyond importing torch and torchvision", min(walls), "s")
        for where, flags in (("mnist_ae", ["--model", "mlp"]), ("mnist_latent_diffusion", ["--ae-ckpt", str(mlp_run)])):

            def first_step(where=where, flags=flags) -> float:
                command = ["-c", FIRST_STEP, *flags, "--outdir", str(out / "first"), "--data", "hub", *cache]
                return float(re.search(r"FIRST ([\d.]+)", run(where, *command)[1])[1])

            add(f"{where}: first training step after importing torch", best_of(3, first_step), "s")
        for where, script in (
            ("mnist_ae", "train.py"),
            ("mnist_ae", "infer.py"),
            ("mnist_latent_diffusion", "train.py"),
            ("mnist_latent_diffusion", "infer.py"),
        ):
            add(f"{where}/{script} --help", best_of(3, lambda w=where, s=script: run(w, s, "--help")[0]), "s")

        if args.full:
            for figure, value, unit in quality(out, cache):
                add(figure, value, unit)

    print(f"{_processor()}, {threads} threads, torch {torch.__version__}")
    print(f"{'figure':<58} {'value':>9}       {'matmul':>7}  {'at 47':>7}  {'reference':>9}  {'faster':>6}")
    for row in rows:
        extra = [row["at 47"], row["reference"], row["times faster"]]
        cells = [f"{value:.2f}" if value is not None else "" for value in extra]
        print(
            f"{row['figure']:<58} {row['value']:>9.2f} {row['unit']:<5} {row['matmul']:>7.0f}  "
            f"{cells[0]:>7}  {cells[1]:>9}  {cells[2]:>6}"
        )
    if args.json:
        args.json.write_text(json.dumps({"processor": _processor(), "threads": threads, "rows": rows}, indent=1) + "\n")


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return "unknown processor"


if __name__ == "__main__":
    main()
