"""The curves of README.md beside this file: distance against minutes of training, from its two tables.

python tests/benchmarks/curve.py     # writes pixel.png
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
CELL = re.compile(r"([\d.]+), [\d.]+ %")  # distance, taken for the wanted digit[, recall]
MINUTES = (1, 3, 10)
TICKS = (0.5, 1, 2, 5, 10, 20, 50)
COLOURS = plt.get_cmap("tab20").colors[::2] + plt.get_cmap("tab20").colors[1::2]  # the strong ones first
Distances = dict[str, dict[int, list[float]]]  # by network and minutes, of each seed


def tables(text: str) -> dict[str, tuple[float, Distances]]:
    """What was drawn -> (the distance of as many real ones, the distances)."""
    found = {}
    for paragraph, part in re.findall(r"\n((?:Digit 5|All digits), [^\n]*)\n\n(\|.*?)\n\n", text, re.DOTALL):
        header, _, *rows = part.splitlines()
        minutes = [int(title.split()[0]) for title in header.split("|")[2:-1]]
        of_networks: Distances = {}
        for row in rows:
            name, *cells = (cell.strip(" *") for cell in row.split("|")[1:-1])
            seeds = {m: [float(d) for d in CELL.findall(cell)] for m, cell in zip(minutes, cells, strict=True)}
            seeds = {m: distances for m, distances in seeds.items() if distances}
            if len(seeds) > 1:  # one number of minutes is no curve
                of_networks[name] = seeds
        real = float(re.search(r"have a distance of (\d+\.\d+)", paragraph)[1])
        found[paragraph.split(";")[0]] = real, of_networks
    return found


def main() -> None:
    found = tables((HERE / "README.md").read_text())
    fig, axes = plt.subplots(1, len(found), figsize=(11, 5.5), sharex=True, sharey=True, layout="constrained")
    colours: dict[str, tuple[float, ...]] = {}
    for ax, (title, (real, networks)) in zip(axes, found.items(), strict=True):
        for name, seeds in networks.items():
            colour = colours.setdefault(name, COLOURS[len(colours)])
            means = [sum(distances) / len(distances) for distances in seeds.values()]
            ax.plot(list(seeds), means, "-" if name.startswith("ours") else "--", color=colour)
            for m, distances in seeds.items():
                ax.plot([m] * len(distances), distances, "o", color=colour, markersize=4)
        ax.axhline(real, color="grey", linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel="minutes of training", title=title)
        ax.minorticks_off()
        ax.set_xticks(MINUTES, [str(m) for m in MINUTES])
        ax.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axes[0].set_ylabel("Fréchet distance")
    for name, colour in colours.items():
        axes[0].plot([], [], "-o" if name.startswith("ours") else "--o", color=colour, label=name, markersize=4)
    axes[0].plot([], [], ":", color="grey", label="real digits")
    fig.legend(loc="outside lower center", ncols=3, fontsize="small", title="network, learning rate, batch")
    fig.savefig(HERE / "pixel.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
