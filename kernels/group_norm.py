"""GroupNorm, the modulation behind it and SiLU, with the sum before it, as one operator.

    h = ((v - mean_g) rstd_g weight_c + bias_c) scale_bc + shift_bc,   y = h sigmoid(h),   v = x + residual
    mean_g, var_g over the channels of a group and all positions,      rstd_g = 1 / sqrt(var_g + eps)

A group that fits on chip is read once. A larger one, or one of few, is read twice by programs of a tile each:
the moments of every channel about its own mean (Chan et al. 1983), those of a group from them, then y.
Nothing is added atomically, so results repeat.

Source: Wu and He 2018, eq. 1-4; Dhariwal and Nichol 2021, section 3 (scale and shift).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import _norm_tiles as cut
from ._group_norm_cpu import group_norm_silu_torch as group_norm_silu_torch
from ._norm_tiles import across, affine, load_v, over_positions, start_of, tile_at
from ._triton import jit, tl

_ON_CHIP = 16384  # elements of the largest group that one program holds


class Norm(NamedTuple):
    """The operands of group_norm_silu, B samples of C channels at N positions.

    Attributes:
        y: like x. Overwritten.
        mean, rstd: [B, groups] float32. Overwritten.
        x: [B, C, N], or [B, N, C] where `last`; float32, bfloat16 or float16, dense.
        residual: like x, or None for 0.
        weight, bias: [C] of any floating dtype, dense, or None for 1 and 0.
        scale, shift: [B, C] or [1, C] of any floating dtype, dense, or None for 1 and 0.
        groups: divides C.
        eps: added to the variance.
        activation: whether y = silu(h), or h.
        last: whether channels come last in memory.
    """

    y: torch.Tensor
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
def _silu(h, ACTIVATION: tl.constexpr):
    if ACTIVATION:
        h = h / (1.0 + tl.exp(-h))
    return h


@jit
def _group_norm_silu_kernel(
    y_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_step,
    shift_step, channels, n, GROUPS: tl.constexpr, OWN: tl.constexpr, EPS: tl.constexpr,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One group of OWN channels per program."""
    pid = tl.program_id(0)
    b = pid // GROUPS
    first = (pid % GROUPS) * OWN
    offset, inside = tile_at(channels, n, OWN, n, LAST, DEPTH, WIDTH)
    at = start_of(b, channels, n, first, 0 * b, LAST) + offset
    v = load_v(x_ptr, residual_ptr, at, inside)
    count = n * 1.0 * OWN
    mean = tl.sum(over_positions(v, LAST), 0) / count
    centred = tl.where(inside, v - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(over_positions(centred * centred, LAST), 0) / count + EPS)
    c = tl.arange(0, DEPTH)
    gain, shift = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_step, shift_step, b, first + c, c < OWN
    )
    h = centred * rstd * across(gain, LAST) + across(shift, LAST)
    tl.store(y_ptr + at, _silu(h, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, rstd)


@jit
def _moments_kernel(
    moment_ptr, x_ptr, residual_ptr, channels, n, chunks, STEPS: tl.constexpr, LAST: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares about it of DEPTH channels over STEPS tiles, into [B, C, chunks, 2]."""
    pid = tl.program_id(0)
    chunk = pid % chunks
    blocks = tl.cdiv(channels, DEPTH)
    first = (pid // chunks % blocks) * DEPTH
    b = pid // chunks // blocks
    mean = tl.zeros((DEPTH,), tl.float32)
    square = tl.zeros((DEPTH,), tl.float32)
    count = 0.0
    for step in range(STEPS):
        start = (chunk.to(tl.int64) * STEPS + step) * WIDTH
        offset, inside = tile_at(channels, n, channels - first, n - start, LAST, DEPTH, WIDTH)
        v = load_v(x_ptr, residual_ptr, start_of(b, channels, n, first, start, LAST) + offset, inside)
        taken = tl.minimum(tl.maximum(n - start, 0), WIDTH).to(tl.float32)
        here = over_positions(v, LAST) / tl.maximum(taken, 1.0)
        centred = tl.where(inside, v - across(here, LAST), 0.0)
        delta = here - mean
        share = taken / tl.maximum(count + taken, 1.0)
        square += over_positions(centred * centred, LAST) + delta * delta * (count * share)
        mean += delta * share
        count += taken
    c = tl.arange(0, DEPTH)
    at = ((b.to(tl.int64) * channels + first + c) * chunks + chunk) * 2
    tl.store(moment_ptr + at, mean, mask=c < channels - first)
    tl.store(moment_ptr + at + 1, square, mask=c < channels - first)


@jit
def _combine_kernel(
    mean_ptr, rstd_ptr, moment_ptr, n, chunks, OWN: tl.constexpr, LENGTH: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A group's mean and rstd from its channels' moments, of LENGTH positions each."""
    pid = tl.program_id(0)
    moment_ptr += pid.to(tl.int64) * OWN * chunks * 2
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, OWN * chunks, BLOCK):
        at = start + i
        inside = at < OWN * chunks
        taken = tl.minimum(n - (at % chunks).to(tl.int64) * LENGTH, LENGTH).to(tl.float32)
        total += taken * tl.load(moment_ptr + 2 * at, mask=inside, other=0.0)
    count = n * 1.0 * OWN
    mean = tl.sum(total, 0) / count
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, OWN * chunks, BLOCK):
        at = start + i
        inside = at < OWN * chunks
        taken = tl.minimum(n - (at % chunks).to(tl.int64) * LENGTH, LENGTH).to(tl.float32)
        delta = tl.load(moment_ptr + 2 * at, mask=inside, other=0.0) - mean
        within = tl.load(moment_ptr + 2 * at + 1, mask=inside, other=0.0)
        square += tl.where(inside, within + taken * delta * delta, 0.0)
    tl.store(mean_ptr + pid, mean)
    tl.store(rstd_ptr + pid, tl.rsqrt(tl.sum(square, 0) / count + EPS))


@jit
def _normalise_kernel(
    y_ptr, mean_ptr, rstd_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_step,
    shift_step, channels, n, GROUPS: tl.constexpr, OWN: tl.constexpr, ACTIVATION: tl.constexpr,
    LAST: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of one tile from the moments of its channels' groups."""
    pid = tl.program_id(0)
    widths = tl.cdiv(n, WIDTH)
    blocks = tl.cdiv(channels, DEPTH)
    start = (pid % widths).to(tl.int64) * WIDTH
    first = (pid // widths % blocks) * DEPTH
    b = pid // widths // blocks
    offset, inside = tile_at(channels, n, channels - first, n - start, LAST, DEPTH, WIDTH)
    at = start_of(b, channels, n, first, start, LAST) + offset
    c = first + tl.arange(0, DEPTH)
    group = b * GROUPS + c // OWN
    mean = tl.load(mean_ptr + group, mask=c < channels, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < channels, other=0.0)
    gain, shift = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_step, shift_step, b, c, c < channels
    )
    v = load_v(x_ptr, residual_ptr, at, inside)
    h = (v - across(mean, LAST)) * across(rstd, LAST) * across(gain, LAST) + across(shift, LAST)
    tl.store(y_ptr + at, _silu(h, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


def group_norm_silu_triton(f: Norm) -> None:
    """`group_norm_silu_torch` on a GPU or in Triton's interpreter."""
    batch, channels, n = f.sizes
    own = channels // max(f.groups, 1)
    if not f.x.numel():
        f.mean.zero_()
        f.rstd.zero_()
        return
    scaling = (f.weight, f.bias, f.scale, f.shift, *cut.steps(f.scale, f.shift), channels, n)
    kind: dict[str, Any] = dict(GROUPS=f.groups, OWN=own, ACTIVATION=f.activation, LAST=f.last)
    written = (f.y, f.mean, f.rstd, f.x, f.residual)
    if cut.fits(batch, f.groups, own, n, _ON_CHIP):
        shape = dict(DEPTH=cut.power_of_2(own), WIDTH=cut.power_of_2(n))
        block = shape["DEPTH"] * shape["WIDTH"]
        _group_norm_silu_kernel[(batch * f.groups,)](
            *written, *scaling, EPS=f.eps, **kind, **shape, BLOCK=block, num_warps=cut.warps(block)
        )
        return
    depth, width, steps = cut.tiles(channels, n, f.last)
    chunks, blocks = -(-n // (width * steps)), batch * -(-channels // depth)
    shape = dict(
        LAST=f.last, DEPTH=depth, WIDTH=width, BLOCK=depth * width, num_warps=cut.warps(depth * width)
    )
    moments = torch.empty(batch, channels, chunks, 2, dtype=torch.float32, device=f.x.device)
    _moments_kernel[(blocks * chunks,)](moments, f.x, f.residual, channels, n, chunks, STEPS=steps, **shape)
    block = min(1024, cut.power_of_2(own * chunks))
    _combine_kernel[(batch * f.groups,)](
        f.mean, f.rstd, moments, n, chunks, OWN=own, LENGTH=width * steps, EPS=f.eps, BLOCK=block,
        num_warps=cut.warps(block),
    )  # fmt: skip
    _normalise_kernel[(blocks * -(-n // width),)](*written, *scaling, **(kind | shape))


def group_norm_silu_reference(f: Norm) -> None:
    """The formula in float64; y, mean and rstd may be float64."""
    batch, channels, n = f.sizes
    v = f.x.double() if f.residual is None else f.x.double() + f.residual.double()
    by_group = (v.mT if f.last else v).reshape(batch, f.groups, -1)
    mean = by_group.mean(2, keepdim=True)
    rstd = ((by_group - mean).square().mean(2, keepdim=True) + f.eps).rsqrt()
    h = ((by_group - mean) * rstd).reshape(batch, channels, n)
    for factor, term in ((f.weight, f.bias), (f.scale, f.shift)):
        h = h if factor is None else h * factor.double()[..., None]
        h = h if term is None else h + term.double()[..., None]
    y = h * h.sigmoid() if f.activation else h
    f.y.copy_(y.mT if f.last else y)
    f.mean.copy_(mean[..., 0])
    f.rstd.copy_(rstd[..., 0])
