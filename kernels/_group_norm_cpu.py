"""group_norm_silu and its gradient on the CPU: compiled loops where there are, else torch's operators."""

from __future__ import annotations

from ctypes import c_double, c_int64
from typing import TYPE_CHECKING

import torch

from . import cpu
from ._norm_tiles import steps

if TYPE_CHECKING:
    from .group_norm import Norm
    from .group_norm_backward import NormGrad


def group_norm_silu_torch(f: Norm) -> None:
    """Fill y, mean and rstd: the CPU's implementation, and that of devices without Triton.

    On one core of a Xeon the loop is ahead of torch's group_norm and SiLU from about half a million elements
    on (1.2 to 1.6x) and behind it below, where calls cost more than the arithmetic.
    """
    batch, channels, n = f.sizes
    if not f.x.numel():
        f.mean.zero_()
        f.rstd.zero_()
        return
    native = cpu.library() if f.x.device.type == "cpu" else None
    gain, offset = affine_of(f.weight, f.bias, f.scale, f.shift)
    if native is None:
        _forward_eager(f, gain, offset)
        return
    y = f.y if f.y.dtype == torch.float32 else torch.empty_like(f.y, dtype=torch.float32)
    tensors = (y, f.mean, f.rstd, v_of(f), gain, offset)
    native.fd_group_norm(
        *map(cpu.pointer, tensors), *map(c_int64, (*steps(gain, offset), batch, channels, n, f.groups)),
        c_double(f.eps), int(f.activation), int(f.last), torch.get_num_threads(),
    )  # fmt: skip
    if y is not f.y:
        f.y.copy_(y)


def _forward_eager(f: Norm, gain: torch.Tensor | None, offset: torch.Tensor | None) -> None:
    """torch's own operators; not its group_norm, whose variance cancels in channels_last."""
    v = v_of(f)
    channels = f.sizes[1]
    by_group = v.unflatten(2, (f.groups, -1)).transpose(1, 2) if f.last else v.unflatten(1, (f.groups, -1))
    var, mean = torch.var_mean(by_group, (2, 3), correction=0)
    f.mean.copy_(mean)
    f.rstd.copy_((var + f.eps).rsqrt())
    factor = by_channel(f.rstd, channels, f.last)
    h = v - by_channel(f.mean, channels, f.last)
    h.mul_(factor if gain is None else factor * by_channel(gain, channels, f.last))
    h = h if offset is None else h.add_(by_channel(offset, channels, f.last))
    f.y.copy_(torch.nn.functional.silu(h, inplace=True) if f.activation else h)


def group_norm_silu_backward_torch(f: NormGrad) -> None:
    """Fill grad_x and sums: the CPU's implementation, and that of devices without Triton."""
    batch, channels, n = f.sizes
    if not f.x.numel():
        f.sums.zero_()
        return
    native = cpu.library() if f.x.device.type == "cpu" else None
    gain, offset = affine_of(f.weight, f.bias, f.scale, f.shift)
    if native is None:
        _backward_eager(f, gain, offset)
        return
    grad_x = f.grad_x if f.grad_x.dtype == torch.float32 else torch.empty_like(f.grad_x, dtype=torch.float32)
    tensors = (grad_x, f.sums, f.grad.float(), f.mean, f.rstd, v_of(f), gain, offset)
    native.fd_group_norm_backward(
        *map(cpu.pointer, tensors), *map(c_int64, (*steps(gain, offset), batch, channels, n, f.groups)),
        int(f.activation), int(f.last), torch.get_num_threads(),
    )  # fmt: skip
    if grad_x is not f.grad_x:
        f.grad_x.copy_(grad_x)


def _backward_eager(f: NormGrad, gain: torch.Tensor | None, offset: torch.Tensor | None) -> None:
    """torch's own operators."""
    channels, positions = f.sizes[1], 1 if f.last else 2
    v = v_of(f)
    rstd = by_channel(f.rstd, channels, f.last)
    x_hat = (v - by_channel(f.mean, channels, f.last)).mul_(rstd)
    gain, offset = (None if a is None else by_channel(a, channels, f.last) for a in (gain, offset))
    grad = f.grad.float()
    if f.activation:
        h = x_hat if gain is None else x_hat * gain
        grad = torch.ops.aten.silu_backward(grad, h if offset is None else h + offset)
    torch.sum(grad, positions, out=f.sums[0])
    torch.sum(grad * x_hat, positions, out=f.sums[1])
    plain, along = (by_channel(means, channels, f.last) for means in group_means(f))
    grad = grad if gain is None else grad * gain
    f.grad_x.copy_((grad - plain).sub_(x_hat.mul_(along)).mul_(rstd))


def group_means(f: NormGrad) -> torch.Tensor:
    """[2, B, groups]: the means over a group of gain gh and gain gh x_hat, from the sums."""
    batch, channels, n = f.sizes
    weighted = f.sums
    for factor in (f.weight, f.scale):
        weighted = weighted if factor is None else weighted * factor.to(weighted.dtype)
    return weighted.view(2, batch, f.groups, -1).sum(3) / (channels // f.groups * n)


def v_of(f: Norm | NormGrad) -> torch.Tensor:
    """x + residual in float32."""
    return f.x.float() if f.residual is None else f.x.float() + f.residual.float()


def affine_of(
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`affine` in torch: gain and offset, [B or 1, C] float32, None for 1 and 0."""
    gain, offset = (None if a is None else a.float()[None] for a in (weight, bias))
    if scale is not None:
        gain = scale.float() if gain is None else gain * scale
        offset = offset if offset is None else offset * scale
    if shift is not None:
        offset = shift.float() if offset is None else offset + shift
    return gain, offset


def by_channel(vector: torch.Tensor, channels: int, last: bool) -> torch.Tensor:
    """[B, groups] or [B, C] values as they meet x."""
    return vector.repeat_interleave(channels // vector.shape[1], 1).unsqueeze(1 if last else 2)
