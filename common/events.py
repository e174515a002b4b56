"""Files that only grow, and TensorBoard's events as one of them.

SummaryWriter hands its events to a thread, which dies with a traceback when the disk is full and takes what it had not
written with it. Here a write that fails is an OSError in the caller, and is made up for at the next one.
"""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Appended:
    """A file to append to. What cannot be written now is kept, and goes before what comes next."""

    def __init__(self, path: Path) -> None:
        self.path, self._pending = path, b""

    def write(self, data: bytes) -> None:
        """Take `data`; `flush` brings it to the file."""
        self._pending += data

    def flush(self) -> None:
        """Write what is pending. Raises OSError; nothing is lost by that, and nothing is written twice."""
        if self._pending:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                while self._pending:
                    self._pending = self._pending[file.write(self._pending) :]


class Events(Appended):
    """A TensorBoard event file in `folder`. Of earlier files, TensorBoard shows only steps below `purge_step`."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads a run's files in the order of their names: ours must come last, whatever the clock says
        names = [re.match(r"events\.out\.tfevents\.(\d+(?:\.\d+)?)\.", path.name) for path in folder.glob("events.*")]
        stamp = max([time.time(), *(float(name[1]) + 1e-5 for name in names if name)])
        super().__init__(folder / f"events.out.tfevents.{stamp:.6f}.{socket.gethostname()}.{os.getpid()}")
        self._records = RecordWriter(self)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One point in the curve of each tag."""
        from torch.utils.tensorboard.summary import scalar

        for tag, value in values.items():
            self._add(step=step, summary=scalar(tag, value))

    def image(self, tag: str, image: torch.Tensor, step: int) -> None:
        """image: (C, H, W) in [0, 1]."""
        from torch.utils.tensorboard.summary import image as summary_of

        self._add(step=step, summary=summary_of(tag, image, dataformats="CHW"))

    def hyperparameters(self, flags: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        """The HPARAMS tab: plain flags against the run's final figures."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(flags, metrics):
            self._add(step=step, summary=summary)
        self.scalars(metrics, step)
