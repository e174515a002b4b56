"""The mathematics of DDPM (Ho et al. 2020), for tensors of any shape: the noise, the loss, and how a net is asked.

Timesteps are counted from 0 (least noise) to T - 1, so `alpha_bar[t]` is the paper's alpha_bar_{t+1}.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import mse_loss

from common.error_codes import MODEL_MISMATCH, Exit
from common.flags import LEAST_LOG
from common.progress import counted
from common.schedules import SCHEDULES

MOST_LEFT = 0.2  # of the image, by the last timestep's sqrt(alpha_bar); at 0.36 what is drawn is plainly too grey
NULL_LABEL = 10  # "not told which digit", where a net has no `null_label` of its own


class Schedules(NamedTuple):
    """Float32 tensors of shape (T,)."""

    beta: torch.Tensor
    alpha: torch.Tensor
    alpha_bar: torch.Tensor
    sqrt_alpha_bar: torch.Tensor
    sqrt_one_minus_alpha_bar: torch.Tensor

    @property
    def T(self) -> int:
        return len(self.beta)

    @property
    def exact_alpha_bar(self) -> torch.Tensor:
        """(T,) float64, on the CPU: 1 - alpha_bar cancels badly in float32."""
        return (1 - self.beta.cpu().double()).cumprod(0)

    def first(self, count: int) -> Schedules:
        """Those of the `count` timesteps of least noise."""
        return Schedules(*(values[:count] for values in self))


def precompute_schedules(
    T: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    device: torch.device | str = "cpu",
    schedule: str = "linear",
) -> Schedules:
    """One of `common.schedules.SCHEDULES`: computed in float64, stored as float32.

    Raises ValueError if there is none of that name, it gives anything but T numbers between 0 and 1, its first step
    adds no noise at all, or its steps leave nothing of the image.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"--schedule {schedule}: there is none in common/schedules.py, but {', '.join(SCHEDULES)}")
    beta = SCHEDULES[schedule](T, beta_start, beta_end)
    shape = tuple(beta.shape) if isinstance(beta, torch.Tensor) else type(beta).__name__
    if shape != (T,) or not ((beta.float() > 0) & (beta.float() < 1)).all():
        given = "others" if shape == (T,) else shape
        raise ValueError(
            f"--schedule {schedule} must give a tensor ({T},) of numbers between 0 and 1; it gives {given}"
        )
    beta = beta.double()
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    if 1 - beta[0].float().double() == 1:
        raise ValueError(f"--schedule {schedule} begins with so little noise that it is none: {beta[0].item():g}")
    if alpha_bar[-1].log() < 2 * LEAST_LOG:
        raise ValueError(f"--schedule {schedule} leaves no trace of the image after {counted(T, 'step')}: less noise")
    exact = (beta, alpha, alpha_bar, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    return Schedules(*(values.float().to(device) for values in exact))


def schedules_of(
    flags: Mapping[str, Any], device: torch.device | str = "cpu", warn: Callable[[str], None] = lambda _: None
) -> Schedules:
    """Those of a run with these flags; one from before --schedule existed was linear. Raises Exit(MODEL_MISMATCH).

    warn: told if the last timestep is not near enough to the pure noise that drawing begins with.
    """
    names = ("T", "beta_start", "beta_end")
    try:
        found = precompute_schedules(*(flags[name] for name in names), device, flags.get("schedule", "linear"))
    except ValueError as error:
        raise Exit(MODEL_MISMATCH, str(error), everywhere=True) from None
    if (left := found.exact_alpha_bar[-1].sqrt().item()) > MOST_LEFT:
        begin = f"after {counted(found.T, 'step')} {left:.0%} of the image is left, but drawing begins with pure noise"
        warn(f"{begin}: raise --T or --beta-end, or take --schedule cosine")
    return found


def _rows(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, ..., 1), to scale the rows of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def q_sample(x0: torch.Tensor, t: torch.Tensor, epsilon: torch.Tensor, schedules: Schedules) -> torch.Tensor:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon (Ho et al. 2020, equation 4).

    x0, epsilon: (B, ...); t: (B,) int64 in [0, T). Returns (B, ...).
    """
    signal, noise = schedules.sqrt_alpha_bar[t], schedules.sqrt_one_minus_alpha_bar[t]
    return _rows(signal, x0) * x0 + _rows(noise, x0) * epsilon


def timestep_distribution(schedules: Schedules, mean: float = -0.5, deviation: float = 1.2) -> torch.Tensor:
    """(T,) float64: how probable training makes timesteps up to t. Log of noise over signal is normally distributed.

    That spends training where images take shape (Karras et al. 2022, section 5, whose P_mean, in units of the data's
    deviation, and P_std the defaults are) instead of on timesteps that are all noise: half of a linear schedule's.
    """
    log_ratio = -half_log_snr(schedules.exact_alpha_bar)  # (T,), grows with t
    edges = torch.cat([log_ratio[:1], (log_ratio[1:] + log_ratio[:-1]) / 2, log_ratio[-1:]])  # (T + 1,)
    share = torch.special.ndtr((edges - mean) / deviation).diff() + 1e-9  # (T,); no timestep is never seen
    return (share / share.sum()).cumsum(0)


def uniform_timesteps(schedules: Schedules) -> torch.Tensor:
    """(T,) float64, as `timestep_distribution`, where every timestep is as likely (Ho et al. 2020, algorithm 1)."""
    return torch.arange(1, schedules.T + 1, dtype=torch.float64) / schedules.T


def draw_timesteps(count: int, distribution: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """(count,) int64 in [0, T) from a `timestep_distribution`, stratified so that a batch covers it evenly.

    Each row's timestep follows the distribution, but the loss of a batch varies less than with independent draws
    (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).
    """
    strata = (torch.arange(count) + torch.rand(count, generator=rng)) / count  # (count,) in [0, 1)
    shuffled = strata[torch.randperm(count, generator=rng)].double()
    return torch.searchsorted(distribution, shuffled, right=True).clamp_(max=len(distribution) - 1)


def loss_draws(
    shape: tuple[int, ...], timesteps: torch.Tensor, rng: torch.Generator, label_dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `epsilon_loss` needs by chance, for a batch of x_0 of that shape (B, ...): (t (B,), epsilon, dropped (B,)).

    timesteps: a `timestep_distribution` to draw t from. All draws come from `rng`, on the CPU. Rows of `dropped` are
    True with probability `label_dropout`.
    """
    t = draw_timesteps(shape[0], timesteps, rng)
    return t, torch.randn(shape, generator=rng), torch.rand(shape[0], generator=rng) < label_dropout


def epsilon_loss(
    net: nn.Module,
    x0: torch.Tensor,
    labels: torch.Tensor,
    schedules: Schedules,
    draws: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    min_snr_gamma: float = 0.0,
) -> torch.Tensor:
    """Mean squared error of the predicted noise (Ho et al. 2020, equation 14): a scalar.

    min_snr_gamma: unless 0, a row counts min(SNR, gamma) / SNR at its timestep (Hang et al. 2023, "Efficient Diffusion
    Training via Min-SNR Weighting Strategy", section 3.4): less where there is so little noise that only details are
    left to learn.

    net: see `ask`; x0: (B, ...); labels: (B,); draws: from `loss_draws`. A row's label that was dropped becomes
    `null_label_of(net)`, so that the net also learns to draw without one (Ho & Salimans 2022, algorithm 1).
    """
    t, epsilon, dropped = draws
    labels = labels.masked_fill(dropped, null_label_of(net))  # (B,)
    errors = mse_loss(ask(net, q_sample(x0, t, epsilon, schedules), t, labels), epsilon, reduction="none")
    if min_snr_gamma:
        snr = (schedules.sqrt_alpha_bar / schedules.sqrt_one_minus_alpha_bar)[t].square()  # (B,)
        errors = errors * _rows((min_snr_gamma / snr).clamp(max=1), errors)  # a schedule may end at SNR 0
    return errors.mean()


def ask(net: nn.Module, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """epsilon (B, ...), of any module whose forward is (x (B, ...), t (B,) int64, labels (B,) int64), or (x, t)."""
    return net(x, t, labels) if takes_labels(net) else net(x, t)


def null_label_of(net: nn.Module) -> int:
    """The label that means "not told"."""
    return getattr(net, "null_label", NULL_LABEL)


def takes_labels(net: nn.Module) -> bool:
    """Has its forward a place for labels? (A module around another one says it by an attribute of this name.)"""
    told = getattr(net, "takes_labels", None)
    return _has_a_third_place(type(net)) if told is None else told


@cache
def _has_a_third_place(kind: type) -> bool:
    parameters = list(inspect.signature(getattr(kind, "forward", kind.__call__)).parameters.values())[1:]  # self
    positional = [it for it in parameters if it.kind in (it.POSITIONAL_ONLY, it.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 2 or any(it.kind is it.VAR_POSITIONAL for it in parameters)


def predictor_of(net: nn.Module) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
    """epsilon(x (B, ...), t, labels (B,)) for rows that share a timestep: the net's own `predictor`, else the net."""
    if hasattr(net, "predictor"):
        predict = net.predictor()
    else:

        def predict(x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
            return ask(net, x, torch.full((len(x),), t, device=x.device), labels)

    return lambda x, t, labels: predict(x.clone(), t, labels)  # as in training a net may change what it gets


def half_log_snr(alpha_bar: torch.Tensor) -> torch.Tensor:
    """log(signal / noise) at these alpha_bar, of the same shape: lambda of Lu et al. 2022b, falling with t."""
    return torch.logit(alpha_bar) / 2
