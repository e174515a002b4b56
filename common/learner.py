"""One update path: everything that changes when a batch is learned, and its state for the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from common.ranks import World

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

LossFn = Callable[..., "torch.Tensor"]
DrawsFn = Callable[..., "tuple[torch.Tensor, ...]"]


def learning_rate(step: int, total: int, base: float, scheduler: str, warmup: int = 0) -> float:
    """The learning rate of step `step` of `total` (from 0): a pure function, so a resume has nothing to restore.

    scheduler: "none" (constant), "cosine" (to zero; Loshchilov & Hutter 2017, without restarts) or "step" (times 0.1
    after each third). A linear warm-up over the first `warmup` steps comes on top.
    """
    import math

    progress = min(step / max(total, 1), 1.0)
    factor = {"none": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "step": 0.1 ** min(int(3 * progress), 2)}
    return base * factor[scheduler] * min(1.0, (step + 1) / (warmup + 1))


def ema_decay(updates: int, ceiling: float) -> float:
    """EMA decay after `updates` updates: low at first, so that the random initial weights are soon forgotten."""
    return min(ceiling, (1 + updates) / (10 + updates))


def averaged(net: nn.Module, ceiling: float) -> AveragedModel:
    """torch's running average of a network's weights, with the decay of `ema_decay`.

    The counter is asked on the host, where torch keeps it: the copy on the device would have to be waited for.
    """
    import torch
    from torch.optim.swa_utils import AveragedModel

    def update(mine: list[torch.Tensor], theirs: list[torch.Tensor], _updates: torch.Tensor | int) -> None:
        torch._foreach_lerp_(mine, theirs, 1 - ema_decay(int(average.n_averaged), ceiling))

    average = AveragedModel(net, multi_avg_fn=update)
    return average


class Learner:
    """Net, EMA, optimizer and scaler, side by side; `step` is the only place where weights change.

    ema: the ceiling of the EMA's decay, None for no EMA. grad_clip: largest gradient norm, 0 for no limit.
    amp: automatic mixed precision; off, the scaler and autocast are no-ops on the same path.
    shards, world: the parts that a batch's gradient is computed in, and the processes that share them.
    """

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        *,
        lr_at: Callable[[int], float],
        grad_clip: float = 0.0,
        amp: bool = False,
        ema: float | None = None,
        weight_decay: float = 0.01,
        shards: int = 1,
        world: World | None = None,
    ) -> None:
        import torch

        self.device, self.lr_at, self.grad_clip, self.amp = device, lr_at, grad_clip, amp
        self.shards, self.world = shards, world or World()
        self.net = net.to(device)
        self.ema = averaged(self.net, ema) if ema is not None else None
        self.parameters = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=weight_decay, fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp)

    @property
    def averaged_net(self) -> nn.Module:
        """The weights to draw and to validate with: the EMA's, where there is one."""
        return self.ema.module if self.ema is not None else self.net

    def autocast(self) -> Any:
        """The context for forward passes."""
        import torch

        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.amp)

    def gradient(self, loss_of: Callable[[int, slice], torch.Tensor], rows: int) -> torch.Tensor:
        """Backward for a batch of so many rows; returns its mean loss, a scalar.

        loss_of(shard, rows) is the mean loss of these rows of it. Each shard's gradient is computed by itself, and they
        are added up in order, each by its share of the rows: so the processes that share them leave no trace.
        """
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        if self.shards == 1:
            loss = loss_of(0, slice(0, rows))
            self.scaler.scale(loss).backward()
            return loss.detach()
        mine = self.world.mine(self.shards)
        sizes = [parameter.numel() for parameter in self.parameters]
        parts = torch.zeros(len(mine), sum(sizes) + 1, device=self.device)  # a shard's gradients, and its loss
        for part, shard in zip(parts, mine, strict=True):
            begin, end = (edge * rows // self.shards for edge in (shard, shard + 1))
            if begin == end:  # the last batch of an epoch may have fewer rows than there are shards
                continue
            loss = loss_of(shard, slice(begin, end)) * ((end - begin) / rows)
            self.scaler.scale(loss).backward()
            part[-1] = loss.detach()
            for place, parameter in zip(part[:-1].split(sizes), self.parameters, strict=True):
                if parameter.grad is not None:
                    place.copy_(parameter.grad.flatten())
            self.optimizer.zero_grad(set_to_none=True)
        total = self.world.sum_in_order(parts)
        for gradient, parameter in zip(total[:-1].split(sizes), self.parameters, strict=True):
            # in the weight's own layout: a fused optimizer goes through both as they lie in memory
            parameter.grad = torch.empty_like(parameter).copy_(gradient.view(parameter.shape))
        return total[-1]

    def step(self, number: int) -> float:
        """Update from the gradients that are there, as step `number` of the run; returns the learning rate used."""
        from torch.nn.utils import clip_grads_with_norm_, get_total_norm

        lr = self.lr_at(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.grad_clip:
            self.scaler.unscale_(self.optimizer)
            norm = get_total_norm([weight.grad for weight in self.parameters if weight.grad is not None])
            # a look at the norm spares the CPU a pass over small gradients; another device would be waited for
            if self.device.type != "cpu" or norm > self.grad_clip:
                clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.net)
        return lr

    def is_finite(self) -> bool:
        """Are all weights finite? (A loss can still be finite when the update behind it was not.)"""
        import torch

        return bool(torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all())

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's `model`, `ema`, `optimizer` and `scaler`."""
        return {
            "model": self.net.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Mirror of `state_dict`. Raises RuntimeError or ValueError if the weights do not fit.

        The optimizer's options stay today's: those of the device that the state was saved on need not suit this one.
        """
        import torch

        self.net.load_state_dict(state["model"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        (today,), (saved,) = (kept["param_groups"] for kept in (self.optimizer.state_dict(), state["optimizer"]))
        options = [today | {"lr": saved["lr"]}]  # of the last step: a resume after it, for the epoch's end, sets none
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": options})
        for parameter, moments in self.optimizer.state.items():  # in its layout, whatever they were saved in
            for name, moment in moments.items():
                if moment.ndim and moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(moment)
        if self.amp and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
