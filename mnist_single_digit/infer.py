"""Draw digits from a pixel-space diffusion checkpoint: `python infer.py --checkpoint PATH`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.drawing import draw_to_file, drawing_parser, what_to_draw_with
from common.error_codes import run_main
from common.export import export
from common.modules import module_of


def main(argv: list[str] | None = None) -> None:
    example = "python infer.py --checkpoint RUN_FOLDER --n 64 --out samples.png"
    parser = drawing_parser("Draw digits by pixel-space diffusion.", example, count=16, output="samples_infer.png")
    args = parser.parse_args(argv)
    if args.export:
        return export(args.ckpt, args.export, parser.typed(argv), ("ddpm",))

    def load(device):
        return module_of("ddpm").load_for_drawing(what_to_draw_with(args, "ddpm"), device, guide=args.guide)

    draw_to_file(args, load)


if __name__ == "__main__":
    sys.exit(run_main(main))
