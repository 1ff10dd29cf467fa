"""The networks of the chains: small ones, where what lies between their evaluations is worth measuring."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

import fastdiff as fd
from examples.action_unet import ActionUNet


class MLP(nn.Module):
    """A denoiser of tables: [B, features] and a time -> [B, features], through three hidden layers."""

    def __init__(self, features: int = 16, width: int = 256) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.arange(16) * (-math.log(10_000.0) / 16)))
        sizes = [features + 32, width, width, width]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, features))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        return self.layers(torch.cat((x, angle.sin(), angle.cos()), dim=1))


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """The MLP and the shape of a sample: a row of 16 numbers."""
    return _filled(MLP()), (16,)


def policy() -> tuple[nn.Module, tuple[int, ...]]:
    """A robot's policy as a U-Net over time: 16 actions of 7 joints."""
    return _filled(fd.UNet(7, rank=1, model_channels=64, channel_mult=(1, 2, 4), num_res_blocks=1)), (7, 16)


def unet() -> tuple[nn.Module, tuple[int, ...]]:
    """A U-Net of 1.1 million parameters for images of 16 by 16."""
    return _filled(fd.UNet(1, model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=1)), (1, 16, 16)


def digits() -> tuple[nn.Module, tuple[int, ...]]:
    """The embedded model and its sample's shape."""
    sampler = fd.Sampler.from_pretrained("digits")
    return sampler.model, sampler.shape


class Observed(nn.Module):
    """A policy at one observation: (plan [B, horizon, actions], t [B]) -> of the plan's shape."""

    def __init__(self, policy: nn.Module, obs: Tensor) -> None:
        super().__init__()
        self.policy = policy
        self.register_buffer("obs", obs)

    def forward(self, plan: Tensor, t: Tensor) -> Tensor:
        return self.policy(plan, t, self.obs.expand(len(plan), -1))


def action() -> tuple[nn.Module, tuple[int, ...]]:
    """A policy as others write it, Conv1d over 16 actions of 7 joints, at one observation."""
    policy, (plan, _, obs) = action_unet(1)
    return Observed(policy, obs).eval(), tuple(plan.shape[1:])


def cifar10() -> tuple[nn.Module, tuple[int, ...]]:
    """diffusers' network of 35.7 million parameters for images of 32 by 32, as Ho et al. 2020 trained it."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=256,
        norm_eps=1e-6,
    )
    return _filled(network), (3, 32, 32)


def action_unet(batch: int, widths: tuple[int, ...] = (64, 128, 256)) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A policy as others write it, Conv1d over [B, horizon, actions], and what it is called with."""
    example = torch.zeros(batch, 16, 7), torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 20)
    return _filled(ActionUNet(7, 20, widths)), example


def large_action_unet(batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The same at the width of the paper's."""
    return action_unet(batch, (256, 512, 1024))


def _filled(network: nn.Module) -> nn.Module:
    """The network with small random weights everywhere: a new U-Net's output is 0, whatever its input."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()
