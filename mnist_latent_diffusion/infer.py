"""Draw digits from a latent diffusion checkpoint: `python infer.py --ckpt PATH`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.drawing import draw_to_file, drawing_parser, what_to_draw_with
from common.error_codes import MODEL_MISMATCH, Exit, run_main
from common.export import export
from common.modules import module_of


def main(argv: list[str] | None = None) -> None:
    example = "python infer.py --ckpt RUN_FOLDER --digit 3 --output threes.png"
    parser = drawing_parser("Draw digits by latent diffusion.", example, count=64, output="generated.png")
    parser.add_argument("--ae-ckpt", help="decode with this autoencoder instead of the one inside the checkpoint")
    args = parser.parse_args(argv)
    if args.export:
        return export(args.ckpt, args.export, parser.typed(argv), ("lddpm",))

    def load(device):
        if args.inpaint:
            raise Exit(MODEL_MISMATCH, f"--{module_of('lddpm').ONLY_PIXELS}")
        return module_of("lddpm").load_for_drawing(
            what_to_draw_with(args, "lddpm"), device, args.ae_ckpt, guide=args.guide
        )

    draw_to_file(args, load)


if __name__ == "__main__":
    sys.exit(run_main(main))
