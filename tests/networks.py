"""The small network that the tests of `fd.UNet` use, and arguments for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.nn import UNet

ARGUMENTS = {
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_levels": (1,),
    "head_channels": 8,
    "num_classes": 3,
}


def network(in_channels: int = 2, **changes) -> UNet:
    """A small network in eval mode in which no parameter is 0, so that every path shows in the output."""
    model = UNet(in_channels, **ARGUMENTS | changes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in))
    return model


def arguments(model: UNet, batch: int = 3, size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.in_channels, *[size] * model.rank)
    t = torch.linspace(0, 999, batch).long()
    return torch.randn(shape, generator=generator), t, torch.arange(batch) % 4 - 1
