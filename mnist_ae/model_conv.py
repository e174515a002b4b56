"""The convolutional autoencoder: 28 x 28 digits to a latent vector and back."""

import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.layers import Scaled, scaled_linear

PIXEL_MEAN, PIXEL_STD = 0.13, 0.31  # of MNIST in [0, 1]
FEW, MANY, HIDDEN = 16, 32, 384
GAIN = 16.0


def _down(few: int, many: int) -> tuple[Scaled, nn.Module]:
    """Halve height and width."""
    return Scaled(nn.Conv2d(few, many, 4, stride=2, padding=1), 16 * few, GAIN), nn.SiLU()


def _up(many: int, few: int, std: float = math.sqrt(2)) -> Scaled:
    """Double height and width; an output pixel sees 2 x 2 of the 4 x 4 kernel."""
    return Scaled(nn.ConvTranspose2d(many, few, 4, stride=2, padding=1), 4 * many, GAIN, std)


def _dense(inputs: int, outputs: int) -> tuple[Scaled, nn.Module]:
    return scaled_linear(inputs, outputs, GAIN), nn.SiLU()


class Autoencoder(nn.Module):
    """Two strided convolutions and two linear layers each way.

    use_sigmoid: let `decode` end in [0, 1]; without, in logits.
    """

    def __init__(self, latent_dim: int = 16, use_sigmoid: bool = True) -> None:
        super().__init__()
        self.use_sigmoid = use_sigmoid
        flat = MANY * 7 * 7
        self.encoder = nn.Sequential(
            *_down(1, FEW),  # (B, 16, 14, 14)
            *_down(FEW, MANY),  # (B, 32, 7, 7)
            nn.Flatten(),
            *_dense(flat, HIDDEN),  # (B, 384)
            scaled_linear(HIDDEN, latent_dim, GAIN, std=1),  # (B, D)
        )
        self.decoder = nn.Sequential(
            *_dense(latent_dim, HIDDEN),  # (B, 384)
            *_dense(HIDDEN, flat),
            nn.Unflatten(1, (MANY, 7, 7)),  # (B, 32, 7, 7)
            _up(MANY, FEW),  # (B, 16, 14, 14)
            nn.SiLU(),
            _up(FEW, 1, std=1),  # (B, 1, 28, 28)
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 28, 28) images in [0, 1] -> (B, D) latents."""
        return self.encoder((x - PIXEL_MEAN) / PIXEL_STD)  # (B, D)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, D) latents -> (B, 1, 28, 28) images in [0, 1]."""
        x = self.decoder(z)  # (B, 1, 28, 28)
        return x.sigmoid() if self.use_sigmoid else x  # (B, 1, 28, 28)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))  # (B, 1, 28, 28)
