"""curves.png: a run's losses and learning rate, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from common.files import atomic_write

A_DECADE = 10  # from which ratio on a logarithmic axis gets the ticks 1, 2 and 5 of every decade


def tick_name(value: float, _position: int | None = None) -> str:
    """0.005, 12, 1.5e-4: as exact as `:g`, and short. Powers of ten would be set as mathematics, which is slow."""
    plain = f"{value:g}"
    if len(plain) <= 5 and "e" not in plain:
        return plain
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Draw the epochs in a metrics.jsonl as a PNG, 640 x 480.

    Raises OSError if that is missing or the PNG cannot be written, ValueError or KeyError for lines that are torn.
    title: the run's name. Figure without pyplot: no window system, no global state, half of the import time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(6.4, 4.8), dpi=100)  # a layout engine would take longer than all the rest
    spaces = {"left": 0.13, "right": 0.97, "bottom": 0.1, "top": 0.94, "hspace": 0.1}
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1), gridspec_kw=spaces)
    autoencoder = title.startswith("ae-")  # its training loss is more than what its validation measures
    names = {"train_loss": "training", "val_loss": "validation" + ": squared error alone" * autoencoder}
    for (name, label), colour, style in zip(names.items(), ("#0072B2", "#D55E00"), ("-", "--"), strict=True):
        values = [row[name] if row[name] is not None else float("nan") for row in rows]
        losses.plot(
            epochs, values, style, color=colour, label=label, marker="o" if len(rows) < 40 else "", markersize=3
        )
    losses.set(yscale="log", ylabel="loss", title=title)
    losses.title.set_fontsize(8)
    losses.legend()
    rate.plot(epochs, [row["lr"] for row in rows], color="#009E73", marker="o" if len(rows) < 40 else "", markersize=3)
    rate.set(xlabel="epoch", ylabel="lr")
    low, high = losses.get_ylim()
    wide = high / low >= A_DECADE
    losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=99) if wide else MaxNLocator(6))
    losses.yaxis.set_minor_locator(NullLocator())
    rate.yaxis.set_major_locator(MaxNLocator(3))
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, rate):
        axes.grid(alpha=0.3)
        axes.yaxis.set_label_coords(-0.1, 0.5)
        axes.yaxis.set_major_formatter(tick_name)
    atomic_write(target, lambda file: FigureCanvasAgg(figure).print_png(file))
