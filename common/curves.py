"""curves.png: a run's losses and learning rate, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from common.ckpt import atomic_write


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Draw the epochs in a metrics.jsonl as a PNG, 640 x 480. Raises OSError if it cannot be written.

    Figure without pyplot: no window system, no global state, half of the import time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(6.4, 4.8), dpi=100)  # a layout engine would take longer than all the rest
    spaces = {"left": 0.13, "right": 0.97, "bottom": 0.1, "top": 0.94, "hspace": 0.1}
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1), gridspec_kw=spaces)
    for name, colour, style in (("train_loss", "#0072B2", "-"), ("val_loss", "#D55E00", "--")):
        values = [row[name] if row[name] is not None else float("nan") for row in rows]
        label = {"train_loss": "training", "val_loss": "validation"}[name]
        losses.plot(
            epochs, values, style, color=colour, label=label, marker="o" if len(rows) < 40 else "", markersize=3
        )
    losses.set(yscale="log", ylabel="loss", title=title)
    losses.title.set_fontsize(8)
    losses.legend()
    rate.plot(epochs, [row["lr"] for row in rows], color="#009E73", marker="o" if len(rows) < 40 else "", markersize=3)
    rate.set(xlabel="epoch", ylabel="lr")
    losses.yaxis.set_major_locator(MaxNLocator(6))
    losses.yaxis.set_minor_locator(NullLocator())
    rate.yaxis.set_major_locator(MaxNLocator(3))
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, rate):
        axes.grid(alpha=0.3)
        axes.yaxis.set_label_coords(-0.1, 0.5)
    losses.yaxis.set_major_formatter("{x:g}")  # powers of ten would be set as mathematics, which is slow
    rate.yaxis.set_major_formatter("{x:.0e}")
    atomic_write(target, lambda file: FigureCanvasAgg(figure).print_png(file))
