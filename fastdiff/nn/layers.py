"""The layers of the U-Net. Ranks 1 and 2 share them: a signal [B, C, L] travels as an image [B, C, 1, L].

That is also the fast way on a CPU, where a Conv2d of height 1 in channels_last order takes 33 µs and a Conv1d
86 µs (256 channels, kernel 5, length 4, two cores).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.ops import group_norm_silu


def num_groups(channels: int) -> int:
    """The number of groups of a GroupNorm: the largest divisor of `channels` with 4 or more in a group.

    At most 32 (Wu & He 2018); fewer than 8 channels, or a prime number of them, are one group. With fewer
    than 4 channels in a group the normalisation would remove what a channel says.
    """
    return next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)


def conv(in_channels: int, out_channels: int, kernel: int, rank: int, stride: int = 1) -> nn.Conv2d:
    """A convolution over the last `rank` of two spatial axes that keeps a size n (stride 2: ceil(n / 2))."""
    window, step, pad = (1, kernel), (1, stride), (0, kernel // 2)
    if rank == 2:
        window, step, pad = (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2)
    return nn.Conv2d(in_channels, out_channels, window, step, pad)


def zeroed(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """The module with its parameters set to 0, so that the branch it ends begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def silu_of(result: Tensor) -> Tensor:
    """silu of what nothing else reads, in its memory; with a gradient autograd would copy it first."""
    return F.silu(result, inplace=not result.requires_grad)


class NormSiLU(nn.GroupNorm):
    """silu(norm(x)).

    Where `fused` is set and a CPU runs it eagerly, as one operator, with sums of its own order. A compiler
    fuses the plain form with what is around it.
    """

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        """Args: x [B, C, H, W]."""
        if self.fused and _is_eager_on_cpu(x):
            return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps)
        return silu_of(super().forward(x))


class ModulatedNormSiLU(nn.Module):
    """silu(scale * norm(x) + shift), where norm is a GroupNorm without parameters of its own.

    Source: Dhariwal & Nichol 2021, section 3 (adaptive group normalisation).
    """

    fused = False  # as in NormSiLU

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Args: x [B, C, H, W]; scale, shift [B, C], or [1, C] for all samples alike."""
        if self.fused and _is_eager_on_cpu(x):
            return group_norm_silu(x, self.groups, scale=scale, shift=shift)
        batch, channels = x.shape[:2]
        if scale.shape[0] == 1:
            return silu_of(F.group_norm(x, self.groups, scale.flatten(), shift.flatten()))
        if batch > 0 and x.is_contiguous() and not torch.compiler.is_compiling():
            # The batch laid out as channels makes the samples' parameters those of one call: a pass less.
            # A compiler fuses the plain form, and could not keep the batch size dynamic in this one.
            flat = x.view(1, batch * channels, *x.shape[2:])
            y = F.group_norm(flat, batch * self.groups, scale.reshape(-1), shift.reshape(-1))
            return silu_of(y).view_as(x)
        y = torch.addcmul(shift[:, :, None, None], F.group_norm(x, self.groups), scale[:, :, None, None])
        return silu_of(y)


def _is_eager_on_cpu(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.is_cpu


class ResidualBlock(nn.Module):
    """x -> skip(x) + conv2(dropout(silu(scale * norm(conv1(silu(norm(x)))) + shift))); conv2 begins at 0."""

    def __init__(self, in_channels: int, out_channels: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.norm = NormSiLU(num_groups(in_channels), in_channels)
        self.modulated = ModulatedNormSiLU(num_groups(out_channels))
        self.conv1 = conv(in_channels, out_channels, 3, rank)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(conv(out_channels, out_channels, 3, rank))
        self.skip = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1, rank)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Args: x [B, C, H, W]; modulation [B or 1, 2 * out_channels], scale then shift."""
        scale, shift = modulation.chunk(2, dim=1)
        h = self.conv1(self.norm(x))
        h = self.dropout(self.modulated(h, scale, shift))
        # Neither convolution keeps its result for the backward pass, so the sum needs no memory of its own.
        return self.conv2(h).add_(self.skip(x))


class SelfAttention(nn.Module):
    """x -> x + project(attention(norm(x))) over all positions, in heads of `head_channels` channels.

    Source: Vaswani et al. 2017, section 3.2; in diffusion U-Nets Ho et al. 2020, appendix B.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.GroupNorm(num_groups(channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Args: x [B, C, H, W]."""
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height * width, channels)
        return x + self.project(y).transpose(1, 2).view(batch, channels, height, width)


class Block(nn.Module):
    """A residual block, and self-attention after it where `head_channels` is not 0."""

    def __init__(
        self, in_channels: int, out_channels: int, rank: int, dropout: float, head_channels: int
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, rank, dropout)
        self.attention = SelfAttention(out_channels, head_channels) if head_channels else None

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Args: x [B, C, H, W]; modulation [B or 1, 2 * out_channels]."""
        x = self.residual(x, modulation)
        return x if self.attention is None else self.attention(x)
