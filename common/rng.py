"""Randomness as a function: every draw belongs to (seed, purpose, epoch or step), never to a hidden state.

So a resumed run repeats an uninterrupted one bit for bit without storing generator states, previews cannot disturb
training, and processes that share a batch can each draw the whole batch's noise and keep their own rows.
"""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed for one purpose, e.g. `derive_seed(42, "order", epoch)` (torch's CPU generator uses 32 bits)."""
    digest = hashlib.blake2b(repr((operator.index(seed), *purpose)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A fresh CPU generator for one purpose. Draw on the CPU and move: so every device sees the same numbers."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
