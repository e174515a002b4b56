"""How the benchmark measures: the matrix-product rate, the real scripts, and the table that both end up in."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent
FRESH = 5.0  # seconds for which a measured rate serves: figures often come in bunches
REFERENCE_RATE = 47.0  # GFLOP/s of the machine on which the figures called "reference" were measured


def matmul_rate(repeats: int = 15) -> float:
    """Median GFLOP/s of a 2048^3 float32 matrix product."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    seconds = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds[2:]) / 1e9


def best_of(count: int, measure: Callable[[], float]) -> float:
    """The smallest of `count` measurements."""
    return min(measure() for _ in range(count))


def run(folder: str, *command: object) -> tuple[float, str]:
    """(wall seconds, stdout) of `python ...` started in an experiment's folder."""
    started = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    reply = subprocess.run(words, cwd=ROOT / folder, capture_output=True, text=True)
    if reply.returncode:
        sys.exit(f"{' '.join(words[1:])} failed in {folder}:\n{reply.stdout}{reply.stderr}")
    return time.perf_counter() - started, reply.stdout


_PEAK = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(code)
"""


def peak_gigabytes(folder: str, *command: object) -> tuple[float, float]:
    """(wall seconds, the most memory that it held at once, in 10^9 bytes) of `python ...` in an experiment's folder."""
    seconds, text = run(folder, "-c", _PEAK, *command)
    return seconds, int(re.findall(r"^PEAK (\d+)$", text, re.MULTILINE)[-1]) / 1e9


def train(folder: str, *flags: object) -> tuple[float, Path]:
    """(wall seconds, run folder) of a train.py."""
    seconds, text = run(folder, "train.py", *flags)
    return seconds, Path(re.findall(r"^checkpoints: (.+)$", text, re.MULTILINE)[-1])


class Figures:
    """The table: each figure beside a peer's, if it has one, and the matrix-product rate measured beside it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rate, self.rated = 0.0, float("-inf")  # the matrix product's rate, and when it was measured

    def add(
        self,
        figure: str,
        ours: float,
        unit: str = "",
        *,
        peer: float | None = None,
        reference: float | None = None,
        scaled: bool = False,
    ) -> None:
        """peer: the same, measured in this run. reference: the reference's. scaled: show ours at its machine's rate."""
        if time.perf_counter() - self.rated > FRESH:
            self.rate, self.rated = matmul_rate(), time.perf_counter()
        rate = self.rate
        row = {"figure": figure, "ours": ours, "unit": unit, "peer": peer, "matmul": rate}
        row["peer / ours"] = peer / ours if peer and ours else None
        row["at 47"] = ours * rate / REFERENCE_RATE if scaled else None
        self.rows.append(row | {"reference": reference})
        print(f"  {figure}: {ours:.4g} {unit}" + (f", peer {peer:.4g}" if peer else ""), file=sys.stderr, flush=True)

    def print(self) -> None:
        """The table, as text."""
        heads = ("ours", "peer", "peer / ours", "matmul", "at 47", "reference")
        print(f"{'figure':<66} {'':<7}" + "".join(f"{head:>12}" for head in heads))
        for row in self.rows:
            cells = (f"{row[head]:>12.4g}" if row[head] is not None else " " * 12 for head in heads)
            print(f"{row['figure']:<66} {row['unit']:<7}" + "".join(cells))

    def write(self, path: Path, **about: Any) -> None:
        """The table, as JSON."""
        path.write_text(json.dumps(about | {"rows": self.rows}, indent=1) + "\n")
