"""The speed and quality figures of README.md in one run: ours beside the peers', and the matrix product's rate.

    python tests/benchmarks/run.py --cache-dir mnist_latent_diffusion/hf_cache [--full] [--json figures.json]

Needs full MNIST in the cache folder and an otherwise idle machine, and installs tests/requirements.txt if the peers'
libraries are missing. The short mode takes some eight minutes on two cores and trains too little for the quality
figures to mean much; --full takes 70 minutes with --pixel-seconds 100, about three hours without. "reference"
figures come from two cores where a 2048 x 2048 float32 matrix product ran at 47 GFLOP/s; "at 47" scales ours to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import measure
import pixel
import quality
import speed
import torch

from common.args import number
from common.threads import available, prepare

PARTS = ("speed", "tools", "pixel", "digits", "quality")
PEERS = ("denoising_diffusion_pytorch", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True, help="a folder with full MNIST (python -m common.data fills it)")
    parser.add_argument("--full", action="store_true", help="the trainings of README.md, not only short ones")
    parser.add_argument("--json", type=_file, help="also write the figures there")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some parts (default: all)")
    parser.add_argument(
        "--pixel-seconds", type=number(float, 1), help="training time per network (default: 8; full: 600)"
    )
    args = parser.parse_args()
    if args.only == ["digits"] and not args.full:
        parser.error("--only digits belongs to the full mode: add --full")
    if not all(importlib.util.find_spec(peer) for peer in PEERS):
        wanted = str(Path(__file__).parent.parent / "requirements.txt")
        if subprocess.run([sys.executable, "-m", "pip", "install", "-r", wanted]).returncode:
            sys.exit(f"the networks to compare with are in {wanted}, which cannot be installed")
    cache = ["--cache-dir", str(Path(args.cache_dir).resolve())]
    threads = prepare() or available()  # the functions measured in this process; the scripts choose for themselves
    torch.set_num_threads(threads)
    os.environ.pop("SCRATCH", None)
    figures = measure.Figures()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        measure.run(".", "-m", "common.data", *cache, "--data", "hub")  # warm the decoded cache
        seconds = args.pixel_seconds or (600.0 if args.full else 8.0)
        parts = {
            "speed": lambda: speed.main_job(figures, out, cache, args.full),
            "tools": lambda: speed.tools(figures, out, args.full),
            "pixel": lambda: pixel.everything(figures, Path(cache[1]), seconds),
            "digits": lambda: pixel.all_digits(figures, out, cache) if args.full else None,
            "quality": lambda: quality.everything(figures, out, cache, args.full),
        }
        for name in args.only:
            parts[name]()
            if args.json:  # after each part: an hour of measuring should not be lost
                figures.write(args.json, processor=_processor(), threads=threads, torch=str(torch.__version__))
    print(f"{_processor()}, {threads} threads, torch {torch.__version__}")
    figures.print()


def _file(text: str) -> Path:
    path = Path(text)
    if not path.resolve().parent.is_dir():  # better now than after an hour of measuring
        raise argparse.ArgumentTypeError(f"{path.parent} is not a folder")
    return path


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return "unknown processor"


if __name__ == "__main__":
    main()
