"""What ours is measured against.

The plain networks below are the design of this repository as it is usually published, written anew and plainly: ReLU
layers, digits decoded one by one as they are asked for, every latent encoded again in every epoch, time embeddings
computed in every step of sampling. The other peers are the U-Nets of denoising-diffusion-pytorch and diffusers.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

LABEL_DROPOUT = 0.1
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from common.diffusion import Schedules, epsilon_loss, loss_draws, uniform_timesteps  # noqa: E402
from common.time_embedding import TimeMLP  # noqa: E402


class PlainAutoencoder(nn.Module):
    """784-512-256-128-16 and back."""

    def __init__(self, widths: tuple[int, ...] = (784, 512, 256, 128, 16)) -> None:
        super().__init__()
        self.encoder = self._mlp(widths)
        self.decoder = self._mlp(widths[::-1])

    @staticmethod
    def _mlp(widths: tuple[int, ...]) -> nn.Sequential:
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x.flatten(1))  # (B, 16)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z).sigmoid().view(-1, 1, 28, 28)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


class _PlainBlock(nn.Module):
    """Two FiLM-conditioned layers around a residual; `layer` and `norm` make them for pixels or for latents."""

    def __init__(self, width: int, layer: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm() for _ in range(2))
        self.films = nn.ModuleList(nn.Linear(256, 2 * width) for _ in range(2))
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = x
        for norm, film, layer in zip(self.norms, self.films, self.layers, strict=True):
            gamma, beta = film(emb).view(len(x), -1, *[1] * (x.ndim - 2)).chunk(2, dim=1)
            h = layer(F.silu((1 + gamma) * norm(h) + beta))
        return x + h


class PlainDenoiser(nn.Module):
    """Four residual FiLM blocks: for latents (B, 16) at width 256, for images (B, 1, 28, 28) with 64 channels."""

    null_label = 10

    def __init__(self, pixels: bool) -> None:
        super().__init__()
        self.time_mlp, self.label_embedding = TimeMLP(), nn.Embedding(11, 256)
        if pixels:
            width = 64
            self.enter, self.leave = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)
            layer, norm = lambda: nn.Conv2d(width, width, 3, padding=1), lambda: nn.GroupNorm(8, width)
        else:
            width = 256
            self.enter, self.leave = nn.Linear(16, width), nn.Linear(width, 16)
            layer, norm = lambda: nn.Linear(width, width), lambda: nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_PlainBlock(width, layer, norm) for _ in range(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        emb, h = self.time_mlp(t) + self.label_embedding(labels), self.enter(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.leave(h)


class Library(nn.Module):
    """A library's U-Net behind the interface of ours. call(net, x, t, labels) -> epsilon."""

    null_label = 10

    def __init__(self, net: nn.Module, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.call(self.net, x, t, labels)


def lucidrains(dim: int) -> Library:
    """denoising-diffusion-pytorch's Unet with dim, 2 dim and 2 dim channels; it knows no labels."""
    from denoising_diffusion_pytorch import Unet

    net = Unet(dim=dim, dim_mults=(1, 2, 2), channels=1).to(memory_format=torch.channels_last)  # up to 1.8 times faster
    return Library(net, lambda net, x, t, _labels: net(x, t))


def diffusers_unet(channels: tuple[int, int, int], groups: int = 8) -> Library:
    """diffusers' UNet2DModel with one layer a block, attention at 7 x 7, and an embedding of the label."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        num_class_embeds=11,
        norm_num_groups=groups,  # its default of 32 would normalise each of 32 channels by itself
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(memory_format=torch.channels_last)  # 4 % faster
    return Library(net, lambda net, x, t, labels: net(x, t, labels).sample)


class OneByOne(torch.utils.data.Dataset):
    """The digits of a `datasets` cache as most code reads them: a PNG is decoded whenever its digit is asked for."""

    def __init__(self, cache_dir: Path) -> None:
        from datasets import Dataset
        from torchvision.transforms.functional import to_tensor

        self.rows = Dataset.from_file(str(max(cache_dir.glob("ylecun___mnist/mnist/*/*/mnist-train.arrow"))))
        self.to_tensor = to_tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[int(index)]
        return self.to_tensor(row["image"]), row["label"]


def seconds_per_epoch(cache_dir: Path, schedules: Schedules, latent: bool, batches: int = 40) -> float:
    """Seconds of a plain epoch of 54,000 digits at batch 128, from `batches` batches; data loaded by one worker."""
    loader = torch.utils.data.DataLoader(OneByOne(cache_dir), batch_size=128, shuffle=True, num_workers=1)
    autoencoder, denoiser, uniform = PlainAutoencoder(), PlainDenoiser(pixels=False), uniform_timesteps(schedules)
    net = denoiser if latent else autoencoder
    optimizer, rng, started = torch.optim.AdamW(net.parameters(), 2e-4), torch.Generator(), 0.0
    for number, (images, labels) in enumerate(loader):
        if number == 5:  # the worker runs, caches are warm
            started = time.perf_counter()
        if number == 5 + batches:
            break
        if latent:
            with torch.no_grad():
                z = autoencoder.encode(images)
            loss = epsilon_loss(net, z, labels, schedules, loss_draws(z.shape, uniform, rng, LABEL_DROPOUT))
        else:
            loss = F.mse_loss(net(images), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return (time.perf_counter() - started) / batches * (54_000 / 128)
