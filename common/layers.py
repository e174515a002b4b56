"""Layers that the networks share."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F


class Scaled(nn.Module):
    """`layer(gain * x)`, with weights that start `gain` times smaller (equalised learning rate, Karras et al. 2018).

    At initialisation it is the plain layer, but Adam, which moves every weight by about the learning rate, moves the
    function `gain` times further: so small learning rates train it as fast as large ones train a plain layer.

    layer: Linear, Conv2d or ConvTranspose2d. fan_in: inputs that meet in one output. std: deviation of an output at
    initialisation, for inputs of deviation 1 (sqrt(2) before an activation that halves the variance).
    """

    def __init__(self, layer: nn.Module, fan_in: int, gain: float, std: float = math.sqrt(2)) -> None:
        super().__init__()
        self.layer, self.gain = layer, gain
        nn.init.normal_(layer.weight, std=std / gain / math.sqrt(fan_in))
        nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gain == 1:
            return self.layer(x)
        if isinstance(self.layer, nn.Conv2d):  # its weights are few beside the pixels: the cheaper place for the gain
            layer = self.layer
            return F.conv2d(x, self.gain * layer.weight, layer.bias, layer.stride, layer.padding)
        return self.layer(self.gain * x)


def scaled_linear(inputs: int, outputs: int, gain: float, std: float = math.sqrt(2)) -> Scaled:
    """A `Scaled` linear layer, (B, inputs) -> (B, outputs)."""
    return Scaled(nn.Linear(inputs, outputs), inputs, gain, std)


def folded(net: nn.Module) -> nn.Module:
    """A copy of `net` for drawing: its `Scaled` layers carry the gain in their weights, which spares every step it."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Scaled):
                module.layer.weight *= module.gain
                module.gain = 1.0
    return net
