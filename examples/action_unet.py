"""A robot's policy as a network of the usual kind: a 1-D U-Net over a plan, conditioned on observations.

It is plain torch on purpose, as a network of your own would be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def layer(inputs: int, outputs: int) -> nn.Sequential:
    """conv -> norm -> silu."""
    return nn.Sequential(nn.Conv1d(inputs, outputs, 5, padding=2), nn.GroupNorm(8, outputs), nn.SiLU())


class Block(nn.Module):
    """layer twice, scaled and shifted by the condition in between (FiLM, Perez et al. 2017)."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first = layer(inputs, outputs)
        self.film = nn.Sequential(nn.SiLU(), nn.Linear(condition, 2 * outputs))
        self.second = layer(outputs, outputs)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        return self.second(self.first(x) * (1 + scale) + shift) + self.skip(x)


class ActionUNet(nn.Module):
    """(plan [B, horizon, actions], t [B], obs [B, observations]) -> the noise in the plan, of its shape.

    Args:
        actions: numbers of one action, e.g. 7 joints.
        observations: numbers of an observation.
        widths: channels of each level; every level halves the horizon, which must be divisible.
    Source: the architecture of Chi et al. 2023 (Diffusion Policy), section 4, in its convolutional form.
    """

    def __init__(self, actions: int, observations: int, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        size = 128
        self.time = nn.Sequential(nn.Linear(64, size), nn.SiLU(), nn.Linear(size, size))
        condition = size + observations
        ins = (actions, *widths[:-1])
        self.down = nn.ModuleList(Block(i, o, condition) for i, o in zip(ins, widths, strict=True))
        self.downsample = nn.ModuleList(nn.Conv1d(w, w, 3, stride=2, padding=1) for w in widths[:-1])
        self.middle = Block(widths[-1], widths[-1], condition)
        self.upsample = nn.ModuleList(nn.ConvTranspose1d(w, w, 4, stride=2, padding=1) for w in widths[:0:-1])
        ups = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(Block(i + o, o, condition) for i, o in ups)
        self.head = nn.Conv1d(widths[0], actions, 1)

    def forward(self, plan: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        frequencies = torch.exp(torch.arange(32, device=plan.device) * (-math.log(10_000.0) / 32))
        angle = t[:, None] * frequencies
        condition = torch.cat((self.time(torch.cat((angle.sin(), angle.cos()), dim=1)), obs), dim=1)
        h, skips = plan.transpose(1, 2), []
        for level, block in enumerate(self.down):
            h = block(h, condition)
            if level < len(self.downsample):
                skips.append(h)
                h = self.downsample[level](h)
        h = self.middle(h, condition)
        for upsample, block in zip(self.upsample, self.up, strict=True):
            h = block(torch.cat((upsample(h), skips.pop()), dim=1), condition)
        return self.head(h).transpose(1, 2)
