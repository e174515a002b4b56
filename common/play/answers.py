"""What a browser may ask for by name, which of it is short, and the look into a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.play import drawings, judge, space
from common.play.drawings import Send
from common.play.runs import Entry, Shelf
from common.play.worker import Wish
from common.record import rows_in

MOST_ROWS = 5000  # epochs of metrics.jsonl that are shown
_PICTURE = re.compile(r"epoch_(\d{6,})\.png")


def look(shelf: Shelf, wish: Wish, asked: dict[str, Any], send: Send) -> None:
    """A run's curves, the epochs it has pictures of, and its flags."""
    entry = shelf.entry(asked.get("run"))
    names = ("epoch", "train_loss", "val_loss", "lr", "seconds")
    rows = [{name: row.get(name) for name in names} for row in rows_in(entry.folder)]
    flags = {name: str(value) for name, value in sorted(entry.flags.items())}
    shown = {"rows": thinned(rows), "epochs": len(rows), "pictures": sorted(pictures(entry))}
    send(last=True, epoch=entry.newest(), flags=flags, **shown)


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of very many rows every so manieth, among them the last, and the one of the lowest val_loss."""
    kept = set(range(len(rows) - 1, -1, -max(1, -(-len(rows) // MOST_ROWS))))
    losses = {index: row["val_loss"] for index, row in enumerate(rows) if isinstance(row["val_loss"], int | float)}
    kept |= set(sorted((index for index in losses if math.isfinite(losses[index])), key=losses.get)[:1])
    return [rows[index] for index in sorted(kept)]


def pictures(entry: Entry) -> dict[int, Path]:
    """{epoch: its picture}."""
    files = entry.samples.iterdir() if entry.samples.is_dir() else ()
    return {int(match[1]): path for path in files if (match := _PICTURE.fullmatch(path.name))}


class Answer(NamedTuple):
    """answer(shelf, wish, asked, send); is_short(shelf, asked): may it come between the steps of other work?"""

    answer: Callable[[Shelf, Wish, dict[str, Any], Send], None]
    is_short: Callable[[Shelf, dict[str, Any]], bool]


def _always(_shelf: Shelf, _asked: dict[str, Any]) -> bool:
    return True


def _never(_shelf: Shelf, _asked: dict[str, Any]) -> bool:
    return False


ANSWERS = {
    "draw": Answer(drawings.draw, drawings.is_short),
    "judge": Answer(judge.judge, lambda _shelf, asked: asked.get("train") is not True),
    "take": Answer(drawings.take, _never),
    "map": Answer(space.map_digits, _never),
    "digit": Answer(space.digit, _always),
    "walk": Answer(space.walk, _always),
    "decode": Answer(space.decode, _always),
    "look": Answer(look, _always),
}
