"""Show what is in a checkpoint: `python -m common.inspect_ckpt PATH...`."""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, datetime
from typing import Any

from common import ckpt, emoji
from common.args import Parser
from common.error_codes import run_main

LARGEST = 5


def _age(timestamp: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def report(info: dict[str, Any]) -> str:
    """What a person wants to know, as lines of text; `info` is from `ckpt.inspect_checkpoint`."""
    known = {name: value for name, value in (info["args"] or {}).items() if value is not None}
    largest = sorted(info["tensors"].items(), key=lambda item: -math.prod(item[1]))[:LARGEST]
    best = info["best"]
    done = "complete" if info["complete"] else f"partial, {info['batch']} batches done"
    rows = {
        "experiment": info["exp_name"],
        "model": info["model"],
        "epoch": f"{info['epoch']} ({done})",
        "global step": info["global_step"],
        "train loss": info["train_loss"],
        "val loss": info["val_loss"],
        "best": f"{best['val_loss']:.6f} in epoch {best['epoch']}" if best else "none yet",
        "saved": f"{info['timestamp']} ({_age(info['timestamp'])})",
        "size": f"{info['bytes'] / 1e6:.1f} MB",
        "parameters": f"{info['parameters']:,} in {len(info['tensors'])} tensors",
        "largest": ", ".join(f"{name} {shape}" for name, shape in largest),
        "autoencoder": info["autoencoder"],
        "flags": " ".join(f"{name}={value}" for name, value in sorted(known.items())),
    }
    return "\n".join(f"{name:>12}  {value}" for name, value in rows.items() if value is not None)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Show what is in a checkpoint.", "python -m common.inspect_ckpt outputs/checkpoints/RUN --json")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="checkpoint file, run folder (newest) or FOLDER/best")
    parser.add_argument("--json", action="store_true", help="one JSON object per checkpoint and line")
    args = parser.parse_args(argv)
    for path in args.paths:
        info = ckpt.inspect_checkpoint(path)
        print(json.dumps(info) if args.json else f"{emoji.step} {info['path']}\n{report(info)}")


if __name__ == "__main__":
    sys.exit(run_main(main))
