"""What is left of the speed on a busy machine: `python tests/benchmarks/busy.py --cache-dir DIR [--seconds 15]`.

Each trainer, and drawing, beside 0, 1 and 2 processes per core that compute at nice 19: with the number of threads
that a start chooses by itself, and with a thread per core. Needs full MNIST in the cache folder and an otherwise idle
machine; takes eight minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from measure import ROOT, run, train

from common import ckpt
from common.threads import available

SPIN = "while True: pass"


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """That many processes that always want a core, and give way to others."""
    busy = [subprocess.Popen(["nice", "-n", "19", sys.executable, "-c", SPIN]) for _ in range(count)]
    time.sleep(1)
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def training_rate(folder: str, flags: tuple, out: Path, seconds: float) -> tuple[float, int]:
    """(images/s, threads) of a training that is stopped after some seconds of learning."""
    command = [sys.executable, "train.py", *map(str, flags), "--outdir", str(out), "--epochs", "1000"]
    process = subprocess.Popen(command, cwd=ROOT / folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while "steps an epoch" not in (line := process.stdout.readline()):
        if not line:
            sys.exit(f"{' '.join(command)} ended early")
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    (run_folder,) = (out / "checkpoints").iterdir()
    state = ckpt.read_checkpoint(ckpt.run_checkpoints(run_folder)[0][1])
    rows, spent = state["running"][1:]
    metrics = run_folder / "metrics.jsonl"
    if metrics.exists() and spent < seconds / 4:  # the epoch had just begun
        rate = float(re.findall(r'"images_per_second": ([\d.]+)', metrics.read_text())[-1])
    else:
        rate = rows / spent
    return rate, state["args"]["threads"]


def drawing_rate(run_folder: Path, flags: tuple, out: Path) -> float:
    """Images/s of infer.py, 64 images in T = 1000 steps, without its start-up."""
    command = ("infer.py", "--ckpt", run_folder, "--num-images", 64, "--output", out / "a.png", *flags)
    return 64 / float(re.search(r"in ([\d.]+) s", run("mnist_latent_diffusion", *command)[1])[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--seconds", type=float, default=15.0, help="of training per figure (default: 15)")
    args = parser.parse_args()
    cores = available()
    data = ("--cache-dir", str(Path(args.cache_dir).resolve()), "--data", "hub")
    os.environ.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        _, autoencoder = train("mnist_ae", "--model", "mlp", "--epochs", 1, *data, "--outdir", out / "ae")
        latent = ("--ae-ckpt", autoencoder, *data)
        _, drawn = train("mnist_latent_diffusion", *latent, "--epochs", 1, "--outdir", out / "latent")
        rates = {
            "MLP autoencoder": ("mnist_ae", ("--model", "mlp", *data)),
            "convolutional autoencoder": ("mnist_ae", ("--model", "conv", *data)),
            "latent diffusion": ("mnist_latent_diffusion", latent),
            "pixel diffusion, digit 5": ("mnist_single_digit", ("--only-digit", 5, *data)),
        }
        print(f"{cores} cores; images/s (threads taken) and, in brackets, its share of the idle rate")
        print(f"{'':<28}{'beside':>10}{'chosen':>28}{f'{cores} threads':>28}")
        for name in (*rates, "drawing 64 latent images"):
            idle: dict[str, float] = {}
            for per_core in (0, 1, 2):
                cells = []
                for how in ((), ("--threads", cores)):
                    with competitors(per_core * cores):
                        if name in rates:
                            folder, flags = rates[name]
                            place = out / f"{name}-{per_core}-{len(how)}"
                            rate, threads = training_rate(folder, (*flags, *how), place, args.seconds)
                            taken = f" ({threads})"
                        else:
                            rate, taken = drawing_rate(drawn, how, out), ""
                    idle.setdefault(str(how), rate)
                    cells.append(f"{rate:,.0f}{taken} [{rate / idle[str(how)]:.2f}]")
                print(f"{name:<28}{per_core * cores:>10}{cells[0]:>28}{cells[1]:>28}", flush=True)


if __name__ == "__main__":
    main()
