"""What several processes bring, and what shards cost: `python tests/benchmarks/processes.py --cache-dir DIR`.

Images/s of each trainer's last epoch: one process with a thread for each of two cores, two processes of one thread, and
one process of one thread with 1, 2 and 4 shards. Each figure is the median of --repeats runs, in turn. Needs full MNIST
in the cache folder and an otherwise idle machine of two cores or more; takes over half an hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from measure import matmul_rate, run, train

WAYS = {
    # name: (processes, threads of each, shards)
    "1 process of 2 threads": (1, 2, 1),
    "2 processes of 1 thread": (2, 1, 2),
    "1 process of 1 thread": (1, 1, 1),
    "... in 2 shards": (1, 1, 2),
    "... in 4 shards": (1, 1, 4),
}


def rate(folder: str, flags: tuple, way: tuple[int, int, int], outdir: Path) -> float:
    """Images/s of the last of two epochs."""
    processes, threads, shards = way
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    how = ("--threads", threads, "--shards", shards, "--epochs", 2, "--outdir", outdir)
    run(folder, *launcher, "train.py", *flags, *how)
    (metrics,) = outdir.glob("checkpoints/*/metrics.jsonl")
    return json.loads(metrics.read_text().splitlines()[-1])["images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-dir", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    data = ("--cache-dir", str(Path(args.cache_dir).resolve()), "--data", "hub", "--device", "cpu")
    print(f"matrix product: {matmul_rate():.0f} GFLOP/s")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        _, autoencoder = train("mnist_ae", "--model", "mlp", "--epochs", 1, *data, "--outdir", out / "ae")
        trainers = {
            "MLP autoencoder": ("mnist_ae", ("--model", "mlp", *data)),
            "convolutional autoencoder": ("mnist_ae", ("--model", "conv", *data)),
            "latent diffusion": ("mnist_latent_diffusion", ("--ae-ckpt", autoencoder, *data)),
            "pixel diffusion, digit 5": ("mnist_single_digit", ("--only-digit", 5, *data)),
        }
        print("".join(f"{title:>26}" for title in ("images/s", *WAYS)))
        for name, (folder, flags) in trainers.items():
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(args.repeats):
                for way, how in WAYS.items():
                    found[way].append(rate(folder, flags, how, out / f"{name}-{number}-{way}"))
            rates = {way: statistics.median(values) for way, values in found.items()}
            alone = rates["1 process of 1 thread"]
            cells = (f"{f'{value:,.0f} ({value / alone:.2f})':>26}" for value in rates.values())
            print(f"{name:>26}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
