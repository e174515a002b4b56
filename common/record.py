"""What a run leaves behind beside its weights: config.json, metrics.jsonl, TensorBoard, sample grids.

All of it is kept free of gaps and repeats across resumes: what was recorded after the checkpoint that a resume starts
from is removed, because it will be recorded again (a grid when its epoch is drawn anew).
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.args import AUTO, Args
from common.curves import draw_curves
from common.events import Appended, Events
from common.files import write_text
from common.images import make_image_grid, save_image_grid
from common.ranks import identity

if TYPE_CHECKING:
    import torch

    from common.run import Run

CONFIG, METRICS = "config.json", "metrics.jsonl"


def _read_config(folder: Path) -> dict[str, Any]:
    """A run folder's config.json, {} if there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        config = json.loads((folder / CONFIG).read_text())
        return config if isinstance(config, dict) else {}
    return {}


def flags_in(folder: Path) -> dict[str, Any]:
    """The flags in a run folder's config.json, {} if there are none that can be read."""
    with suppress(AttributeError, KeyError, TypeError):
        return {name: entry["value"] for name, entry in _read_config(folder)["flags"].items()}
    return {}


def starts_in(folder: Path) -> list[dict[str, Any]]:
    """The starts in a run folder's config.json, the last one last; [] if there are none that can be read."""
    starts = _read_config(folder).get("starts")
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The rows in a run folder's metrics.jsonl, but for torn lines; [] if it cannot be read."""
    rows = []
    with suppress(OSError):
        for line in (folder / METRICS).read_text(errors="replace").splitlines():
            with suppress(ValueError, RecursionError):  # torn by a kill, or being written just now
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def announce(folder: Path, args: Args) -> None:
    """Write a new run's config.json as far as it is known, so that no other start takes its folder for a dead run's."""
    with suppress(OSError):  # whoever writes next says so
        write_text(folder / CONFIG, _config(folder.name, args, []))


def _config(exp_name: str, args: Args, starts: list[dict[str, Any]]) -> str:
    origin = args.origin
    flags = {name: {"value": value, "from": origin.get(name, "derived")} for name, value in args.flags().items()}
    return json.dumps({"exp_name": exp_name, "flags": flags, "starts": starts}, indent=1, default=str) + "\n"


class Record:
    """The written record of a run. `warn` is told, once, when something cannot be written; training goes on.

    Lines and events that could not be written follow when it is possible again.
    """

    def __init__(self, run: Run, warn: Callable[[str], None]) -> None:
        self.run, self.warn = run, warn
        self._metrics = Appended(run.checkpoints / METRICS)
        self._events: Events | None = None
        self._purge_step = 0
        self._failed: set[str] = set()
        self._drawn, self._curves_at, self._curves_cost = True, time.monotonic(), 0.08  # seconds, until it is known

    def start(self, args: Args, device: torch.device) -> None:
        """Add this start to config.json, and say what changed about the machine."""
        import torch

        starts = starts_in(self.run.checkpoints)
        config = self.run.checkpoints / CONFIG
        if config.is_file() and not _read_config(config.parent):
            kept = config.with_name(f"{CONFIG}.aside-{uuid.uuid4().hex[:8]}")
            self._try(CONFIG, lambda: os.replace(config, kept))
            self.warn(f"{config} does not tell of the run's earlier starts: set aside as {kept.name}")
        now = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "device": str(device),
            "processes": identity().size,
            "threads": args.threads,
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "git_commit": git_commit(),
            "resumed_from": str(self.run.source) if self.run.source else None,
        }
        if self.run.state:
            before = {**(starts or [{}])[-1], "threads": self.run.state["args"].get("threads")}
            for name in ("device", "threads", "torch"):
                if before.get(name) not in (None, AUTO, now[name]):
                    self.warn(
                        f"{name} was {before[name]} and is now {now[name]}: results may differ in their last bits"
                    )
        self._now_and_before = [*starts, now]
        self.amend(args)

    def amend(self, args: Args) -> None:
        """Write the flags as they are now, and the number of threads, which is known only at the first step."""
        self._now_and_before[-1]["threads"] = args.threads
        self._config = _config(self.run.name, args, self._now_and_before)
        self.config_again()

    def last_start(self) -> dict[str, Any]:
        """What config.json says of the run's last start, {} if it does not."""
        return (starts_in(self.run.checkpoints) or [{}])[-1]

    def config_again(self) -> None:
        """Write config.json (again, where somebody deleted the run's folder)."""
        self._try(CONFIG, lambda: write_text(self.run.checkpoints / CONFIG, self._config))

    def rewind(self) -> None:
        """Drop what was recorded after the checkpoint that the run resumes from (in a fresh run: everything).

        Replaces the log file: whoever holds it open must open it anew.
        """
        state = self.run.state or {"epoch": 1, "global_step": 0, "val_loss": None}
        done = state["epoch"] if state["val_loss"] is not None else state["epoch"] - 1
        # An epoch's own figures stand at its last step: a checkpoint within the epoch does not count them as done.
        self._purge_step = state["global_step"] + (1 if state["val_loss"] is not None else 0)
        self._filter(self.run.checkpoints / METRICS, lambda line: _epoch_in_json(line) <= done)
        self._filter(self.run.log_file, lambda line: _epoch_in_log(line) <= done)

    def _filter(self, path: Path, keep: Callable[[str], bool]) -> None:
        def rewrite() -> None:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if keep(line)]
            if kept != lines:
                write_text(path, "".join(kept))

        if path.is_file():
            self._try(path.name, rewrite)

    @property
    def events(self) -> Events:
        """TensorBoard's event file, begun when first needed (its imports take longer than a training step)."""
        if self._events is None:
            self._events = Events(self.run.tensorboard, self._purge_step)
        return self._events

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add TensorBoard scalars at `step` (the global step, for every tag)."""
        self.events.scalars(values, step)
        self.flush()

    def epoch(self, row: dict[str, Any], step: int) -> None:
        """Add one epoch's line to metrics.jsonl and its figures to TensorBoard."""
        self._metrics.write(json.dumps({key: _json_safe(value) for key, value in row.items()}).encode() + b"\n")
        names = {"train_loss": "loss/train", "val_loss": "loss/validation"}
        skip = ("epoch", "global_step", "timestamp")
        figures = {names.get(k, k): v for k, v in row.items() if k not in skip and isinstance(v, int | float)}
        self.scalars(figures, step)
        self._curves(cheaply=True)

    def _curves(self, cheaply: bool) -> None:
        """Redraw curves.png; cheaply: not before 30 times as long has passed as drawing it took the last time."""
        self._drawn = False
        if cheaply and time.monotonic() - self._curves_at < 30 * self._curves_cost:
            return
        started = time.monotonic()

        def draw() -> None:
            draw_curves(self.run.checkpoints / METRICS, self.run.samples / "curves.png", self.run.name)
            self._drawn = True

        self._try("curves.png", draw)
        self._curves_at = time.monotonic()
        self._curves_cost = self._curves_at - started

    def images(self, images: torch.Tensor, epoch: int, step: int) -> None:
        """Write samples/{exp_name}/epoch_NNNNNN.png, and the grid to TensorBoard. images: (N, C, H, W) in [0, 1]."""
        self._try("sample grid", lambda: save_image_grid(images, self.run.samples / f"epoch_{epoch:06d}.png"))
        self._try("sample grid for TensorBoard", lambda: self.events.image("samples", make_image_grid(images), step))
        self.flush()

    def hyperparameters(self, args: Args, metrics: dict[str, float], step: int) -> None:
        """TensorBoard's HPARAMS tab: this run's flags against its final figures."""
        plain = {k: v if isinstance(v, int | float | bool) else _readable(str(v)) for k, v in args.flags().items()}
        self.events.hyperparameters(plain, metrics, step)
        self.flush()

    def flush(self) -> None:
        """Bring metrics.jsonl and TensorBoard's events to the disk, with what could not be written before."""
        self._try(METRICS, self._metrics.flush)
        if self._events is not None:
            self._try("TensorBoard", self._events.flush)

    def close(self) -> None:
        """Bring everything to the disk, and curves.png up to date."""
        self.flush()
        if not self._drawn:
            self._curves(cheaply=False)

    def _try(self, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
            if what not in self._failed:
                self._failed.add(what)
                self.warn(f"cannot write {what} ({error}); training goes on")


class NoRecord:
    """The record of a process that writes none: of several that train together, all but the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _readable(text: str) -> str:
    """A path may hold bytes that are not UTF-8, which TensorBoard's format cannot."""
    return text.encode(errors="backslashreplace").decode()


def _json_safe(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _epoch_in_json(line: str) -> float:
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf  # a line torn by a kill


def _epoch_in_log(line: str) -> float:
    match = re.search(r" epoch +(\d+)/\d+ +train_loss", line)
    return int(match[1]) if match else 0


def git_commit() -> str | None:
    """Of this repository, and of no other that a copy of it lies in, or that a hook of git has in its environment."""
    root = Path(__file__).resolve().parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "rev-parse", "--show-cdup", "HEAD"]  # the way up to the top: none
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=5, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    above, _, commit = reply.stdout.partition("\n")
    return commit.strip() or None if not above else None
