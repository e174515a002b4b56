"""Show what is in a checkpoint, or in any PyTorch file: `python -m common.inspect_ckpt PATH...`.

Nothing of the file is run, and its tensors are not read, so a large file answers as fast as a small one.
"""

from __future__ import annotations

import json
import math
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import ckpt, emoji
from common.args import Parser
from common.error_codes import BAD_CHECKPOINT, Exit, run_main

SUFFIXES = (".pt", ".pth", ".ckpt")  # of the files that are looked for in folders


def _age(timestamp: Any) -> str:
    try:
        saved = datetime.fromisoformat(timestamp)
    except (TypeError, ValueError):
        return "at an unknown time"
    seconds = (datetime.now(UTC) - (saved if saved.tzinfo else saved.replace(tzinfo=UTC))).total_seconds()
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit} ago"
    return f"{seconds:.0f} seconds ago"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _cleaned(value: Any, text: bool) -> Any:
    """For a terminal (text) without control characters; for JSON without NaN and infinities, which it does not know."""
    if isinstance(value, dict):
        return {_cleaned(key, text): _cleaned(inner, text) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(inner, text) for inner in value]
    if isinstance(value, str) and text:
        return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], value)
    return None if isinstance(value, float) and not text and not math.isfinite(value) else value


def _inner(autoencoder: dict[str, Any] | None) -> str | None:
    """The autoencoder inside a latent checkpoint, in a line."""
    if autoencoder is None:
        return None
    loss = autoencoder["val_loss"]
    error = f", val loss {loss:.6f}" if isinstance(loss, float) else ""
    what = f"{autoencoder['model']}, {autoencoder['parameters']:,} parameters, epoch {autoencoder['epoch']}{error}"
    return f"{autoencoder['exp_name']} ({what})"


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
            "autoencoder": _inner(info["autoencoder"]),
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
    try:
        if path.name in ("best", "latest") and path.with_suffix(".pt").is_file():
            return [path.with_suffix(".pt")]
        if not path.is_dir():
            return [path]  # if it is missing, reading it says so
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise ckpt.UnreadableCheckpoint(path, str(error.strerror)) from None
    if own := ckpt.run_checkpoints(path):
        return [own[0][1]]
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    newest = [own[0][1] for folder in sorted({file.parent for file in files}) if (own := ckpt.run_checkpoints(folder))]
    others = [file for file in files if not ckpt.run_checkpoints(file.parent)]
    if not newest and not others:
        raise Exit(BAD_CHECKPOINT, f"{path}: no checkpoint in this folder")
    return newest + others


def _verify(path: Path) -> bool:
    """Are the file's checksums right? False if it has none. Raises UnreadableCheckpoint if one is wrong."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged archive can raise anything
        raise ckpt.UnreadableCheckpoint(path, f"damaged ({type(error).__name__}: {error})") from None
    if damaged:
        raise ckpt.UnreadableCheckpoint(path, f"damaged: the checksum of its part {damaged!r} is wrong")
    return True


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Show what is in a PyTorch file.", "python -m common.inspect_ckpt outputs/checkpoints/RUN --json")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a file, a run's folder (newest), FOLDER/best, or a tree"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per file and line")
    parser.add_argument("--verify", action="store_true", help="also read everything and verify the checksums")
    args = parser.parse_args(argv)
    failures: list[Exit] = []
    for given in args.paths:
        files: list[Path] = []
        with _going_on(failures):
            files = files_of(given)
        for path in files:
            with _going_on(failures):
                info = ckpt.inspect_checkpoint(path) | {"verified": args.verify and _verify(path)}
                print(json.dumps(_cleaned(info, text=False), default=repr) if args.json else _text(info, args.verify))
    if failures:
        raise failures[0]


@contextmanager
def _going_on(failures: list[Exit]) -> Iterator[None]:
    """Show and keep an error; the other files are still shown."""
    try:
        yield
    except Exit as error:
        print(f"{emoji.error} {error}", file=sys.stderr)
        error.shown = True
        failures.append(error)


def _text(info: dict[str, Any], asked: bool) -> str:
    checksums = (
        "verified" if info["verified"] else "has none (not a zip archive)" if asked else "not verified (--verify)"
    )
    shown = report(_cleaned(info, text=True))
    return f"{emoji.step} {info['path']}\n{shown}\n{'checksums':>12}  {checksums}"


if __name__ == "__main__":
    sys.exit(run_main(main))
