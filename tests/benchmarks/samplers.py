"""Samplers against evaluations of the network: the tables of README.md, from a latent and a pixel run.

python tests/benchmarks/samplers.py --latent RUN --pixel RUN --cache-dir DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common import emoji
from common.args import Parser, number
from common.classifier import load_classifier
from common.data import HF_MNIST
from common.drawing import wanted_labels
from common.error_codes import USAGE, Exit, run_main
from common.flags import SAMPLERS, add_data_arguments
from common.modules import module_of
from common.scores import score

EVALUATIONS = (1, 2, 4, 8, 16, 50, 1000)
SEED = 42


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Fréchet distance by sampler and number of evaluations.", "samplers.py --latent RUN --pixel RUN")
    parser.add_argument("--latent", metavar="RUN", help="a latent diffusion's checkpoint or run folder")
    parser.add_argument("--pixel", metavar="RUN", help="a pixel diffusion's")
    parser.add_argument("--n", type=number(int, 200), default=2000, help="drawings a figure (default: 2000)")
    parser.add_argument("--unlabelled", action="store_true", help="draw with the null label, as --digit none does")
    parser.add_argument("--evaluations", type=number(int, 1), nargs="+", default=EVALUATIONS, help="rows of the table")
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    runs = {"lddpm": args.latent, "ddpm": args.pixel}
    drawers = {model: module_of(model).load_for_drawing(run) for model, run in runs.items() if run}
    if not drawers:
        raise Exit(USAGE, "name a run: --latent RUN, --pixel RUN or both")
    real = HF_MNIST("test", args.cache_dir, source=args.data)
    classifier, _ = load_classifier(args.cache_dir, real.source, lambda text: print(f"{emoji.info} {text}"))

    floors = set()

    def cell(model: str, sampler: str, steps: int) -> str:
        draw, state = drawers[model]
        if steps > state["args"]["T"]:
            return ""
        labels = wanted_labels([] if args.unlabelled else None, args.n, SEED, state["args"])
        images = draw(labels=labels, count=args.n, seed=SEED, sampler=sampler, steps=steps).cpu()
        fid = score(images, None if labels is None else torch.tensor(labels), real, classifier)["fid"]
        floors.add(f"{fid['floor']:.3f} ± {fid['floor_error']:.3f}")
        return f"{fid['value']:.3f} ± {fid['error']:.3f}"

    columns = [(model, sampler) for model in drawers for sampler in SAMPLERS]
    names = {"lddpm": "latent", "ddpm": "pixel"}
    print("| evaluations |", *(f"{names[model]}, {sampler} |" for model, sampler in columns))
    print("|---|" + "---|" * len(columns))
    for steps in args.evaluations:
        print(f"| {steps} |", *(f"{cell(*column, steps)} |" for column in columns), flush=True)
    print(f"\nas many real digits: {', '.join(floors)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
