"""The latent denoiser: residual FiLM blocks on a latent vector, conditioned on timestep and digit."""

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
from common.autoencoder import build_autoencoder, read_autoencoder
from common.console import warn
from common.diffusion import (
    Schedules,
    ask,
    null_label_of,
    precompute_schedules,
    predictor_of,
    q_sample,
    takes_labels,
)
from common.error_codes import MODEL_MISMATCH, Exit
from common.flags import OUR_NETWORK
from common.layers import folded, scaled_linear
from common.modules import build_network, guiding_network, trained_network
from common.ranks import identity
from common.rng import generator
from common.sampling import Drawing, draw
from common.time_embedding import TIME_DIM, TimeMLP

__all__ = ["FiLMCondMLP", "LatentDenoiser", "TimeMLP", "generate_images", "precompute_schedules", "q_sample"]

BLOCKS, WIDEN = 2, 2
GAIN = 4.0  # see common.layers.Scaled
APART = 0.05  # mean difference of two autoencoders' images: 0.01 where one was trained on, 0.16 where they are two
ONLY_PIXELS = "inpaint keeps pixels, and a latent has none: only a model of pixels (mnist_single_digit) can do it"


class FiLMCondMLP(nn.Module):
    """Residual block: h + Linear(SiLU(Linear((1 + gamma) * LayerNorm(h) + beta))) (FiLM: Perez et al. 2018)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)  # FiLM scales and shifts
        self.up = scaled_linear(dim, WIDEN * dim, GAIN)
        self.down = scaled_linear(WIDEN * dim, dim, GAIN, std=0.5)

    def forward(self, h: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        x = torch.addcmul(beta, self.norm(h), 1 + gamma)  # (B, H)
        return h + self.down(F.silu(self.up(x)))  # (B, H)


class OnLatents(nn.Module):
    """What diffusion on latents needs beside a network: the training latents' statistics, with which it is saved.

    The buffers `latent_mean` and `latent_std` (D,) hold them.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.ones(latent_dim))

    def standardise(self, z: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents (B, D) -> mean 0, deviation 1 in every dimension."""
        return (z - self.latent_mean) / self.latent_std  # (B, D)

    def restore(self, z: torch.Tensor) -> torch.Tensor:
        """Inverse of `standardise`."""
        return z * self.latent_std + self.latent_mean  # (B, D)


class Own(OnLatents):
    """A network of one's own, `net`, on latents: see `common.diffusion.ask`."""

    def __init__(self, net: nn.Module, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.net, self.takes_labels, self.null_label = net, takes_labels(net), null_label_of(net)

    def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """z (B, D), t (B,) in [0, T), labels (B,) -> epsilon (B, D)."""
        return ask(self.net, z, t, labels)  # (B, D)

    def predictor(self) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
        return predictor_of(self.net)


class LatentDenoiser(OnLatents):
    """Predicts the noise in a standardised latent z_t from z_t, the timestep and the digit.

    Labels are 0 to num_classes - 1, or `null_label` for "not told". The blocks' output v enters as
    epsilon = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) z_t, the v-prediction of Salimans & Ho (2022, appendix D):
    with v = 0 this already is the best linear guess for latents of deviation 1; the blocks learn what differs from it.
    """

    def __init__(
        self, latent_dim: int = 16, hidden_dim: int = 256, num_classes: int = 10, schedules: Schedules | None = None
    ) -> None:
        super().__init__(latent_dim)
        self.null_label = num_classes
        schedules = schedules or precompute_schedules()
        self.register_buffer("signal", schedules.sqrt_alpha_bar.clone())  # (T,)
        self.register_buffer("noise", schedules.sqrt_one_minus_alpha_bar.clone())  # (T,)
        self.time_mlp = TimeMLP()
        self.label_embedding = nn.Embedding(num_classes + 1, TIME_DIM)
        nn.init.normal_(self.label_embedding.weight, std=0.1)
        self.film = scaled_linear(TIME_DIM, BLOCKS * 2 * hidden_dim, GAIN, std=0.3)  # gamma and beta of all blocks
        self.enter = scaled_linear(latent_dim, hidden_dim, GAIN, std=1)
        self.blocks = nn.ModuleList(FiLMCondMLP(hidden_dim) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(hidden_dim, elementwise_affine=False)
        self.leave = scaled_linear(hidden_dim, latent_dim, GAIN, std=0)

    def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """z (B, D), t (B,) in [0, T), labels (B,) -> epsilon (B, D)."""
        film = self.film(self.time_mlp(t) + self.label_embedding(labels))  # (B, blocks * 2H)
        return self._mix(z, film, self.signal[t, None], self.noise[t, None])  # (B, D)

    def _mix(self, z: torch.Tensor, film: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        h = self.enter(z)  # (B, H)
        params = film.chunk(2 * BLOCKS, dim=1)  # (B, H) each
        for block, gamma, beta in zip(self.blocks, params[::2], params[1::2], strict=True):
            h = block(h, gamma, beta)  # (B, H)
        v = self.leave(self.norm(h))  # (B, D)
        return signal * v + noise * z  # (B, D)

    @torch.no_grad()
    def predictor(self) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
        """epsilon(z (B, D), t, labels (B,)) for rows that share a timestep, as they do in sampling.

        FiLM is linear in time embedding + label embedding, so the gamma and beta of all T timesteps and of all labels
        are computed once, and a step only adds two rows.
        """
        net = folded(self)
        by_time = net.film(net.time_mlp(torch.arange(len(net.signal), device=net.signal.device)))  # (T, blocks * 2H)
        by_label = net.film(net.label_embedding.weight) - net.film.layer.bias  # (classes + 1, blocks * 2H)
        return lambda z, t, labels: net._mix(z, by_time[t] + by_label[labels], net.signal[t], net.noise[t])


def build(flags: Mapping[str, Any], schedules: Schedules, typed: Collection[str] = ()) -> OnLatents:
    """The network of a run with these flags: `LatentDenoiser`, or --network's. typed: see `build_network`."""
    network, latent_dim = flags.get("network", OUR_NETWORK), flags["ae_latent_dim"]
    offered = {"latent_dim": latent_dim, "hidden_dim": flags["hidden_dim"]}
    known = {"typed": typed, "recorded": flags.get("network_digest")}
    net = build_network("lddpm", network, (latent_dim,), schedules, **known, **offered)
    return net if network == OUR_NETWORK else Own(net, latent_dim).to(schedules.beta.device)


def load_for_drawing(
    path: str | Path | tuple[Path, ckpt.State],
    device: torch.device | str = "cpu",
    ae_ckpt: str | Path | None = None,
    *,
    guide: str | Path | None = None,
) -> tuple[Callable[..., torch.Tensor], dict]:
    """(draw, the checkpoint's state); `draw` is `generate_images` with everything filled in that the checkpoint knows.

    The denoiser gets its EMA weights; the autoencoder is the one inside the checkpoint, or `ae_ckpt`'s.
    guide: the checkpoint of a guiding network, see `common.sampling.guided`.
    Raises Exit(MODEL_MISMATCH) if a checkpoint holds another kind of model or another latent dimension, or the guide
    does not fit.
    """
    path, state = ckpt.read_model(path, ("lddpm",))
    net, schedules = trained_network((path, state), build, device)
    guiding = {"guide": guiding_network(guide, state, build, device)} if guide is not None else {}
    ae_data = read_autoencoder(ae_ckpt) if ae_ckpt else state["ae_ckpt_data"]
    if ae_data["args"]["latent_dim"] != net.latent_dim:
        other = ae_data["args"]["latent_dim"]
        raise Exit(MODEL_MISMATCH, f"{ae_ckpt} has latent dimension {other}, the denoiser has {net.latent_dim}")
    autoencoder = build_autoencoder(ae_data, device)
    if ae_ckpt and not identity().rank and _decode_apart(net, autoencoder, build_autoencoder(state["ae_ckpt_data"])):
        warn(f"{ae_ckpt} decodes otherwise than the autoencoder whose latents this run has learned: expect noise")
    return partial(generate_images, net, autoencoder, schedules, **guiding), state


@torch.no_grad()
def _decode_apart(net: OnLatents, one: nn.Module, other: nn.Module) -> bool:
    """Do two autoencoders make other images of the same latents? (One that was trained a little further does not.)"""
    z = net.restore(torch.randn(64, net.latent_dim, generator=generator(0, "apart")).to(net.latent_mean))  # (64, D)
    return bool((one.decode(z).cpu() - other.decode(z.cpu())).abs().mean() > APART)


@torch.no_grad()
def generate_images(
    net: OnLatents,
    autoencoder: nn.Module,
    schedules: Schedules,
    **how: Unpack[Drawing],
) -> torch.Tensor:
    """Draw latents and decode them: (N, 1, 28, 28) images in [0, 1]. `how`: see `common.sampling.draw`.

    Raises ValueError for `inpaint`.
    """
    if how.get("inpaint") is not None:
        raise ValueError(ONLY_PIXELS)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return net.standardise(autoencoder.encode(images))  # (N, D)

    def decode(z: torch.Tensor) -> torch.Tensor:
        return autoencoder.decode(net.restore(z)).clamp(0, 1)  # (N, 1, 28, 28)

    return draw(net, (net.latent_dim,), schedules, to_images=decode, of_images=encode, **how)  # (N, 1, 28, 28)
