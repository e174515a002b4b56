"""MLP autoencoder: 28x28 digits <-> a 16-dimensional latent vector."""

import math

import torch
import torch.nn as nn

MEAN, STD = 0.13, 0.31  # of MNIST pixels in [0, 1]
GAIN = 8.0  # see Dense


class Dense(nn.Linear):
    """A linear layer of `GAIN * x` whose weights start `GAIN` times smaller.

    The function at initialisation is that of a plain layer, but a step of Adam moves it
    `GAIN` times further: small learning rates train it as fast as large ones would.
    """

    def __init__(self, n_in, n_out, scale=math.sqrt(2)):
        super().__init__(n_in, n_out)
        nn.init.normal_(self.weight, std=scale / GAIN / math.sqrt(n_in))
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return super().forward(GAIN * x)


class Autoencoder(nn.Module):
    """784 -> 768 -> 384 -> latent -> 384 -> 768 -> 784: few, wide layers keep the CPU busy."""

    def __init__(self, latent_dim=16, use_sigmoid=True, widths=(768, 384)):
        super().__init__()
        wide, narrow = widths
        self.encoder = nn.Sequential(
            Dense(28 * 28, wide),
            nn.SiLU(),
            Dense(wide, narrow),
            nn.SiLU(),
            Dense(narrow, latent_dim, scale=1),
        )
        self.decoder = nn.Sequential(
            Dense(latent_dim, narrow),
            nn.SiLU(),
            Dense(narrow, wide),
            nn.SiLU(),
            Dense(wide, 28 * 28, scale=1),
        )
        self.use_sigmoid = use_sigmoid

    def encode(self, x):
        """Latents of images in [0, 1]."""
        x = (x.flatten(1) - MEAN) / STD  # (B, 784)
        return self.encoder(x)  # (B, latent_dim)

    def decode(self, z):
        """Images of latents, in [0, 1] when `use_sigmoid`."""
        x = self.decoder(z)  # (B, 784)
        x = x.view(-1, 1, 28, 28)  # (B, 1, 28, 28)
        return torch.sigmoid(x) if self.use_sigmoid else x  # (B, 1, 28, 28)

    def forward(self, x):
        return self.decode(self.encode(x))  # (B, 1, 28, 28)


def reconstruction_loss(net, images, rng):
    return torch.nn.functional.mse_loss(net(images), images)
