"""The pixel-space denoiser: a U-Net of FiLM-conditioned blocks."""

import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import ckpt
from common.diffusion import Schedules, precompute_schedules, q_sample
from common.flags import OUR_NETWORK
from common.layers import Scaled, folded, scaled_linear
from common.modules import build_network, guiding_network, trained_network
from common.sampling import Drawing, draw
from common.time_embedding import TIME_DIM, TimeMLP

__all__ = ["Denoiser", "FiLMCond", "TimeMLP", "generate_images", "precompute_schedules", "q_sample"]

SHAPE = (1, 28, 28)
GAIN = 4.0  # see common.layers.Scaled
PARTS = ("base_ch", "fine_ch", "dense_dim", "attention")  # of a `Denoiser`: the flags that choose them
Film = Callable[["FiLMCond"], torch.Tensor]  # the gamma and beta (B, 2C) of a layer


def _norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """8 channels a group: a CPU is slow at fewer, and with 16 the first minutes teach the net less."""
    return nn.GroupNorm(channels // 8, channels, affine=affine)


def _conv(inputs: int, outputs: int, std: float = 1.0, size: int = 3, stride: int = 1) -> Scaled:
    return Scaled(nn.Conv2d(inputs, outputs, size, stride, size // 2), size**2 * inputs, GAIN, std)


class FiLMCond(nn.Module):
    """Conv2d(SiLU((1 + gamma) * GroupNorm(x) + beta)) (FiLM: Perez et al. 2018); gamma, beta = Linear(time_emb)."""

    def __init__(self, inputs: int, outputs: int, std: float = 1.0) -> None:
        super().__init__()
        self.norm = _norm(inputs, affine=False)  # FiLM scales and shifts
        self.film = scaled_linear(TIME_DIM, 2 * inputs, GAIN, std=0.3)
        self.conv = _conv(inputs, outputs, std)

    def forward(self, x: torch.Tensor, film: torch.Tensor) -> torch.Tensor:
        gamma, beta = film[:, :, None, None].chunk(2, dim=1)  # (B, C, 1, 1) each
        return self.conv(F.silu(torch.addcmul(beta, self.norm(x), 1 + gamma)))  # (B, C', H, W)


class ResBlock(nn.Module):
    """x + two FiLM-conditioned convolutions (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = FiLMCond(channels, channels, std=1.4), FiLMCond(channels, channels, std=0.5)

    def forward(self, x: torch.Tensor, film: Film) -> torch.Tensor:
        h = self.first(x, film(self.first))  # (B, C, H, W)
        return x + self.second(h, film(self.second))  # (B, C, H, W)


class Attention(nn.Module):
    """x + self-attention over all positions, with one head (as in the U-Net of Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # (B, HW, C) each
        # for 49 positions a third quicker on a CPU than F.scaled_dot_product_attention
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)).softmax(dim=-1)  # (B, HW, HW)
        h = (weights @ v).transpose(1, 2).reshape(x.shape)  # (B, C, H, W)
        return x + self.out(h)  # (B, C, H, W)


class Dense(nn.Module):
    """x + a FiLM-conditioned layer that sees all positions at once, through a few channels.

    Under much noise a digit's shape is to be guessed as a whole, which neighbourhoods teach slowly.
    """

    def __init__(self, channels: int, hidden: int, side: int = 7, through: int = 16) -> None:
        super().__init__()
        features = through * side**2
        self.narrow = nn.Sequential(_norm(channels), _conv(channels, through, size=1))
        self.first = scaled_linear(features, hidden, GAIN)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.film = scaled_linear(TIME_DIM, 2 * hidden, GAIN, std=0.3)
        self.second = scaled_linear(hidden, features, GAIN)
        self.widen = nn.Sequential(nn.SiLU(), _conv(through, channels, std=0.5, size=1))

    def forward(self, x: torch.Tensor, film: Film) -> torch.Tensor:
        few = self.narrow(x)  # (B, 16, H, W)
        gamma, beta = film(self).chunk(2, dim=1)  # (B, hidden) each
        h = F.silu(torch.addcmul(beta, self.norm(self.first(few.flatten(1))), 1 + gamma))  # (B, hidden)
        return x + self.widen(self.second(h).view_as(few))  # (B, C, H, W)


class Finish(nn.Module):
    """The block at full resolution, and its C channels made one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = ResBlock(channels)
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), _conv(channels, 1, std=0))

    def forward(self, x: torch.Tensor, film: Film) -> torch.Tensor:
        return self.out(self.block(x, film))  # (B, 1, 28, 28)


class Denoiser(nn.Module):
    """Predicts the noise in an image x_t (scaled to [-1, 1]) from x_t, the timestep and the digit.

    28 x 28 is folded to 14 x 14 at once (space to depth); 7 x 7, with `attention` and a `Dense` layer of width
    `dense_dim` (0: none), gets most of the work; at full resolution there are one convolution before and one block
    behind, of `fine_ch` channels (0: neither). Labels are 0 to num_classes - 1, or `null_label` for "not told". Like
    the latent denoiser it mixes the network's output v and x_t to epsilon (v-prediction, Salimans & Ho 2022, appendix
    D).
    """

    def __init__(
        self,
        base_ch: int = 24,
        num_classes: int = 10,
        schedules: Schedules | None = None,
        *,
        fine_ch: int = 8,
        dense_dim: int = 512,
        attention: bool = True,
    ) -> None:
        super().__init__()
        self.null_label = num_classes
        schedules = schedules or precompute_schedules()
        self.register_buffer("signal", schedules.sqrt_alpha_bar.clone())  # (T,)
        self.register_buffer("noise", schedules.sqrt_one_minus_alpha_bar.clone())  # (T,)
        self.time_mlp = TimeMLP()
        self.label_embedding = nn.Embedding(num_classes + 1, TIME_DIM)
        nn.init.normal_(self.label_embedding.weight, std=0.1)
        few, many = base_ch, 3 * base_ch  # most of the work is at 7 x 7, where it is cheap
        self.look = _conv(1, fine_ch) if fine_ch else nn.Identity()
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _conv(4 * (fine_ch or 1), few))
        self.enter = ResBlock(few)
        self.down = _conv(few, many, stride=2)
        self.before = ResBlock(many)
        self.attention = Attention(many) if attention else nn.Identity()
        self.after = ResBlock(many)
        self.dense = Dense(many, dense_dim) if dense_dim else None
        self.up = nn.Sequential(_conv(many, few, size=1), nn.Upsample(scale_factor=2))
        self.leave = ResBlock(few)
        last = _conv(few, 4 * fine_ch) if fine_ch else _conv(few, 4, std=0)
        self.head = nn.Sequential(_norm(few), nn.SiLU(), last, nn.PixelShuffle(2))
        self.finish = Finish(fine_ch) if fine_ch else None
        self.to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x (B, 1, 28, 28), t (B,) in [0, T), labels (B,) -> epsilon (B, 1, 28, 28)."""
        cond = self.time_mlp(t) + self.label_embedding(labels)  # (B, 256)
        signal, noise = (values[t].view(-1, 1, 1, 1) for values in (self.signal, self.noise))
        return self._mix(x, lambda layer: layer.film(cond), signal, noise)  # (B, 1, 28, 28)

    def _mix(self, x: torch.Tensor, film: Film, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        fine = self.look(x)  # (B, F, 28, 28)
        wide = self.enter(self.stem(fine), film)  # (B, C, 14, 14)
        h = self.before(self.down(wide), film)  # (B, 3C, 7, 7)
        h = self.attention(h)  # (B, 3C, 7, 7)
        h = self.dense(h, film) if self.dense else h  # (B, 3C, 7, 7)
        h = self.after(h, film)  # (B, 3C, 7, 7)
        h = self.leave(self.up(h) + wide, film)  # (B, C, 14, 14)
        v = self.head(h)  # (B, F, 28, 28)
        v = self.finish(v + fine, film) if self.finish else v  # (B, 1, 28, 28)
        return signal * v + noise * x  # (B, 1, 28, 28)

    @torch.no_grad()
    def predictor(self) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
        """epsilon(x (B, 1, 28, 28), t, labels (B,)) for rows that share a timestep: FiLM comes from tables."""
        net = folded(self)
        times = net.time_mlp(torch.arange(len(net.signal), device=net.signal.device))  # (T, 256)
        embedding = net.label_embedding.weight  # (11, 256)
        layers = [module for module in net.modules() if isinstance(module, FiLMCond | Dense)]
        tables = [layer.film(times) for layer in layers]  # (T, 2C) each
        widths = [table.shape[1] for table in tables]
        by_time = torch.cat(tables, dim=1)  # (T, sum of 2C)
        by_label = torch.cat([layer.film(embedding) - layer.film.layer.bias for layer in layers], dim=1)

        def predict(x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
            rows = (by_time[t] + by_label[labels]).split(widths, dim=1)  # (B, 2C) each
            film = dict(zip(layers, rows, strict=True)).__getitem__
            return net._mix(x, film, net.signal[t], net.noise[t])  # (B, 1, 28, 28)

        return predict


def build(flags: Mapping[str, Any], schedules: Schedules, typed: Collection[str] = ()) -> nn.Module:
    """The network of a run with these flags: `Denoiser`, or --network's. typed: see `build_network`."""
    network = flags.get("network", OUR_NETWORK)
    known = {"typed": typed, "recorded": flags.get("network_digest")}
    return build_network("ddpm", network, SHAPE, schedules, **known, **{name: flags[name] for name in PARTS})


def load_for_drawing(
    path: str | Path | tuple[Path, ckpt.State],
    device: torch.device | str = "cpu",
    *,
    guide: str | Path | None = None,
) -> tuple[Callable[..., torch.Tensor], dict]:
    """(draw, the checkpoint's state); `draw` is `generate_images` with everything filled in that the checkpoint knows.

    guide: the checkpoint of a guiding network, see `common.sampling.guided`.
    Raises Exit(MODEL_MISMATCH) if a checkpoint holds another kind of model, or the guide does not fit.
    """
    read = ckpt.read_model(path, ("ddpm",))
    net, schedules = trained_network(read, build, device)
    guiding = {"guide": guiding_network(guide, read[1], build, device)} if guide is not None else {}
    return partial(generate_images, net, schedules, **guiding), read[1]


@torch.no_grad()
def generate_images(
    net: nn.Module,
    schedules: Schedules,
    **how: Unpack[Drawing],
) -> torch.Tensor:
    """Draw (N, 1, 28, 28) images in [0, 1]. `how`: see `common.sampling.draw`."""
    scaled = {"to_images": lambda x: x.add(1).div(2).clamp(0, 1), "of_images": lambda images: 2 * images - 1}
    return draw(net, SHAPE, schedules, **scaled, **how)  # (N, 1, 28, 28)
