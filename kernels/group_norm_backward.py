"""The gradient of group_norm_silu, from its operands and each group's mean and rstd.

    gh = gy silu'(h),   silu'(h) = sigmoid(h) (1 + h (1 - sigmoid(h)))
    dv = rstd (gain gh - <gain gh> - x_hat <gain gh x_hat>),   x_hat = (v - mean) rstd,   gain = weight scale
    sums[0]_bc = sum_n gh,   sums[1]_bc = sum_n gh x_hat,      <.>: mean over a group

The gradients of weight, bias, scale and shift follow from the sums.

A group that fits on chip is read once, else twice: the sums of every channel, then dv. Nothing is added
atomically.

Source: Wu and He 2018, eq. 1-4, differentiated; tests hold it against automatic differentiation in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import _norm_tiles as cut
from ._group_norm_cpu import group_means
from ._group_norm_cpu import group_norm_silu_backward_torch as group_norm_silu_backward_torch
from ._norm_tiles import across, affine, load_v, over_positions, start_of, tile_at
from ._triton import jit, tl

_ON_CHIP = 8192  # elements of the largest group of which one program holds x and the gradient


class NormGrad(NamedTuple):
    """The operands of group_norm_silu_backward; those of the same name are `Norm`'s.

    Attributes:
        grad_x: like x. Overwritten.
        sums: [2, B, C] float32. Overwritten.
        grad: like x, the gradient of y.
    """

    grad_x: torch.Tensor
    sums: torch.Tensor
    grad: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    groups: int
    eps: float
    activation: bool
    last: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, C, N."""
        return cut.sizes(self.x, self.last)


@jit
def _through_silu(grad, h, ACTIVATION: tl.constexpr):
    if ACTIVATION:
        sigmoid = 1.0 / (1.0 + tl.exp(-h))
        grad = grad * (sigmoid * (1.0 + h * (1.0 - sigmoid)))
    return grad


@jit
def _group_norm_silu_backward_kernel(
    grad_x_ptr, sums_ptr, grad_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr,
    shift_ptr, scale_step, shift_step, channels, n, sums_step, GROUPS: tl.constexpr, OWN: tl.constexpr,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of OWN channels per program."""
    pid = tl.program_id(0)
    b = pid // GROUPS
    first = (pid % GROUPS) * OWN
    offset, inside = tile_at(channels, n, OWN, n, LAST, DEPTH, WIDTH)
    at = start_of(b, channels, n, first, 0 * b, LAST) + offset
    c = tl.arange(0, DEPTH)
    gain, shift = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_step, shift_step, b, first + c, c < OWN
    )
    mean = tl.load(mean_ptr + pid)
    rstd = tl.load(rstd_ptr + pid)
    x_hat = (load_v(x_ptr, residual_ptr, at, inside) - mean) * rstd
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = _through_silu(grad, x_hat * across(gain, LAST) + across(shift, LAST), ACTIVATION)
    plain = over_positions(grad, LAST)
    along = over_positions(grad * x_hat, LAST)
    count = n * 1.0 * OWN
    plain_mean = tl.sum(gain * plain, 0) / count
    along_mean = tl.sum(gain * along, 0) / count
    grad_x = rstd * (across(gain, LAST) * grad - plain_mean - x_hat * along_mean)
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    channel = b.to(tl.int64) * channels + first + c
    tl.store(sums_ptr + channel, plain, mask=c < OWN)
    tl.store(sums_ptr + sums_step + channel, along, mask=c < OWN)


@jit
def _tile_kernel(
    grad_x_ptr, sums_ptr, means_ptr, grad_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr,
    scale_ptr, shift_ptr, scale_step, shift_step, channels, n, chunks, sums_step, means_step,
    GROUPS: tl.constexpr, OWN: tl.constexpr, ACTIVATION: tl.constexpr, STEPS: tl.constexpr,
    LAST: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS tiles of DEPTH channels: their sums into [2, B, C, chunks], or dv where `means` is given."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    blocks = tl.cdiv(channels, DEPTH)
    first = (pid // chunks % blocks) * DEPTH
    b = pid // chunks // blocks
    c = first + tl.arange(0, DEPTH)
    group = b * GROUPS + c // OWN
    mean = across(tl.load(mean_ptr + group, mask=c < channels, other=0.0), LAST)
    rstd = across(tl.load(rstd_ptr + group, mask=c < channels, other=0.0), LAST)
    gain, shift = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_step, shift_step, b, c, c < channels
    )
    gain = across(gain, LAST)
    shift = across(shift, LAST)
    plain = tl.zeros((DEPTH,), tl.float32)
    along = tl.zeros((DEPTH,), tl.float32)
    for step in range(STEPS):
        start = (chunk.to(tl.int64) * STEPS + step) * WIDTH
        offset, inside = tile_at(channels, n, channels - first, n - start, LAST, DEPTH, WIDTH)
        at = start_of(b, channels, n, first, start, LAST) + offset
        x_hat = (load_v(x_ptr, residual_ptr, at, inside) - mean) * rstd
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = _through_silu(grad, x_hat * gain + shift, ACTIVATION)
        if means_ptr is None:
            plain += over_positions(grad, LAST)
            along += over_positions(grad * x_hat, LAST)
        else:
            plain_mean = across(tl.load(means_ptr + group, mask=c < channels, other=0.0), LAST)
            along_mean = across(tl.load(means_ptr + means_step + group, mask=c < channels, other=0.0), LAST)
            grad_x = rstd * (gain * grad - plain_mean - x_hat * along_mean)
            tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if means_ptr is None:
        at = (b.to(tl.int64) * channels + c) * chunks + chunk
        tl.store(sums_ptr + at, plain, mask=c < channels)
        tl.store(sums_ptr + sums_step + at, along, mask=c < channels)


def group_norm_silu_backward_triton(f: NormGrad) -> None:
    """`group_norm_silu_backward_torch` on a GPU or in Triton's interpreter."""
    batch, channels, n = f.sizes
    own = channels // max(f.groups, 1)
    if not f.x.numel():
        f.sums.zero_()
        return
    read = (f.grad, f.mean, f.rstd, f.x, f.residual, f.weight, f.bias, f.scale, f.shift)
    sizes = (*cut.steps(f.scale, f.shift), channels, n)
    kind: dict[str, Any] = dict(GROUPS=f.groups, OWN=own, ACTIVATION=f.activation, LAST=f.last)
    if cut.fits(batch, f.groups, own, n, _ON_CHIP):
        shape = dict(DEPTH=cut.power_of_2(own), WIDTH=cut.power_of_2(n))
        block = shape["DEPTH"] * shape["WIDTH"]
        _group_norm_silu_backward_kernel[(batch * f.groups,)](
            f.grad_x, f.sums, *read, *sizes, batch * channels, **kind, **shape, BLOCK=block,
            num_warps=cut.warps(block),
        )  # fmt: skip
        return
    depth, width, steps = cut.tiles(channels, n, f.last)
    kind |= dict(DEPTH=depth, WIDTH=width, BLOCK=depth * width, num_warps=cut.warps(depth * width))
    blocks, chunks, widths = batch * -(-channels // depth), -(-n // (width * steps)), -(-n // width)
    parts = torch.empty(2, batch, channels, chunks, dtype=torch.float32, device=f.x.device)
    _tile_kernel[(blocks * chunks,)](
        None, parts, None, *read, *sizes, chunks, batch * channels * chunks, 0, STEPS=steps, **kind
    )
    torch.sum(parts, 3, out=f.sums)
    _tile_kernel[(blocks * widths,)](
        f.grad_x, None, group_means(f), *read, *sizes, widths, 0, batch * f.groups, STEPS=1, **kind
    )


def group_norm_silu_backward_reference(f: NormGrad) -> None:
    """The formula in float64, mean and rstd computed again; grad_x and sums may be float64."""
    batch, channels, n = f.sizes
    given = (f.x, f.grad) if f.residual is None else (f.x, f.grad, f.residual)
    x, grad, *residual = ((a.mT if f.last else a).double() for a in given)
    v = sum(residual, x).reshape(batch, f.groups, -1)
    rstd = (v.var(2, correction=0, keepdim=True) + f.eps).rsqrt()
    x_hat = ((v - v.mean(2, keepdim=True)) * rstd).view(batch, channels, n)
    one = torch.ones(1, channels, dtype=torch.float64, device=v.device)
    weight, scale = (one if a is None else a.double() for a in (f.weight, f.scale))
    bias, shift = (0 * one if a is None else a.double() for a in (f.bias, f.shift))
    h = x_hat * (weight * scale)[..., None] + (bias * scale + shift)[..., None]
    if f.activation:
        grad = grad * h.sigmoid() * (1 + h * (1 - h.sigmoid()))
    f.sums.copy_(torch.stack([grad.sum(2), (grad * x_hat).sum(2)]))
    weighted = (grad * (weight * scale)[..., None]).reshape(v.shape)
    by_group = x_hat.reshape(v.shape)
    along = (weighted * by_group).mean(2, keepdim=True)
    grad_x = (rstd * (weighted - weighted.mean(2, keepdim=True) - by_group * along)).view(batch, channels, n)
    f.grad_x.copy_(grad_x.mT if f.last else grad_x)
