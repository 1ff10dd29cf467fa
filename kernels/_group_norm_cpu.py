"""group_norm_silu and its gradient on the CPU: compiled loops where there are, else torch's operators."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch

from . import cpu

if TYPE_CHECKING:
    from .group_norm import Norm
    from .group_norm_backward import NormGrad

_pack = struct.Struct("4P" + 4 * "P2q" + "3P4qd4i").pack  # loops.h's `Norm`


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
    v = _elements(f, f.y)
    y = f.y if f.y.dtype == v.dtype else torch.empty_like(f.y, dtype=v.dtype)
    _run(native.fd_group_norm, f, v, y=y)
    if y is not f.y:
        f.y.copy_(y)


def _run(
    loop: Any, f: Norm | NormGrad, v: torch.Tensor, y: torch.Tensor | None = None,
    grad: torch.Tensor | None = None, grad_x: torch.Tensor | None = None, sums: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """A compiled loop on f's operands, with v, y, grad and grad_x of one dtype that it reads."""
    vectors = [a if a is None else _readable(a) for a in (f.weight, f.bias, f.scale, f.shift)]
    before, behind = ([_address(a) for a in each] for each in ((y, f.mean, f.rstd, v), (grad, grad_x, sums)))
    packed_vectors = [number for a in vectors for number in _vector(a)]
    sizes = (*f.sizes, f.groups, f.eps, f.activation, f.last, torch.get_num_threads())
    loop(_pack(*before, *packed_vectors, *behind, *sizes, v.dtype == torch.bfloat16))


def _address(a: torch.Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def _vector(a: torch.Tensor | None) -> tuple[int, int, bool]:
    """loops.h's `Vector`."""
    if a is None:
        return 0, 0, False
    return a.data_ptr(), a.stride(0) if a.dim() == 2 and a.shape[0] > 1 else 0, a.dtype == torch.bfloat16


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
    v = _elements(f, f.grad)
    grad_x = f.grad_x if f.grad_x.dtype == v.dtype else torch.empty_like(f.grad_x, dtype=v.dtype)
    _run(native.fd_group_norm_backward, f, v, grad=f.grad.to(v.dtype), grad_x=grad_x, sums=f.sums)
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


def _elements(f: Norm | NormGrad, other: torch.Tensor) -> torch.Tensor:
    """x + residual as the compiled loops read it, which have y or its gradient in the same dtype."""
    is_alike = f.residual is None and other.dtype == f.x.dtype
    return _readable(f.x) if is_alike else v_of(f.x, f.residual)


def _readable(a: torch.Tensor) -> torch.Tensor:
    """What the compiled loops do not read, float16, in float32; what they do stays as it is."""
    return a if a.dtype in (torch.float32, torch.bfloat16) else a.float()


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
