"""Where a training stands: all of a checkpoint that is neither weights nor flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.progress import counted


@dataclass
class TrainState:
    """Saved, restored and, between two epochs, reset as a whole."""

    epoch: int = 1  # that the weights belong to
    batch: int = 0  # batches done in it
    global_step: int = 0
    best: dict[str, Any] | None = None  # {"val_loss", "epoch"} of the lowest validation loss
    val_loss: float | None = None  # None until the epoch is complete
    scores: dict[str, float] = field(default_factory=dict)
    loss_sum: float = 0.0  # of the epoch's rows so far
    loss_rows: int = 0
    seconds: float = 0.0  # spent on the epoch's batches so far

    @property
    def train_loss(self) -> float | None:
        """Mean loss of the epoch's rows so far, None before the first."""
        return self.loss_sum / self.loss_rows if self.loss_rows else None

    def next_epoch(self) -> TrainState:
        """The state before the first batch of the next epoch."""
        return TrainState(self.epoch + 1, global_step=self.global_step, best=self.best)

    def to_checkpoint(self) -> dict[str, Any]:
        """The keys that a checkpoint keeps it under."""
        plain = {name: getattr(self, name) for name in ("epoch", "batch", "global_step", "best", "val_loss", "scores")}
        running = [self.loss_sum, self.loss_rows, self.seconds]
        return {**plain, "train_loss": self.train_loss, "running": running}

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any]) -> TrainState:
        """Mirror of `to_checkpoint`."""
        plain = (state[name] for name in ("epoch", "batch", "global_step", "best", "val_loss"))
        return cls(*plain, state.get("scores") or {}, *state["running"])

    def why_ended(self, flags: Mapping[str, Any]) -> str:
        """Why a run with these flags ends after this epoch; "" if it goes on."""
        epochs, patience = flags.get("epochs", self.epoch), flags.get("early_stopping_patience")
        if self.epoch >= epochs:
            return f"epoch {self.epoch} of {epochs} is done"
        if patience and self.best and self.epoch - self.best["epoch"] >= patience:
            waited = f"early stopping, no better val_loss for {counted(patience, 'epoch')}"
            return f"{waited} (--early-stopping-patience 0, or a larger one, goes on)"
        return ""
