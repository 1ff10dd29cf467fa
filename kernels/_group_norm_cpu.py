"""group_norm_silu and its gradient on the CPU: compiled loops where there are, else torch's operators."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import cpu

if TYPE_CHECKING:
    from .group_norm import Norm
    from .group_norm_backward import NormGrad

_pack = struct.Struct("11P6qd3i").pack  # group_norm.cpp's `Norm`


def group_norm_silu_torch(f: Norm) -> None:
    """Fill y, mean and rstd: the CPU's implementation, and that of devices without Triton."""
    if not f.x.numel():
        f.mean.zero_()
        f.rstd.zero_()
        return
    native = cpu.library() if f.x.device.type == "cpu" else None
    if native is None:
        _forward_eager(f, *affine_of(f.weight, f.bias, f.scale, f.shift))
        return
    y = f.y if f.y.dtype == torch.float32 else torch.empty_like(f.y, dtype=torch.float32)
    tensors = (y, f.mean, f.rstd, v_of(f.x, f.residual), *float32_of(f.weight, f.bias, f.scale, f.shift))
    norm_native(native, tensors, f.sizes, f.groups, f.eps, f.activation, f.last)
    if y is not f.y:
        f.y.copy_(y)


def norm_native(
    native: Any, tensors: Sequence[torch.Tensor | None], sizes: tuple[int, int, int], groups: int, eps: float,
    activation: bool, last: bool, backward: Sequence[torch.Tensor | None] = (None, None, None),
) -> None:  # fmt: skip
    """The compiled loop on float32 operands.

    Args:
        tensors: y, mean, rstd, v, weight, bias, scale, shift as in `Norm`; samples of the last two may lie
            apart. y, mean and rstd may be None where nobody wants them.
        sizes: B, C, N.
        groups, eps, activation, last: as in `Norm`.
        backward: grad, grad_x and sums as in `NormGrad`, where it is the gradient's loop that runs.
    """
    addresses = [0 if a is None else a.data_ptr() for a in (*tensors, *backward)]
    steps = [0 if a is None or a.shape[0] == 1 else a.stride(0) for a in tensors[6:]]
    packed = _pack(*addresses, *steps, *sizes, groups, eps, activation, last, torch.get_num_threads())
    (native.fd_group_norm if backward[0] is None else native.fd_group_norm_backward)(packed)


def _forward_eager(f: Norm, gain: torch.Tensor | None, offset: torch.Tensor | None) -> None:
    """torch's own operators; not its group_norm, whose variance cancels in channels_last."""
    v = v_of(f.x, f.residual)
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
    if not f.x.numel():
        f.sums.zero_()
        return
    native = cpu.library() if f.x.device.type == "cpu" else None
    if native is None:
        _backward_eager(f, *affine_of(f.weight, f.bias, f.scale, f.shift))
        return
    grad_x = f.grad_x if f.grad_x.dtype == torch.float32 else torch.empty_like(f.grad_x, dtype=torch.float32)
    vectors = float32_of(f.weight, f.bias, f.scale, f.shift)
    tensors = (None, f.mean, f.rstd, v_of(f.x, f.residual), *vectors)
    backward = (f.grad.float(), grad_x, f.sums)
    norm_native(native, tensors, f.sizes, f.groups, f.eps, f.activation, f.last, backward)
    if grad_x is not f.grad_x:
        f.grad_x.copy_(grad_x)


def _backward_eager(f: NormGrad, gain: torch.Tensor | None, offset: torch.Tensor | None) -> None:
    """torch's own operators."""
    channels, positions = f.sizes[1], 1 if f.last else 2
    v = v_of(f.x, f.residual)
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


def v_of(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """x + residual in float32."""
    v = x if x.dtype == torch.float32 else x.float()
    return v if residual is None else v + residual.float()


def float32_of(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The channels' parameters in float32; one that is stays as it is."""
    return [a if a is None or a.dtype == torch.float32 else a.float() for a in vectors]


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
