"""Show what is in a checkpoint, or in any PyTorch file: `python -m common.inspect_ckpt PATH...`.

Nothing of the file is run, and its tensors are not read, so a large file answers as fast as a small one.
"""

from __future__ import annotations

import json
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import ckpt, emoji
from common.args import Parser
from common.error_codes import BAD_CHECKPOINT, Exit, run_main


def _age(timestamp: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def report(info: dict[str, Any]) -> str:
    """What a person wants to know, as lines of text; `info` is from `ckpt.inspect_checkpoint`."""
    rows: dict[str, Any] = {"kind": info["kind"]}
    if info["kind"] == "checkpoint":
        best, known = info["best"], {name: value for name, value in info["args"].items() if value is not None}
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
            "autoencoder": info["autoencoder"],
            "flags": " ".join(f"{name}={value}" for name, value in sorted(known.items())),
        }
    shapes = {name: f"{dtype} {shape}" for name, (dtype, shape) in info["tensors"].items()}
    rows |= {
        "size": f"{_size(info['bytes'])}, {_size(info['tensor_bytes'])} of it tensors",
        "parameters": f"{info['parameters']:,} in {len(shapes)} tensors",
        "largest": "\n              ".join(f"{name}  {shapes[name]}" for name in info["largest"]),
        "also holds": ", ".join(f"{name}={value}" for name, value in list(info["values"].items())[:20]) or None,
    }
    if info["classes"]:
        names = ", ".join(info["classes"][:6]) + (", ..." if len(info["classes"]) > 6 else "")
        rows["note"] = f"described without running its pickle, which names {names}"
    return "\n".join(f"{name:>12}  {value}" for name, value in rows.items() if value is not None)


def files_of(path: Path) -> list[Path]:
    """The files that a path means: itself, a run's newest (or FOLDER/best), or a tree's runs, the newest of each."""
    if path.name in ("best", "latest") and path.with_suffix(".pt").is_file():
        return [path.with_suffix(".pt")]
    if not path.is_dir():
        return [path]  # if it is missing, reading it says so
    if own := ckpt.run_checkpoints(path):
        return [own[0][1]]
    folders = sorted({file.parent for file in path.rglob("*.pt")})
    newest = [ckpt.run_checkpoints(folder)[0][1] for folder in folders if ckpt.run_checkpoints(folder)]
    others = [file for file in sorted(path.rglob("*.pt")) if not ckpt.run_checkpoints(file.parent)]
    if not newest and not others:
        raise Exit(BAD_CHECKPOINT, f"{path}: no checkpoint in this folder")
    return newest + others


def _verify(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile):
        return "has none (not a zip archive)"
    if damaged:
        raise ckpt.UnreadableCheckpoint(path, f"damaged: the checksum of its part {damaged!r} is wrong")
    return "verified"


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Show what is in a PyTorch file.", "python -m common.inspect_ckpt outputs/checkpoints/RUN --json")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a file, a run's folder (newest), FOLDER/best, or a tree"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per file and line")
    parser.add_argument("--verify", action="store_true", help="also read everything and verify the checksums")
    args = parser.parse_args(argv)
    failure: Exit | None = None
    for path in [file for given in args.paths for file in files_of(given)]:
        try:
            info = ckpt.inspect_checkpoint(path)
            checksums = _verify(path) if args.verify else "not verified (--verify does)"
        except Exit as error:  # the other files are still shown
            print(f"{emoji.error} {error}", file=sys.stderr)
            failure, error.shown = error, True
            continue
        if args.json:
            print(json.dumps(info | {"verified": args.verify}, default=repr))
        else:
            print(f"{emoji.step} {info['path']}\n{report(info)}\n{'checksums':>12}  {checksums}")
    if failure:
        raise failure


if __name__ == "__main__":
    sys.exit(run_main(main))
