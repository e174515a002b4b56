"""What a browser asks for, checked: every number has bounds, every sentence of refusal says what to do."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from common.args import SAMPLERS

MOST_BYTES = 64 * 1024  # of a message
MOST_IMAGES = 144
MOST_GUIDANCE = 20.0
MOST_SIDES = 2
SIZE = 28


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


class Drawing(NamedTuple):
    """One picture: a grid of digits, by settings that infer.py has too."""

    side: int
    digits: list[int]
    count: int
    guidance: float
    sampler: str
    steps: int
    seed: int


def drawing(wish: dict[str, Any], T: int) -> Drawing:
    """The settings of a drawing from a model with T steps. Raises Refused."""
    if not isinstance(wish, dict):
        raise Refused("A drawing is an object.")
    if wish.get("sampler") not in SAMPLERS:
        raise Refused(f"The sampler must be one of {', '.join(SAMPLERS)}.")
    return Drawing(
        side=whole(wish, "side", 0, MOST_SIDES - 1),
        digits=digits(wish),
        count=whole(wish, "count", 1, MOST_IMAGES),
        guidance=real(wish, "guidance", 0, MOST_GUIDANCE),
        sampler=wish["sampler"],
        steps=whole(wish, "steps", 1, T),
        seed=whole(wish, "seed", 0, 2**32 - 1),
    )


def words_of(drawing: Drawing) -> list[str]:
    """The flags by which infer.py draws it."""
    words = ["--num-images", drawing.count, "--sampler", drawing.sampler, "--steps", drawing.steps]
    words += ["--guidance", drawing.guidance, "--seed", drawing.seed]
    return [str(word) for word in [*words, *(["--digit", *drawing.digits] if drawing.digits else [])]]
