"""Timesteps as vectors: sinusoidal embedding and the MLP behind it."""

from __future__ import annotations

import math

import torch
from torch import nn

TIME_DIM = 256
SINUSOIDS = 64


def sinusoidal_embedding(t: torch.Tensor, dim: int = SINUSOIDS) -> torch.Tensor:
    """(B,) timesteps -> (B, dim): cosines, then sines, of frequencies from 1 to 1.3e-4 (Vaswani et al. 2017, 3.5)"""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)  # (half,)
    angles = t.float()[:, None] * frequencies[None]  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


class TimeMLP(nn.Module):
    """Sinusoidal embedding -> Linear -> SiLU -> Linear -> SiLU: (B,) timesteps -> (B, dim) time embedding.

    The closing SiLU lets a FiLM layer be one plain Linear of the result.
    """

    def __init__(self, dim: int = TIME_DIM) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(SINUSOIDS, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.net(sinusoidal_embedding(t))  # (B, dim)
