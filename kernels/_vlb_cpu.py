"""`vlb_terms` without Triton: the loop of vlb.cpp, and torch; the constants of the formula in vlb.py."""

from __future__ import annotations

import math
from ctypes import CDLL, c_int64
from typing import TYPE_CHECKING

import torch

from . import cpu
from .exact import EXP_HI

if TYPE_CHECKING:
    from .vlb import Terms

# columns of a row of `coef`; the gaps are ln s^2 less log_var_min and log_var_max
X0_FROM_X, X0_FROM_OUT, CLIP_LO, CLIP_HI, MEAN_WEIGHT, GAP_AT_MIN, GAP_AT_MAX, WIDTH = *range(7), 8
HALF_BIN, EDGE, LEAST = 1 / 255, 0.999, 1e-12
HALF_BIN_SQUARED = HALF_BIN**2
SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * SLOPE
SIX_CUBIC = 6 * CUBIC
BITS = 1 / math.log(2)

_CHUNK = 2**16  # elements whose temporaries stay in a core's cache


def terms_native(native: CDLL, f: Terms) -> None:
    """The compiled loop, of float32; a network's half precision it meets in float32."""
    batch, n = f.x0.shape
    sums = torch.empty(batch, native.fd_blocks(c_int64(n)), dtype=torch.float64, device="cpu")
    wide = [
        a if a is None or a.dtype == torch.float32 else torch.empty_like(f.x0)
        for a in (f.grad_mean, f.grad_v)
    ]
    out = f.out.float()
    native.fd_vlb_terms(
        *map(cpu.pointer, (sums, *wide, f.x0, f.x_t, out, f.coef, f.t)),
        *map(c_int64, (batch, n, out.shape[1], f.coef.shape[0])), torch.get_num_threads(),
    )  # fmt: skip
    f.vlb.copy_(sums.sum(1) * (BITS / n))
    for written, own in zip((f.grad_mean, f.grad_v), wide, strict=True):
        if written is not None and written is not own:
            written.copy_(own)  # type: ignore[arg-type]


def terms_eager(f: Terms) -> None:
    """The same in torch, a few samples at a time; in float64 where x0 is."""
    batch, n = f.x0.shape
    step = max(1, _CHUNK // n)
    for start in range(0, batch, step):
        few = (a if a is None or a is f.coef else a[start : start + step] for a in f)
        _few_samples(type(f)._make(few))


def _few_samples(f: Terms) -> None:
    """`terms_eager` of samples whose temporaries fit the memory."""
    n, dtype = f.x0.shape[1], f.x0.dtype
    row, first = rows(f, dtype)
    prediction = f.out[:, :n].to(dtype)
    raw = row[X0_FROM_OUT] * prediction + row[X0_FROM_X] * f.x_t.where(row[X0_FROM_X] != 0, 0)
    error = f.x0 - raw.clamp(row[CLIP_LO], row[CLIP_HI])
    gap = row[GAP_AT_MIN]
    if f.out.shape[1] != n:
        share = (f.out[:, n:].to(dtype) + 1.0) * 0.5
        gap = share * row[GAP_AT_MAX] + (1.0 - share) * gap
    gap = gap.clamp(max=EXP_HI).expand_as(error)
    power, less = gap.exp(), gap.expm1()
    square = power * (row[MEAN_WEIGHT] * error).square()
    term, by_gap, by_x0 = 0.5 * (less - gap + square), 0.5 * (less + square), -(power * error)
    if first.any():
        at = first.squeeze(1)
        found = _discretised(f.x0[at], error[at], gap[at], row[MEAN_WEIGHT][at])
        for all_samples, these in zip((term, by_gap, by_x0), found, strict=True):
            all_samples[at] = these
    f.vlb.copy_(term.sum(1) * (BITS / n))
    if f.grad_mean is not None:
        passed = (raw >= row[CLIP_LO]) & (raw <= row[CLIP_HI])
        f.grad_mean.copy_(by_x0.where(passed, 0))  # also where it is NaN
    if f.grad_v is not None:
        f.grad_v.copy_(by_gap.div_(row[MEAN_WEIGHT].clamp(min=1.0)))


def factors(coef: torch.Tensor, t: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the terms over grad_mean and grad_v as `Terms` holds them, [B] each.

    Without them both have a size near 1, whatever the time and the image's size: float16 holds them.
    """
    row = coef[t.clamp(0, coef.shape[0] - 1)]
    weight, gap = row[:, MEAN_WEIGHT], row[:, GAP_AT_MAX] - row[:, GAP_AT_MIN]
    bits = BITS / max(n, 1)
    return row[:, X0_FROM_OUT] * weight.square() * bits, gap * weight.clamp(min=1.0) * (0.5 * bits)


def _discretised(
    x0: torch.Tensor, error: torch.Tensor, gap: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A term at t = 0 in nats, and its derivatives by gap and, over weight^2, by x0_hat."""
    root = (0.5 * gap).exp()
    k = weight * root
    a, b = k * (error + HALF_BIN), k * (error - HALF_BIN)
    aa, bb = CUBIC * a.square(), CUBIC * b.square()
    span = 2 * HALF_BIN * k
    bend = CUBIC * k.square() * (3.0 * error.square() + HALF_BIN_SQUARED)
    above, below = x0 > EDGE, x0 < -EDGE
    p, q, y = a * (SLOPE + aa), b * (SLOPE + bb), span * (SLOPE + bend)
    s_p, s_q = torch.sigmoid(-p).where(~above, 0.0), torch.sigmoid(q).where(~below, 0.0)
    bounded = above | below
    probability = torch.expm1(-y).neg().where(~bounded, 1.0)
    probability *= torch.sigmoid(p).where(~above, 1.0) * torch.sigmoid(-q).where(~below, 1.0)
    s_y = torch.expm1(y).reciprocal().where(~bounded, 0.0)
    rise_p, rise_q = SLOPE + 3.0 * aa, SLOPE + 3.0 * bb
    by_log_k = s_p * (a * rise_p) - s_q * (b * rise_q) + s_y * (span * (SLOPE + 3.0 * bend))
    by_error = (root / weight) * (s_p * rise_p - s_q * rise_q + s_y * (span * (SIX_CUBIC * (k * error))))
    least = probability < LEAST
    return (
        -probability.clamp(min=LEAST).log(),
        (-0.5 * by_log_k).masked_fill(least, 0.0),
        by_error.masked_fill(least, 0.0),
    )


def rows(f: Terms, dtype: torch.dtype) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Each sample's columns of `coef`, [B, 1], and whether it stands at t = 0."""
    level = f.t.clamp(0, f.coef.shape[0] - 1)[:, None]
    return f.coef.to(dtype)[level].unbind(2), level == 0
