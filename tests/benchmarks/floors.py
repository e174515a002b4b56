"""What real digits score: by the number of digits, over random halves of the test digits, and seen by the classifier.

python tests/benchmarks/floors.py --cache-dir DIR [--ckpt RUN]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common import emoji, threads
from common.args import Parser, number
from common.classifier import judge, load_classifier
from common.data import HF_MNIST
from common.error_codes import run_main
from common.flags import add_data_arguments
from common.loading import load
from common.metrics import frechet_distance

COUNTS = (200, 500, 1000, 2000, 5000)
SEED = 42


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Fréchet distances of real digits.", "python tests/benchmarks/floors.py --cache-dir DIR")
    parser.add_argument("--ckpt", metavar="RUN", help="also a latent run's drawings, labels by class shares")
    parser.add_argument("--splits", type=number(int, 2), default=20, help="random halves (default: 20)")
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    threads.prepare()
    test, learned = (HF_MNIST(split, args.cache_dir, source=args.data) for split in ("test", "train"))
    classifier, _ = load_classifier(args.cache_dir, test.source, lambda text: print(f"{emoji.info} {text}"))

    def features(images: torch.Tensor) -> np.ndarray:
        return judge(classifier, images)[0].numpy()

    held_out, seen = (features(digits[torch.arange(len(digits))][0]) for digits in (test, learned))
    rows = {"held-out digits": None, "digits that the classifier learned from": seen}
    if args.ckpt:
        rows["drawings"] = features(load(args.ckpt).draw(count=COUNTS[-1], seed=SEED, sampler="dpm"))
    half = len(held_out) // 2
    counts = [count for count in COUNTS if count <= half]
    print("| of N against half of the test digits |", *(f"{count:,} |" for count in counts))
    print("|---|" + "---|" * len(counts))
    for name, shown in rows.items():
        cells = []
        for count in counts:
            found = []
            for split in range(args.splits):
                rng = np.random.default_rng(split)
                reference, spare = np.split(held_out[rng.permutation(len(held_out))], [half])
                others = spare if shown is None else shown[rng.permutation(len(shown))]
                found.append(frechet_distance(others[:count], reference))
            cells.append(f"{np.mean(found):.3f} ± {np.std(found, ddof=1):.3f} |")
        print(f"| {name} |", *cells, flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
