"""Checkpoints: what they hold, how they are written so that no crash loses one, how they are read without trust.

A checkpoint is `torch.save` of plain Python types and tensors, so that it loads with `weights_only=True`, the only
way this project loads anything. Keys: model, ema, optimizer, scaler, epoch (that the weights belong to, from 1),
global_step, batch (batches done in the epoch), args, exp_name, timestamp (UTC), train_loss, val_loss, best, scores,
running (sum and rows behind train_loss, the epoch's seconds), format; of latent diffusion also ae_ckpt_data, its
autoencoder.
A checkpoint without `val_loss` was saved within its epoch: it is partial, and is replaced when the epoch ends.
One with `exported` was written for drawing alone: see `common.export`.
"""

from __future__ import annotations

import contextlib
import errno
import filecmp
import hashlib
import io
import os
import re
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from common import console
from common.error_codes import BAD_CHECKPOINT, MODEL_MISMATCH, Exit
from common.files import atomic_write, link, no_file
from common.flags import OUR_NETWORK
from common.peek import format_of
from common.peek import read as read_without_torch
from common.record import git_commit, starts_in

FORMAT = 1
NAME = "checkpoint_epoch_{epoch:06d}.pt"
_NAME = re.compile(r"checkpoint_epoch_(\d{6,})\.pt")
LATEST, BEST = "latest.pt", "best.pt"
EXPORTED = "exported"  # the key of files that infer.py --export wrote
RUNS = "checkpoints"  # the folder that runs' folders lie in
TIMESTAMP = re.compile(r"-\d{8}-\d{6}$")  # of a run's name
MODEL_TYPES = ("ae-mlp", "ae-conv", "lddpm", "ddpm")
_SHORT = {"mlp": "ae-mlp", "conv": "ae-conv"}  # as a checkpoint may say it too

State = dict[str, Any]
Warn = Callable[[str], None]
T = TypeVar("T")

_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # a file server that does not answer now says nothing of the file
PATIENCE = 5.0  # seconds for such a fault to pass


class UnreadableCheckpoint(Exit):
    """The file is missing, damaged, or not a checkpoint of this project; `error` is what the system said of it."""

    def __init__(self, path: str | Path, reason: str, error: OSError | None = None) -> None:
        super().__init__(BAD_CHECKPOINT, f"{path}: {reason}")
        self.gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        self.passing = error is not None and error.errno in _PASSING  # it may well be readable later


# --- writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, state: State) -> None:
    """Write `state` to `path` atomically. Raises OSError if it cannot; an earlier file at `path` then stays whole."""
    import torch

    atomic_write(path, lambda file: torch.save(state, file))


def save_checkpoint_and_link_latest(folder: str | Path, state: State) -> Path:
    """Save `state` as `folder`/checkpoint_epoch_NNNNNN.pt, and point latest.pt to it, best.pt to its best.

    Returns the file's path. Raises OSError like `save_checkpoint`.
    """
    path = Path(folder) / NAME.format(epoch=state["epoch"])
    save_checkpoint(path, state)
    with contextlib.suppress(OSError):  # saved is saved; the next save links anew
        relink(folder, state)
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


def _holds_an_epoch(path: Path) -> bool:
    """Is this a readable checkpoint from the end of its epoch?"""
    try:
        return is_complete(peek_checkpoint(path))
    except UnreadableCheckpoint:
        return False


def _is_there(path: Path) -> bool:
    """Raises OSError where that cannot be told, which `Path.exists` calls a no from Python 3.14 on."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def relink(folder: str | Path, state: State) -> None:
    """Point latest.pt and best.pt to what `state`, the checkpoint just saved or resumed from, knows as newest and best.

    If that best could not be saved when its epoch ended, best.pt stays with the last that could.
    """
    best = (state.get("best") or {}).get("epoch")
    for name, epoch in ((LATEST, state["epoch"]), (BEST, best)):
        path, target = Path(folder) / name, Path(folder) / NAME.format(epoch=epoch or 0)
        if _is_there(target):
            if _leads_to(path, target):
                continue
            if name == LATEST or _holds_an_epoch(target):
                link(target, name)
                continue
        if best is None or not _is_there(path):
            path.unlink(missing_ok=True)  # a dangling symlink


def _leads_to(path: Path, target: Path) -> bool:
    if path.is_symlink():
        return os.readlink(path) == target.name
    return path.is_file() and filecmp.cmp(path, target, shallow=False)  # where there are no symlinks


# --- reading ----------------------------------------------------------------------------------------------------------


def insist(path: Path, read: Callable[[], T]) -> T:
    """read(), tried again for some seconds where a disk or file server fails it for the moment.

    Raises UnreadableCheckpoint for what the system says of `path`.
    """
    started = time.monotonic()
    while True:
        try:
            return read()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            limit = PATIENCE if error.errno in _PASSING else 0.0
            limit = 0.2 if gone and os.path.islink(path) else limit  # what it pointed to was replaced just now
            if time.monotonic() - started >= limit:
                reason = "no such file" if gone else error.strerror or str(error)
                raise UnreadableCheckpoint(path, reason, error) from None
        time.sleep(0.05)


def _content(path: Path) -> bytes:
    if reason := no_file(path):
        raise UnreadableCheckpoint(path, reason)
    return path.read_bytes()


def read_file(path: str | Path) -> Any:
    """`torch.load(weights_only=True)` of a file whose zip checksums were verified first (torch does not look at them).

    Raises UnreadableCheckpoint with a reason in one line.
    """
    import pickle

    import torch

    path = Path(path)
    content = insist(path, lambda: _content(path))  # in one go: what is verified is what is loaded
    if not content:
        raise UnreadableCheckpoint(path, "the file is empty")
    try:
        if other := format_of(io.BytesIO(content), path.suffix):
            raise UnreadableCheckpoint(path, f"{other}, not a PyTorch file")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if damaged := archive.testzip():
                raise UnreadableCheckpoint(path, f"damaged: the checksum of its part {damaged!r} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UnreadableCheckpoint(path, "holds more than tensors and plain types; nothing of it was run") from None
    except zipfile.BadZipFile:
        raise UnreadableCheckpoint(path, "truncated, or not a PyTorch file") from None
    except Exit:
        raise
    except Exception as error:  # a damaged zip or pickle can raise anything; the reason goes to the user
        raise UnreadableCheckpoint(path, f"cannot be read ({type(error).__name__}: {error})".splitlines()[0]) from None


def read_checkpoint(path: str | Path) -> State:
    """The state in one of this project's checkpoints, on the CPU. Raises UnreadableCheckpoint."""
    state = _checked(path, read_file(path))
    if "ae_ckpt_data" in state and "ae_weights" not in state["args"]:  # saved before it was recorded
        state["args"]["ae_weights"] = weights_digest(state["ae_ckpt_data"]["model"])
    return state


def peek_checkpoint(path: str | Path) -> State:
    """Like `read_checkpoint`, at once: without torch, with stand-ins for the tensors, with no checksum verified."""
    return _checked(path, peek(path)[0])


def peek(path: str | Path) -> tuple[Any, set[str]]:
    """`common.peek.read` with its errors as UnreadableCheckpoint."""
    try:
        return insist(Path(path), lambda: read_without_torch(path))
    except ValueError as error:
        raise UnreadableCheckpoint(path, str(error)) from None


def is_ours(content: Any, version: int | None = FORMAT) -> bool:
    """Is this, read from a file, one of this project's checkpoints, of that format (None: any)?"""
    known = isinstance(content, dict) and content.keys() >= {"model", "args", "epoch", "exp_name", "format"}
    plain = known and isinstance(content["args"], dict) and isinstance(content["epoch"], int)
    return plain and version in (None, content["format"])


def _checked(path: str | Path, state: Any) -> State:
    if not is_ours(state, None):
        raise UnreadableCheckpoint(path, "a PyTorch file, but not a checkpoint of this project")
    if not is_ours(state):
        raise UnreadableCheckpoint(path, f"has format {state['format']}, this version reads {FORMAT}")
    for holder in (state, state.get("ae_ckpt_data")):
        if isinstance(holder, dict) and isinstance(flags := holder.get("args"), dict):
            holder["args"] = in_full(flags)
    if state["args"].get("model") == "ddpm":  # saved before there was such a part, or such a choice
        state["args"] = {"fine_ch": 0, "dense_dim": 0, "attention": True} | state["args"]
    return state


def in_full(flags: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's flags, with model types by their full names."""
    said = {name: str(flags.get(name)) for name in ("model", "ae_model")}
    return flags | {name: _SHORT[model] for name, model in said.items() if model in _SHORT}


def names_in(folder: str | Path) -> list[str]:
    """The names in a folder, none if it is not there. Raises OSError if a disk fails: glob would say nothing of it."""
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in _PASSING:
            raise
        return []


def run_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(epoch, path) of the checkpoint files directly in `folder`, newest epoch first."""
    folder = Path(folder)
    found = [(int(match[1]), folder / name) for name in names_in(folder) if (match := _NAME.fullmatch(name))]
    return sorted(found, reverse=True)


def newest_readable(
    folder: str | Path, warn: Warn, read: Callable[[Path], State] = read_checkpoint
) -> tuple[Path, State] | None:
    """The newest checkpoint of a run that can be read; every damaged one that is passed over is named through `warn`.

    None if there is none. Raises UnreadableCheckpoint if a disk or file server fails for longer than a moment: the
    newest may well be whole, and must be neither passed over nor begun again.
    """
    damaged: set[Path] = set()
    while True:
        for _, path in insist(Path(folder), lambda: run_checkpoints(folder)):
            try:
                return path, read(path)
            except UnreadableCheckpoint as error:
                if error.passing:
                    raise
                if error.gone and not path.is_symlink():
                    break  # pruned by the run that trains there, once it had a newer one: look again
                if path not in damaged:
                    damaged.add(path)
                    warn(f"passing over {error}")
        else:
            return None


def open_checkpoint(
    path: str | Path, warn: Warn = console.warn, read: Callable[[Path], State] = read_checkpoint
) -> tuple[Path, State]:
    """(file, state) of what a user's `path` means: a file, a run folder's newest readable checkpoint, or RUN/best.

    Raises UnreadableCheckpoint if there is no such file, or it cannot be read.
    """
    path = Path(path)
    if path.name in ("best", "latest") and not os.path.exists(path) and os.path.isdir(path.parent):
        path = path.with_name(f"{path.name}.pt")
    if not os.path.isdir(path):  # False also for names that are too long
        return path, read(path)
    if found := newest_readable(path, warn, read):
        return found
    raise UnreadableCheckpoint(path, "no readable checkpoint in this folder")


def load_checkpoint(
    path: str | Path,
    *,
    model: Any = None,
    ema: Any = None,
    optimizer: Any = None,
    scaler: Any = None,
) -> State:
    """Read the checkpoint at `path` (a file, a run's folder, or RUN/best) and restore the objects given.

    Returns the whole state. Raises UnreadableCheckpoint, also if its weights do not fit `model`.
    """
    path, state = open_checkpoint(path)
    for name, target in {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}.items():
        if target is not None and state.get(name) is not None:
            try:
                target.load_state_dict(state[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise UnreadableCheckpoint(path, f"its {name} does not fit: {str(error).splitlines()[0]}") from None
    return state


def recorded_runs(directories: Iterable[str | Path], warn: Warn) -> list[tuple[Path, State]]:
    """(folder, state) of the runs in these folders, newest first by what they recorded, each by a glance.

    A run of nothing but damaged checkpoints is named through `warn`. Raises UnreadableCheckpoint if a disk fails.
    """
    places = [Path(directory) for directory in directories]
    folders = [place / name for place in places for name in insist(place, partial(names_in, place))]
    runs = [(folder, state) for folder in folders if (state := glance(folder, warn))]
    return sorted(runs, key=lambda run: (str(run[1].get("timestamp")), run[0].name), reverse=True)


def glance(folder: Path, warn: Warn) -> State | None:
    """What the newest readable checkpoint of a run records; where all are damaged, they are named through `warn`."""
    damaged: list[str] = []
    found = newest_readable(folder, damaged.append, peek_checkpoint)
    for text in damaged if found is None else ():
        warn(text)
    return found and found[1]


def default_runs() -> list[Path]:
    """The folders of the runs that are trained from the current folder without --outdir, or by a job.sh."""
    scratch = os.environ.get("SCRATCH")
    outputs = [Path(scratch), Path(scratch) / "ddpm-output"] if scratch else [Path("outputs")]
    return [folder / RUNS for folder in outputs]


def _newest_run(source: str | Path, types: tuple[str, ...], warn: Warn) -> tuple[Path, State] | None:
    """The newest readable checkpoint of the newest run of one of the `types` in a folder of runs.

    None for anything but a folder of runs, or "latest" for those of `default_runs`. Raises Exit(MODEL_MISMATCH) if all
    of them hold other models, UnreadableCheckpoint if "latest" finds none.
    """
    folder = Path(source)
    latest = str(folder) == "latest" and not os.path.lexists(folder)
    if not latest and (not os.path.isdir(folder) or insist(folder, lambda: run_checkpoints(folder))):
        return None
    folders = default_runs() if latest else [folder]
    runs, where = recorded_runs(folders, warn), " or ".join(map(str, folders))
    for run, glance in runs:
        if glance["args"].get("model") in types and (found := newest_readable(run, warn)):
            return found
    if runs:
        raise Exit(MODEL_MISMATCH, f"{where} holds no run of type {' or '.join(types)}")
    if latest:
        raise UnreadableCheckpoint("latest", f"no run in {where}: train one, or name one elsewhere")
    return None


def read_model(
    source: str | Path | tuple[Path, State], types: tuple[str, ...], warn: Warn = console.warn
) -> tuple[Path, State]:
    """(file, state) of what a path means, or of what was read, if it holds one of the `types`.

    A path: see `open_checkpoint`; a folder of runs means its newest run of these types, and "latest" the newest in
    `default_runs`.
    Raises Exit(MODEL_MISMATCH) if it holds another kind of model, UnreadableCheckpoint if it cannot be read.
    """
    if isinstance(source, tuple):
        path, state = source
    else:
        path, state = _newest_run(source, types, warn) or open_checkpoint(source, warn)
    if (model := infer_model_from_checkpoint(state)) not in types:
        raise Exit(MODEL_MISMATCH, f"{path} holds a model of type {model}; {' or '.join(types)} is needed here")
    return path, state


def very_file(path: Path) -> str:
    """What read_model returned, so that another process reads the same: a folder's newest, or best.pt, moves on."""
    return str(path.resolve() if path.is_symlink() else path)


def is_epochs_name(name: str) -> bool:
    """Is a file of this name a run's checkpoint of an epoch?"""
    return _NAME.fullmatch(name) is not None


def exported_text(state: State) -> str:
    """What to say of an exported file where a checkpoint that can be trained on, or ranked, is wanted."""
    return f"was exported for drawing (infer.py --export) from {state['exp_name']}, epoch {state['epoch']}"


def averaged_weights(state: State) -> dict[str, Any]:
    """The weights to draw with: the EMA's, where there is one. An exported file has no others."""
    averaged = state.get("ema") or state["model"]
    return {key.removeprefix("module."): value for key, value in averaged.items() if key != "n_averaged"}


def load_averaged(net: Any, state: State, path: str | Path) -> None:
    """Give `net` the EMA weights of a checkpoint's state. Raises Exit(MODEL_MISMATCH) if they are another network's."""
    try:
        net.load_state_dict(averaged_weights(state))
    except RuntimeError as error:
        raise of_another_network(path, state, error) from None


def of_another_network(path: str | Path, state: State, error: RuntimeError) -> Exit:
    """What to raise where a `load_state_dict` did: the network of that name is not the one that was trained."""
    network = state["args"].get("network", OUR_NETWORK)
    first = (str(error).splitlines()[1:] or [str(error)])[0].strip()
    today, commits = git_commit(), [start.get("git_commit") for start in starts_in(Path(path).parent)]
    other = [commit for commit in commits if isinstance(commit, str) and commit != today]
    trained = f" (it was trained by commit {other[-1]:.10})" if other else ""
    text = f"{path} holds the weights of another network than {network}.py has{trained}: {first:.100}"
    return Exit(MODEL_MISMATCH, text)


def is_complete(state: State) -> bool:
    """Was this saved at the end of its epoch (not within it)?"""
    return state.get("val_loss") is not None


def infer_model_from_checkpoint(source: str | Path | State) -> str:
    """ "ae-mlp", "ae-conv", "lddpm" or "ddpm", from a checkpoint's path or its state.

    The short forms "mlp" and "conv" are understood too. Raises UnreadableCheckpoint if none of them is recorded.
    """
    state = source if isinstance(source, dict) else open_checkpoint(source, read=peek_checkpoint)[1]
    model = str(in_full(state["args"]).get("model"))
    if model not in MODEL_TYPES:
        raise UnreadableCheckpoint(
            source if not isinstance(source, dict) else state["exp_name"], f"unknown model type {model!r}"
        )
    return model


def weights_digest(weights: dict[str, Any]) -> str:
    """12 hex digits of the SHA-256 of a state_dict's tensors: what a network is, wherever its file lies."""
    import torch

    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


# --- promised under these names, and kept where they belong -----------------------------------------------------------


def find_latest_checkpoint(directory: str | Path, prefix: str = "", warn: Warn = console.warn) -> Path | None:
    """The newest checkpoint of all runs below `directory` whose names begin with `prefix`; None if there is none.

    Newest by the time recorded inside, not by mtime, which copying a tree rewrites.
    """
    for folder, _ in recorded_runs([directory], warn):
        if folder.name.startswith(prefix) and (found := newest_readable(folder, warn)):
            return found[0]
    return None


def resolve_resume_path(
    resume: str | None, auto_resume: bool, directory: str | Path, prefix: str, warn: Warn = console.warn
) -> Path | None:
    """The checkpoint file that --resume, or else --auto-resume, means; None for a fresh start.

    `resume`: see `common.run.resume_target`. `auto_resume` alone: `find_latest_checkpoint`. The trainers themselves
    choose by what a run does, not by its name (`common.run.open_run`).
    """
    from common.run import resume_target

    if resume is not None:
        return resume_target(resume, auto_resume, warn)[0]
    return find_latest_checkpoint(directory, prefix, warn) if auto_resume else None


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Show what is in any PyTorch file, a run's newest checkpoint or RUN/best, and return it as plain types.

    See `common.inspect_ckpt.describe`. Raises UnreadableCheckpoint.
    """
    from common.inspect_ckpt import describe, odd_values, report

    with odd_values(path):
        _, info = open_checkpoint(path, read=describe)
        print(report(info))
    return info
