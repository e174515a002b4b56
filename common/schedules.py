"""Noise schedules: how much noise each of T steps adds. Another one is another function here, named at the end.

Each returns beta, (T,) float64 in (0, 1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LARGEST_BETA = 0.999  # the last step of a cosine would leave nothing at all


def linear(T: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """Evenly from beta_start to beta_end (Ho et al. 2020, section 4)."""
    import torch

    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


def cosine(T: int, _beta_start: float, _beta_end: float) -> torch.Tensor:
    """alpha_bar falls as a squared cosine, slowly at both ends (Nichol & Dhariwal 2021, equation 17)."""
    import torch

    s = 0.008  # their offset: the first step is not too small
    angle = (torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2
    alpha_bar = angle.cos() ** 2  # (T + 1,), from before the first step; the factor 1 / alpha_bar[0] cancels
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=LARGEST_BETA)


SCHEDULES = {schedule.__name__: schedule for schedule in (linear, cosine)}
