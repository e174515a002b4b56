"""Checkpoints: what they hold, how they are written so that no crash loses one, how they are read without trust.

A checkpoint is `torch.save` of plain Python types and tensors, so that it loads with `weights_only=True`, the only
way this project loads anything. Keys: model, ema, optimizer, scaler, epoch (that the weights belong to, from 1),
global_step, batch (batches done in the epoch), args, exp_name, timestamp (UTC), train_loss, val_loss, best, scores,
running (sums behind train_loss), format; of latent diffusion also ae_ckpt_data, its autoencoder.
A checkpoint without `val_loss` was saved within its epoch: it is partial, and is replaced when the epoch ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
import warnings
import zipfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from common.error_codes import BAD_CHECKPOINT, MODEL_MISMATCH, Exit

FORMAT = 1
NAME = "checkpoint_epoch_{epoch:06d}.pt"
_NAME = re.compile(r"checkpoint_epoch_(\d{6,})\.pt")
LATEST, BEST = "latest.pt", "best.pt"
RUNS = "checkpoints"  # the folder that runs' folders lie in
TIMESTAMP = re.compile(r"-\d{8}-\d{6}$")  # of a run's name
MODEL_TYPES = ("ae-mlp", "ae-conv", "lddpm", "ddpm")

State = dict[str, Any]
Warn = Callable[[str], None]


_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # a file server that does not answer now says nothing of the file


class UnreadableCheckpoint(Exit):
    """The file is missing, damaged, or not a checkpoint of this project. `passing`: it may be readable later."""

    def __init__(self, path: str | Path, reason: str, passing: bool = False) -> None:
        super().__init__(BAD_CHECKPOINT, f"{path}: {reason}")
        self.passing = passing


# --- writing ----------------------------------------------------------------------------------------------------------


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it over `path`.

    Whatever interrupts this leaves the old file whole. Raises OSError if the disk is full, read-only or gone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"  # no reader's pattern matches this
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except RuntimeError as error:  # how torch reports a failing write, and Ctrl-C during it
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the folder's own entries, so that a rename survives a power cut (a no-op where that is not possible)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(path: str | Path, state: State) -> None:
    """Write `state` to `path` atomically. Raises OSError if it cannot; an earlier file at `path` then stays whole."""
    import torch

    atomic_write(path, lambda file: torch.save(state, file))


def link(target: Path, name: str) -> None:
    """Make `name`, beside `target`, a relative symlink to it (a copy where symlinks are not allowed)."""
    temporary = target.parent / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        try:
            os.symlink(target.name, temporary)
        except OSError:
            shutil.copyfile(target, temporary)
        os.replace(temporary, target.parent / name)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint_and_link_latest(folder: str | Path, state: State) -> Path:
    """Save `state` as `folder`/checkpoint_epoch_NNNNNN.pt and point latest.pt (and best.pt, if it is) to it.

    Returns the file's path. Raises OSError like `save_checkpoint`.
    """
    path = Path(folder) / NAME.format(epoch=state["epoch"])
    save_checkpoint(path, state)
    with contextlib.suppress(OSError):  # saved is saved; the next save links anew
        link(path, LATEST)
        if is_complete(state) and (state.get("best") or {}).get("epoch") == state["epoch"]:
            link(path, BEST)
    return path


def prune(folder: str | Path, *, keep_every: int = 1, keep_last: int | None = None, best_epoch: int | None) -> None:
    """Remove the checkpoints that only served until a newer one was safe; never the newest and the best.

    keep_every: of every so many epochs one is kept. keep_last: of those the newest so many (None: all).
    """
    kept = 1  # the newest, whatever its epoch
    linked = os.path.realpath(Path(folder) / BEST)  # the best that could be saved, if a better one could not
    for epoch, path in run_checkpoints(folder)[1:]:
        wanted = epoch % keep_every == 0 and (keep_last is None or kept < keep_last)
        kept += wanted
        if not wanted and epoch != best_epoch:
            if os.path.realpath(path) == linked:
                continue
            with contextlib.suppress(OSError):  # the next save tries again
                path.unlink()


def set_aside(folder: str | Path, after: int) -> list[Path]:
    """Rename the checkpoints of epochs later than `after`, so that training on from there overwrites nothing.

    Returns the new names.
    """
    later = [path for epoch, path in run_checkpoints(folder) if epoch > after]
    return [path.rename(path.with_name(f"{path.name}.aside-{uuid.uuid4().hex[:8]}")) for path in later]


def clear_leftovers(folder: str | Path, name: str = "*") -> None:
    """Remove the temporary files that killed writes of `name` left in `folder`."""
    for leftover in Path(folder).glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()


def _holds_an_epoch(path: Path) -> bool:
    """Is this a readable checkpoint from the end of its epoch?"""
    try:
        return is_complete(peek_checkpoint(path))
    except UnreadableCheckpoint:
        return False


def relink(folder: str | Path, state: State) -> None:
    """Point latest.pt and best.pt to what `state`, the checkpoint just resumed from, knows as newest and best.

    If that best could not be saved when its epoch ended, best.pt stays with the last that could.
    """
    best = (state.get("best") or {}).get("epoch")
    for name, epoch in ((LATEST, state["epoch"]), (BEST, best)):
        path, target = Path(folder) / name, Path(folder) / NAME.format(epoch=epoch or 0)
        if target.is_file() and (name == LATEST or _holds_an_epoch(target)):
            link(target, name)
        elif best is None or not path.exists():
            path.unlink(missing_ok=True)  # a dangling symlink


# --- reading ----------------------------------------------------------------------------------------------------------


def read_file(path: str | Path, *, verify: bool = True) -> Any:
    """`torch.load(weights_only=True)` of a file whose zip checksums were verified first (torch does not look at them).

    With verify=False tensors stay on disk until they are used: a quick look at the rest.
    Raises UnreadableCheckpoint with a reason in one line.
    """
    import pickle

    import torch

    path = Path(path)
    if not path.is_file():
        raise UnreadableCheckpoint(path, "is a folder, not a file" if path.is_dir() else "no such file")
    if path.stat().st_size == 0:
        raise UnreadableCheckpoint(path, "the file is empty")
    try:
        with zipfile.ZipFile(path) as archive:
            if verify and (damaged := archive.testzip()):
                raise UnreadableCheckpoint(path, f"damaged: the checksum of its part {damaged!r} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=not verify)
    except pickle.UnpicklingError:
        raise UnreadableCheckpoint(path, "holds more than tensors and plain types; nothing of it was run") from None
    except zipfile.BadZipFile:
        raise UnreadableCheckpoint(path, "truncated, or not a PyTorch file") from None
    except Exit:
        raise
    except Exception as error:  # a damaged zip or pickle can raise anything; the reason goes to the user
        reason = f"cannot be read ({type(error).__name__}: {error})".splitlines()[0]
        raise UnreadableCheckpoint(path, reason, getattr(error, "errno", None) in _PASSING) from None


def read_checkpoint(path: str | Path, *, verify: bool = True) -> State:
    """The state in one of this project's checkpoints, on the CPU. Raises UnreadableCheckpoint."""
    return _checked(path, read_file(path, verify=verify))


_WANTED = {"model", "args", "epoch", "exp_name", "format"}


def _checked(path: str | Path, state: Any) -> State:
    ours = isinstance(state, dict) and state.keys() >= _WANTED
    if not ours or not isinstance(state["args"], dict) or not isinstance(state["epoch"], int):
        raise UnreadableCheckpoint(path, "a PyTorch file, but not a checkpoint of this project")
    if state["format"] != FORMAT:
        raise UnreadableCheckpoint(path, f"has format {state['format']}, this version reads {FORMAT}")
    return state


def load_checkpoint(
    path: str | Path,
    *,
    model: Any = None,
    ema: Any = None,
    optimizer: Any = None,
    scaler: Any = None,
) -> State:
    """Read the checkpoint at `path` (a file, a run's folder, or FOLDER/best) and restore the objects given.

    Returns the whole state. Raises UnreadableCheckpoint, also if its weights do not fit `model`.
    """
    path = resolve_checkpoint(path)
    state = read_checkpoint(path)
    for name, target in {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}.items():
        if target is not None and state.get(name) is not None:
            try:
                target.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise UnreadableCheckpoint(path, f"its {name} does not fit: {str(error).splitlines()[0]}") from None
    return state


def read_model(path: str | Path, types: tuple[str, ...]) -> State:
    """The state of the checkpoint that `path` means (see `resolve_checkpoint`), which holds one of the model `types`.

    Raises Exit(MODEL_MISMATCH) if it holds another kind of model, UnreadableCheckpoint if it cannot be read.
    """
    path = resolve_checkpoint(path)
    state = read_checkpoint(path)
    if (model := infer_model_from_checkpoint(state)) not in types:
        raise Exit(MODEL_MISMATCH, f"{path} holds a model of type {model}; {' or '.join(types)} is needed here")
    return state


def load_averaged(net: Any, state: State, path: str | Path) -> None:
    """Give `net` the EMA weights of a checkpoint's state. Raises UnreadableCheckpoint if they do not fit."""
    averaged = {key.removeprefix("module."): value for key, value in state["ema"].items() if key != "n_averaged"}
    try:
        net.load_state_dict(averaged)
    except RuntimeError as error:
        raise UnreadableCheckpoint(path, f"its weights do not fit: {str(error).splitlines()[0]}") from None


def is_complete(state: State) -> bool:
    """Was this saved at the end of its epoch (not within it)?"""
    return state.get("val_loss") is not None


def infer_model_from_checkpoint(source: str | Path | State) -> str:
    """ "ae-mlp", "ae-conv", "lddpm" or "ddpm", from a checkpoint's path or its state.

    The short forms "mlp" and "conv" are understood too. Raises UnreadableCheckpoint if none of them is recorded.
    """
    state = source if isinstance(source, dict) else read_checkpoint(resolve_checkpoint(source), verify=False)
    recorded = str(state["args"].get("model"))
    model = f"ae-{recorded}" if recorded in ("mlp", "conv") else recorded
    if model not in MODEL_TYPES:
        raise UnreadableCheckpoint(
            source if not isinstance(source, dict) else state["exp_name"], f"unknown model type {recorded!r}"
        )
    return model


# --- finding ----------------------------------------------------------------------------------------------------------


def run_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(epoch, path) of the checkpoint files directly in `folder`, newest epoch first."""
    folder = Path(folder)
    found = [(int(match[1]), path) for path in folder.glob("*.pt") if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def newest_readable(folder: str | Path, warn: Warn, *, verify: bool = True) -> tuple[Path, State] | None:
    """The newest checkpoint of a run that can be read; every one passed over is named through `warn`.

    None if there is none. Raises UnreadableCheckpoint if none can be read because of a disk or file server that fails:
    the run may well be whole, and must not be begun again.
    """
    passing = None
    for _, path in run_checkpoints(folder):
        try:
            return path, read_checkpoint(path, verify=verify)
        except UnreadableCheckpoint as error:
            warn(f"passing over {error}")
            passing = error if error.passing else passing
    if passing is not None:
        raise passing
    return None


def find_latest_checkpoint(directory: str | Path, prefix: str = "", warn: Warn = lambda _: None) -> Path | None:
    """The newest checkpoint of all runs below `directory` whose names begin with `prefix` (`*` matches anything).

    Newest by the time recorded inside, not by mtime, which copying a tree rewrites. None if there is none.
    """
    runs = []
    for folder in Path(directory).glob("*/"):
        if fnmatchcase(folder.name, prefix + "*"):
            _, state = newest_readable(folder, lambda _: None, verify=False) or (None, {})
            runs.append((str(state.get("timestamp", "")), folder.name, folder))
    for _, _, folder in sorted(runs, reverse=True):  # a glance for the order, a full check of what is taken
        if found := newest_readable(folder, warn):
            return found[0]
    return None


def resolve_checkpoint(path: str | Path, warn: Warn = lambda _: None) -> Path:
    """The file that a user's `path` means: itself, a run folder's newest readable checkpoint, or FOLDER/best.

    Raises UnreadableCheckpoint if there is no such file.
    """
    path = Path(path)
    if path.name in ("best", "latest") and not path.exists() and path.parent.is_dir():
        path = path.with_name(f"{path.name}.pt")
    if path.is_dir():
        if found := newest_readable(path, warn):
            return found[0]
        raise UnreadableCheckpoint(path, "no readable checkpoint in this folder")
    if not path.exists():
        raise UnreadableCheckpoint(path, "no such file")
    return path


def resolve_resume_path(
    resume: str | None, auto_resume: bool, directory: str | Path, prefix: str, warn: Warn = lambda _: None
) -> Path | None:
    """The checkpoint file to resume from, or None for a fresh start.

    `--resume PATH` means that checkpoint, or a run's newest readable one if PATH is its folder or latest.pt; with
    `--auto-resume` beside it, the newest of PATH's run, so that a job which is requeued with both goes on instead of
    back: for a PATH outside any run, a newer run of the same experiment below `directory`. `--auto-resume` alone means
    the newest run below `directory` whose name begins with `prefix`. Raises UnreadableCheckpoint if `resume` names
    nothing readable.
    """
    if resume is None:
        return find_latest_checkpoint(directory, prefix, warn) if auto_resume else None
    path = Path(resume).absolute()
    if path.name == LATEST and run_checkpoints(path.parent):
        if not path.exists():
            warn(f"passing over {path}: it points to no file")
        path = path.parent
    path = resolve_checkpoint(path, warn)
    path = path.resolve() if path.is_symlink() else path  # best.pt moves on; its target does not
    if path.parent.parent.name != RUNS:
        path = path.resolve()  # through a symlink to the run's folder
    if auto_resume and path.parent.parent.name != RUNS:
        copied = read_checkpoint(path, verify=False)
        prefix = f"{TIMESTAMP.sub('', copied['exp_name'])}-"
        latest = find_latest_checkpoint(directory, prefix, warn)
        if latest and read_checkpoint(latest, verify=False)["timestamp"] > copied["timestamp"]:
            warn(f"{latest.parent.name} is newer than {path}: going on with it")
            return latest
    newest = newest_readable(path.parent, warn) if auto_resume and _NAME.fullmatch(path.name) else None
    return newest[0] if newest else path


def peek_checkpoint(path: str | Path) -> State:
    """Like `read_checkpoint`, at once: without torch, with stand-ins for the tensors, with no checksum verified."""
    from common import peek

    try:
        state, _ = peek.read(path)
    except (OSError, ValueError) as error:
        raise UnreadableCheckpoint(path, str(getattr(error, "strerror", None) or error)) from None
    return _checked(path, state)


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """What is in any PyTorch file, as plain types, without reading its tensors or running its pickle.

    Keys: path, bytes, kind ("checkpoint" for one of this project's, else words for what it seems to be), tensors
    {name: [dtype, shape]}, parameters, largest (names), tensor_bytes, values (plain entries beside the weights),
    classes (names of everything in it that is neither tensor nor plain; they were not imported). One of this
    project's has model, exp_name, epoch, complete, batch, global_step, timestamp, train_loss, val_loss, best, args and
    autoencoder as well. Raises UnreadableCheckpoint.
    """
    from common import peek

    path = Path(path)
    try:
        content, classes = peek.read(path)
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise UnreadableCheckpoint(path, str(getattr(error, "strerror", None) or error)) from None
    try:
        ours = bool(_checked(path, content))
    except UnreadableCheckpoint:
        ours = False
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
    info |= {key: content.get(key) for key in ("train_loss", "val_loss", "best", "args")}
    model, inner = infer_model_from_checkpoint(content), content.get("ae_ckpt_data") or {}
    info |= {"model": model, "complete": is_complete(content), "autoencoder": None, "values": {}}
    if inner:
        size = sum(tensor.numel() for tensor in peek.tensors_in(inner.get("model")).values())
        known = {key: inner.get(key) for key in ("exp_name", "epoch", "val_loss", "path")}
        info["autoencoder"] = known | {"model": (inner.get("args") or {}).get("model"), "parameters": size}
    return info


def _foreign(content: Any) -> tuple[str, Any]:
    """(what a file of somebody else's seems to be, where its weights are)."""
    from common import peek

    if isinstance(content, peek.Tensor):
        return "a tensor", content
    if isinstance(content, peek.Stranger):
        return f"an object saved whole ({content.qualified_name})", content
    if isinstance(content, dict):
        for key in ("state_dict", "model_state_dict", "model", "net", "network", "module", "ema", "weights", "params"):
            if key in content and peek.tensors_in(content[key]):
                return f"a training checkpoint, its weights under {key!r}", content[key]
        if content and all(isinstance(value, peek.Tensor) for value in content.values()):
            return "a state_dict", content
    return f"a {type(content).__name__}", content
