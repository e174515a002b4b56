"""Show what is in a checkpoint, or in any PyTorch file: `python -m common.inspect_ckpt PATH...`.

Nothing of the file is run, and its tensors are not read, so a large file answers as fast as a small one.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import ckpt, emoji, peek
from common.args import Parser, named_path
from common.error_codes import BAD_CHECKPOINT, Exit, run_main
from common.progress import counted

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")  # of the files that are looked for in folders


def describe(path: str | Path) -> dict[str, Any]:
    """What is in any PyTorch file, as plain types, without reading its tensors or running its pickle.

    Keys: path, bytes, kind ("checkpoint" for one of this project's, else words for what it seems to be), tensors
    {name: [dtype, shape]}, parameters, largest (names), tensor_bytes, values (plain entries beside the weights),
    classes (names of everything in it that is neither tensor nor plain; they were not imported). One of this
    project's has model, exp_name, epoch, complete, batch, global_step, timestamp, train_loss, val_loss, best, args,
    exported and autoencoder as well. Raises UnreadableCheckpoint.
    """
    content, classes = ckpt.peek(path)
    try:
        size = os.path.getsize(path)
    except OSError as error:
        raise ckpt.UnreadableCheckpoint(path, str(error.strerror), error) from None
    ours = ckpt.is_ours(content)
    kind, weights = ("checkpoint", content["model"]) if ours else _foreign(content)
    tensors = peek.tensors_in(weights)
    largest = sorted(tensors, key=lambda name: -tensors[name].bytes)[:5]
    info = {
        "path": str(path),
        "bytes": size,
        "kind": kind,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "tensor_bytes": sum(tensor.bytes for tensor in peek.tensors_in(content).values()),
        "tensors": {name: [tensor.dtype, list(tensor.shape)] for name, tensor in tensors.items()},
        "largest": largest,
        "classes": sorted(classes),
    }
    if not ours:
        plain = content.items() if isinstance(content, dict) else ()
        values = {str(key): value for key, value in plain if isinstance(value, int | float | str | bool)}
        return info | {"values": values}
    info |= {key: content.get(key) for key in ("exp_name", "epoch", "batch", "global_step", "timestamp")}
    info |= {key: content.get(key) for key in ("train_loss", "val_loss", "best", "args", ckpt.EXPORTED)}
    model, inner = ckpt.infer_model_from_checkpoint(content), content.get("ae_ckpt_data") or {}
    info |= {"model": model, "complete": ckpt.is_complete(content), "autoencoder": None, "values": {}}
    if inner:
        size = sum(tensor.numel() for tensor in peek.tensors_in(inner.get("model")).values())
        known = {key: inner.get(key) for key in ("exp_name", "epoch", "val_loss", "path")}
        info["autoencoder"] = known | {"model": (inner.get("args") or {}).get("model"), "parameters": size}
    return info


def _foreign(content: Any) -> tuple[str, Any]:
    """(what a file of somebody else's seems to be, where its weights are)."""
    if isinstance(content, peek.Tensor):
        return "a tensor", content
    if isinstance(content, peek.Safetensors):
        return peek.SAFETENSORS, dict(content)
    if isinstance(content, peek.Stranger):
        return f"an object saved whole ({content.qualified_name})", content
    if isinstance(content, dict):
        for key in ("state_dict", "model_state_dict", "model", "net", "network", "module", "ema", "weights", "params"):
            if key in content and peek.tensors_in(content[key]):
                return f"a training checkpoint, its weights under {key!r}", content[key]
        if content and all(isinstance(value, peek.Tensor) for value in content.values()):
            return "a state_dict", content
    return f"a {type(content).__name__}", content


def _age(timestamp: Any) -> str:
    try:
        saved = datetime.fromisoformat(timestamp)
    except (TypeError, ValueError):
        return "at an unknown time"
    seconds = (datetime.now(UTC) - (saved if saved.tzinfo else saved.replace(tzinfo=UTC))).total_seconds()
    if seconds < -60:
        return "in the future, by this machine's clock"
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


def _exported(exported: dict[str, Any] | None) -> dict[str, str | None]:
    """Rows about a file that infer.py --export wrote."""
    if exported is None:
        return {}
    scores = {name: value for name, value in exported["scores"].items() if isinstance(value, float)}
    return {
        "exported": f"for drawing, in float16, {exported['time']} ({_age(exported['time'])})",
        "trained by": "\n              ".join(exported["commands"]) or None,
        "scores": " ".join(f"{name}={value:.4g}" for name, value in scores.items()) or None,
    }


def report(info: dict[str, Any]) -> str:
    """What a person wants to know, as lines of text for a terminal; `info` is from `describe`."""
    info = _cleaned(info, text=True)
    rows: dict[str, Any] = {"kind": info["kind"]}
    if info["kind"] == "checkpoint":
        best, known = info["best"], {name: value for name, value in info["args"].items() if value is not None}
        done = "complete" if info["complete"] else f"partial, {counted(info['batch'], 'batch', 'batches')} done"
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
            **_exported(info[ckpt.EXPORTED]),
            "flags": " ".join(f"{name}={value}" for name, value in sorted(known.items())),
        }
    shapes = {name: f"{dtype} {shape}" for name, (dtype, shape) in info["tensors"].items()}
    rows |= {
        "size": f"{_size(info['bytes'])}, {_size(info['tensor_bytes'])} of it tensors",
        "parameters": f"{info['parameters']:,} in {counted(len(shapes), 'tensor')}",
        "largest": "\n              ".join(f"{name}  {shapes[name]}" for name in info["largest"]),
        "also holds": ", ".join(f"{name}={value!s:.80}" for name, value in list(info["values"].items())[:20]) or None,
    }
    if info["classes"]:
        names = ", ".join(info["classes"][:6]) + (", ..." if len(info["classes"]) > 6 else "")
        rows["note"] = f"described without running its pickle, which names {names}"
    return "\n".join(f"{name:>12}  {value}" for name, value in rows.items() if value is not None)


def files_below(folder: Path) -> list[Path]:
    """Files that may be checkpoints, in order; without what other processes remove meanwhile, or may not be read.

    Runs that lie elsewhere, and here a symlink to their folder, are among them. Raises OSError if a disk fails.
    """

    def passed_over(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
            raise error

    whole, files, elsewhere = folder.resolve(), [], set()
    for root, folders, names in os.walk(folder, onerror=passed_over):
        files += [Path(root, name) for name in names]
        for link in (Path(root, name) for name in sorted(folders) if os.path.islink(os.path.join(root, name))):
            run = link.resolve()
            if not run.is_relative_to(whole) and run not in elsewhere:
                elsewhere.add(run)
                files += [path for _, path in ckpt.run_checkpoints(link)]
    return sorted(file for file in files if file.suffix in SUFFIXES)


def _places(path: Path) -> list[Path]:
    """What a path means: itself (a file, a run's folder, or RUN/best), or the runs and other files of a tree."""
    if not os.path.isdir(path) or ckpt.run_checkpoints(path):
        return [path]
    files = files_below(path)
    runs = [folder for folder in sorted({file.parent for file in files}) if ckpt.run_checkpoints(folder)]
    others = [file for file in files if file.parent not in runs]
    if not runs and not others:
        raise Exit(BAD_CHECKPOINT, f"{path}: no checkpoint in this folder")
    return runs + others


def verify(path: Path) -> bool:
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


@contextmanager
def odd_values(path: str | Path) -> Iterator[None]:
    """What values that this project never writes make `describe` and `report` raise becomes UnreadableCheckpoint."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        text = f"cannot be described: its values are not what they should be ({why})"
        raise ckpt.UnreadableCheckpoint(path, text) from None


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Show what is in a PyTorch file.", "python -m common.inspect_ckpt outputs/checkpoints/RUN --json")
    parser.add_argument(
        "paths", nargs="+", type=named_path, metavar="PATH", help="a file, a run's folder (newest), RUN/best, or a tree"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per file and line")
    parser.add_argument("--verify", action="store_true", help="also read everything and verify the checksums")
    args = parser.parse_args(argv)
    failures: list[Exit] = []

    def fail(error: Exit | str) -> None:
        """Show and keep an error; the other files are still shown."""
        error = Exit(BAD_CHECKPOINT, error) if isinstance(error, str) else error
        print(f"{emoji.error} {error}", file=sys.stderr)
        error.shown = True
        failures.append(error)

    for given in args.paths:
        try:
            places = _places(given)
        except (Exit, OSError) as error:
            fail(error if isinstance(error, Exit) else f"{given}: {error.strerror}")
            continue
        for place in places:
            try:
                with odd_values(place):
                    path, info = ckpt.open_checkpoint(place, fail, describe)
                    info |= {"verified": args.verify and verify(path)}
                    plain = _cleaned(info, text=False)
                    shown = json.dumps(plain, default=repr) if args.json else _text(info, args.verify)
            except Exit as error:
                fail(error)
            else:
                print(shown)
    if failures:
        raise failures[0]


def _text(info: dict[str, Any], asked: bool) -> str:
    checksums = (
        "verified" if info["verified"] else "has none (not a zip archive)" if asked else "not verified (--verify)"
    )
    return f"{emoji.step} {_cleaned(info['path'], text=True)}\n{report(info)}\n{'checksums':>12}  {checksums}"


if __name__ == "__main__":
    sys.exit(run_main(main))
