"""The MLP autoencoder: 28 x 28 digits to a latent vector and back."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.layers import Scaled, scaled_linear

PIXEL_MEAN, PIXEL_STD = 0.13, 0.31  # of MNIST in [0, 1]
ENCODER, DECODER = (512, 256), (384, 1024)  # widths on the way in and out; drawing is the harder half
GAIN = 16.0


def _dense(inputs: int, outputs: int) -> tuple[Scaled, nn.Module]:
    return scaled_linear(inputs, outputs, GAIN), nn.SiLU()


class Autoencoder(nn.Module):
    """784 -> 512 -> 256 -> latent_dim -> 384 -> 1024 -> 784: few, wide layers keep a processor busy.

    use_sigmoid: let `decode` end in [0, 1]; without, in logits.
    """

    def __init__(self, latent_dim: int = 16, use_sigmoid: bool = True) -> None:
        super().__init__()
        self.use_sigmoid = use_sigmoid
        wide, narrow = ENCODER
        self.encoder = nn.Sequential(
            *_dense(28 * 28, wide), *_dense(wide, narrow), scaled_linear(narrow, latent_dim, GAIN, std=1)
        )
        narrow, wide = DECODER
        self.decoder = nn.Sequential(
            *_dense(latent_dim, narrow), *_dense(narrow, wide), scaled_linear(wide, 28 * 28, GAIN, std=1)
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 1, 28, 28) images in [0, 1] -> (B, D) latents."""
        x = (x.flatten(1) - PIXEL_MEAN) / PIXEL_STD  # (B, 784)
        return self.encoder(x)  # (B, D)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(B, D) latents -> (B, 1, 28, 28) images in [0, 1]."""
        x = self.decoder(z).unflatten(1, (1, 28, 28))  # (B, 1, 28, 28)
        return x.sigmoid() if self.use_sigmoid else x  # (B, 1, 28, 28)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))  # (B, 1, 28, 28)
