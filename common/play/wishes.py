"""What a browser asks for, checked: every number has bounds, every sentence of refusal says what to do."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from common.flags import SAMPLERS, timesteps_left

MOST_BYTES = 64 * 1024  # of a message
MOST_IMAGES = 144
MOST_GUIDANCE = 20.0
MOST_SIDES = 2
MOST_PASSES = 20  # of a sketch that is finished
MOST_WORK = 300_000  # images times steps of a drawing: minutes of a small U-Net, for which other tabs' long work waits
PIXELS = 28 * 28
SKETCH, MASK = "sketch.png", "mask.png"


class Refused(ValueError):
    """One sentence or two for the person at the browser."""


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def parsed(message: str | bytes) -> dict[str, Any]:
    """A message as a dict. Raises Refused if it is not one, or holds NaN or Infinity."""
    try:
        wish = json.loads(message, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused("The message is not JSON.") from None
    if not isinstance(wish, dict) or not isinstance(wish.get("do"), str):
        raise Refused('A message is an object with "do".')
    return wish


def whole(wish: dict[str, Any], name: str, low: int, high: int) -> int:
    """wish[name] as an int in [low, high]. Raises Refused."""
    value = wish.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(f"{name.capitalize()} must be a whole number from {low} to {high}.")
    return value


def real(wish: dict[str, Any], name: str, low: float, high: float) -> float:
    """wish[name] as a float in [low, high]. Raises Refused."""
    return _real(wish.get(name), name, low, high)


def _real(value: Any, name: str, low: float, high: float) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or not math.isfinite(value):
        raise Refused(f"{name.capitalize()} must be a number from {low:g} to {high:g}.")
    return float(value)


def reals(wish: dict[str, Any], name: str, count: int, low: float, high: float) -> list[float]:
    """wish[name] as `count` floats in [low, high]. Raises Refused."""
    values = wish.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise Refused(f"{name.capitalize()} must be a list of {count} numbers.")
    return [_real(value, name, low, high) for value in values]


def digits(wish: dict[str, Any]) -> list[int]:
    """wish["digits"], a list of different digits, empty for any. Raises Refused."""
    value = wish.get("digits")
    fits = isinstance(value, list) and len(value) <= 10 and all(type(d) is int and 0 <= d <= 9 for d in value)
    if not fits or len(set(value)) < len(value):
        raise Refused("Digits must be a list of different digits from 0 to 9.")
    return value


def pixels(wish: dict[str, Any], name: str) -> bytes:
    """wish[name], a 28 x 28 image from 0 to 255, as bytes. Raises Refused."""
    value = wish.get(name)
    if not isinstance(value, list) or len(value) != PIXELS or not all(type(v) is int and 0 <= v <= 255 for v in value):
        raise Refused(f"{name.capitalize()} must be {PIXELS} whole numbers from 0 to 255.")
    return bytes(value)


class Sketch(NamedTuple):
    """What a drawing begins with: an image, which is noised by `strength` of the timesteps, or finished in `passes`."""

    image: bytes
    finish: bool
    strength: float
    passes: int


class Drawing(NamedTuple):
    """One picture: a grid of digits, by settings that infer.py has too."""

    side: int
    digits: list[int]
    count: int
    guidance: float
    sampler: str
    steps: int
    seed: int
    sketch: Sketch | None = None
    labelled: bool = True  # does the network take labels?

    @property
    def all_steps(self) -> int:
        return self.steps * (self.sketch.passes if self.sketch else 1)


def drawing(wish: Any, T: int, labelled: bool = True) -> Drawing:
    """The settings of a drawing from a model with T steps, which takes labels or not. Raises Refused."""
    if not isinstance(wish, dict):
        raise Refused("A drawing is an object.")
    if wish.get("sampler") not in SAMPLERS:
        raise Refused(f"The sampler must be one of {', '.join(SAMPLERS)}.")
    sketch = sketch_of(wish)
    count, named, steps = whole(wish, "count", 1, MOST_IMAGES), digits(wish), whole(wish, "steps", 1, T)
    if count < len(named):  # an equal run of each would have less than one image: those that get one
        named = [named[i * len(named) // count] for i in range(count)]
    guidance = real(wish, "guidance", 0, MOST_GUIDANCE)
    if sketch is not None:
        steps = min(steps, timesteps_left(sketch.strength, T))
        guidance = guidance if named else 1.0  # nobody said what is in the picture
    guidance = guidance if labelled else 1.0
    asked = Drawing(
        side=whole(wish, "side", 0, MOST_SIDES - 1),
        digits=named,
        count=count,
        guidance=guidance,
        sampler=wish["sampler"],
        steps=steps,
        seed=whole(wish, "seed", 0, 2**32 - 1),
        sketch=sketch,
        labelled=labelled,
    )
    if (work := asked.count * asked.all_steps) > MOST_WORK:
        fewer = "images, steps or passes" if sketch and sketch.finish else "images or steps"
        raise Refused(
            f"That is {work:,} images times steps, and at most {MOST_WORK:,} are drawn: choose fewer {fewer}."
        )
    return asked


def sketch_of(wish: dict[str, Any]) -> Sketch | None:
    """What a drawing begins with, if it has an "image". Raises Refused."""
    if "image" not in wish:
        return None
    image, finish = pixels(wish, "image"), wish.get("finish") is True
    if finish and 0 not in image:
        raise Refused("Nothing is left to be filled in: what is drawn stays, so leave some of it black.")
    strength = 1.0 if finish else real(wish, "strength", 0.001, 1)
    return Sketch(image, finish, strength, whole(wish, "passes", 1, MOST_PASSES) if finish else 1)


def words_of(drawing: Drawing) -> list[str]:
    """The flags by which infer.py draws it; a sketch lies in SKETCH, what is to be drawn anew of it in MASK."""
    words = ["--num-images", drawing.count, "--sampler", drawing.sampler, "--steps", drawing.steps]
    words += ["--seed", drawing.seed]
    if drawing.labelled and (drawing.digits or not drawing.sketch):
        words += ["--guidance", drawing.guidance]
    if drawing.digits:
        words += ["--digit", *drawing.digits]
    if drawing.sketch:
        words += ["--from-image", SKETCH]
        finish = ["--inpaint", MASK, "--resample", drawing.sketch.passes]
        words += finish if drawing.sketch.finish else ["--strength", drawing.sketch.strength]
    return [str(word) for word in words]
